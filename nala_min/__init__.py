"""Norm-aware linear attention, made to be read: see model.py. Exported are its functions and
models, which here check their arguments."""

from nala_min import relatives  # noqa: F401, registers them
from nala_min.arguments import LMConfig, NaLaLM, NaLaViT, ViTConfig, public
from nala_min.model import ATTENTIONS

attention_weights = public("attention_weights")
cosine_map = public("cosine_map")
decompose = public("decompose")
entropy = public("entropy")
key_features = public("key_features")
key_magnitude = public("key_magnitude")
linear_attention = public("linear_attention")
nala_attention = public("nala_attention")
query_features = public("query_features")
query_magnitude = public("query_magnitude")
query_power = public("query_power")
sign_split = public("sign_split")
softmax_attention = public("softmax_attention")

__all__ = [
    "ATTENTIONS",
    "LMConfig",
    "NaLaLM",
    "NaLaViT",
    "ViTConfig",
    "attention_weights",
    "cosine_map",
    "decompose",
    "entropy",
    "key_features",
    "key_magnitude",
    "linear_attention",
    "nala_attention",
    "query_features",
    "query_magnitude",
    "query_power",
    "sign_split",
    "softmax_attention",
]
