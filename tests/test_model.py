"""Tests of nala_min/model.py. Most take the module as an argument: test_bug_zoo.py passes broken
copies, which must fail. Numbers in parentheses are model.py's equations."""

import ast
import contextlib
import inspect
import io
import itertools
import math
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import nala_min
import train_cifar
from nala_min import measure

B, H, D, M = 2, 3, 4, 5
FEATURE_MAPS = ("cosine", "split", "elu", "relu")
SIGNED_MAPS = ("cosine", "split")


def random_qkv(num_tokens, dtype=torch.float64, batch=B, heads=H):
    """Random q, k, v that require gradients."""
    return tuple(
        torch.randn(batch, heads, num_tokens, size, dtype=dtype, requires_grad=True)
        for size in (D, D, M)
    )


def output_and_gradients(attention, q, k, v):
    """The output of attention(q, k, v), and the gradients of a fixed random weighted sum of it."""
    out = attention(q, k, v)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return out, *torch.autograd.grad((out * cotangent).sum(), (q, k, v))


def loop_attention(model, q, k, v, feature_map, causal):
    """Eq. (5) as a loop over independent queries. Without mass, the output is 0."""
    phi_q, phi_k = model.query_features(q, feature_map), model.key_features(k, feature_map)
    rows = []
    for t in range(q.shape[2]):
        visible = slice(0, t + 1) if causal else slice(None)
        weights = (phi_q[:, :, t, None] * phi_k[:, :, visible]).sum(-1, keepdim=True)
        mass = weights.sum(2)
        rows.append((weights * v[:, :, visible]).sum(2) / torch.where(mass > 0, mass, 1.0))
    return torch.stack(rows, dim=2)


def cut_and_resume(model, q, k, v, feature_map):
    """Attention to pieces of 1, 2, 4, ... tokens, alternately chunked and recurrent."""
    pieces, state, start, size = [], None, 0, 1
    while start < q.shape[2]:
        piece = (x[:, :, start : start + size] for x in (q, k, v))
        out, state = model.nala_attention(
            *piece,
            causal=True,
            feature_map=feature_map,
            mode=("chunked", "recurrent")[len(pieces) % 2],
            chunk_size=3,
            state=state,
            return_state=True,
        )
        pieces.append(out)
        start, size = start + size, 2 * size
    return torch.cat(pieces, dim=2)


def causal_form(mode, chunk_size=None):
    def form(model, q, k, v, feature_map):
        return model.nala_attention(
            q, k, v, causal=True, feature_map=feature_map, mode=mode, chunk_size=chunk_size
        )

    return form


CAUSAL_FORMS = {
    "auto": causal_form("auto"),
    "quadratic": causal_form("quadratic"),
    "recurrent": causal_form("recurrent"),
    **{f"chunked by {size}": causal_form("chunked", size) for size in (1, 3, 16, 64, 100)},
    "cut and resumed": cut_and_resume,
}

# --- 1. The published forms -----------------------------------------------------------------------

PUBLISHED = np.load(Path(__file__).parent / "published_forms.npz")
CASES = sorted({name.rpartition("/")[0] for name in PUBLISHED.files})


@pytest.mark.parametrize("case", CASES)
def test_published_forms(model, case):
    """(9), (11): outputs equal those of the released code with eps = 0, for both forms."""
    q, k, v, exact = (torch.from_numpy(PUBLISHED[f"{case}/{x}"]) for x in ("q", "k", "v", "exact"))
    for mode in ("auto", "parallel"):
        out = model.nala_attention(q, k, v, feature_map=case.partition("/")[0], mode=mode)
        assert_close(out, exact, rtol=1e-9, atol=1e-12)


# --- 2. All forms give the same results -----------------------------------------------------------


@pytest.mark.parametrize("num_tokens", [1, 7, 63, 64, 65, 130])
@pytest.mark.parametrize("form", CAUSAL_FORMS)
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_causal_forms_equal_the_loop(model, feature_map, form, num_tokens):
    """(13c), (14), (15): outputs and gradients equal those of (5), token by token."""
    q, k, v = random_qkv(num_tokens)
    want = output_and_gradients(
        lambda *qkv: loop_attention(model, *qkv, feature_map, causal=True), q, k, v
    )
    got = output_and_gradients(lambda *qkv: CAUSAL_FORMS[form](model, *qkv, feature_map), q, k, v)
    assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("num_tokens", [1, 7, 64, 130])
@pytest.mark.parametrize("mode", ["auto", "parallel"])
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_bidirectional_form_equals_the_loop(model, feature_map, mode, num_tokens):
    """(5), (13): outputs and gradients equal those of a loop over queries."""
    q, k, v = random_qkv(num_tokens)
    want = output_and_gradients(
        lambda *qkv: loop_attention(model, *qkv, feature_map, causal=False), q, k, v
    )
    got = output_and_gradients(
        lambda *qkv: model.nala_attention(*qkv, feature_map=feature_map, mode=mode), q, k, v
    )
    assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mode", ["auto", "chunked", "recurrent"])
def test_state_is_the_sum_over_tokens(model, mode):
    """(14): S = sum phi(k)^T v, z = sum phi(k)."""
    q, k, v = random_qkv(9)
    _, state = model.nala_attention(
        q, k, v, causal=True, mode=mode, chunk_size=4, return_state=True
    )
    phi_k = model.key_features(k)
    S, z = torch.einsum("bhnf,bhnm->bhfm", phi_k, v), phi_k.sum(2)
    assert_close(state, torch.cat([S, z[..., None]], -1), rtol=1e-12, atol=1e-12)


MODES = {
    "bidirectional": {"mode": "parallel"},
    "quadratic": {"causal": True, "mode": "quadratic"},
    "chunked": {"causal": True, "mode": "chunked", "chunk_size": 4},
    "recurrent": {"causal": True, "mode": "recurrent"},
    "fast bidirectional": {},
    "fast causal": {"causal": True, "chunk_size": 4},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_gradcheck(model, feature_map, mode):
    """Gradients against finite differences."""
    q, k, v = random_qkv(5, batch=1, heads=2)
    assert torch.autograd.gradcheck(
        lambda *qkv: model.nala_attention(*qkv, feature_map=feature_map, **MODES[mode]),
        (q, k, v),
        raise_exception=False,
    )


def rms_ratio(got, want):
    return ((got.double() - want).square().mean() / want.square().mean()).sqrt().item()


@pytest.mark.parametrize("form", ["fast bidirectional", "bidirectional", *CAUSAL_FORMS])
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)]
)
def test_low_precision_is_near_float64(model, dtype, bound, feature_map, form):
    """Compare outputs and gradients in dtype and in float64, for the same rounded inputs."""

    def attention(q, k, v):
        if form in MODES and form not in CAUSAL_FORMS:
            return model.nala_attention(q, k, v, feature_map=feature_map, **MODES[form])
        return CAUSAL_FORMS[form](model, q, k, v, feature_map)

    low = [x.detach().to(dtype).requires_grad_() for x in random_qkv(65)]
    high = [x.detach().double().requires_grad_() for x in low]
    got, want = output_and_gradients(attention, *low), output_and_gradients(attention, *high)
    for name, g, w in zip(("output", "dq", "dk", "dv"), got, want, strict=True):
        assert g.dtype == dtype, name
        assert rms_ratio(g, w) <= bound, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_half_precision_sums_over_many_tokens(model, feature_map, reference, causal, dtype):
    """Sums over 5,000 tokens: a float16 sum of ones stops at 2,048, a bfloat16 sum at 256. The
    keys are large: their cubes and sums overflow float16."""
    q, k, v = (x.detach().to(dtype) for x in random_qkv(5000, batch=1, heads=1))
    options = {"causal": causal, "feature_map": feature_map}
    options["mode"] = ("chunked" if causal else "parallel") if reference else "auto"
    got = model.nala_attention(q, 40 * k, v, **options)
    want = model.nala_attention(q.double(), (40 * k).double(), v.double(), **options)
    assert rms_ratio(got, want) <= 2e-2
    sums = model.nala_attention(q, 40 * k, torch.ones_like(v), **options)
    mass = model.query_features(q, feature_map).sum(-1, keepdim=True) > 0
    assert mass.double().mean() > 0.9
    assert_close(sums, mass.to(dtype).expand_as(v), rtol=0, atol=1e-2)


@pytest.mark.parametrize("feature_map", SIGNED_MAPS)
def test_options_reach_the_features(model, feature_map):
    q, k, v = random_qkv(9)
    query_options = {"lam": 2.0, "tau": 0.3, "alpha": 1.5, "norm_scale": 4.0}
    key_options = {"lam": 2.0, "alpha": 1.5}
    phi_q = model.query_features(q, feature_map, **query_options)
    weights = phi_q @ model.key_features(k, feature_map, **key_options).mT
    want = weights / weights.sum(-1, keepdim=True)
    assert_close(model.nala_attention(q, k, v, feature_map=feature_map, **query_options), want @ v)
    assert_close(model.attention_weights(q, k, feature_map=feature_map, **query_options), want)
    for name, default in {"lam": 3.0, "tau": 0.5, "alpha": 20.0, "norm_scale": 1.0}.items():
        changed = model.query_features(q, feature_map, **query_options | {name: default})
        assert torch.equal(changed, phi_q) == (name == "alpha" and feature_map == "split"), name


def test_baselines_are_elu_plus_one_and_relu(model):
    x = torch.randn(50, D, dtype=torch.float64)
    for features in (model.query_features, model.key_features):
        assert_close(features(x, "elu"), F.elu(x) + 1)
        assert torch.equal(features(x, "relu"), x.clamp_min(0))
        zero = torch.zeros(1, 1, requires_grad=True)  # elu is smooth: its slope at 0 is 1
        assert torch.autograd.grad(features(zero, "elu").sum(), zero)[0] == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_features_are_at_least_float32(model, feature_map, dtype):
    """Also custom features, in every form."""
    q, k, v = (x.detach().to(dtype) for x in random_qkv(5))
    for features in (model.query_features, model.key_features):
        assert features(q, feature_map).dtype == torch.float32
        assert features(q.double(), feature_map).dtype == torch.float64
    dtypes = []

    def custom(x):
        dtypes.append(x.dtype)
        return torch.relu(x)

    for mode in ("auto", "quadratic", "chunked", "recurrent"):
        out = model.linear_attention(q, k, v, custom, custom, causal=True, mode=mode)
        assert out.dtype == dtype
    assert set(dtypes) <= {torch.float32, torch.float64} and dtypes[-4:] == [torch.float32] * 4


def test_elu_survives_very_negative_bfloat16(model):
    """At x = -20, elu(x) + 1 = exp(x) must not be 0. Rounding elu(x) before adding 1 gives 0."""
    x = torch.tensor([[-20.0]], dtype=torch.bfloat16)
    assert_close(model.key_features(x, "elu").double(), x.double().exp(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("mode", MODES)
def test_autocast_changes_nothing(model, mode):
    """Neither in the forward nor in the backward pass."""
    q, k, v = (x.detach().float().requires_grad_() for x in random_qkv(100))

    def attention(q, k, v):
        return model.nala_attention(q, k, v, **MODES[mode])

    want = output_and_gradients(attention, q, k, v)
    with torch.autocast("cpu", torch.bfloat16):
        got = attention(q, k, v)
    assert torch.equal(got, want[0])
    if "fast" in mode:  # elsewhere, autograd's backward pass follows the user's autocast
        with torch.autocast("cpu", torch.bfloat16):
            got = output_and_gradients(attention, q, k, v)
        for g, w in zip(got, want, strict=True):
            assert torch.equal(g, w)


@pytest.mark.parametrize("mode", ["auto", "chunked"])
def test_chunked_form_keeps_no_state_per_token(model, mode):
    """The largest tensor of both passes holds about N / C states, not N. Other implementations
    form a (B, H, N, F, M) cumulative sum."""

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else [out]:
                if isinstance(x, torch.Tensor):
                    self.numel = max(self.numel, x.numel())
            return out

    num_tokens, chunk_size, size = 1024, 64, 16
    q, k, v = (torch.randn(1, 2, num_tokens, size, requires_grad=True) for _ in range(3))
    with Largest() as largest:
        output_and_gradients(
            lambda *qkv: model.nala_attention(*qkv, causal=True, mode=mode, chunk_size=chunk_size),
            q,
            k,
            v,
        )
    state = 2 * size * (size + 1)
    assert num_tokens * chunk_size < num_tokens * state / 8  # so the bound below separates the two
    assert largest.numel <= 2 * max((num_tokens // chunk_size + 1) * state, num_tokens * chunk_size)


def test_whole_chunks_are_not_copied_for_padding(model):
    """In the readable form, a text that is one token shorter is padded and needs more memory."""
    peaks = []
    for num_tokens in (511, 512):
        q, k, v = torch.randn(3, 1, 1, num_tokens, 64)
        with measure.Recorder() as recorder:
            model.nala_attention(q, k, v, causal=True, mode="chunked")
        peaks.append(recorder.peak)
    assert peaks[1] < 0.8 * peaks[0]


# --- 3. The theorems ------------------------------------------------------------------------------


def test_entropy_by_hand(model):
    """(3) for the weights of four keys: all equal, only one, none, and 3 to 1."""
    weights = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 5.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    weights = torch.cat([weights, torch.tensor([[3.0, 1.0, 0.0, 0.0]])]).double()
    want = torch.tensor([math.log(4), 0, 0, 0.25 * math.log(4) + 0.75 * math.log(4 / 3)]).double()
    assert_close(model.entropy(weights), want)


def test_entropy_of_weights_that_do_not_sum_to_one(model):
    """The scale of the weights does not matter, and the gradient is correct."""
    weights = torch.rand(3, 7, dtype=torch.float64, requires_grad=True)
    assert_close(model.entropy(5 * weights), model.entropy(weights))
    assert torch.autograd.gradcheck(model.entropy, weights, raise_exception=False)


def test_softmax_entropy_falls_with_the_query_norm(model):
    """(4): dPSE/dc = -c Var_p(s), by autograd through the attention weights."""
    k = torch.randn(1, 1, 9, D, dtype=torch.float64)
    _, direction = model.decompose(torch.randn(D, dtype=torch.float64))
    s = (k @ direction).flatten()
    for c in (0.01, 0.5, 1.0, 3.0):
        c = torch.tensor(c, dtype=torch.float64, requires_grad=True)
        q = (c * math.sqrt(D) * direction).expand(1, 1, 9, D)
        pse = model.entropy(model.attention_weights(q, k, feature_map="softmax"))[0, 0, 0]
        p = torch.softmax(c.detach() * s, 0)
        variance = (p * s**2).sum() - (p * s).sum() ** 2
        assert_close(torch.autograd.grad(pse, c)[0], -c.detach() * variance)


def entropies(model, q, k, scales, **options):
    """Entropy of the weights of keys k (N, D) for each scale times query q (D,)."""
    rows = []
    for scale in scales:
        queries = (scale * q).expand(1, 1, *k.shape)
        rows.append(model.entropy(model.attention_weights(queries, k[None, None], **options)))
    return torch.stack(rows)[:, 0, 0, 0]


def test_relu_cancels_the_query_norm_and_elu_does_not(model):
    """(6). Scaling by 4 is exact in floating point, so ReLU's entropies must be identical."""
    q, k = torch.randn(D, dtype=torch.float64), torch.randn(32, D, dtype=torch.float64)
    relu = entropies(model, q, k, (0.25, 1.0, 4.0), feature_map="relu")
    assert relu[0] == relu[1] == relu[2]
    elu = entropies(model, q, k, (0.25, 1.0, 4.0), feature_map="elu")
    softmax = entropies(model, q, k, (0.25, 1.0, 4.0), feature_map="softmax")
    assert 0 < (elu[0] - elu[2]).abs() < 0.2 * (softmax[0] - softmax[2])


@pytest.mark.parametrize("feature_map", SIGNED_MAPS)
def test_query_norm_acts_as_an_exponent(model, feature_map):
    """(7): features are |d|^p up to a factor per query, p = 3 (0.5 + tanh|q|)."""
    direction = torch.tensor([0.8, -0.6, 0.0], dtype=torch.float64)
    for norm in (0.05, 0.3, 1.0, 2.0, 50.0):
        features = model.query_features(norm * direction, feature_map)
        magnitude = features.unflatten(0, (2, 3)).norm(dim=0)  # cos^2 + sin^2 = 1, 1^2 + 0^2 = 1
        power = 3 * (0.5 + math.tanh(norm))
        assert_close(magnitude[1] / magnitude[0], torch.tensor(0.75).double() ** power)
        assert magnitude[2] == 0


def test_norm_scale_divides_the_norm(model):
    """Our extension: tanh(norm / norm_scale), by default with 1.0."""
    norm = torch.tensor([[0.0], [2.0], [8.0]], dtype=torch.float64)
    assert_close(model.query_power(norm, norm_scale=4.0), model.query_power(norm / 4))
    assert_close(model.query_power(norm)[0], torch.tensor([1.5]).double())
    q, k, v = random_qkv(6)
    plain = model.nala_attention(q, k, v)
    assert torch.equal(model.nala_attention(q, k, v, norm_scale=1.0), plain)
    assert (model.nala_attention(q, k, v, norm_scale=4.0) - plain).abs().max() > 1e-3


def test_key_keeps_its_norm(model):
    """(8): a key with twice the norm has 2^lam times the weight."""
    k = torch.randn(10, D, dtype=torch.float64)
    for feature_map in SIGNED_MAPS:
        once, twice = (model.key_features(c * k, feature_map) for c in (1.0, 2.0))
        assert_close(twice, 8 * once)


def adversarial_vectors():
    """Vectors with all sign patterns and many sizes, on the axes and close to them."""
    grid = torch.tensor([-1e3, -1.0, -1e-8, 0.0, 1e-8, 1.0, 1e3], dtype=torch.float64)
    return torch.cartesian_prod(grid, grid, grid)  # (343, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_weights_are_not_negative(model, feature_map, dtype):
    """(10), exactly: no weight is negative even after rounding."""
    for x in (adversarial_vectors(), torch.randn(300, 3, dtype=torch.float64)):
        x = x.to(dtype)
        scores = model.query_features(x, feature_map) @ model.key_features(x, feature_map).mT
        assert scores.min() >= 0
        assert torch.isfinite(scores).all()


@pytest.mark.parametrize("name", ["cosine_map", "sign_split"])
def test_maps_keep_the_norm(model, name):
    """(10): |phi(x)| = |a|; equal signs have weight 1, opposite signs 0."""
    magnitude, direction = torch.rand(100, D).double(), torch.randn(100, D).double()
    norms = getattr(model, name)(magnitude, direction).norm(dim=-1)
    assert_close(norms, magnitude.norm(dim=-1), rtol=1e-12, atol=1e-12)
    one, axis = torch.ones(1, dtype=torch.float64), torch.eye(1, dtype=torch.float64)[0]
    plus, minus = (getattr(model, name)(one, sign * axis) for sign in (1.0, -1.0))
    assert_close(plus @ plus, torch.tensor(1.0).double())
    assert 0 <= plus @ minus < 1e-15


def test_without_the_factor_pi_over_4_weights_are_negative(model):
    """q = e1, k = -e1: angles +-tanh(20) give cos(2) < 0. The factor pi/4 prevents this."""
    axis = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    too_wide = torch.tanh(20 * axis)
    assert_close(torch.cos(too_wide - -too_wide)[0], torch.tensor(math.cos(2)).double())
    assert math.cos(2) < 0 <= model.cosine_map(axis, axis) @ model.cosine_map(axis, -axis)


def test_cosine_map_tends_to_the_sign_split(model):
    """(11): the difference vanishes as alpha grows."""
    a_q, a_k, d_q, d_k = torch.randn(4, 200, D, dtype=torch.float64)
    a_q, a_k = a_q.abs(), a_k.abs()
    limit = (model.sign_split(a_q, d_q) * model.sign_split(a_k, d_k)).sum(-1)
    gaps = []
    for alpha in (2.0, 20.0, 200.0, 1e9):
        maps = model.cosine_map(a_q, d_q, alpha), model.cosine_map(a_k, d_k, alpha)
        gaps.append(((maps[0] * maps[1]).sum(-1) - limit).abs().max())
    assert gaps[0] > gaps[1] > gaps[2] > gaps[3]
    assert gaps[3] < 1e-12


def test_a_channel_of_0_is_in_neither_half_of_the_sign_split(model):
    split = model.sign_split(torch.tensor([2.0, 3.0, 5.0]), torch.tensor([1.0, -1.0, 0.0]))
    assert split.tolist() == [2, 0, 0, 0, 3, 0]


def test_a_larger_norm_does_not_always_lower_the_entropy(model):
    """A counterexample: all keys share channel 0, and one is an outlier in channel 1. As the norm
    grows, NaLa favours the larger channel of d(q), which is the shared one: entropy rises."""
    k = torch.tensor([[1.0, 0.5]] * 7 + [[1.0, 3.0]], dtype=torch.float64)
    q = torch.tensor([0.8, 0.6], dtype=torch.float64)
    scales = (0.05, 0.5, 1.0, 2.0, 4.0)
    assert (entropies(model, q, k, scales).diff() > 0).all()
    assert (entropies(model, q, k, scales, feature_map="softmax").diff() < 0).all()


def test_decompose(model):
    """(2), on a 2 x 3 tensor: the zero vector has direction 0 and finite gradients."""
    x = torch.tensor([[3.0, 0.0, -4.0], [0.0, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    norm, direction = model.decompose(x)
    assert_close(norm, torch.tensor([[5.0], [0.0]]).double())
    assert_close(direction, torch.tensor([[0.6, 0.0, -0.8], [0.0, 0.0, 0.0]]).double())
    (gradient,) = torch.autograd.grad((norm + direction).sum(), x)
    assert torch.isfinite(gradient).all()


def test_safe_power_changes_no_weight(model):
    """(12): the largest channel is 1, the others keep their ratio to it."""
    direction = torch.tensor([[0.6, 0.0, -0.8]], dtype=torch.float64)
    power = torch.tensor([[4.0]], dtype=torch.float64)
    want = torch.tensor([[0.75**4, 0.0, 1.0]], dtype=torch.float64)
    assert_close(model.query_magnitude(direction, power), want)
    assert_close(model.query_magnitude(1e-30 * direction, power), want)


ROTARY = np.load(Path(__file__).parent / "released_rotary.npz")
GRIDS = sorted({name.rpartition("/")[0] for name in ROTARY.files})


@pytest.mark.parametrize("case", GRIDS)
def test_released_rotary(model, case):
    """(17) for images: outputs equal those of the released code with eps = 0."""
    q, k, v, grid, exact = (
        torch.from_numpy(ROTARY[f"{case}/{x}"]) for x in ("q", "k", "v", "grid", "exact")
    )
    positions = torch.cartesian_prod(*(torch.arange(int(size)) for size in grid))
    out = model.nala_attention(q, k, v, feature_map="split", rope_positions=positions)
    assert_close(out, exact, rtol=1e-9, atol=1e-9)


def rotated_by_hand(features, position, dim):
    """Rotate channels 2j and 2j + 1 of each sign half by position times the j-th frequency."""
    out = features.clone()
    for start in range(0, features.shape[-1], dim):
        for j in range(dim // 2):
            angle = position * 10000.0 ** (-j / max(dim // 2 - 1, 1))
            cos, sin = math.cos(angle), math.sin(angle)
            x, y = features[..., start + 2 * j], features[..., start + 2 * j + 1]
            out[..., start + 2 * j], out[..., start + 2 * j + 1] = (
                x * cos - y * sin,
                x * sin + y * cos,
            )
    return out


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_rope_rotates_only_the_numerator(model, feature_map):
    """(17) for text, against a loop: every causal form, and a sequence in two parts."""
    q, k, v = random_qkv(11)
    positions = torch.arange(11)[:, None]
    phi_q, phi_k = model.query_features(q, feature_map), model.key_features(k, feature_map)
    rows = []
    for t in range(11):
        rotated_q = rotated_by_hand(phi_q[:, :, t], t, D)
        numerator = mass = 0
        for i in range(t + 1):
            weight = (rotated_q * rotated_by_hand(phi_k[:, :, i], i, D)).sum(-1, keepdim=True)
            numerator = numerator + weight * v[:, :, i]
            mass = mass + (phi_q[:, :, t] * phi_k[:, :, i]).sum(-1, keepdim=True)
        rows.append(numerator / torch.where(mass > 0, mass, math.inf))
    want = torch.stack(rows, 2)
    options = {"causal": True, "feature_map": feature_map}
    for form in ({"mode": "quadratic"}, {"mode": "recurrent"}, {"chunk_size": 4}):
        got = model.nala_attention(q, k, v, rope_positions=positions, **options, **form)
        assert_close(got, want, rtol=1e-10, atol=1e-10)
    first, rest = ([x[:, :, part] for x in (q, k, v)] for part in (slice(4), slice(4, None)))
    head, state = model.nala_attention(
        *first, rope_positions=positions[:4], return_state=True, **options
    )
    tail = model.nala_attention(*rest, rope_positions=positions[4:], state=state, **options)
    assert_close(torch.cat([head, tail], 2), want, rtol=1e-10, atol=1e-10)


def test_rotary_angles_split_the_channels_between_the_axes(model):
    """(17) for images: half of the angles encode the row and half the column, and the last
    frequency of each is 1 / 10,000."""
    positions = torch.tensor([[0, 0], [0, 3], [2, 0], [5, 7]])
    want = [[r, r / 1e4, s, s / 1e4] for r, s in positions.tolist()]
    assert_close(model.rotary_angles(positions, 8), torch.tensor(want))
    assert_close(model.rotary_angles(positions, 4), positions.float())  # one frequency each


# --- 4. Safety ------------------------------------------------------------------------------------


@pytest.mark.parametrize("key_scale", [1e-3, 1e-2, 1.0, 30.0, 1e3])
@pytest.mark.parametrize("query_scale", [1e-6, 1e-3, 1.0, 1e4])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("feature_map", SIGNED_MAPS)
def test_rows_sum_to_one(model, feature_map, mode, query_scale, key_scale):
    """In float32, at scales where an eps in the denominator would show."""
    q, k = (scale * torch.randn(B, H, 33, 16) for scale in (query_scale, key_scale))
    sums = model.nala_attention(
        q, k, torch.ones(B, H, 33, 1), feature_map=feature_map, **MODES[mode]
    )
    assert_close(sums, torch.ones_like(sums), rtol=0, atol=1e-6)
    weights = model.attention_weights(q, k, causal="causal" in MODES[mode], feature_map=feature_map)
    assert weights.min() >= 0
    assert_close(weights.sum(-1), torch.ones(B, H, 33), rtol=0, atol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_softmax_attention_by_hand(model, causal):
    """(1), one query at a time; from the start, and from a state of two tokens."""
    q, k, v = random_qkv(5)
    out = model.softmax_attention(q, k, v, causal=causal)
    _, state = model.softmax_attention(
        q[:, :, :2], k[:, :, :2], v[:, :, :2], causal=True, return_state=True
    )
    rest = model.softmax_attention(q[:, :, 2:], k[:, :, 2:], v[:, :, 2:], causal=True, state=state)
    for b, h, t in itertools.product(range(B), range(H), range(5)):
        visible = range(t + 1 if causal else 5)
        scores = [math.exp((q[b, h, t] @ k[b, h, i]).item() / math.sqrt(D)) for i in visible]
        want = sum(scores[i] * v[b, h, i] for i in visible) / sum(scores)
        assert_close(out[b, h, t], want)
        if causal and t >= 2:
            assert_close(rest[b, h, t - 2], want)


@pytest.mark.parametrize("num_keys", [D, D + 1])
def test_fewer_queries_than_keys_are_the_last_ones(model, num_keys):
    """With a mask, without one, and with a state."""
    q, k, v = (x.detach() for x in random_qkv(num_keys))
    want = model.softmax_attention(q, k, v, causal=True)[:, :, 3:]
    mask = torch.ones(B, num_keys, dtype=torch.bool)
    assert_close(model.softmax_attention(q[:, :, 3:], k, v, causal=True), want)
    assert_close(model.softmax_attention(q[:, :, 3:], k, v, causal=True, key_mask=mask), want)
    past = k[:, :, :3], v[:, :, :3]
    new = (x[:, :, 3:] for x in (q, k, v))
    assert_close(model.softmax_attention(*new, causal=True, state=past), want)
    with pytest.raises(
        ValueError, match=f"k must have at least as many tokens as q if causal, got 2 < {num_keys}"
    ):
        nala_min.softmax_attention(q, k[:, :, :2], v[:, :, :2], causal=True)


@pytest.mark.parametrize("feature_map", [*FEATURE_MAPS, "softmax"])
@pytest.mark.parametrize("causal", [False, True])
def test_weights_times_values_give_the_output(model, feature_map, causal):
    q, k, v = random_qkv(20)
    if feature_map == "softmax":
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    else:
        out = model.nala_attention(q, k, v, causal=causal, feature_map=feature_map)
    weights = model.attention_weights(q, k, causal=causal, feature_map=feature_map)
    assert_close(weights @ v, out)
    if feature_map in ("cosine", "elu", "softmax"):  # a clipped query may have no mass
        assert_close(weights.sum(-1), torch.ones(B, H, 20, dtype=torch.float64))
    if causal:
        assert torch.equal(weights, weights.tril())


DEGENERATE = {
    "zero query row": lambda q, k: q[:, :, 2].zero_(),
    "every query zero": lambda q, k: q.zero_(),
    "zero key row": lambda q, k: k[:, :, 0].zero_(),
    "every key zero": lambda q, k: k.zero_(),
    "exact-zero channels": lambda q, k: (q[..., 1].zero_(), k[..., 2].zero_()),
    "exact-zero channel of a small query": lambda q, k: q.mul_(1e-4)[..., 1].zero_(),
    "one channel alone": lambda q, k: (q[..., 1:].zero_(), k[..., 1:].zero_()),
    "one visible key": lambda q, k: k[:, :, 1:].zero_(),
    "query and keys without a common channel": lambda q, k: (q[..., 1:].zero_(), k[..., 0].zero_()),
}


@pytest.mark.parametrize("num_tokens", [1, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("damage", DEGENERATE)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_degenerate_inputs_stay_finite(model, feature_map, mode, damage, dtype, num_tokens):
    q, k, v = (x.detach().to(dtype) for x in random_qkv(max(num_tokens, 3)))
    DEGENERATE[damage](q, k)
    q, k, v = (x[:, :, :num_tokens].requires_grad_() for x in (q, k, v))
    results = output_and_gradients(
        lambda *qkv: model.nala_attention(*qkv, feature_map=feature_map, **MODES[mode]), q, k, v
    )
    for name, x in zip(("output", "dq", "dk", "dv"), results, strict=True):
        assert torch.isfinite(x).all(), name


@pytest.mark.parametrize("cause", ["query", "keys", "mask"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_no_mass_gives_output_and_gradient_zero(model, feature_map, mode, cause):
    if feature_map == "elu":
        cause = "mask"  # elu(0) + 1 = 1: zero vectors have mass
    q, k, v = random_qkv(6)
    with torch.no_grad():
        if cause != "mask":
            {"query": q, "keys": k}[cause].zero_()
    mask = torch.full((B, 6), cause != "mask")
    results = output_and_gradients(
        lambda *qkv: model.nala_attention(
            *qkv, feature_map=feature_map, key_mask=mask, **MODES[mode]
        ),
        q,
        k,
        v,
    )
    for x in results:
        assert torch.equal(x, torch.zeros_like(x))


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("feature_map", [*FEATURE_MAPS, "softmax"])
def test_padding_changes_nothing(model, feature_map, mode, side):
    """Garbage in padding changes no output or gradient of real tokens. Its own gradients are 0."""

    def attention(q, k, v, key_mask=None):
        if feature_map == "softmax":
            return model.softmax_attention(
                q, k, v, causal="causal" in MODES[mode], key_mask=key_mask
            )
        return model.nala_attention(
            q, k, v, feature_map=feature_map, key_mask=key_mask, **MODES[mode]
        )

    q, k, v = random_qkv(9)
    want = output_and_gradients(attention, q, k, v)
    left, _ = {"left": (5, 0), "right": (0, 5), "both": (3, 2)}[side]
    real = slice(left, left + 9)
    mask = torch.zeros(B, 14, dtype=torch.bool)
    mask[:, real] = True

    def pad(x):
        garbage = 100 * torch.randn(B, H, 14, x.shape[-1], dtype=x.dtype)
        garbage[:, :, real] = x.detach()
        return garbage.requires_grad_()

    padded = [pad(x) for x in (q, k, v)]
    got = output_and_gradients(lambda *qkv: attention(*qkv, key_mask=mask)[:, :, real], *padded)
    assert_close(got[0], want[0], rtol=1e-10, atol=1e-10)
    for gradient, expected in zip(got[1:], want[1:], strict=True):
        assert_close(gradient[:, :, real], expected, rtol=1e-10, atol=1e-10)
        assert (gradient[:, :, ~mask[0]] == 0).all()


def test_each_row_of_a_batch_has_its_own_padding(model):
    q, k, v = random_qkv(8)
    mask = torch.tensor([[True] * 3 + [False] * 5, [False] * 8])
    out = model.nala_attention(q, k, v, key_mask=mask)
    alone = model.nala_attention(q[:1, :, :3], k[:1, :, :3], v[:1, :, :3])
    assert_close(out[:1, :, :3], alone)
    assert (out[1] == 0).all()


@pytest.mark.parametrize("size", [1.0, 1e9])
@pytest.mark.parametrize("mode", [mode for mode, options in MODES.items() if "causal" in options])
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_the_future_changes_no_past_output(model, feature_map, mode, size):
    """Exactly, in float32, even if the future is large enough to swamp the past."""
    q, k, v = (x.detach().float() for x in random_qkv(13))
    before = model.nala_attention(q, k, v, feature_map=feature_map, **MODES[mode])
    for cut in range(1, 13):
        changed = [x.clone() for x in (q, k, v)]
        for x in changed:
            x[:, :, cut:] = size * torch.randn_like(x[:, :, cut:])
        after = model.nala_attention(*changed, feature_map=feature_map, **MODES[mode])
        assert torch.equal(after[:, :, :cut], before[:, :, :cut])
        assert not torch.equal(after[:, :, cut], before[:, :, cut])


@pytest.mark.parametrize("mode", MODES)
def test_heads_and_batches_do_not_mix(model, mode):
    q, k, v = random_qkv(7)
    want = model.nala_attention(q, k, v, **MODES[mode])
    for b in range(B):
        for h in range(H):
            one = (x[b : b + 1, h : h + 1] for x in (q, k, v))
            got = model.nala_attention(*one, **MODES[mode])
            assert_close(got[0, 0], want[b, h], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "fast"}, "mode must be one of .*, got 'fast'"),
        ({"mode": "chunked"}, "causal must be True for mode='chunked', got False"),
        ({"mode": "recurrent"}, "causal must be True for mode='recurrent'"),
        ({"feature_map": "gelu"}, "feature_map must be one of .*, got 'gelu'"),
        ({"feature_map": "softmax"}, "feature_map must be one of .*, got 'softmax'"),
        ({"causal": True, "chunk_size": 0}, "chunk_size must be a positive integer, got 0"),
        ({"key_mask": torch.ones(B, 7)}, r"key_mask must be bool \(B, N\), got float32"),
        ({"key_mask": torch.ones(B, 3, dtype=torch.bool)}, "with N = 7, as in q, got bool"),
        ({"return_state": True}, "causal must be True for a state, got False"),
        ({"causal": True, "state": torch.zeros(B, H, 2 * D, M)}, "state must be"),
        ({"causal": True, "state": torch.zeros(B, H, D, M + 1)}, "state must be .* with F = 8"),
        ({"k": torch.zeros(B, H, 6, D)}, r"k must be .* with N = 7, as in q, got float32 \(2, 3"),
        ({"v": torch.zeros(B, H, 6, M)}, r"v must be .* \(B, H, N, M\) with N = 7, as in q, got"),
        ({"q": torch.zeros(7, D)}, r"q must be .* \(B, H, N, D\), got float32 \(7, 4\)"),
        ({"norm_scale": torch.ones(D)}, r"norm_scale must be floating-point \(..., 1, 1\)"),
        ({"rope_positions": torch.zeros(7, 3)}, "D must be divisible by 2 x 3 axes, got 4"),
        ({"mode": "quadratic"}, "causal must be True for mode='quadratic'"),
        (
            {"causal": True, "mode": "quadratic", "return_state": True},
            "for a state, got 'quadratic'",
        ),
        (
            {"causal": True, "mode": "parallel", "return_state": True},
            "mode must be .*, got 'parallel'",
        ),
        ({"k": torch.zeros(B, H, 7, D, dtype=torch.int64)}, "k must be floating-point .* int64"),
    ],
)
def test_invalid_arguments_are_rejected(change, message):
    q, k, v = (x.float() for x in random_qkv(7))
    arguments = {"q": q, "k": k, "v": v} | change
    with pytest.raises((ValueError, TypeError), match=message):
        nala_min.nala_attention(**arguments)


FORM_NAMES = ("parallel", "quadratic", "recurrent", "chunked")


def test_a_mode_runs_its_own_form(model, monkeypatch):
    """Results cannot show this: all forms give the same, at different costs."""
    calls, q, k, v = [], *(x[:, :, :3] for x in random_qkv(7))
    for name in FORM_NAMES:
        form = getattr(model, name)
        recorded = partial(lambda name, form, *x: (calls.append(name), form(*x))[1], name, form)
        monkeypatch.setattr(model, name, recorded)
    monkeypatch.setattr(model.fast, "attention", lambda *_, **__: None)
    for mode, causal in (("auto", False), ("parallel", False), ("parallel", True)):
        model.nala_attention(q, k, v, mode=mode, causal=causal)
    for mode in ("quadratic", "recurrent", "chunked", "auto"):
        model.nala_attention(q, k, v, mode=mode, causal=True)
    for n in (1, 2):
        model.nala_attention(*(x[:, :, :n] for x in (q, k, v)), causal=True)
    expected = ["parallel", "parallel", "quadratic", "quadratic", "recurrent", "chunked", "chunked"]
    assert calls == [*expected, "recurrent", "chunked"]


def test_defaults_are_those_of_the_paper(model):
    """lambda = 3, tau = 0.5 and alpha = 20, Eqs. (7) to (9), in every signature."""
    paper = {"lam": 3.0, "tau": 0.5, "alpha": 20.0, "norm_scale": 1.0}
    checked = set()
    for name in ("query_power", "key_magnitude", "cosine_map", "query_features", "key_features"):
        for function in (getattr(model, name), model.nala_attention):
            for parameter in inspect.signature(function).parameters.values():
                if parameter.name in paper:
                    assert parameter.default == paper[parameter.name], (name, parameter)
                    checked.add((function.__name__, parameter.name))
    assert len(checked) == 3 + 1 + 1 + 4 + 2 + 4
    assert inspect.signature(model.NaLaLM.generate).parameters["temperature"].default == 1.0
    assert nala_min.LMConfig(vocab_size=2).conv_size == 4 and nala_min.ViTConfig().conv_size == 5


@pytest.mark.parametrize(("kind", "dim"), [("LM", 6), ("ViT", 12)])
def test_heads_that_cannot_be_rotated_are_rejected(kind, dim):
    """3 channels do not form pairs, nor do 6 form pairs for each of two axes."""
    with pytest.raises(ValueError, match=f"rope: channels per head must be .*, got {dim // 2}"):
        MODELS[kind](nala_min, dim=dim, rope="numerator", patch_size=1)


def test_rotation_keeps_dtype_and_shape(model):
    rotated = model.rotate(torch.randn(3, 4), torch.rand(3, 2, dtype=torch.float64))
    assert rotated.dtype == torch.float32 and rotated.shape == (3, 4)


# --- 5. The language model ------------------------------------------------------------------------

ATTENTIONS = ("nala", "split", "elu", "relu", "softmax")
MAPS = {"nala": "cosine"}  # attentions whose feature map has another name


def config_of(model, kind):
    """The package's LMConfig or ViTConfig, with checks, or model.py's Config, without."""
    return getattr(nala_min, f"{kind}Config") if model is nala_min else model.Config


def small_lm(model, **options):
    sizes = {"vocab_size": 11, "num_layers": 2, "num_heads": 2, "dim": 16, "conv_size": 3}
    return model.NaLaLM(config_of(model, "LM")(**sizes | options))


VARIANTS = [{"attention": name} for name in ATTENTIONS] + [
    {"attention": ("split", "softmax")},
    {"attention": ["softmax", "nala"]},
    {"rope": "numerator"},
    {"norm_scale": None},
    {"conv_size": 1},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_decoding_equals_recomputing_the_whole_prefix(model, options):
    """Greedy decoding in float64. Large weights make the tokens vary."""
    lm = small_lm(model, **options).double()
    for parameter in lm.parameters():
        parameter.data.mul_(5.0)
    prompt = torch.randint(11, (3, 5))
    want = prompt
    for _ in range(30):
        logits, _ = lm(want)
        want = torch.cat([want, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert len(want.unique()) > 3
    assert torch.equal(lm.generate(prompt, 30, temperature=0), want)


def test_a_block_adds_both_branches(model):
    """Pre-norm and residual: x + attention(norm(x)), then x + mlp(norm(x))."""
    block = small_lm(model).blocks[0].double()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    y, _ = block.attention(block.norm1(x), model.BlockState())
    want = x + y + block.mlp(block.norm2(x + y))
    assert_close(block(x, model.BlockState())[0], want)


def test_a_state_counts_the_tokens_read(model):
    lm, tokens = small_lm(model), torch.zeros(1, 5, dtype=torch.long)
    _, state = lm(tokens)
    assert [block.position for block in state] == [5, 5]
    assert [block.position for block in lm(tokens, state)[1]] == [10, 10]


def test_generate_records_no_gradients(model):
    lm, enabled = small_lm(model), []
    lm.head.register_forward_hook(lambda *call: enabled.append(torch.is_grad_enabled()))
    lm.generate(torch.zeros(1, 2, dtype=torch.long), 2)
    assert enabled == [False, False]


def test_the_input_state_is_not_modified(model):
    lm, tokens = small_lm(model), torch.zeros(1, 2, dtype=torch.long)
    _, state = lm(tokens)
    before = list(state)
    lm(tokens, state)
    assert all(x is y for x, y in zip(state, before, strict=True))
    assert_close(lm(tokens, tuple(state))[0], lm(tokens, before)[0])


def test_an_empty_batch_of_texts(model):
    logits, state = small_lm(model)(torch.zeros(0, 3, dtype=torch.long))
    assert logits.shape == (0, 3, 11) and state[0].position == 3


def test_states_of_another_model_are_rejected():
    lm, tokens = small_lm(nala_min), torch.zeros(1, 2, dtype=torch.long)
    with pytest.raises(ValueError, match="state must be 2 items, one per block, got 1"):
        lm(tokens, lm(tokens)[1][:1])


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_every_parameter_gets_a_gradient(model, options):
    lm = small_lm(model, **options)
    logits, _ = lm(torch.randint(11, (2, 12)))
    F.cross_entropy(logits.flatten(0, 1), torch.randint(11, (24,))).backward()
    for name, parameter in lm.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_bfloat16_autocast_is_near_float32(model, options):
    """As in the gpu preset: compares the logits and the gradients of all parameters."""
    lm = small_lm(model, **options)
    tokens = torch.randint(11, (4, 30))
    logits, gradients = [], []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logits.append(lm(tokens)[0].float())
        loss = F.cross_entropy(logits[-1].flatten(0, 1), tokens.flatten())
        gradients.append(
            torch.cat([g.flatten() for g in torch.autograd.grad(loss, lm.parameters())])
        )
    assert rms_ratio(logits[1], logits[0].double()) < 2e-2
    assert rms_ratio(gradients[1], gradients[0].double()) < 5e-2


def test_the_language_model_does_not_see_the_future(model):
    lm = small_lm(model)
    tokens = torch.randint(11, (1, 20))
    changed = tokens.clone()
    changed[:, 10] = (tokens[:, 10] + 1) % 11
    before, after = lm(tokens)[0], lm(changed)[0]
    assert torch.equal(after[:, :10], before[:, :10])
    assert not torch.equal(after[:, 10:], before[:, 10:])


def test_gated_block_by_hand(model):
    """(16), with the local convolution as a sum over tokens."""
    config = model.Config(vocab_size=5, num_heads=2, dim=8, conv_size=3)
    block = model.GatedAttention(config, "nala", causal=True).double()
    x = torch.randn(1, 6, 8, dtype=torch.float64)
    q, k, v, gate = (x @ w.T for w in block.project.weight.chunk(4))
    heads = [y.view(1, 6, 2, 4).transpose(1, 2) for y in (q, k, v)]
    o = loop_attention(model, *heads, "cosine", causal=True).transpose(1, 2).reshape(1, 6, 8)
    w, bias = block.local.conv.weight[:, 0], block.local.conv.bias
    local = torch.stack(
        [sum(w[:, j] * v[:, t + j - 2] for j in range(3) if t + j >= 2) + bias for t in range(6)], 1
    )
    y = F.layer_norm(o + local, (8,), block.norm.weight, block.norm.bias)
    want = (y * gate * torch.sigmoid(gate)) @ block.out.weight.T
    assert_close(block(x, model.BlockState())[0], want)


def test_generate_is_seeded_and_keeps_the_mode(model):
    lm = small_lm(model)
    lm.train()
    prompt = torch.randint(11, (2, 3))
    a, b, c = (lm.generate(prompt, 40, seed=seed) for seed in (1, 1, 2))
    assert a.shape == (2, 43)
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(a[:, :3], prompt)
    assert lm.training
    assert torch.equal(lm.generate(prompt, 40, top_k=1), lm.generate(prompt, 40, temperature=0))
    assert torch.equal(lm.generate(prompt, 40, top_k=99, seed=1), a)


def test_top_k_keeps_k_tokens_of_equal_logits(model):
    """Also, a temperature close to 0 selects the most likely token."""
    lm, prompt = small_lm(model), torch.zeros(2000, 1, dtype=torch.long)
    lm.head.weight.data.zero_()
    for top_k in (1, 3, 99):
        drawn = lm.generate(prompt, 1, top_k=top_k, seed=0)[:, 1]
        assert len(drawn.unique()) == min(top_k, 11)
    lm = small_lm(model)
    for temperature in (1e-40, 1e-30):
        got = lm.generate(prompt[:2], 20, temperature=temperature, seed=0)
        assert torch.equal(got, lm.generate(prompt[:2], 20, temperature=0))


def test_generate_restores_the_mode_of_every_module():
    """Also after an error, and if modules are in different modes."""
    lm = small_lm(nala_min, dropout=0.5).train()
    lm.blocks[0].eval()
    modes = [module.training for module in lm.modules()]
    lm.generate(torch.zeros(1, 2, dtype=torch.long), 2)
    assert [module.training for module in lm.modules()] == modes
    lm.head.register_forward_hook(lambda *call: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        lm.generate(torch.zeros(1, 2, dtype=torch.long), 2)
    assert [module.training for module in lm.modules()] == modes


def test_states_that_do_not_fit_the_tokens_are_rejected():
    lm, tokens = small_lm(nala_min), torch.zeros(2, 3, dtype=torch.long)
    _, state = lm(tokens)
    with pytest.raises(ValueError, match="state must be of batch size 1, like tokens, got 2"):
        lm(tokens[:1], state)
    with pytest.raises(TypeError, match="state must be BlockStates, as forward returns, got 1"):
        lm(tokens, [1, 2])
    _, state = nala_min.nala_attention(*random_qkv(3), causal=True, return_state=True)
    for mode in ("auto", "chunked", "recurrent"):
        with pytest.raises(TypeError, match=r"state must be torch\.float32, like q, got float64"):
            low = (x.float() for x in random_qkv(3))
            nala_min.nala_attention(*low, causal=True, state=state, mode=mode)


# --- Tensors without values -----------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"rope": "numerator"}, {"attention": "softmax"}], ids=str)
@pytest.mark.parametrize("kind", ["LM", "ViT"])
def test_models_run_on_tensors_without_values(kind, options):
    """Forward and backward, on "meta" (not the default device) and with fake tensors."""
    inputs = torch.zeros(2, 9, dtype=torch.long) if kind == "LM" else torch.randn(2, 3, 9, 6)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    for context, device in ((contextlib.nullcontext(), "meta"), (fake, "cpu")):
        with context:
            with torch.device(device):
                net = MODELS[kind](nala_min, **options)
            out = net(inputs.to(device))
            out = out[0] if kind == "LM" else out
            out.sum().backward()
        assert out.shape == ((2, 9, 11) if kind == "LM" else (2, 7))
        assert all(parameter.grad.shape == parameter.shape for parameter in net.parameters())


@pytest.mark.parametrize("kind", ["LM", "ViT"])
def test_a_saved_export_gives_the_same_output(kind):
    net = MODELS[kind](nala_min).eval()
    inputs = torch.randint(11, (2, 9)) if kind == "LM" else torch.randn(2, 3, 9, 6)
    torch.export.save(torch.export.export(net, (inputs,)), content := io.BytesIO())
    content.seek(0)
    loaded = torch.export.load(content).module()
    assert_close(loaded(inputs), net(inputs))


def test_unsupported_wrappers_say_what_to_use():
    lm = small_lm(nala_min)
    with pytest.raises(TypeError, match=r"use torch\.export"):
        torch.fx.symbolic_trace(lm)
    with pytest.raises(TypeError, match=r"use torch\.export"):
        torch.fx.symbolic_trace(lambda q, k, v: nala_min.nala_attention(q, k, v))
    with pytest.raises(TypeError, match=r"DataParallel .* use torchrun"):
        lm._replicate_for_data_parallel()  # DataParallel calls this


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_changes_no_angle(model, dtype):
    positions = torch.arange(3000)[:, None]
    want = model.rotary_angles(positions, 8)
    torch.set_default_dtype(dtype)
    try:
        assert torch.equal(model.rotary_angles(positions, 8), want)
        q, k, v = (x.float() for x in random_qkv(40))
        assert model.nala_attention(q, k, v, causal=True).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_an_unknown_keyword_is_rejected():
    q, k, v = random_qkv(3)
    for call in (nala_min.nala_attention, nala_min.linear_attention, nala_min.softmax_attention):
        with pytest.raises(TypeError, match="casual"):
            call(q, k, v, casual=True)
    for feature_map in ("cosine", "softmax", "elu"):
        with pytest.raises(TypeError, match="casual"):
            nala_min.attention_weights(q, k, feature_map=feature_map, casual=True)
    with pytest.raises(TypeError, match="lam"):
        nala_min.attention_weights(q, k, feature_map="softmax", lam=3.0)


def test_dropout_acts_in_training_only(model):
    lm = small_lm(model, dropout=0.5)
    tokens = torch.randint(11, (1, 9))
    assert not torch.equal(lm(tokens)[0], lm(tokens)[0])
    drawn = lm.generate(tokens, 20, temperature=0)  # although lm is in training mode
    lm.eval()
    assert torch.equal(lm(tokens)[0], lm(tokens)[0])
    assert torch.equal(lm.generate(tokens, 20, temperature=0), drawn)
    assert not lm.training


def test_dropout_follows_the_embedding_and_both_branches_of_each_block(model):
    lm, calls = small_lm(model), []
    for module in lm.modules():
        if isinstance(module, torch.nn.Dropout):
            module.register_forward_hook(lambda *_: calls.append(1))
    lm(torch.randint(11, (1, 9)))
    assert len(calls) == 1 + 2 * len(lm.blocks)


def test_a_learned_norm_scale_starts_at_the_root_of_the_channels(model):
    config = model.Config(vocab_size=5, dim=64, num_heads=4, norm_scale=None)
    block = model.GatedAttention(config, "nala", causal=True)
    assert block.norm_scale.tolist() == [4.0] * 4


def check_initial_weights(net):
    """The standard deviation is 0.02. In the layers that end a residual branch, it is divided by
    the root of the number of branches."""
    ends = [end for block in net.blocks for end in (block.attention.out, block.mlp[-1])]
    for module in net.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            want = 0.02 / math.sqrt(len(ends)) if module in ends else 0.02
            assert module.weight.std().item() == pytest.approx(want, rel=0.1)


def test_the_stem_ignores_the_scale_of_its_first_convolution(model):
    """It normalises each whole image before every later convolution."""
    vit = small_vit(model, patch_size=4).double()
    images = torch.randn(2, 3, 16, 12, dtype=torch.float64)
    before = vit.stem(images)
    for parameter in vit.stem[0].parameters():
        parameter.data.mul_(7.0)
    assert_close(vit.stem(images), before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("patch_size", "strides"), [(1, [1, 1]), (2, [1, 2, 1]), (4, [1, 2, 1, 2, 1])]
)
def test_the_stem_has_two_convolutions_per_halving(model, patch_size, strides):
    """It goes from 3 channels to half the width, then to the full width."""
    convolutions = [x for x in small_vit(model, patch_size=patch_size).stem if hasattr(x, "stride")]
    assert [x.stride for x in convolutions] == [(stride, stride) for stride in strides]
    assert [x.in_channels for x in convolutions] == [3, 8, *[16] * (len(strides) - 2)]
    assert [x.out_channels for x in convolutions] == [8, *[16] * (len(strides) - 1)]


def test_initial_weights(model):
    """The first loss is close to that of uniform guesses."""
    lm = small_lm(model, num_layers=8, dim=128)
    check_initial_weights(lm)
    logits = lm(torch.randint(11, (4, 64)))[0].flatten(0, 1)
    loss = F.cross_entropy(logits, torch.randint(11, (256,))).item()
    assert loss == pytest.approx(math.log(11), abs=0.2)


def test_temperature_and_top_k_shape_the_draw(model):
    lm = small_lm(model)
    prompt = torch.zeros(4000, 1, dtype=torch.long)
    logits = lm(prompt[:1])[0][0, -1]
    for temperature, top_k in ((1.0, None), (0.1, None), (1.0, 3)):
        kept = (
            logits
            if top_k is None
            else logits.where(logits >= logits.topk(3).values[-1], -math.inf)
        )
        want = torch.softmax(kept / temperature, 0)
        drawn = lm.generate(prompt, 1, temperature=temperature, top_k=top_k, seed=0)[:, 1]
        got = torch.bincount(drawn, minlength=11) / 4000
        assert (got - want).abs().max() < 0.04
        assert (got[want == 0] == 0).all()


def test_decoding_state_does_not_grow(model):
    """NaLa's state has a constant size; softmax's cache grows."""

    def numel(state):
        if isinstance(state, torch.Tensor):
            return state.numel()
        return sum(map(numel, state)) if isinstance(state, tuple | list) else 0

    for attention, grows in (("nala", False), ("softmax", True)):
        lm = small_lm(model, attention=attention)
        _, short = lm(torch.randint(11, (1, 8)))
        _, long = lm(torch.randint(11, (1, 80)))
        assert (numel(long) > numel(short)) == grows


def test_overfits_a_short_text(model):
    """It memorises 200 characters: the loss falls below 0.1."""
    text = "First Citizen: before we proceed any further, hear me speak. All: speak, speak. " * 3
    characters = sorted(set(text))
    tokens = torch.tensor([characters.index(c) for c in text[:201]])[None]
    lm = small_lm(model, vocab_size=len(characters), dim=32)
    optimizer = torch.optim.AdamW(lm.parameters(), lr=1e-2)
    for _ in range(150):
        logits, _ = lm(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


# --- 6. The image model ---------------------------------------------------------------------------


def small_vit(model, **options):
    sizes = {"num_classes": 7, "num_layers": 2, "num_heads": 2, "dim": 16, "conv_size": 3}
    return model.NaLaViT(config_of(model, "ViT")(**{"patch_size": 2} | sizes | options))


MODELS = {"LM": small_lm, "ViT": small_vit}
VIT_VARIANTS = [*VARIANTS, {"patch_size": 1}, {"patch_size": 4, "conv_size": 5}]


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 9), (5, 7), (32, 32), (33, 20)])
@pytest.mark.parametrize("patch_size", [1, 2, 4, 8, 16])
def test_images_and_patches_may_have_any_size(model, patch_size, height, width):
    """The number of patches is rounded up in both directions."""
    vit, grids = small_vit(model, patch_size=patch_size), []
    vit.blocks[0].register_forward_pre_hook(lambda _, arguments: grids.append(arguments[0].shape))
    logits = vit(torch.randn(2, 3, height, width))
    assert grids == [(2, math.ceil(height / patch_size), math.ceil(width / patch_size), 16)]
    assert logits.shape == (2, 7) and torch.isfinite(logits).all()


@pytest.mark.parametrize("options", VIT_VARIANTS, ids=str)
def test_every_parameter_of_an_image_model_gets_a_gradient(model, options):
    vit = small_vit(model, **options)
    F.cross_entropy(vit(torch.randn(4, 3, 11, 6)), torch.randint(7, (4,))).backward()
    for name, parameter in vit.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("options", VIT_VARIANTS, ids=str)
def test_every_pixel_matters(model, options):
    """The stem skips no pixel, even at the edges."""
    images = torch.randn(1, 3, 9, 6, dtype=torch.float64, requires_grad=True)
    vit = small_vit(model, **options).double()
    (gradient,) = torch.autograd.grad(vit(images)[0, 0], images)
    assert (gradient != 0).all()


@pytest.mark.parametrize("options", VIT_VARIANTS, ids=str)
def test_bfloat16_autocast_of_an_image_model_is_near_float32(model, options):
    """As in the gpu preset: compares the logits and the gradients of all parameters."""
    vit, images = small_vit(model, **options), torch.randn(4, 3, 12, 8)
    logits, gradients = [], []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logits.append(vit(images).float())
        loss = F.cross_entropy(logits[-1], torch.arange(4))
        gradients.append(
            torch.cat([g.flatten() for g in torch.autograd.grad(loss, vit.parameters())])
        )
    assert rms_ratio(logits[1], logits[0].double()) < 2e-2
    assert rms_ratio(gradients[1], gradients[0].double()) < 5e-2


@pytest.mark.parametrize("options", VIT_VARIANTS, ids=str)
def test_float32_images_are_near_float64(model, options):
    vit, images = small_vit(model, **options), torch.randn(4, 3, 12, 8)
    got, want = vit(images), vit.double()(images.double())
    assert want.dtype == torch.float64
    assert rms_ratio(got, want) < 1e-5


@pytest.mark.parametrize("attention", [*ATTENTIONS, ("split", "softmax"), ("elu", "nala")])
@pytest.mark.parametrize("kind", MODELS)
def test_the_blocks_are_the_same_for_every_attention(model, kind, attention):
    """For a fair comparison, all parameters have the same names and shapes."""
    shapes, expected = (
        {name: parameter.shape for name, parameter in net.named_parameters()}
        for net in (MODELS[kind](model, attention=attention), MODELS[kind](model))
    )
    assert shapes == expected


@pytest.mark.parametrize("names", list(itertools.product(ATTENTIONS, repeat=2)), ids="-".join)
def test_each_block_has_the_configured_attention(model, names):
    """The model equals one assembled from blocks of models with a single attention."""
    vit = small_vit(model, attention=names).double()
    images = torch.randn(2, 3, 6, 10, dtype=torch.float64)
    x = vit.stem(images).movedim(1, -1)
    for i, name in enumerate(names):
        single = small_vit(model, attention=name).double()
        single.load_state_dict(vit.state_dict())
        x, _ = single.blocks[i](x, model.BlockState())
    x = F.layer_norm(x, (16,), vit.norm.weight, vit.norm.bias)
    mean = sum(x[:, r, s] for r in range(3) for s in range(5)) / 15
    assert_close(vit(images), mean @ vit.head.weight.T + vit.head.bias)


@pytest.mark.parametrize("names", [("nala", "softmax"), ("softmax", "nala")], ids="-".join)
def test_each_block_of_the_language_model_has_its_attention(model, names):
    """Only softmax has a pair as its state: keys and values."""
    _, states = small_lm(model, attention=names)(torch.randint(11, (1, 4)))
    assert [isinstance(state.attention, tuple) for state in states] == [
        name == "softmax" for name in names
    ]


def test_split_heads_takes_patches_row_by_row(model):
    config = model.Config(num_heads=3, dim=12, conv_size=5)
    x = torch.randn(2, 4, 5, 12)
    heads = model.GatedAttention(config, "nala", causal=False).split_heads(x)
    assert heads.shape == (2, 3, 20, 4)
    for h, r, s in itertools.product(range(3), range(4), range(5)):
        assert torch.equal(heads[:, h, 5 * r + s], x[:, r, s, 4 * h : 4 * h + 4])


def attention_by_hand(model, q, k, v, name):
    """Bidirectional attention, selected by name; softmax as in Eq. (1)."""
    if name == "softmax":
        return torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), -1) @ v
    return loop_attention(model, q, k, v, MAPS.get(name, name), causal=False)


def gated_by_hand(block, x, attention):
    """(16) on a grid (B, R, S, E), with two heads. The 5 x 5 convolution is a loop over patches
    and neighbours; attention(q, k, v) takes the patches row by row."""
    batch, rows, columns, dim = x.shape
    q, k, v, gate = (x @ w.T for w in block.project.weight.chunk(4))
    local = torch.zeros_like(v) + block.local.conv.bias
    for r, s, i, j in itertools.product(range(rows), range(columns), range(-2, 3), range(-2, 3)):
        if 0 <= r + i < rows and 0 <= s + j < columns:
            local[:, r, s] += block.local.conv.weight[:, 0, i + 2, j + 2] * v[:, r + i, s + j]

    def heads(y):
        patches = [y[:, r, s].view(batch, 2, -1) for r in range(rows) for s in range(columns)]
        return torch.stack(patches, 2)

    o = attention(*(heads(y) for y in (q, k, v)))
    o = torch.stack([o[:, :, n].reshape(batch, dim) for n in range(rows * columns)], 1)
    y = F.layer_norm(o.view(x.shape) + local, (dim,), block.norm.weight, block.norm.bias)
    return (y * gate * torch.sigmoid(gate)) @ block.out.weight.T


def grid_block(model, attention="nala", **options):
    sizes = {"num_heads": 2, "dim": 8, "conv_size": 5}
    config = model.Config(**sizes | options)
    return model.GatedAttention(config, attention, causal=False).double()


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_gated_block_on_a_grid_by_hand(model, attention):
    """(16), with every sum written out. The gain and shift of the norm are random."""
    block = grid_block(model, attention)
    for parameter in block.norm.parameters():
        parameter.data.normal_()
    x = torch.randn(2, 3, 4, 8, dtype=torch.float64)
    want = gated_by_hand(block, x, lambda *qkv: attention_by_hand(model, *qkv, attention))
    y, state = block(x, model.BlockState())
    assert_close(y, want)
    assert state.attention is None and state.conv is None  # nothing follows an image


@pytest.mark.parametrize("attention", ["nala", "split", "elu", "relu"])
def test_rope_on_a_grid_encodes_row_and_column(model, attention):
    """(17) with the pair (row, column) as a patch's position."""
    block = grid_block(model, attention, rope="numerator")
    x = torch.randn(2, 3, 4, 8, dtype=torch.float64)
    positions = torch.tensor([(r, s) for r in range(3) for s in range(4)])
    options = {"feature_map": MAPS.get(attention, attention), "rope_positions": positions}
    want = gated_by_hand(block, x, lambda *qkv: model.nala_attention(*qkv, **options))
    assert_close(block(x, model.BlockState())[0], want)


def test_each_head_has_its_own_learned_norm_scale(model):
    block = grid_block(model, norm_scale=None)
    block.norm_scale.data = torch.tensor([0.5, 3.0], dtype=torch.float64)
    x = torch.randn(1, 2, 3, 8, dtype=torch.float64)

    def attention(*qkv):
        heads = zip(*(y.split(1, dim=1) for y in qkv), (0.5, 3.0), strict=True)
        return torch.cat([model.nala_attention(*y, norm_scale=s) for *y, s in heads], 1)

    assert_close(block(x, model.BlockState())[0], gated_by_hand(block, x, attention))


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_every_patch_sees_every_other(model, attention):
    """Only through attention: the convolution covers a single patch. With 32 channels, ReLU leaves
    no vector without positive entries."""
    block = grid_block(model, attention, conv_size=1, num_heads=1, dim=32)
    x = torch.randn(1, 3, 4, 32, dtype=torch.float64)
    before, _ = block(x, model.BlockState())
    for r, s in itertools.product(range(3), range(4)):
        changed = x.clone()
        changed[:, r, s] += 1
        after, _ = block(changed, model.BlockState())
        assert ((after - before).abs().amax(-1) > 1e-9).all(), (r, s)


POSITION_SOURCES = {
    "nothing": ({}, False),
    "the stem": ({}, True),
    "the local convolution": ({"conv_size": 3}, True),
    "rope": ({"rope": "numerator"}, True),
}


@pytest.mark.parametrize(
    ("source", "attention"),
    [
        (source, name)
        for source in POSITION_SOURCES
        for name in (*ATTENTIONS, ("nala", "softmax"))
        if source != "rope" or "softmax" not in (name, name[-1])
    ],
    ids=str,
)
def test_position_comes_from_convolutions_and_rope_only(model, source, attention):
    """Shuffling the patches, here pixels, changes the logits only if something encodes position."""
    options, has_position = POSITION_SOURCES[source]
    options = {"conv_size": 1, "patch_size": 1, "attention": attention} | options
    vit = small_vit(model, **options).double()
    for name, parameter in vit.named_parameters():
        parameter.data.mul_(5.0)  # makes differences visible
        if name.startswith("stem") and parameter.ndim == 4 and source != "the stem":
            middle = parameter[..., 1, 1].clone()
            parameter.data.zero_()[..., 1, 1] = middle
    images = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    shuffled = images.flatten(2)[..., torch.randperm(20)].view_as(images)
    logits = vit(images)
    difference = (vit(shuffled) - logits).abs().max() / logits.abs().max()
    assert difference > 1e-4 if has_position else difference < 1e-12


def test_zero_padding_encodes_position(model):
    """In an image of one colour, only the zero padding of the stem and of each local convolution
    tells patches apart."""
    vit, outputs = small_vit(model, patch_size=1).double(), []
    for block in vit.blocks:
        block.attention.local.register_forward_hook(lambda *call: outputs.append(call[2][0]))
    images = torch.ones(1, 3, 9, 9, dtype=torch.float64)
    outputs.append(vit.stem(images).movedim(1, -1))
    vit(images)
    for x in outputs:
        corner, edge, middle = x[0, 0, 0], x[0, 0, 4], x[0, 4, 4]
        for one, other in itertools.combinations((corner, edge, middle), 2):
            assert (one - other).abs().max() > 1e-3 * x.abs().max()


@pytest.mark.parametrize("options", VIT_VARIANTS, ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_the_images_of_a_batch_do_not_mix(model, options, training):
    vit = small_vit(model, **options).double().train(training)
    images = torch.randn(4, 3, 6, 9, dtype=torch.float64)
    want = vit(images)
    for i in range(4):
        assert_close(vit(images[i : i + 1]), want[i : i + 1], rtol=1e-10, atol=1e-12)
    assert_close(vit(images.flip(0)), want.flip(0), rtol=1e-10, atol=1e-12)


def test_dropout_of_an_image_model_acts_in_training_only(model):
    vit, images = small_vit(model, dropout=0.5), torch.randn(2, 3, 6, 8)
    assert not torch.equal(vit(images), vit(images))
    vit.eval()
    assert torch.equal(vit(images), vit(images))
    without = small_vit(model).eval()
    without.load_state_dict(vit.state_dict())
    assert torch.equal(vit(images), without(images))


def test_dropout_follows_the_stem_and_both_branches_of_each_block(model):
    vit, calls = small_vit(model), []
    for module in vit.modules():
        if isinstance(module, torch.nn.Dropout):
            module.register_forward_hook(lambda *_: calls.append(1))
    vit(torch.randn(1, 3, 4, 4))
    assert len(calls) == 1 + 2 * len(vit.blocks)


def test_initial_weights_of_an_image_model(model):
    vit = small_vit(model, num_layers=4, dim=128, num_classes=200)
    check_initial_weights(vit)
    loss = F.cross_entropy(vit(torch.randn(64, 3, 4, 4)), torch.randint(200, (64,))).item()
    assert loss == pytest.approx(math.log(200), abs=0.2)


@pytest.mark.parametrize("attention", ["nala", "softmax", ("split", "softmax")])
def test_overfits_a_few_images(model, attention):
    """It memorises 20 noise images: the loss falls below 0.1."""
    vit = small_vit(model, attention=attention, dim=32, patch_size=4)
    images, labels = torch.randn(20, 3, 12, 16), torch.randint(7, (20,))
    optimizer = torch.optim.AdamW(vit.parameters(), lr=3e-3)
    for _ in range(60):
        loss = F.cross_entropy(vit(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert F.cross_entropy(vit(images), labels).item() < 0.1


# --- 7. Configs -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attention", "names", "kind"),
    [
        ("nala", ("nala",) * 3, "linear"),
        ("softmax", ("softmax",) * 3, "softmax"),
        (["softmax"] * 3, ("softmax",) * 3, "softmax"),
        (["nala", "elu", "relu"], ("nala", "elu", "relu"), "linear"),
        (("split", "split", "softmax"), ("split", "split", "softmax"), "hybrid"),
        (("softmax", "softmax", "nala"), ("softmax", "softmax", "nala"), "hybrid"),
    ],
)
def test_a_config_lists_its_attentions_and_their_kind(attention, names, kind):
    for config in (
        nala_min.LMConfig(vocab_size=5, num_layers=3, attention=attention),
        nala_min.ViTConfig(num_layers=3, attention=attention),
    ):
        assert config.attentions == names
        assert config.kind == kind


def test_the_released_hybrid_in_the_docstring_works():
    """The pattern in ViTConfig's docstring, at the default sizes."""
    (pattern,) = re.findall(r"attention=(\(.*?\))", nala_min.ViTConfig.__doc__)
    config = nala_min.ViTConfig(attention=ast.literal_eval(pattern))
    assert config.kind == "hybrid"
    is_linear = [name != "softmax" for name in config.attentions]
    assert is_linear == sorted(is_linear, reverse=True)  # linear in early blocks
    logits = nala_min.NaLaViT(config)(torch.randn(1, 3, 32, 32))
    assert logits.shape == (1, 10) and torch.isfinite(logits).all()


@pytest.mark.parametrize("preset", train_cifar.PRESETS)
def test_image_presets_have_at_most_four_million_parameters(preset):
    with torch.device("meta"):  # no memory for the weights
        vit = train_cifar.build_model(train_cifar.PRESETS[preset] | {"attention": "nala"})
    assert 10_000 < sum(parameter.numel() for parameter in vit.parameters()) <= 4_000_000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 5}, "dim must be divisible by num_heads, got 16 and 5"),
        ({"attention": "fast"}, "attention must be one of .*, got 'fast'"),
        ({"attention": ("nala", "fast")}, "attention must be one of .*, got 'fast'"),
        ({"attention": ("nala",)}, "attention must be one name, or num_layers=2 names, got 1"),
        ({"attention": ["nala"] * 3}, "attention must be one name, or num_layers=2 names, got 3"),
        ({"rope": "both"}, "rope must be None or 'numerator', got 'both'"),
        ({"rope": "numerator", "attention": "softmax"}, "rope must be None for 'softmax', got 'nu"),
        ({"rope": "numerator", "attention": ("nala", "softmax")}, "must be None for 'softmax'"),
    ],
)
@pytest.mark.parametrize("kind", MODELS)
def test_invalid_configs_are_rejected(kind, options, message):
    with pytest.raises(ValueError, match=message):
        MODELS[kind](nala_min, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": 0}, "patch_size must be a positive integer, got 0"),
        ({"patch_size": -4}, "patch_size must be a positive integer, got -4"),
        ({"patch_size": 3}, "patch_size must be a power of 2, got 3"),
        ({"patch_size": 12}, "patch_size must be a power of 2, got 12"),
        ({"conv_size": 4}, "conv_size must be odd, got 4"),
        ({"conv_size": -1}, "conv_size must be a positive integer, got -1"),
        ({"conv_size": 0}, "conv_size must be a positive integer, got 0"),
    ],
)
def test_invalid_image_configs_are_rejected(options, message):
    with pytest.raises(ValueError, match=message):
        small_vit(nala_min, **options)


def test_a_config_takes_its_arguments_by_name_only(model):
    """A model with swapped sizes would train, but be wrong."""
    for config in (model.Config, nala_min.LMConfig, nala_min.ViTConfig):
        with pytest.raises(TypeError):
            config(5)
