"""Attention stays right where others break: zeros, padding with NaN, the future, extreme norms,
half precision, any memory layout, and any setting of PyTorch."""

import itertools
import math
from functools import partial

import pytest
import torch
from scripts import ambient
from test_1_equations import FEATURE_MAPS, B, H, paper_attention, random_qkv
from test_2_forms import MODES, output_and_gradients
from torch.testing import assert_close

from nala_min import model

CAUSAL_MODES = [mode for mode in MODES if "causal" in MODES[mode]]
every_mode = pytest.mark.parametrize("mode", MODES)

DEGENERATE = {
    "zero query row": lambda q, k: q[:, :, 2].zero_(),
    "exact-zero channels": lambda q, k: (q[..., 1].zero_(), k[..., 2].zero_()),
    "exact-zero channel of a small query": lambda q, k: q.mul_(1e-4)[..., 1].zero_(),
    "query and keys without a common channel": lambda q, k: (q[..., 1:].zero_(), k[..., 0].zero_()),
}


@pytest.mark.parametrize("damage", DEGENERATE)
def test_degenerate_inputs_stay_finite(damage):
    """Outputs and gradients. With lam = 0.5, the power of a key has an infinite slope at 0."""
    forms = [*itertools.product(("chunked", "causal auto"), ("cosine", "split"), (3.0, 0.5))]
    forms += [("parallel", "elu", 3.0), ("auto", "cosine", 0.5), ("chunked", "relu", 3.0)]
    dtypes = torch.float32, torch.bfloat16
    for (mode, feature_map, lam), dtype in itertools.product(forms, dtypes):
        q, k, v = random_qkv(6, dtype=dtype, batch=1, heads=1)
        DEGENERATE[damage](q.data, k.data)
        options = {"feature_map": feature_map, "lam": lam, **MODES[mode]}
        for x in output_and_gradients(partial(model.nala_attention, **options), q, k, v):
            assert torch.isfinite(x).all(), options


@pytest.mark.parametrize("cause", ["query", "keys", "mask"])
@every_mode
def test_no_mass_gives_output_and_gradient_zero(mode, cause):
    q, k, v = random_qkv(6)
    {"query": q, "keys": k}.get(cause, torch.ones(1)).data.zero_()
    mask = torch.full((B, 6), cause != "mask")
    for feature_map in ("cosine", "split", "relu"):  # elu(0) + 1 = 1
        options = {"feature_map": feature_map, "key_mask": mask, **MODES[mode]}
        for x in output_and_gradients(partial(model.nala_attention, **options), q, k, v):
            assert torch.equal(x, torch.zeros_like(x))


@pytest.mark.parametrize(
    ("mode", "garbage"),
    [(mode, math.nan) for mode in (*MODES, "softmax", "causal softmax")]
    + [("parallel", 100.0), ("causal auto", math.inf)],
)
def test_padding_changes_nothing(mode, garbage):
    """Garbage in padding changes no output or gradient of real tokens. Its own gradients are 0.
    0 times NaN is NaN, so a NaN in a key or value must be removed before any product."""
    for feature_map, left in (("cosine", 3), ("split", 5), ("elu", 0)):
        if mode in MODES:
            attention = partial(model.nala_attention, feature_map=feature_map, **MODES[mode])
        else:
            attention = partial(model.softmax_attention, causal="causal" in mode)
        qkv, real = random_qkv(9), slice(left, left + 9)
        want = output_and_gradients(attention, *qkv)
        mask = torch.zeros(B, 14, dtype=torch.bool)
        mask[:, real] = True
        padded = random_qkv(14)
        for x, y, size in zip(padded, qkv, (100.0, garbage, garbage), strict=True):
            x.data.mul_(size)[:, :, real] = y.detach()
        got = output_and_gradients(partial(attention, key_mask=mask), *padded, tokens=real)
        assert_close(got[0], want[0], rtol=1e-10, atol=1e-10)
        for gradient, expected in zip(got[1:], want[1:], strict=True):
            assert_close(gradient[:, :, real], expected, rtol=1e-10, atol=1e-10)
            assert (gradient[:, :, ~mask[0]] == 0).all()


@pytest.mark.parametrize("size", [1.0, 1e9])
@pytest.mark.parametrize("mode", CAUSAL_MODES)
def test_the_future_changes_no_past_output(mode, size):
    """Exactly, in float32, even if the future is large enough to swamp the past."""
    for feature_map, cut in itertools.product(FEATURE_MAPS, (1, 4, 7)):
        q, k, v = (x.detach().float() for x in random_qkv(13))
        before = model.nala_attention(q, k, v, feature_map=feature_map, **MODES[mode])
        changed = [x.clone() for x in (q, k, v)]
        for x in changed:
            x[:, :, cut:] = size * torch.randn_like(x[:, :, cut:])
        after = model.nala_attention(*changed, feature_map=feature_map, **MODES[mode])
        assert torch.equal(after[:, :, :cut], before[:, :, :cut])
        assert not torch.equal(after[:, :, cut], before[:, :, cut])


LIMITS = {  # of q and of k, as powers of 10, and the tolerance
    torch.float16: ((-6, 4), (-6, 4), 1e-3),
    torch.bfloat16: ((-20, 18), (-11, 12), 8e-3),
    torch.float32: ((-20, 18), (-11, 12), 3e-5),  # errors in d grow 2 alpha = 40 times
}


@pytest.mark.parametrize("dtype", LIMITS)
def test_range_of_queries_and_keys(dtype):
    """The loop in float64 agrees from end to end. In float16, this is the whole range."""
    q, k, v = torch.randn(3, 1, 2, 20, 6, dtype=torch.float64)
    v, (*limits, tolerance) = v.to(dtype), LIMITS[dtype]
    for mode, feature_map in itertools.product(MODES, ("cosine", "split")):
        options = {"feature_map": feature_map, **MODES[mode]}
        for size_q, size_k in itertools.product(*limits):
            low = (10.0**size_q * q).to(dtype), (10.0**size_k * k).to(dtype)
            got = model.nala_attention(*low, v, **options)
            high, causal = [x.double() for x in (*low, v)], mode in CAUSAL_MODES
            loop = partial(paper_attention, feature_map=feature_map, causal=causal)
            want, terms = loop(*high), loop(*high[:2], high[2].abs())
            assert got.dtype == dtype and ((got - want).abs() <= tolerance * terms).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", ["parallel", "auto", "chunked", "causal auto"])
def test_half_precision_sums_over_many_tokens(mode, dtype):
    """Sums over 5,000 tokens: a float16 sum of ones stops at 2,048, a bfloat16 sum at 256. The
    keys are large: their cubes and sums overflow float16."""
    q, k, v = (x.detach().to(dtype) for x in random_qkv(5000, batch=1, heads=1))
    options = MODES[mode] | {"chunk_size": 64}
    got = model.nala_attention(q, 40 * k, v, **options)
    want = model.nala_attention(q.double(), (40 * k).double(), v.double(), **options)
    assert_close(got.double(), want, rtol=2e-2, atol=2e-2 * want.abs().max().item())
    sums = model.nala_attention(q, 40 * k, torch.ones_like(v), **options)
    assert_close(sums, torch.ones_like(v), rtol=0, atol=1e-2)


@every_mode
def test_memory_layout_does_not_matter(mode):
    """Heads after tokens, one key for all tokens, every other channel. And nobody writes to them:
    not even to what is masked."""
    q, k, v = random_qkv(12)
    views = q.transpose(1, 2).contiguous().transpose(1, 2), k[:, :, :1].expand_as(k), v[..., ::2]
    mask, state = torch.rand(B, 12) < 0.7, torch.rand(B, H, 8, 4, dtype=torch.float64)
    copies = [x.detach().clone() for x in (*views, mask, state)]
    attention = partial(model.nala_attention, key_mask=mask, state=state, **MODES[mode])
    want = output_and_gradients(attention, *(x.contiguous() for x in views))
    assert_close(output_and_gradients(attention, *views), want, rtol=1e-12, atol=1e-12)
    assert all(map(torch.equal, (*views, mask, state), copies))


@every_mode
def test_autocast_changes_nothing(mode):
    """Nor do PyTorch's default dtype and device, and inference mode."""
    q, k, v = (x.detach() for x in random_qkv(100, dtype=torch.float32))
    want = model.nala_attention(q, k, v, **MODES[mode])
    autocast = torch.autocast("cpu", torch.bfloat16)
    for context in (autocast, ambient(torch.bfloat16, "meta"), torch.inference_mode()):
        with context:
            assert torch.equal(model.nala_attention(q, k, v, **MODES[mode]), want)
