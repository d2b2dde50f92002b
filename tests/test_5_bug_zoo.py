"""The bug zoo: bugs that published linear attentions shipped, each in a copy of model.py. The check
named with a bug fails on its copy, and passes on model.py."""

import functools
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from mutants import SOURCE, load_model, mutant
from torch.testing import assert_close

B, H, N, D, M = 2, 2, 13, 4, 3  # chunks of 4 tokens: the last is not whole
MAPS = ("cosine", "split", "elu", "relu")
CAUSAL = [{"causal": True, "chunk_size": 4, "mode": mode} for mode in (
    "auto", "quadratic", "chunked", "recurrent")]  # fmt: skip
FORMS = [{"mode": "parallel"}, {"mode": "auto"}, *CAUSAL]


def every(maps, forms):
    return [form | {"feature_map": feature_map} for feature_map in maps for form in forms]


def qkv(num_tokens=N, dtype=torch.float64):
    return [torch.randn(B, H, num_tokens, x, dtype=dtype) for x in (D, D, M)]


def output_and_grads(model, tensors, tokens=slice(None), **options):
    """The output at tokens, and the gradients of a weighted sum of it."""
    tensors = [x.clone().requires_grad_() for x in tensors]
    out = model.nala_attention(*tensors, **options)[:, :, tokens]
    weights = torch.arange(out.numel()).cos().view(out.shape)
    return out, *torch.autograd.grad((out * weights).sum(), tensors)


# --- Checks, one promise each ---------------------------------------------------------------------


def pair_weights(q, k, feature_map):
    """phi(q) . phi(k) of all pairs, from Eqs. (7) to (11), channel by channel."""
    q, k = q[:, :, :, None], k[:, :, None]  # (B, H, N, 1, D), (B, H, 1, N, D)
    if feature_map in ("elu", "relu"):
        features = {"elu": lambda x: F.elu(x) + 1, "relu": F.relu}[feature_map]
        return (features(q) * features(k)).sum(-1)
    norm_q, norm_k = (torch.linalg.vector_norm(x, dim=-1, keepdim=True) for x in (q, k))
    size = (q / norm_q).abs() ** (3 * (0.5 + norm_q.tanh())) * k.abs() ** 3
    turn = math.pi / 4 * ((20 * q / norm_q).tanh() - (20 * k / norm_k).tanh())
    return (size * (turn.cos() if feature_map == "cosine" else q * k > 0)).sum(-1)


def every_form_equals_the_sum_over_pairs(model):
    """Also if a text is cut into two pieces, and the second continues from a state."""
    q, k, v = qkv()
    for options in every(MAPS, FORMS):
        w = pair_weights(q, k, options["feature_map"])
        w = w.tril() if "causal" in options else w
        want = w @ v / w.sum(-1, keepdim=True).clamp_min(1e-300)
        assert_close(model.nala_attention(q, k, v, **options), want, rtol=1e-9, atol=1e-9)
        if "causal" in options:
            first, rest = ([x[:, :, part] for x in (q, k, v)] for part in (slice(6), slice(6, N)))
            head, state = model.nala_attention(*first, return_state=True, **options)
            tail = model.nala_attention(*rest, state=state, **options)
            assert_close(torch.cat([head, tail], dim=2), want, rtol=1e-9, atol=1e-9)


def gradients_equal_finite_differences(model):
    tensors = [x[:1, :1, :6].requires_grad_() for x in qkv()]
    for options in every(("cosine", "elu"), FORMS):
        attention = functools.partial(model.nala_attention, **options)
        assert torch.autograd.gradcheck(attention, tensors, raise_exception=False, fast_mode=True)


def padding_changes_nothing(model):
    """0 times NaN is NaN: a NaN in padding must be removed before any product."""
    tensors, mask = qkv(), torch.arange(N).expand(B, N) < 9
    for options, garbage in itertools.product(every(MAPS[::2], FORMS), (100.0, math.nan)):
        want = output_and_grads(model, [x[:, :, :9] for x in tensors], **options)
        tensors[1][:, :, 9:] = tensors[2][:, :, 9:] = garbage
        got = output_and_grads(model, tensors, slice(9), key_mask=mask, **options)
        for x, y in zip(got, want, strict=True):
            assert_close(x[:, :, :9], y, rtol=1e-9, atol=1e-9)
            assert (x[:, :, 9:] == 0).all()


def the_future_changes_nothing(model):
    """Exactly, in float32, also if it is large enough to swamp the past."""
    for options, size in itertools.product(every(MAPS[::2], CAUSAL), (1.0, 1e9)):
        tensors = qkv(dtype=torch.float32)
        changed = [torch.cat([x[:, :, :7], size * x[:, :, 7:].roll(1, 2)], 2) for x in tensors]
        before, after = (model.nala_attention(*x, **options)[:, :, :7] for x in (tensors, changed))
        assert torch.equal(before, after)


def zeros_are_harmless(model):
    """Outputs and gradients are finite; a zero query has output 0. With lam = 0.5, the power of a
    key has an infinite slope at 0."""
    for options, lam in itertools.product(every(MAPS[:2], FORMS), (3.0, 0.5)):
        q, k, v = qkv()
        q[:, :, 2], k[:, :, 0], q[0, :, :, 1], k[1, :, :, 2] = 0, 0, 0, 0
        q[0] *= 1e-4
        results = output_and_grads(model, (q, k, v), lam=lam, **options)
        assert all(x.isfinite().all() for x in results)
        assert lam < 1 or (results[0][:, :, 2] == 0).all()


def weights_are_a_distribution(model):
    """In float32, none is negative, and they sum to 1 at any scale of the queries and keys."""
    for options, scale in itertools.product(FORMS, (1e-3, 1.0, 1e3)):
        q, k, _ = (scale * x for x in qkv(dtype=torch.float32))
        w = model.attention_weights(q, k, **options)
        assert w.min() >= 0
        assert_close(w.sum(-1), torch.ones(B, H, N), rtol=0, atol=1e-6)


def half_precision_is_summed_in_float32(model):
    """A float16 sum of ones stops at 2,048. The cubes of these keys overflow float16. Autocast
    changes nothing. And elu(x) + 1 is not rounded to 0."""
    half, single = [x.half() for x in qkv(2100)], qkv(dtype=torch.float32)
    half[1] *= 40
    for options in FORMS[:3]:
        want = model.nala_attention(*(x.double() for x in half), **options)
        got = model.nala_attention(*half, **options | {"chunk_size": 64})
        assert_close(got.double(), want, rtol=2e-2, atol=2e-2 * want.abs().max().item())
        with torch.autocast("cpu", torch.bfloat16):
            got = model.nala_attention(*single, **options)
        assert torch.equal(got, model.nala_attention(*single, **options))
    low = torch.tensor([[-20.0]])
    assert_close(model.query_features(low, "elu"), low.exp(), rtol=1e-5, atol=0)


def memory_is_bounded(model):
    """A language model's state holds no other memory, and no form keeps a state per token."""
    lm = model.NaLaLM(model.Config(vocab_size=7, num_layers=1, num_heads=2, dim=8))
    for x in lm(torch.zeros(1, 40, dtype=torch.long))[1][0]:
        assert x.untyped_storage().nbytes() == x.numel() * x.element_size()
    tensors, sizes = [torch.randn(1, 1, 512, 16, requires_grad=True) for _ in range(3)], []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()), lambda x: x):
        for mode in ("auto", "chunked"):
            model.nala_attention(*tensors, causal=True, mode=mode, chunk_size=64)
    assert max(sizes) < 512 * 32 * 17 / 4


# --- The bugs: {check: {bug: (old code, new code)}} -----------------------------------------------

MASS = "normaliser.masked_fill(normaliser == 0, math.inf)"
POWER = "torch.exp2(power * torch.log2(ratio.clamp_min(tiny)))"
MAP = "return torch.cat([magnitude * cos, magnitude * sin], dim=-1)"
ANGLES = (
    "theta = {}torch.tanh(alpha * direction)\n"
    "    return torch.cat([magnitude * theta.cos(), magnitude * theta.sin()], dim=-1)"
)
SCORES, ALL_SCORES = "(phi_q @ phi_k.mT).tril()", "phi_q @ phi_k.mT"
ZOO = {
    every_form_equals_the_sum_over_pairs: {
        "normaliser summed over heads": (  # flash-linear-attention #594, #850
            "normaliser = sums.split([v.shape[3], 1], dim=-1)",
            "normaliser = sums[..., :-1], sums[..., -1:].sum(1, keepdim=True)"),
        # performer-pytorch #40
        "multiplied by the denominator": (f"numerator / {MASS}", "numerator * normaliser"),
        "decoding forgets the earlier keys' normaliser": (  # flash-linear-attention #267
            "is None else state  # no token", "is None else F.pad(state[..., :-1], (0, 1))  #"),
        "the rows after the last whole chunk are lost": (  # lightning-attention #28
            "[:, :, :num_tokens], state",
            "[:, :, :num_tokens].index_fill(2, torch.arange(12, num_tokens), 0.0), state"),
        # linear-attention-transformer, bucket size above 1
        "a chunk does not see its own tokens": (SCORES, SCORES.replace("()", "(-1)")),
        # two third-party ports of NaLaFormer
        "the power acts on the norm, which cancels": (POWER, "ratio * (1 + power)"),
        "a LayerNorm on q erases its norm": (
            "= decompose(q)", "= decompose(F.layer_norm(q, q.shape[-1:]))"),
    },
    gradients_equal_finite_differences: {
        # flash-linear-attention #875
        "no gradient through the denominator": ("/ normaliser.", "/ normaliser.detach()."),
    },
    padding_changes_nothing: {
        # flash-linear-attention #1263
        "padding keys stay in the normaliser": ("phi_k = phi_k.masked_fill(masked, 0.0)", "pass"),
        # PyTorch #101967: 0 * NaN = NaN
        "a masked NaN reaches everyone": (", v.masked_fill(masked, 0.0)", ", v"),
    },
    the_future_changes_nothing: {
        "a chunk sees its own future": (SCORES, ALL_SCORES),
        "a chunk sees the state after itself": (
            "torch.stack(states, dim=2)", "torch.stack([*states[1:], state], dim=2)"),
        # performer-pytorch: stabiliser over the whole sequence
        "keys scaled by the largest of the whole sequence": (
            "phi_k = key_map(at_least_float32(k))",
            "phi_k = (y := key_map(at_least_float32(k))) / y.amax((2, 3), keepdim=True)"),
    },
    zeros_are_harmless: {
        # the published forms of NaLaFormer
        "a zero query gives NaN": ("x / norm.masked_fill(norm == 0, 1.0)", "x / norm"),
        "an exact-zero channel has a NaN gradient": (POWER, "torch.exp2(power * ratio.log2())"),
        "the root of a zero has an infinite slope": (  # Stan math #3031
            "return torch.where(k == 0, 0.0, size.pow(lam))", "return k.abs().pow(lam)"),
        "zero mass gives NaN": (MASS, "normaliser"),
    },
    weights_are_a_distribution: {
        "an eps swallows small keys": (MASS, "(normaliser + 1e-6)"),
        # the cosine map without its factor pi/4: cos(2) < 0
        "angles span more than a quarter turn": (MAP, ANGLES.format("")),
        # the published cosine map: its two features cancel
        "angles about zero round to negative weights": (MAP, ANGLES.format("math.pi / 4 * ")),
    },
    half_precision_is_summed_in_float32: {
        "elu + 1 is rounded to 0": (  # flash-linear-attention #1261
            "F.relu(x) + x.masked_fill(x > 0, 0.0).exp()", "F.elu(x) + 1"),
        "half precision is not summed in float32": (  # fast-transformers #32, Sana #267
            "x.to(torch.promote_types(x.dtype, torch.float32))", "x"),
        "autocast lowers the sums": (
            "enabled=False)", 'enabled=torch.is_autocast_enabled("cpu"))'),
    },
    memory_is_bounded: {
        "a state holds the whole sequence": (  # PyTorch #40157
            "x[:, x.shape[1] - num_past :].clone()", "x[:, x.shape[1] - num_past :]"),
        # linear-attention-transformer and others: 2 GiB at B 4, H 8, N 2048 in float32
        "a state for every token": (
            "num_chunks = 1 if torch", "chunk_size = 1\n    num_chunks = 1 if torch"),
    },
}  # fmt: skip
BUGS = {bug: (check, *change) for check, bugs in ZOO.items() for bug, change in bugs.items()}


@pytest.mark.parametrize("bug", BUGS)
def test_a_published_bug_is_noticed(bug):
    check, old, new = BUGS[bug]
    with pytest.raises(AssertionError):
        check(mutant(old, new))


@pytest.mark.parametrize("check", ZOO)
def test_a_copy_without_a_bug_passes(check):
    """The copies fail for their bugs, not for being copies."""
    check(load_model(SOURCE))
