"""What people get wrong: each call raises ValueError, in one line that names the
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
state = torch.zeros(B, H, 2 * D, M + 1)
tokens, images = torch.zeros(B, N, dtype=torch.long), torch.randn(B, 3, 8, 8)
lm = NaLaLM(Config(vocab_size=7, num_layers=2, num_heads=2, dim=8))
vit = NaLaViT(Config(num_layers=1, num_heads=2, dim=8))
blocks = lm(tokens)[1]


# The argument that the message names, and its wrong values. A dict gives more arguments.
FEWER = {"k": k[:, :, :4], "v": v[:, :, :4], "causal": True}
SHARED = {
    "q": [q[0], q.long(), [1.0, 2.0]],
    "k": [k[:1], k[:, :1], k[..., :3], k.double(), k.to("meta"), k[0], FEWER],
    "v": [v[:, :, :4], v.double(), v.to("meta")],
    "key_mask": [mask.float(), mask[:, None], mask[:1], [True] * N, mask.to("meta")],
    "causal": [mask],
}
STATES = [state[:1], state[:, :1], state[:, :, :D], state[..., :M], state.double(), (k, v), 3]
LINEAR = SHARED | {
    "state": [*STATES, state.to("meta"), *({"state": x, "mode": "parallel"} for x in STATES)],
    "mode": ["banana", "recurrent"],  # recurrent is causal
    "chunk_size": [{"causal": True, "chunk_size": x} for x in (0, -1, 2.5, "a")],
}
BAD = [0, -1.0, math.nan, math.inf]
FEATURES = {"feature_map": ["sofmax", "softmax"], "lam": BAD, "alpha": BAD}
SOFTMAX = SHARED | {
    "state": [(k[:1], v[:1]), (k, v[:, :, :3]), (k.double(), v), state],
    "key_mask": [*SHARED["key_mask"], {"state": (k, v), "key_mask": mask}],
}
WEIGHTS = FEATURES | {"attention": ["sofmax", 3, None]}
CONFIG = {
    "num_layers": [0, -1, 1.5, "2", None, True],
    "num_heads": [0],
    "dim": [-8, {"dim": 128, "num_heads": 5}],
    "conv_size": [0],
    "dropout": [-0.1, 1.0, math.nan],
    "attention": ["fast", ("nala",), ("nala", "fast") * 2, []],
    "patch_size": [0],
}
TOKENS = [tokens[0], tokens.float(), [[1]]]
GENERATE = {"tokens": TOKENS, "top_k": [0, -1], "num_tokens": [-1], "temperature": BAD[1:]}
ELSEWHERE = {"tau": [-1.0, math.inf], "is_causal": [True], "key_padding_mask": [mask]}
QKV, EARLIER = {"q": q, "k": k, "v": v}, {"tokens": tokens[:1], "state": blocks}
CASES = {  # function, correct arguments, and wrong ones
    "nala": (nala_min.nala_attention, QKV, LINEAR | FEATURES | ELSEWHERE),
    "injective": (nala_min.ATTENTIONS["injective"], QKV, {"k": SHARED["k"][:4], "causal": ["no"]}),
    "softmax": (nala_min.softmax_attention, QKV, SOFTMAX),
    "weights": (nala_min.attention_weights, {"q": q, "k": k}, WEIGHTS),
    "queries": (nala_min.query_features, {"q": q}, FEATURES),
    "keys": (nala_min.key_features, {"k": k}, FEATURES),
    "config": (Config, {}, CONFIG),
    "patches": (lambda **x: NaLaViT(Config(**x)), {}, {"conv_size": [4], "patch_size": [3, 12]}),
    "lm": (lm, {"tokens": tokens}, {"tokens": TOKENS, "state": [blocks[:1], [], EARLIER]}),
    "generate": (lm.generate, {"tokens": tokens, "num_tokens": 2}, GENERATE),
    "vit": (
        vit,
        {"images": images},
        {"images": [images[0], images.mT[:, :2], images.to(torch.uint8)]},
    ),
}


@pytest.mark.parametrize("function", CASES)
def test_a_wrong_argument_is_named(function):
    call, correct, mistakes = CASES[function]
    call(**correct)
    for name, values in mistakes.items():
        for value in values:
            wrong = value if isinstance(value, dict) else {name: value}
            with pytest.raises(ValueError) as error:
                call(**correct | wrong)
            message = str(error.value)
            assert re.search(rf"\b{name}\b", message) and "\n" not in message, (wrong, message)


def test_unusual_arguments_are_accepted():
    nala_min.nala_attention(q, k, v, causal=True, key_mask=mask, state=state, chunk_size=1)
    nala_min.nala_attention(q, k[:, :, :4], v[:, :, :4], key_mask=mask[:, :4], state=state)
    nala_min.softmax_attention(q, k, v, causal=True, state=(k, v))
    nala_min.nala_attention(q, k, v, tau=0, lam=torch.ones(H, 1, 1))
    lm(tokens.int(), blocks)
    assert torch.equal(lm.generate(tokens, 0, temperature=0), tokens)
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
