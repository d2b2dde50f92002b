"""Norm-aware linear attention, made to be read.

The method:
    model.py        the whole method and both models: start here
    fast.py         the same attention for any features, faster; checks itself against model.py
    arguments.py    argument checks for everything exported below
    relatives.py    related attentions, and attentions from your own file, for --attention
Training:
    data.py         text and images: find, download, verify, batch
    synthetic.py    stand-ins for them, if there is no network
    train.py        settings, recipe, optimisers, the loop
    checkpoint.py   checkpoints: save, resume and stop a run without loss
    distributed.py  several processes: train one model together, or share one sequence
    flags.py        command-line flags from a dataclass, one-line errors
Measuring:
    measure.py      entropy, memory, norms and powers of a trained model, attention maps
    plots.py        every picture, in one style
    runcard.py      run cards: everything needed to repeat a result
    lab/bench.py    speed and memory, compared with the fused softmax
    lab/compare.py  fair comparisons over several seeds; lab/studies.py: what is compared
    lab/premise.py  entropy against norms, in models that lab/compare.py trained
    lab/gpu.py      all GPU measurements in one command
Teaching:
    course/         code that the lessons share, and the checkers of the exercises
"""

from nala_min import relatives  # noqa: F401, registers the attentions
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
