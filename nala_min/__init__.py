"""Norm-aware linear attention, made to be read: see model.py."""

from nala_min.model import (
    ATTENTIONS,
    LMConfig,
    NaLaLM,
    attention_weights,
    cosine_map,
    decompose,
    entropy,
    key_features,
    key_magnitude,
    nala_attention,
    query_features,
    query_magnitude,
    query_power,
    sign_split,
    softmax_attention,
)

__all__ = [
    "ATTENTIONS",
    "LMConfig",
    "NaLaLM",
    "attention_weights",
    "cosine_map",
    "decompose",
    "entropy",
    "key_features",
    "key_magnitude",
    "nala_attention",
    "query_features",
    "query_magnitude",
    "query_power",
    "sign_split",
    "softmax_attention",
]
