"""Norm-aware linear attention, made to be read.

The method:
    model.py        the whole method and both models: start here
    fast.py         the same attention in less time and memory, for the features of the paper
    relatives.py    related attentions, and attentions from your own file, for --attention
Training:
    data.py         text and images: find, download, verify, batch
    synthetic.py    stand-ins for them, if there is no network
    train.py        settings, recipe, optimisers, checkpoints, the loop
    distributed.py  several processes that train one model
    flags.py        command-line flags from a dataclass, one-line errors
Measuring:
    measure.py      entropy, memory, norms and powers of a trained model, attention maps
    plots.py        every picture, in one style
    runcard.py      run cards: everything needed to repeat a result
    lab/            speed, and fair comparisons over several seeds
Teaching:
    course/         code that the lessons share, and the checkers of the exercises
"""

from nala_min import relatives  # registers the attentions
from nala_min.model import (
    ATTENTIONS, Config, NaLaLM, NaLaViT, attention_weights, cosine_map, decompose, entropy,
    key_features, key_magnitude, linear_attention, nala_attention, query_features,
    query_magnitude, query_power, sign_split, softmax_attention,
)  # fmt: skip
