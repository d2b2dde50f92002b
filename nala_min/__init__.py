"""Norm-aware linear attention, made to be read.

The method:
    model.py        all of it and both models, top to bottom: start here
    fast.py         the same attention for any features, faster; proves itself against model.py
    arguments.py    what is exported below, with wrong arguments refused by name
    relatives.py    related attentions, and what a file of yours defines: names for --attention
Training:
    data.py         text and images: find, download, verify, batch
    synthetic.py    what replaces them without a network
    train.py        settings, recipe, optimisers, the loop
    checkpoint.py   checkpoints: a run is saved, resumed and stopped without loss
    distributed.py  several processes: one model trained by all, one sequence over all
    flags.py        flags from a dataclass, errors in one line
Measuring:
    measure.py      entropy, memory, norms and powers of a trained model, attention maps
    plots.py        every picture, in one style
    runcard.py      run cards: what made a result
    lab/bench.py    speed and memory beside the fused softmax
    lab/compare.py  fair comparisons over several seeds; lab/studies.py: what is compared
    lab/premise.py  entropy against norms, in the models that compare has trained
    lab/gpu.py      everything that is to be measured on a GPU, by one command
Teaching:
    course/         what the lessons share, and the checkers of the exercises
"""

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
