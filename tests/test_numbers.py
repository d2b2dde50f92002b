"""nala_attention is correct for random shapes, options, dtypes and magnitudes, at the limits of a
dtype's range, for very long texts and for any memory layout.

Each random case is determined by its seed, and every run tries one new seed. NALA_SEED=123 pytest
tests/test_numbers.py repeats the case of seed 123."""

import functools
import itertools
import math
import os
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


# --- The equations for each pair, in float64 logarithms: no overflow or underflow -----------------


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
    else:
        pair = torch.zeros(())
        log_q, log_k = (
            log(x.clamp_min(0))
            if feature_map == "relu"
            else torch.where(x > 0, x.clamp_min(0).log1p(), x)
            for x in (q, k)
        )
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


class Case:
    """Random q, k, v and options, determined by a seed."""

    def __init__(self, seed):
        draw = random.Random(seed)
        self.dtype, self.feature_map = draw.choice(list(SIZES)), draw.choice(FEATURE_MAPS)
        self.form, self.earlier_form = draw.choice(list(FORMS)), draw.choice(STATEFUL)
        batch, heads = draw.choice([0, 1, 1, 2, 2, 3, 3]), draw.randint(1, 3)
        dim, size = draw.sample(range(1, 18), 2)
        tokens = draw.choice([1, 2, 63, 64, 65, draw.randint(1, 200)])
        ends, elu = SIZES[self.dtype], self.feature_map == "elu"
        q, k, v = (draw.uniform(*ends[name]) for name in "qkv")
        q, k = (draw.uniform(-2, 1), draw.uniform(-2, 1)) if elu else (q, k)
        q = draw.uniform(*ends["k"]) if self.feature_map == "relu" else q
        limit = ends["sum"] - (
            abs(q) + abs(k) if self.feature_map == "relu" else max(abs(q), 3 * abs(k))
        )
        v = min(max(v, -limit), limit)

        generator = torch.Generator().manual_seed(seed)

        def numbers(size, exponent):
            """Random signs, sizes near 10^exponent; each token up to 10 times larger or smaller."""
            x = torch.rand(3, batch, heads, tokens, size, generator=generator).double() * 2 - 1
            jitter = x[1] + x[2, ..., :1] * math.log(10)
            x = x[0].sign() * (jitter + exponent * math.log(10)).exp()
            return x.clamp(min=-30 if elu else -math.inf).to(self.dtype)

        self.q, self.k = numbers(dim, q), numbers(dim, k)
        self.v, self.cotangent = numbers(size, v), numbers(size, 0)
        mask = torch.rand(batch, tokens, generator=generator) < 0.7
        self.mask = draw.choice([torch.ones_like(mask), mask])
        self.chunk_size = draw.choice([None, 1, 16, draw.randint(1, 250)])
        self.cut = draw.randrange(tokens) if self.form in STATEFUL else 0
        self.segment, self.keep = draw.choice([300, 2**17]), draw.choice([0, 10_000, 2**30])
        shape = f"{tuple(self.q.shape)}, M = {size}, q 1e{q:.0f}, k 1e{k:.0f}, v 1e{v:.0f}"
        print(f"NALA_SEED={seed}: {self.form}, {self.feature_map}, {self.dtype}, {shape}")

    def attention(self, q, k, v):
        """In one call, or in two: the second continues from the state of the first."""

        def attend(tokens, form, **state):
            return nala_attention(
                *(x[:, :, tokens] for x in (q, k, v)),
                **FORMS[form],
                **state,
                feature_map=self.feature_map,
                key_mask=self.mask[:, tokens],
                chunk_size=self.chunk_size,
            )

        if not self.cut:
            return attend(slice(None), self.form)
        first, state = attend(slice(self.cut), self.earlier_form, return_state=True)
        return torch.cat([first, attend(slice(self.cut, None), self.form, state=state)], dim=2)


@pytest.mark.parametrize("seed", [*range(150), "fresh"])
def test_a_random_case(seed, monkeypatch):
    """The error of each output is within TOLERANCE of the sum of its absolute terms; gradients have
    a similar bound. Rows whose mass underflows are skipped, and then all gradients. One case in 250
    has such rows, for example if all of a few channels differ in sign."""
    if seed == "fresh":
        seed = int(os.environ.get("NALA_SEED", random.SystemRandom().randrange(10**6)))
    case = Case(seed)
    monkeypatch.setattr(fast, "SEGMENT", case.segment)
    monkeypatch.setattr(fast, "SAVED_ELEMENTS", case.keep)
    low = [x.requires_grad_() for x in (case.q, case.k, case.v)]
    high = [x.detach().double().requires_grad_() for x in low]
    visible = visible_to(case.form, case.q.shape[2]) & case.mask[:, None, None]
    weights, mass = pair_weights(*high[:2], visible, case.feature_map)
    want, terms = weights @ high[2], (weights @ high[2].abs()).detach()
    got = case.attention(*low)
    assert got.shape == want.shape and got.dtype == case.dtype and got.isfinite().all()
    info, rtol = torch.finfo(case.dtype), TOLERANCE[case.dtype]
    smallest = math.log(torch.finfo(torch.promote_types(case.dtype, torch.float32)).tiny) + 5
    faint = (mass > -math.inf) & (mass - log(terms).abs() < smallest)
    assert ((got - want).abs() <= rtol * terms + info.tiny)[~faint].all()
    if faint.any():
        return
    expected = torch.autograd.grad(want, high, case.cotangent.double())
    gradients = torch.autograd.grad(got, low, case.cotangent)
    for name, x, g, w in zip("qkv", high, gradients, expected, strict=True):
        size = case.cotangent.double().abs().sum(-1).amax((1, 2))[:, None, None, None]
        if name != "v":  # |x dy/dx|, or |dy/dx| for elu, is at most about 10 |y|
            y = high[2].abs().amax((1, 2, 3), keepdim=True).clamp_min(info.tiny)
            size = size * 10 * y / x.abs().clamp(max=1 if case.feature_map == "elu" else math.inf)
        bound = rtol * (w.abs() + size) + info.tiny
        assert ((g - w).abs() <= bound)[w.abs() + bound < info.max].all(), name


# --- Limits of the range --------------------------------------------------------------------------


def numbers(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def output_and_gradients(form, q, k, v, **options):
    """The output, and the gradients of a fixed random weighted sum of it."""
    out = nala_attention(q, k, v, **FORMS[form], **options)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return out, *torch.autograd.grad(out, (q, k, v), cotangent)


RANGES = {  # of q and of k, as powers of 10
    torch.float16: ((-6, 4), (-6, 4)),
    torch.bfloat16: ((-20, 18), (-11, 12)),
    torch.float32: ((-20, 18), (-11, 12)),
    torch.float64: ((-154, 153), (-101, 102)),
}


@every_form
@pytest.mark.parametrize("dtype", RANGES)
@pytest.mark.parametrize("feature_map", ["cosine", "split"])
def test_range_of_queries_and_keys(feature_map, dtype, form):
    """For values of about 1. In float16, this is the whole range."""
    q, k, v = numbers(1, 2, 20, 6), numbers(1, 2, 20, 6), numbers(1, 2, 20, 3).to(dtype)
    visible = visible_to(form, 20)
    for size_q, size_k in itertools.product(*RANGES[dtype]):
        low = (10.0**size_q * q.double()).to(dtype), (10.0**size_k * k.double()).to(dtype)
        weights, _ = pair_weights(*(x.double() for x in low), visible, feature_map)
        got = nala_attention(*low, v, feature_map=feature_map, **FORMS[form])
        bound = TOLERANCE[dtype] * (weights @ v.double().abs())
        assert ((got - weights @ v.double()).abs() <= bound).all()


@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outside_that_range(dtype, form):
    """Queries that are too large have no direction and keys that are too small no mass: the output
    is 0. Keys that are too large make it infinite or NaN. Queries that are too small lose their
    signs, but their weights still sum to 1."""
    q, k, v = (numbers(1, 2, 20, size, dtype=dtype) for size in (6, 6, 3))
    attention = functools.partial(nala_attention, **FORMS[form])
    assert not attention(q.sign() * 1e20, k, v).any()
    assert not attention(q, k.sign() * 1e-16, v).any()
    assert not attention(q, k.sign() * 1e14, v).isfinite().any()
    assert torch.equal(attention(1e-26 * q, k, v), attention(-1e-26 * q, k, v))
    assert_close(attention(1e-26 * q, k, torch.ones_like(v)), torch.ones_like(v))


# --- inf and nan ----------------------------------------------------------------------------------

# The first token whose output is not finite if token 13 of q, k or v is not; 16 tokens in chunks of
# 4. 0 times NaN is NaN: forms that multiply the future by 0 affect earlier tokens.
FIRST_AFFECTED = {
    "auto": (13, 0, 0),
    "parallel": (13, 0, 0),
    "causal auto": (13, 8, 8),  # on a CPU, the start of its segment of 8 tokens
    "quadratic": (13, 13, 0),
    "chunked": (13, 13, 12),
    "recurrent": (13, 13, 13),
}


@every_form
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("feature_map", ["cosine", "split"])
def test_nan_and_inf_propagate_only_within_their_head(feature_map, name, value, form, monkeypatch):
    """Other heads and examples, and tokens before FIRST_AFFECTED, do not change at all."""
    monkeypatch.setattr(fast, "SEGMENT", 2 * 2 * 3 * 8)
    clean = [numbers(2, 2, 16, size).requires_grad_() for size in (3, 3, 2)]
    dirty, index = [x.detach().clone() for x in clean], "qkv".index(name)
    dirty[index][0, 0, 13, 1] = value
    options = {"feature_map": feature_map, "chunk_size": 4}
    want = output_and_gradients(form, *clean, **options)
    got = output_and_gradients(form, *(x.requires_grad_() for x in dirty), **options)
    affected = torch.zeros(2, 2, 16, dtype=torch.bool)
    affected[0, 0, FIRST_AFFECTED[form][index] : 14 if name == "q" else None] = True
    assert torch.equal(got[0][~affected], want[0][~affected])
    assert not got[0][affected].isfinite().all(-1).any()
    for g, w in zip(got[1:], want[1:], strict=True):
        assert torch.equal(g[0, 1], w[0, 1]) and torch.equal(g[1], w[1])
    if name != "v":  # the output is linear in v, so the gradient of v does not depend on v
        assert not got[1 + index][0, 0, 13].isfinite().all()


@every_form
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_a_masked_key_may_be_anything(feature_map, value, form):
    """It changes no output, and no gradient but its own."""
    clean = [numbers(2, 2, 12, size).requires_grad_() for size in (3, 3, 2)]
    options = {"feature_map": feature_map, "key_mask": torch.arange(12).expand(2, 12) != 5}
    want = output_and_gradients(form, *clean, **options)
    dirty = [x.detach().clone() for x in clean]
    dirty[1][:, :, 5] = value
    got = output_and_gradients(form, *(x.requires_grad_() for x in dirty), **options)
    got[2][:, :, 5] = want[2][:, :, 5] = 0
    assert all(map(torch.equal, got, want))


# --- Shapes, layouts, contexts --------------------------------------------------------------------


@pytest.mark.parametrize("form", ["auto", "parallel", "causal auto", "chunked"])
def test_a_quarter_of_a_million_tokens(form):
    """In float32: weights sum to 1, outputs and state match float64, and gradients are finite."""
    num_tokens, causal = 2**18, "causal" in FORMS[form]
    q, k, v = (numbers(1, 2, num_tokens, size).requires_grad_() for size in (3, 3, 2))
    values = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
    out = nala_attention(q, k, values, return_state=causal, **FORMS[form])
    out, state = out if causal else (out, None)
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
        if causal:
            phi_k = model.key_features(k.double())
            bound = 1e-5 * (phi_k.mT @ values.abs())
            assert ((state[..., :-1] - phi_k.mT @ values).abs() <= bound).all()


@pytest.mark.parametrize("form", FORMS)
def test_an_empty_sequence_is_rejected(form):
    q, k, v = (numbers(2, 2, 0, size) for size in (3, 3, 4))
    with pytest.raises(ValueError, match=r"q must be .* with N > 0"):
        output_and_gradients(form, q, k, v)


LAYOUTS = {
    "one row for all tokens": lambda x: x[:, :, :1].expand_as(x),
    "one text and head for all": lambda x: x[:1, :1].expand_as(x),
    "one number for all channels": lambda x: x[..., :1].expand_as(x),
    "heads after tokens": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "channels before tokens": lambda x: x.mT.contiguous().mT,
    "every other channel": lambda x: torch.cat([x, x + 1], -1)[..., ::2],
}


@every_form
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layout_does_not_matter(layout, form):
    """For outputs and gradients. Gradients are summed where memory is shared."""
    tensors = [numbers(2, 2, 12, size, dtype=torch.float64).requires_grad_() for size in (3, 3, 4)]
    results = []
    for contiguous in (False, True):
        views = [LAYOUTS[layout](x) for x in tensors]
        assert not any(x.is_contiguous() for x in views)
        views = [x.contiguous() for x in views] if contiguous else views
        out = nala_attention(*views, **FORMS[form])
        cotangent = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
        results.append((out, *torch.autograd.grad(out, tensors, cotangent)))
    assert_close(*results, rtol=1e-12, atol=1e-12)


@every_form
@pytest.mark.parametrize("dtype", SIZES)
def test_contexts_change_no_bit(dtype, form):
    tensors = [numbers(2, 2, 70, size, dtype=dtype).requires_grad_() for size in (3, 3, 4)]
    want = output_and_gradients(form, *tensors)
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN
    try:
        assert all(map(torch.equal, output_and_gradients(form, *tensors), want))
    finally:
        torch.use_deterministic_algorithms(False)
    for context in (torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        with context:
            got = nala_attention(*tensors, **FORMS[form])
        assert got.dtype == dtype and torch.equal(got, want[0])


@every_form
def test_torch_func_equals_autograd_and_a_loop(form):
    """vmap over q, k and v; grad under vmap; jacrev."""
    attention = functools.partial(nala_attention, **FORMS[form])
    batches = [numbers(3, 1, 2, 6, size, dtype=torch.float64) for size in (3, 3, 4)]
    assert_close(torch.func.vmap(attention)(*batches), torch.stack([*map(attention, *batches)]))

    def loss(q, k, v):
        return attention(q, k, v).pow(3).sum()

    got = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 2)))(*batches)
    leaves = [x.clone().requires_grad_() for x in batches]
    assert_close(got, torch.autograd.grad(sum(map(loss, *leaves)), leaves))
    one = tuple(x[0] for x in batches)
    jacobians = torch.func.jacrev(attention, argnums=(0, 1, 2))(*one)
    assert_close(jacobians, torch.autograd.functional.jacobian(attention, one))
