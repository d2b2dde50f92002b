"""nala_attention is correct for random shapes, options, dtypes and magnitudes, at the limits of a
dtype's range, for long texts, and for any memory layout or context. The reference is the sum over
all pairs, in float64 logarithms."""

import functools
import itertools
import math
import random

import pytest
import torch
from torch.testing import assert_close

from nala_min import fast, model, nala_attention

FEATURE_MAPS = ("cosine", "split", "elu", "relu")
FORMS = {
    "auto": {},
    "parallel": {"mode": "parallel"},
    "causal auto": {"causal": True},
    "quadratic": {"causal": True, "mode": "parallel"},
    "chunked": {"causal": True, "mode": "chunked"},
    "recurrent": {"causal": True, "mode": "recurrent"},
}
STATEFUL = ("causal auto", "chunked", "recurrent")
# Of outputs, relative to the sum of |weight * value|. Half precision rounds once, at the end.
TOLERANCE = {
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
    torch.float32: 3e-5,  # opposite signs give exp(-40 d): rounding errors in d grow 40 times
    torch.float64: 1e-11,
}
every_form = pytest.mark.parametrize("form", FORMS)


# --- The equations for each pair: no overflow or underflow ----------------------------------------


def log(x):
    """log|x|; at 0 it is -inf, with gradient 0."""
    return torch.where(x == 0, 1.0, x.abs()).log().masked_fill(x == 0, -math.inf)


def split_norm(x):
    """Norm, x / max|x| and direction, Eq. (2). No square overflows or underflows."""
    largest = x.detach().abs().amax(-1, keepdim=True)
    ratio = x / largest.masked_fill(largest == 0, 1.0)
    norm = ratio.square().sum(-1, keepdim=True).clamp_min(1e-300).sqrt()
    return largest * norm, ratio, ratio / norm


def log_sum(x):
    """log sum exp over the last dimension, whose entries may all be -inf."""
    largest = x.detach().amax(-1, keepdim=True).clamp_min(-1e300)
    return log((x - largest).exp().sum(-1, keepdim=True)) + largest


def pair_weights(q, k, visible, feature_map):
    """Normalised weights (B, H, Q, N) of N keys for Q queries, and the log of the normaliser.
    visible: broadcastable to (B, 1, Q, N)."""
    if feature_map in ("cosine", "split"):
        norm, ratio, dir_q = split_norm(q)
        dir_q, dir_k = dir_q[:, :, :, None], split_norm(k)[2][:, :, None]
        log_q, log_k = 3 * (0.5 + norm.tanh()) * log(ratio), 3 * log(k)  # Eqs. (7), (8)
        if feature_map == "split":  # Eq. (11)
            pair = log((dir_q * dir_k > 0).double())
        else:  # Eq. (10): cos(theta_q - theta_k) = sin(pi/2 - |theta_q - theta_k|)
            high, low = torch.maximum(dir_q, dir_k), torch.minimum(dir_q, dir_k)
            pair = log((math.pi / 2 * ((-40 * high).sigmoid() + (40 * low).sigmoid())).sin())
    elif feature_map == "relu":
        log_q, log_k, pair = log(q.clamp_min(0)), log(k.clamp_min(0)), torch.zeros(())
    else:
        log_q, log_k = (torch.where(x > 0, x.clamp_min(0).log1p(), x) for x in (q, k))
        pair = torch.zeros(())
    scores = log_sum(log_q[:, :, :, None] + log_k[:, :, None] + pair).squeeze(-1)
    scores = scores.masked_fill(~visible, -math.inf)
    mass = log_sum(scores)
    return (scores - mass.clamp_min(-1e300)).exp(), mass


def visible_to(form, num_tokens):
    visible = torch.ones(num_tokens, num_tokens, dtype=torch.bool)
    return visible.tril() if "causal" in FORMS[form] else visible


# --- Random cases ---------------------------------------------------------------------------------

# Ranges of a case's magnitudes, as powers of 10. sum: the limit for k^3 v.
SIZES = {
    torch.float16: {"q": (-7, 3.3), "k": (-7, 3.3), "v": (-7, 3.3), "sum": 28},
    torch.bfloat16: {"q": (-18, 16), "k": (-9, 9), "v": (-30, 30), "sum": 28},
    torch.float32: {"q": (-18, 16), "k": (-9, 9), "v": (-30, 30), "sum": 28},
    torch.float64: {"q": (-150, 150), "k": (-90, 90), "v": (-280, 280), "sum": 280},
}


def sized(generator, shape, exponent, dtype, lowest=-math.inf):
    """Random signs, sizes near 10^exponent; each token up to 10 times larger or smaller."""
    x = torch.rand(3, *shape, generator=generator).double() * 2 - 1
    jitter = x[1] + x[2, ..., :1] * math.log(10)
    x = x[0].sign() * (jitter + exponent * math.log(10)).exp()
    return x.clamp(min=lowest).to(dtype)


@pytest.mark.parametrize("seed", range(24))
def test_a_random_case(seed, monkeypatch):
    """The error of each output is within TOLERANCE of the sum of its absolute terms; gradients have
    a similar bound. The first half of the tokens may come from a state."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    dtype, feature_map = list(SIZES)[seed % 4], FEATURE_MAPS[seed // 4 % 4]
    form, earlier_form = draw.choice(list(FORMS)), draw.choice(STATEFUL)
    tokens, (dim, size) = draw.choice([1, 63, 64, 65, 200]), draw.sample(range(1, 18), 2)
    exponents = {name: draw.uniform(*SIZES[dtype][name]) for name in "qkv"}
    if feature_map == "elu":
        exponents |= {"q": draw.uniform(-2, 1), "k": draw.uniform(-2, 1)}
    if feature_map == "relu":
        exponents["q"] = draw.uniform(*SIZES[dtype]["k"])
    q, k = abs(exponents["q"]), abs(exponents["k"])
    limit = SIZES[dtype]["sum"] - (q + k if feature_map == "relu" else max(q, 3 * k))
    exponents["v"] = min(max(exponents["v"], -limit), limit)
    lowest = -30 if feature_map == "elu" else -math.inf
    low = [
        sized(generator, (2, 3, tokens, n), x, dtype, lowest).requires_grad_()
        for n, x in zip((dim, dim, size), exponents.values(), strict=True)
    ]
    cotangent = sized(generator, (2, 3, tokens, size), 0, dtype)
    mask = torch.rand(2, tokens, generator=generator) < draw.choice([0.7, 2])
    chunk_size = draw.choice([None, 1, 16, draw.randint(1, 250)])
    monkeypatch.setattr(fast, "SEGMENT", draw.choice([300, 2**17]))
    monkeypatch.setattr(fast, "KEPT", draw.choice([0, 10_000, 2**30]))

    def attend(part, form, **state):
        options = {"feature_map": feature_map, "key_mask": mask[:, part], "chunk_size": chunk_size}
        return nala_attention(*(x[:, :, part] for x in low), **FORMS[form], **options, **state)

    high = [x.detach().double().requires_grad_() for x in low]
    visible = visible_to(form, tokens) & mask[:, None, None]
    weights, mass = pair_weights(*high[:2], visible, feature_map)
    want, terms = weights @ high[2], (weights @ high[2].abs()).detach()
    cut = draw.randrange(tokens) if form in STATEFUL else 0
    if cut:
        first, state = attend(slice(cut), earlier_form, return_state=True)
        got = torch.cat([first, attend(slice(cut, None), form, state=state)], dim=2)
    else:
        got = attend(slice(None), form)
    assert got.dtype == dtype and got.isfinite().all()
    info, rtol = torch.finfo(dtype), TOLERANCE[dtype]
    smallest = math.log(torch.finfo(torch.promote_types(dtype, torch.float32)).tiny) + 5
    faint = (mass > -math.inf) & (mass - log(terms).abs() < smallest)  # its mass underflows
    assert ((got - want).abs() <= rtol * terms + info.tiny)[~faint].all()
    if faint.any():
        return
    expected = torch.autograd.grad(want, high, cotangent.double())
    gradients = torch.autograd.grad(got, low, cotangent)
    for name, x, g, w in zip("qkv", high, gradients, expected, strict=True):
        size = cotangent.double().abs().sum(-1).amax((1, 2))[:, None, None, None]
        if name != "v":  # |x dy/dx|, or |dy/dx| for elu, is at most about 10 |y|
            y = high[2].abs().amax((1, 2, 3), keepdim=True).clamp_min(info.tiny)
            size = size * 10 * y / x.abs().clamp(max=1 if feature_map == "elu" else math.inf)
        bound = rtol * (w.abs() + size) + info.tiny
        assert ((g - w).abs() <= bound)[w.abs() + bound < info.max].all(), name


# --- Limits of the range --------------------------------------------------------------------------


def numbers(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def qkv(num_tokens=12, dtype=torch.float32):
    return [numbers(2, 2, num_tokens, n, dtype=dtype).requires_grad_() for n in (3, 3, 4)]


def output_and_gradients(form, q, k, v, **options):
    """The output, and the gradients of a fixed random weighted sum of it."""
    out = nala_attention(q, k, v, **FORMS[form], **options)
    cotangent = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out).to(out)
    return out, *torch.autograd.grad(out, (q, k, v), cotangent)


RANGES = {  # of q and of k, as powers of 10
    torch.float16: ((-6, 4), (-6, 4)),
    torch.bfloat16: ((-20, 18), (-11, 12)),
    torch.float32: ((-20, 18), (-11, 12)),
    torch.float64: ((-154, 153), (-101, 102)),
}


@pytest.mark.parametrize("dtype", RANGES)
def test_range_of_queries_and_keys(dtype):
    """For values of about 1. In float16, this is the whole range. Outside it, queries that are too
    large have no direction and keys that are too small no mass: the output is 0."""
    q, k, v = numbers(1, 2, 20, 6), numbers(1, 2, 20, 6), numbers(1, 2, 20, 3).to(dtype)
    for form, feature_map in itertools.product(FORMS, ("cosine", "split")):
        attention = functools.partial(nala_attention, feature_map=feature_map, **FORMS[form])
        for size_q, size_k in itertools.product(*RANGES[dtype]):
            low = (10.0**size_q * q.double()).to(dtype), (10.0**size_k * k.double()).to(dtype)
            high = (x.double() for x in low)
            weights, _ = pair_weights(*high, visible_to(form, 20), feature_map)
            bound = TOLERANCE[dtype] * (weights @ v.double().abs())
            assert ((attention(*low, v) - weights @ v.double()).abs() <= bound).all()
        if dtype in (torch.float32, torch.bfloat16):
            x, y = q.to(dtype), k.to(dtype)
            assert not attention(x.sign() * 1e20, y, v).any()
            assert not attention(x, y.sign() * 1e-16, v).any()


# --- Lengths, layouts, contexts -------------------------------------------------------------------


@pytest.mark.parametrize("form", ["auto", "causal auto", "chunked"])
def test_a_long_text(form):
    """In float32: weights sum to 1, outputs and state match float64, and gradients are finite."""
    num_tokens, causal = 2**17, "causal" in FORMS[form]
    q, k, v = (numbers(1, 2, num_tokens, size).requires_grad_() for size in (3, 3, 2))
    values = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
    out, state = nala_attention(q, k, values, return_state=True, **FORMS[form])
    for gradient in torch.autograd.grad(out.square().sum(), (q, k, v)):
        assert gradient.isfinite().all() and gradient.any()
    tokens = torch.tensor([0, 1, 1000, num_tokens // 2, num_tokens - 1])
    visible = torch.arange(num_tokens) <= (tokens[:, None] if causal else num_tokens)
    with torch.no_grad():
        values = values.double()
        weights, _ = pair_weights(q[:, :, tokens].double(), k.double(), visible, "cosine")
        bound = TOLERANCE[torch.float32] * (weights @ values.abs())
        assert ((out[:, :, tokens] - weights @ values).abs() <= bound).all()
        assert_close(out[..., -1], torch.ones(1, 2, num_tokens), rtol=0, atol=1e-5)
        phi_k = model.key_features(k.double())
        bound = 1e-5 * (phi_k.mT @ values.abs())
        assert ((state[..., :-1] - phi_k.mT @ values).abs() <= bound).all()


LAYOUTS = {
    "one row for all tokens": lambda x: x[:, :, :1].expand_as(x),
    "one text and head for all": lambda x: x[:1, :1].expand_as(x),
    "one number for all channels": lambda x: x[..., :1].expand_as(x),
    "heads after tokens": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "channels before tokens": lambda x: x.mT.contiguous().mT,
    "every other channel": lambda x: torch.cat([x, x + 1], -1)[..., ::2],
}


@every_form
def test_memory_layout_does_not_matter(form):
    """For outputs and gradients. Gradients are summed where memory is shared."""
    for layout in LAYOUTS.values():
        tensors = qkv(dtype=torch.float64)
        views = [layout(x) for x in tensors]
        assert not any(x.is_contiguous() for x in views)
        results = []
        for inputs in (views, [x.contiguous() for x in views]):
            out = nala_attention(*inputs, **FORMS[form])
            results.append((out, *torch.autograd.grad(out.pow(3).sum(), tensors)))
        assert_close(*results, rtol=1e-12, atol=1e-12)


@every_form
def test_contexts_change_no_bit(form):
    for dtype in SIZES:
        tensors = qkv(70, dtype)
        want = output_and_gradients(form, *tensors)
        try:
            torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN
            torch.set_default_dtype(torch.bfloat16)
            assert all(map(torch.equal, output_and_gradients(form, *tensors), want))
        finally:
            torch.use_deterministic_algorithms(False)
            torch.set_default_dtype(torch.float32)
        with torch.inference_mode():
            assert torch.equal(nala_attention(*tensors, **FORMS[form]), want[0])
