"""What people get wrong: each call raises ValueError or TypeError, in one line that names the
argument, before any work."""

import math
import re

import pytest
import torch

import nala_min
from nala_min import Config, NaLaLM, NaLaViT

B, H, N, D, M = 2, 3, 6, 4, 5
q, k = torch.randn(2, B, H, N, D)
v, mask = torch.randn(B, H, N, M), torch.ones(B, N, dtype=torch.bool)
fewer = {"k": k[:, :, :4], "v": v[:, :, :4], "causal": True}
SHARED = [  # for every attention: the argument that the message names, and the arguments
    ("q", {"q": q[0]}),
    ("q", {"q": q.long()}),
    ("q", {"q": [1.0, 2.0]}),
    ("k", {"k": k[:1]}),
    ("k", {"k": k[:, :1]}),
    ("k", {"k": k[..., :3]}),
    ("k", {"k": k.double()}),
    ("k", {"k": k.to("meta")}),
    ("v", {"v": v[:, :, :4]}),
    ("v", {"v": v.double()}),
    ("v", {"v": v.to("meta")}),
    ("k", fewer),
    ("key_mask", {"key_mask": mask.float()}),  # an additive mask
    ("key_mask", {"key_mask": mask[:, None]}),
    ("key_mask", {"key_mask": mask[:1]}),
    ("key_mask", {"key_mask": [True] * N}),
    ("key_mask", {"key_mask": mask.to("meta")}),
    ("causal", {"causal": mask}),
    ("is_causal", {"is_causal": True}),
]
state = torch.zeros(B, H, 2 * D, M + 1)
WRONG_STATES = [state[:1], state[:, :1], state[:, :, :D], state[..., :M], state.double(), (k, v), 3]
LINEAR = [
    *(("state", {"causal": True, "state": x}) for x in [*WRONG_STATES, state.to("meta")]),
    ("state", {"state": state[:1]}),
    ("mode", {"mode": "banana"}),
    ("mode", {"mode": "recurrent"}),  # not causal
    ("chunk_size", {"causal": True, "chunk_size": 0}),
    ("chunk_size", {"causal": True, "chunk_size": -1, "mode": "chunked"}),
]
FEATURES = [
    ("feature_map", {"feature_map": "sofmax"}),
    ("feature_map", {"feature_map": "softmax"}),
    *((name, {name: x}) for name in ("lam", "alpha") for x in (0, -1.0, math.nan, math.inf)),
    ("norm_scale", {"norm_scale": 1.0}),
]
SOFTMAX = [
    ("state", {"state": (k[:1], v[:1])}),
    ("state", {"state": (k, v[:, :, :3])}),
    ("state", {"state": (k.double(), v)}),
    ("state", {"state": state}),
    ("key_mask", {"state": (k, v), "key_mask": mask}),
    ("mode", {"mode": "chunked"}),
]
WEIGHTS = [("attention", {"attention": x}) for x in ("sofmax", 3, None)] + [
    ("lam", {"attention": "softmax", "lam": 3.0}),
    ("k", {"k": k[0]}),
]


CONFIG = [
    *(("num_layers", {"num_layers": x}) for x in (0, -1, 1.5, "2", None)),
    ("num_heads", {"num_heads": 0}),
    ("dim", {"dim": 128, "num_heads": 5}),
    ("dim", {"dim": -8, "num_heads": 4}),
    ("conv_size", {"conv_size": 0}),
    *(("dropout", {"dropout": x}) for x in (-0.1, 1.0, math.nan)),
    *(("attention", {"attention": x}) for x in ("fast", ("nala",), ("nala", "fast") * 2, [])),
    ("vocab_size", {"vocab_size": 0}),
    ("num_classes", {"num_classes": -1}),
    ("patch_size", {"patch_size": 0}),
    ("rope", {"rope": "numerator"}),
]
IMAGE_CONFIG = [("conv_size", {"conv_size": 4})] + [
    ("patch_size", {"patch_size": x}) for x in (3, 12)
]
TOKENS = [
    ("tokens", {"tokens": torch.zeros(N, dtype=torch.long)}),
    ("tokens", {"tokens": torch.zeros(B, N)}),
]
GENERATE = [
    *(("temperature", {"temperature": x}) for x in (-1.0, math.nan, math.inf)),
    *(("top_k", {"top_k": x}) for x in (0, -1)),
    ("num_tokens", {"num_tokens": -1}),
]
IMAGES = [
    ("images", {"images": torch.randn(3, 8, 8)}),
    ("images", {"images": torch.randn(B, 8, 8, 3)}),
    ("images", {"images": torch.zeros(B, 3, 8, 8, dtype=torch.uint8)}),
]


def linear_attention(q, k, v, **options):
    """With features of our own, which fast.py does not know."""
    features = [lambda x: torch.cat([x, -x], dim=-1).relu()] * 2
    return nala_min.linear_attention(q, k, v, *features, **options)


lm = NaLaLM(Config(vocab_size=7, num_layers=2, num_heads=2, dim=8))
vit = NaLaViT(Config(num_layers=1, num_heads=2, dim=8))
tokens = torch.zeros(B, N, dtype=torch.long)
blocks = lm(tokens)[1]
QKV, PROMPT = {"q": q, "k": k, "v": v}, {"tokens": tokens, "num_tokens": 2}
CASES = [  # function, correct arguments, and wrong ones
    (nala_min.nala_attention, QKV, SHARED + LINEAR + FEATURES + [("tau", {"tau": -1.0})]),
    (linear_attention, QKV, SHARED + LINEAR),
    (nala_min.softmax_attention, QKV, SHARED + SOFTMAX),
    (nala_min.attention_weights, {"q": q, "k": k}, WEIGHTS + FEATURES),
    (nala_min.query_features, {"q": q}, FEATURES),
    (nala_min.key_features, {"k": k}, FEATURES),
    (Config, {}, CONFIG),
    (lambda **options: NaLaViT(Config(**options)), {"dim": 8, "num_layers": 1}, IMAGE_CONFIG),
    (lm, {"tokens": tokens}, TOKENS + [("state", {"state": x}) for x in (blocks[:1], [])]),
    (lm, {"tokens": tokens[:1]}, [("state", {"state": blocks})]),
    (lm.generate, PROMPT, TOKENS + GENERATE),
    (vit, {"images": torch.randn(B, 3, 8, 8)}, IMAGES),
]


@pytest.mark.parametrize(
    ("function", "correct", "name", "wrong"),
    [(function, correct, *x) for function, correct, cases in CASES for x in cases],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_wrong_argument_is_named(function, correct, name, wrong):
    with pytest.raises((ValueError, TypeError)) as error:
        function(**correct | wrong)
    message = str(error.value)
    assert re.search(rf"\b{name}\b", message) and "\n" not in message, message


def test_correct_arguments_are_accepted():
    """Otherwise the cases above could fail for another reason."""
    for function, correct, _ in CASES:
        if "state" not in correct:
            function(**correct)
    for attention in (nala_min.nala_attention, linear_attention):
        attention(q, k, v, causal=True, key_mask=mask, state=state, chunk_size=1)
        attention(q, k[:, :, :4], v[:, :, :4], key_mask=mask[:, :4], state=state)
    nala_min.softmax_attention(q, k, v, causal=True, state=(k, v))
    nala_min.nala_attention(q, k, v, tau=0, lam=torch.ones(H, 1, 1))
    lm(tokens, blocks)
    lm.generate(tokens, 0)
    Config(num_layers=len(nala_min.ATTENTIONS), attention=list(nala_min.ATTENTIONS))


def test_a_config_has_known_defaults_and_no_order():
    """A model with swapped sizes would train, but be wrong."""
    assert vars(Config()) == {
        **{"num_layers": 4, "num_heads": 4, "dim": 128, "conv_size": None, "dropout": 0.0},
        **{"attention": "nala", "vocab_size": 256, "num_classes": 10, "patch_size": 4},
    }
    with pytest.raises(TypeError):
        Config(4)
    with pytest.raises(AttributeError):
        Config().dim = 5
