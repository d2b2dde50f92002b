"""Tests of nala_min/model.py. Most take the module as an argument: test_bug_zoo.py passes broken
copies, which must fail. Numbers in parentheses are model.py's equations."""

import contextlib
import inspect
import itertools
import math
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

B, H, D, M = 2, 3, 4, 5
FEATURE_MAPS = ("cosine", "split", "elu", "relu")
SIGNED_MAPS = ("cosine", "split")
MODES = {
    "parallel": {"mode": "parallel"},
    "auto": {},
    "quadratic": {"causal": True, "mode": "quadratic"},
    "chunked": {"causal": True, "mode": "chunked", "chunk_size": 4},
    "recurrent": {"causal": True, "mode": "recurrent"},
    "causal auto": {"causal": True, "chunk_size": 4},
}
CAUSAL_MODES = [mode for mode in MODES if "causal" in MODES[mode]]
STATEFUL_MODES = [mode for mode in MODES if mode != "quadratic"]


def random_qkv(num_tokens, num_keys=None, dtype=torch.float64, batch=B, heads=H):
    """Random q, k, v that require gradients."""
    num_keys = num_tokens if num_keys is None else num_keys
    sizes = (num_tokens, D), (num_keys, D), (num_keys, M)
    return tuple(torch.randn(batch, heads, *x, dtype=dtype, requires_grad=True) for x in sizes)


def output_and_gradients(attention, q, k, v, tokens=slice(None)):
    """The output of attention(q, k, v), and the gradients of a fixed random weighted sum of it."""
    out = attention(q, k, v)[:, :, tokens]
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
    """Attention to pieces of 1, 2, 4, ... tokens, by each form that has a state in turn."""
    pieces, state, start, size = [], None, 0, 1
    for mode in itertools.cycle(("chunked", "recurrent", "auto")):
        piece = (x[:, :, start : start + size] for x in (q, k, v))
        options = {"mode": mode, "chunk_size": 3, "state": state, "return_state": True}
        out, state = model.nala_attention(*piece, causal=True, feature_map=feature_map, **options)
        pieces.append(out)
        start, size = start + size, 2 * size
        if start >= q.shape[2]:
            return torch.cat(pieces, dim=2)


def causal_form(form):
    if form == "cut and resumed":
        return cut_and_resume
    mode, _, size = form.partition(" by ")
    options = {"causal": True, "mode": mode, "chunk_size": int(size) if size else None}
    return lambda model, *qkv: model.nala_attention(*qkv[:3], feature_map=qkv[3], **options)


# --- 1. The equations -----------------------------------------------------------------------------

PUBLISHED = np.load(Path(__file__).parent / "published_forms.npz")


@pytest.mark.parametrize("case", sorted({name.rpartition("/")[0] for name in PUBLISHED.files}))
def test_published_forms(model, case):
    """(9), (11): outputs equal those of the released code with eps = 0, for both forms."""
    q, k, v, exact = (torch.from_numpy(PUBLISHED[f"{case}/{x}"]) for x in ("q", "k", "v", "exact"))
    for mode in ("auto", "parallel"):
        out = model.nala_attention(q, k, v, feature_map=case.partition("/")[0], mode=mode)
        assert_close(out, exact, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_softmax_attention_by_hand(model, causal):
    """(1), one query at a time; from the start, and from a state of two tokens."""
    q, k, v = random_qkv(5)
    out = model.softmax_attention(q, k, v, causal=causal)
    first, rest = ([x[:, :, part] for x in (q, k, v)] for part in (slice(2), slice(2, None)))
    _, state = model.softmax_attention(*first, causal=True, return_state=True)
    rest = model.softmax_attention(*rest, causal=True, state=state)
    for b, h, t in itertools.product(range(B), range(H), range(5)):
        visible = range(t + 1 if causal else 5)
        scores = [math.exp((q[b, h, t] @ k[b, h, i]).item() / math.sqrt(D)) for i in visible]
        want = sum(scores[i] * v[b, h, i] for i in visible) / sum(scores)
        assert_close(out[b, h, t], want)
        if causal and t >= 2:
            assert_close(rest[b, h, t - 2], want)


def test_decompose(model):
    """(2), on a 2 x 3 tensor: the zero vector has direction 0 and finite gradients."""
    x = torch.tensor([[3.0, 0.0, -4.0], [0.0, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    norm, direction = model.decompose(x)
    assert_close(norm, torch.tensor([[5.0], [0.0]]).double())
    assert_close(direction, torch.tensor([[0.6, 0.0, -0.8], [0.0, 0.0, 0.0]]).double())
    (gradient,) = torch.autograd.grad((norm + direction).sum(), x)
    assert torch.isfinite(gradient).all()


def test_entropy_by_hand(model):
    """(3) for the weights of four keys: all equal, only one, none, and 3 to 1."""
    weights = torch.tensor([[1.0] * 4, [0.0, 5.0, 0.0, 0.0], [0.0] * 4, [3.0, 1.0, 0.0, 0.0]])
    want = [math.log(4), 0, 0, 0.25 * math.log(4) + 0.75 * math.log(4 / 3)]
    assert_close(model.entropy(weights.double()), torch.tensor(want).double())
    weights = torch.rand(3, 7, dtype=torch.float64, requires_grad=True)
    assert_close(model.entropy(5 * weights), model.entropy(weights))
    assert torch.autograd.gradcheck(model.entropy, weights, raise_exception=False)


def test_helpers_do_not_overflow_in_half_precision(model):
    """A float16 sum of 40,000 ones rounds, one of 70,000 is inf, as is the square of 1e4."""
    for count, dtype in itertools.product((40_000, 70_000), (torch.float16, torch.bfloat16)):
        entropy = model.entropy(torch.ones(count, dtype=dtype))
        assert_close(entropy.item(), math.log(count), rtol=1e-5, atol=0)
    norm, direction = model.decompose(torch.full((64,), 1e4, dtype=torch.float16))
    assert_close(norm.item(), 8e4)
    assert_close(direction, torch.full((64,), 0.125))


def test_softmax_entropy_falls_with_the_query_norm(model):
    """(4): dPSE/dc = -c Var_p(s), by autograd through the attention weights."""
    k = torch.randn(1, 1, 9, D, dtype=torch.float64)
    _, direction = model.decompose(torch.randn(D, dtype=torch.float64))
    s = (k @ direction).flatten()
    for c in (0.01, 0.5, 1.0, 3.0):
        c = torch.tensor(c, dtype=torch.float64, requires_grad=True)
        q = (c * math.sqrt(D) * direction).expand(1, 1, 9, D)
        pse = model.entropy(model.attention_weights(q, k, "softmax"))[0, 0, 0]
        p = torch.softmax(c.detach() * s, 0)
        variance = (p * s**2).sum() - (p * s).sum() ** 2
        assert_close(torch.autograd.grad(pse, c)[0], -c.detach() * variance)


def entropies(model, q, k, scales, attention="nala"):
    """Entropy of the weights of keys k (N, D) for each scale times query q (D,)."""
    queries = torch.stack([scale * q for scale in scales])[None, None]
    return model.entropy(model.attention_weights(queries, k[None, None], attention))[0, 0]


def test_relu_cancels_the_query_norm_and_elu_does_not(model):
    """(6). Scaling by 4 is exact in floating point, so ReLU's entropies must be identical."""
    q, k = torch.randn(D, dtype=torch.float64), torch.randn(32, D, dtype=torch.float64)
    relu, elu, softmax = (
        entropies(model, q, k, (0.25, 1.0, 4.0), name) for name in ("relu", "elu", "softmax")
    )
    assert relu[0] == relu[1] == relu[2]
    assert 0 < (elu[0] - elu[2]).abs() < 0.2 * (softmax[0] - softmax[2])


def test_a_larger_norm_does_not_always_lower_the_entropy(model):
    """A counterexample: all keys share channel 0, and one is an outlier in channel 1. As the norm
    grows, NaLa favours the larger channel of d(q), which is the shared one: entropy rises."""
    k = torch.tensor([[1.0, 0.5]] * 7 + [[1.0, 3.0]], dtype=torch.float64)
    q, scales = torch.tensor([0.8, 0.6], dtype=torch.float64), (0.05, 0.5, 1.0, 2.0, 4.0)
    assert (entropies(model, q, k, scales).diff() > 0).all()
    assert (entropies(model, q, k, scales, "softmax").diff() < 0).all()


@pytest.mark.parametrize("feature_map", SIGNED_MAPS)
def test_query_norm_acts_as_an_exponent(model, feature_map):
    """(7): features are |d|^p up to a factor per query, p = 3 (0.5 + tanh|q|)."""
    direction = torch.tensor([0.8, -0.6, 0.0], dtype=torch.float64)
    for norm in (0.05, 0.3, 1.0, 2.0, 50.0):
        features = model.query_features(norm * direction, feature_map)
        magnitude = features.unflatten(0, (2, 3)).norm(dim=0)  # cos^2 + sin^2 = 1, 1^2 + 0^2 = 1
        power = 3 * (0.5 + math.tanh(norm))
        assert_close(model.query_power(torch.tensor([norm]).double()).item(), power)
        assert_close(magnitude[1] / magnitude[0], torch.tensor(0.75).double() ** power)
        assert magnitude[2] == 0


def test_key_keeps_its_norm(model):
    """(8): a key with twice the norm has 2^lam times the weight."""
    k = torch.randn(10, D, dtype=torch.float64)
    for feature_map in SIGNED_MAPS:
        once, twice = (model.key_features(c * k, feature_map) for c in (1.0, 2.0))
        assert_close(twice, 8 * once)
    assert model.key_magnitude(torch.tensor([2.0, 0.0, -1.0])).tolist() == [8, 0, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_weights_are_not_negative(model, feature_map, dtype):
    """(10), exactly: no weight is negative even after rounding."""
    grid = torch.tensor([-1e3, -1.0, -1e-8, 0.0, 1e-8, 1.0, 1e3], dtype=dtype)
    for x in (torch.cartesian_prod(grid, grid, grid), torch.randn(300, 3, dtype=dtype)):
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


def test_cosine_map_tends_to_the_sign_split(model):
    """(11): the difference vanishes as alpha grows. A channel of 0 is in neither half."""
    a_q, a_k, d_q, d_k = torch.randn(4, 200, D, dtype=torch.float64)
    a_q, a_k = a_q.abs(), a_k.abs()
    limit = (model.sign_split(a_q, d_q) * model.sign_split(a_k, d_k)).sum(-1)
    gaps = []
    for alpha in (2.0, 20.0, 200.0, 1e9):
        maps = model.cosine_map(a_q, d_q, alpha), model.cosine_map(a_k, d_k, alpha)
        gaps.append(((maps[0] * maps[1]).sum(-1) - limit).abs().max())
    assert gaps[0] > gaps[1] > gaps[2] > gaps[3]
    assert gaps[3] < 1e-12
    split = model.sign_split(torch.tensor([2.0, 3.0, 5.0]), torch.tensor([1.0, -1.0, 0.0]))
    assert split.tolist() == [2, 0, 0, 0, 3, 0]


def test_safe_power_changes_no_weight(model):
    """(12): the largest channel is 1, the others keep their ratio to it."""
    direction = torch.tensor([[0.6, 0.0, -0.8]], dtype=torch.float64)
    power = torch.tensor([[4.0]], dtype=torch.float64)
    want = torch.tensor([[0.75**4, 0.0, 1.0]], dtype=torch.float64)
    assert_close(model.query_magnitude(direction, power), want)
    assert_close(model.query_magnitude(1e-30 * direction, power), want)


def test_baselines_are_elu_plus_one_and_relu(model):
    """At x = -20, elu(x) + 1 = exp(x) must not be 0, as it is if elu(x) is rounded first."""
    low = torch.tensor([[-20.0]], dtype=torch.bfloat16)
    x = torch.randn(50, D, dtype=torch.float64)
    for features in (model.query_features, model.key_features):
        assert_close(features(x, "elu"), F.elu(x) + 1)
        assert torch.equal(features(x, "relu"), x.clamp_min(0))
        zero = torch.zeros(1, 1, requires_grad=True)  # elu is smooth: its slope at 0 is 1
        assert torch.autograd.grad(features(zero, "elu").sum(), zero)[0] == 1
        assert_close(features(low, "elu").double(), low.double().exp(), rtol=1e-5, atol=0)
        assert features(low).dtype == torch.float32


@pytest.mark.parametrize("feature_map", SIGNED_MAPS)
def test_options_reach_the_features(model, feature_map):
    q, k, v = random_qkv(9)
    query_options, key_options = {"lam": 2.0, "tau": 0.3, "alpha": 1.5}, {"lam": 2.0, "alpha": 1.5}
    phi_q = model.query_features(q, feature_map, **query_options)
    weights = phi_q @ model.key_features(k, feature_map, **key_options).mT
    want = weights / weights.sum(-1, keepdim=True)
    options = {"feature_map": feature_map, **query_options}
    assert_close(model.nala_attention(q, k, v, **options), want @ v)
    for attention in ("nala", model.nala_attention):
        assert_close(model.attention_weights(q, k, attention, **options), want)
    for name, default in {"lam": 3.0, "tau": 0.5, "alpha": 20.0}.items():
        changed = model.query_features(q, feature_map, **query_options | {name: default})
        assert torch.equal(changed, phi_q) == (name == "alpha" and feature_map == "split"), name


def test_defaults_are_those_of_the_paper(model):
    """lambda = 3, tau = 0.5 and alpha = 20, Eqs. (7) to (9), in every signature."""
    paper, checked = {"lam": 3.0, "tau": 0.5, "alpha": 20.0}, []
    functions = "query_power key_magnitude cosine_map query_features key_features nala_attention"
    for name in functions.split():
        for parameter in inspect.signature(getattr(model, name)).parameters.values():
            if parameter.name in paper:
                assert parameter.default == paper[parameter.name], (name, parameter)
                checked.append(parameter)
    assert len(checked) == 2 + 1 + 1 + 3 + 2 + 3
    qkv = [x.detach() for x in random_qkv(9)]
    assert torch.equal(model.nala_attention(*qkv), model.nala_attention(*qkv, feature_map="cosine"))


# --- 2. All forms give the same results -----------------------------------------------------------


@pytest.mark.parametrize("mode", ["auto", "parallel"])
@pytest.mark.parametrize(
    ("feature_map", "num_tokens", "num_keys"),
    [("cosine", 65, 20), ("split", 7, 7), ("elu", 3, 130), ("relu", 1, 4)],
)
def test_bidirectional_form_equals_the_loop(model, feature_map, mode, num_tokens, num_keys):
    """(5), (13): outputs and gradients equal those of a loop over queries. With a state, the keys
    in it are seen as well."""
    q, k, v = random_qkv(num_tokens, num_keys)
    whole = partial(model.nala_attention, feature_map=feature_map, mode=mode)

    def in_two_parts(q, k, v):
        _, state = whole(q, k[:, :, :3], v[:, :, :3], return_state=True)
        return whole(q, k[:, :, 3:], v[:, :, 3:], state=state)

    loop = partial(loop_attention, model, feature_map=feature_map, causal=False)
    want = output_and_gradients(loop, q, k, v)
    for attention in (whole, in_two_parts):
        got = output_and_gradients(attention, q, k, v)
        assert_close(got, want, rtol=1e-10, atol=1e-10)


CAUSAL_CASES = [
    ("cosine", "auto", 130),
    ("split", "auto", 63),
    ("elu", "auto", 1),
    ("relu", "auto", 7),
    ("cosine", "quadratic", 65),
    ("elu", "recurrent", 7),
    ("split", "chunked by 1", 7),
    ("cosine", "chunked by 16", 63),
    ("relu", "chunked by 64", 130),
    ("cosine", "cut and resumed", 65),
    ("relu", "cut and resumed", 130),
]


@pytest.mark.parametrize(("feature_map", "form", "num_tokens"), CAUSAL_CASES)
def test_causal_forms_equal_the_loop(model, feature_map, form, num_tokens):
    """(13c), (14), (15): outputs and gradients equal those of (5), token by token."""
    q, k, v = random_qkv(num_tokens)
    loop = partial(loop_attention, model, feature_map=feature_map, causal=True)
    got = output_and_gradients(lambda *qkv: causal_form(form)(model, *qkv, feature_map), q, k, v)
    assert_close(got, output_and_gradients(loop, q, k, v), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mode", STATEFUL_MODES)
def test_state_is_the_sum_over_tokens(model, mode):
    """(14): S = sum phi(k)^T v, z = sum phi(k)."""
    q, k, v = random_qkv(9)
    _, state = model.nala_attention(q, k, v, return_state=True, **MODES[mode])
    phi_k = model.key_features(k)
    S, z = torch.einsum("bhnf,bhnm->bhfm", phi_k, v), phi_k.sum(2)
    assert_close(state, torch.cat([S, z[..., None]], -1), rtol=1e-12, atol=1e-12)


def test_a_state_holds_no_more_memory_than_its_own(model):
    """A view would keep alive, and save, all that it is a part of."""
    qkv = [x.detach() for x in random_qkv(64, dtype=torch.float32)]
    one = [x[:, :, :1] for x in qkv]
    states = [
        model.nala_attention(*x, return_state=True, **MODES[mode])[1]
        for x in (qkv, one)
        for mode in STATEFUL_MODES
    ]
    first = model.softmax_attention(*qkv, causal=True, return_state=True)[1]
    states += [*first, *model.softmax_attention(*one, state=first, return_state=True)[1]]
    for name in ("magnitude-aware", "injective"):
        states += nala_min.ATTENTIONS[name](*qkv, causal=True, return_state=True)[1][:2]
    lm = small_lm(model, attention=("nala", "softmax"))
    with torch.no_grad():
        _, (nala, softmax) = lm(torch.zeros(1, 40, dtype=torch.long))
    for x in (*states, *nala, *softmax[0], softmax[1]):
        assert x.untyped_storage().nbytes() == x.numel() * x.element_size(), x.shape


@pytest.mark.parametrize("mode", ["parallel", "auto", "chunked", "causal auto"])
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_gradcheck(model, feature_map, mode):
    """Gradients against finite differences."""
    qkv = random_qkv(5, batch=1, heads=2)
    attention = partial(model.nala_attention, feature_map=feature_map, **MODES[mode])
    assert torch.autograd.gradcheck(attention, qkv, raise_exception=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", ["parallel", "auto", "chunked", "causal auto"])
def test_half_precision_sums_over_many_tokens(model, mode, dtype):
    """Sums over 5,000 tokens: a float16 sum of ones stops at 2,048, a bfloat16 sum at 256. The
    keys are large: their cubes and sums overflow float16."""
    q, k, v = (x.detach().to(dtype) for x in random_qkv(5000, batch=1, heads=1))
    options = MODES[mode] | {"chunk_size": 64}
    got = model.nala_attention(q, 40 * k, v, **options)
    want = model.nala_attention(q.double(), (40 * k).double(), v.double(), **options)
    assert_close(got.double(), want, rtol=2e-2, atol=2e-2 * want.abs().max().item())
    sums = model.nala_attention(q, 40 * k, torch.ones_like(v), **options)
    assert_close(sums, torch.ones_like(v), rtol=0, atol=1e-2)


def test_custom_features_see_float32(model):
    q, k, v = (x.detach().bfloat16() for x in random_qkv(5))
    dtypes = []

    def custom(x):
        dtypes.append(x.dtype)
        return torch.relu(x)

    for options in (*MODES.values(), {"return_state": True}):
        out = model.linear_attention(q, k, v, custom, custom, **options)
        assert (out[0] if "return_state" in options else out).dtype == q.dtype
    assert dtypes == [torch.float32] * 2 * (len(MODES) + 1)


@pytest.mark.parametrize("mode", MODES)
def test_autocast_changes_nothing(model, mode):
    q, k, v = (x.detach().float() for x in random_qkv(100))
    want = model.nala_attention(q, k, v, **MODES[mode])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.nala_attention(q, k, v, **MODES[mode]), want)


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

    qkv = [torch.randn(1, 2, 1024, 16, requires_grad=True) for _ in range(3)]
    options = {"causal": True, "mode": mode, "chunk_size": 64}
    with Largest() as largest:
        output_and_gradients(partial(model.nala_attention, **options), *qkv)
    state = 2 * 32 * 17  # two heads
    assert largest.numel < 1024 / 4 * state


def test_a_mode_runs_its_own_form(model, monkeypatch):
    """Results cannot show this: all forms give the same, at different costs."""
    calls, q, k, v = [], *random_qkv(3)
    for name in ("parallel", "recurrent", "chunked"):
        form = getattr(model, name)

        def recorded(*x, name=name, form=form):
            calls.append((name, *x[4:]))  # and the size of a chunk
            return form(*x)

        monkeypatch.setattr(model, name, recorded)
    monkeypatch.setattr(model.fast, "attention", lambda *_, **__: None)
    for mode, causal in (("auto", False), ("parallel", False), ("parallel", True)):
        model.nala_attention(q, k, v, mode=mode, causal=causal)
    for mode in ("quadratic", "recurrent", "chunked", "auto"):
        model.nala_attention(q, k, v, mode=mode, causal=True)
    for n in (1, 2):
        model.nala_attention(*(x[:, :, :n] for x in (q, k, v)), causal=True)
    whole, chunks, step = ("chunked", 3), ("chunked", 64), ("recurrent",)
    expected = [("parallel",)] * 2 + [whole, whole, step, chunks, chunks]
    assert calls == [*expected, step, chunks]


def test_auto_returns_what_fast_py_returns(model, monkeypatch):
    received, (q, k, v) = [], random_qkv(3)
    monkeypatch.setattr(model.fast, "attention", lambda *x: received.append(x[6:]) or ("o", "S"))
    options = {"chunk_size": 2, "key_mask": torch.ones(B, 3, dtype=torch.bool), "state": q}
    assert model.nala_attention(q, k, v, causal=True, **options) == "o"
    assert model.nala_attention(q, k, v, causal=True, return_state=True, **options) == ("o", "S")
    assert received == [(True, *options.values())] * 2


def test_compiled_attention_has_a_power_of_2_of_chunks(model, monkeypatch):
    """Otherwise torch.compile would make a graph for each number of chunks."""
    counts, form = [], model.accumulate
    monkeypatch.setattr(model, "accumulate", lambda x, **y: counts.append(len(x)) or form(x, **y))
    for num_tokens in (2, 130, 300):
        qkv = [x.detach() for x in random_qkv(num_tokens)]
        want = model.nala_attention(*qkv, causal=True, mode="chunked")
        with monkeypatch.context() as patched:
            patched.setattr(torch.compiler, "is_compiling", lambda: True)
            assert_close(model.nala_attention(*qkv, causal=True), want)
    assert counts == [1, 1, 3, 4, 5, 8]


# --- 3. Safety ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("feature_map", SIGNED_MAPS)
def test_rows_sum_to_one(model, feature_map, mode):
    """In float32, at scales where an eps in the denominator would show."""
    for query_scale, key_scale in itertools.product((1e-6, 1.0, 1e4), (1e-3, 1e-2, 1.0, 1e3)):
        q, k = (scale * torch.randn(B, H, 33, 16) for scale in (query_scale, key_scale))
        options = {"feature_map": feature_map, **MODES[mode]}
        sums = model.nala_attention(q, k, torch.ones(B, H, 33, 1), **options)
        assert_close(sums, torch.ones_like(sums), rtol=0, atol=1e-6)
    weights = model.attention_weights(q, k, **options)
    assert weights.min() >= 0
    assert_close(weights.sum(-1), torch.ones(B, H, 33), rtol=0, atol=1e-6)


@pytest.mark.parametrize("num_keys", [D, D + 1])
def test_fewer_queries_than_keys_are_the_last_ones(model, num_keys):
    """With a mask, without one, and with a state."""
    q, k, v = (x.detach() for x in random_qkv(num_keys))
    want = model.softmax_attention(q, k, v, causal=True)[:, :, 3:]
    for key_mask in (None, torch.ones(B, num_keys, dtype=torch.bool)):
        got = model.softmax_attention(q[:, :, 3:], k, v, causal=True, key_mask=key_mask)
        assert_close(got, want)
    past, new = (k[:, :, :3], v[:, :, :3]), (x[:, :, 3:] for x in (q, k, v))
    assert_close(model.softmax_attention(*new, causal=True, state=past), want)


@pytest.mark.parametrize("attention", ["nala", "split", "elu", "relu", "softmax"])
@pytest.mark.parametrize("causal", [False, True])
def test_weights_times_values_give_the_output(model, attention, causal):
    q, k, v = random_qkv(20, None if causal else 13)
    weights = model.attention_weights(q, k, attention, causal=causal)
    if attention == "softmax":
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    else:
        out = loop_attention(model, q, k, v, {"nala": "cosine"}.get(attention, attention), causal)
    assert_close(weights @ v, out)
    if causal:
        assert torch.equal(weights, weights.tril())


DEGENERATE = {
    "zero query row": lambda q, k: q[:, :, 2].zero_(),
    "exact-zero channels": lambda q, k: (q[..., 1].zero_(), k[..., 2].zero_()),
    "exact-zero channel of a small query": lambda q, k: q.mul_(1e-4)[..., 1].zero_(),
    "query and keys without a common channel": lambda q, k: (q[..., 1:].zero_(), k[..., 0].zero_()),
}


@pytest.mark.parametrize("damage", DEGENERATE)
def test_degenerate_inputs_stay_finite(model, damage):
    """With lam = 0.5, the power of a key has an infinite slope at 0."""
    forms = itertools.product(MODES, FEATURE_MAPS, (torch.float32, torch.bfloat16))
    for mode, feature_map, dtype in forms:
        q, k, v = (x.detach().to(dtype) for x in random_qkv(6, batch=1, heads=1))
        DEGENERATE[damage](q, k)
        qkv = [x.requires_grad_() for x in (q, k, v)]
        for lam in (3.0, 0.5):
            options = {"feature_map": feature_map, "lam": lam, **MODES[mode]}
            for x in output_and_gradients(partial(model.nala_attention, **options), *qkv):
                assert torch.isfinite(x).all(), options


@pytest.mark.parametrize("cause", ["query", "keys", "mask"])
@pytest.mark.parametrize("mode", MODES)
def test_no_mass_gives_output_and_gradient_zero(model, mode, cause):
    q, k, v = random_qkv(6)
    with torch.no_grad():
        if cause != "mask":
            {"query": q, "keys": k}[cause].zero_()
    mask = torch.full((B, 6), cause != "mask")
    for feature_map in ("cosine", "split", "relu", *["elu"] * (cause == "mask")):  # elu(0) + 1 = 1
        options = {"feature_map": feature_map, "key_mask": mask, **MODES[mode]}
        for x in output_and_gradients(partial(model.nala_attention, **options), q, k, v):
            assert torch.equal(x, torch.zeros_like(x))


@pytest.mark.parametrize("garbage", [100.0, math.nan])
@pytest.mark.parametrize("mode", [*MODES, "softmax", "causal softmax"])
def test_padding_changes_nothing(model, mode, garbage):
    """Garbage in padding changes no output or gradient of real tokens. Its own gradients are 0.
    0 times NaN is NaN, so a NaN in a key or value must be removed before any product."""
    for feature_map, left in itertools.product(FEATURE_MAPS, (0, 3, 5)):
        if mode in MODES:
            attention = partial(model.nala_attention, feature_map=feature_map, **MODES[mode])
        else:
            attention = partial(model.softmax_attention, causal="causal" in mode)
        qkv, real = random_qkv(9), slice(left, left + 9)
        want = output_and_gradients(attention, *qkv)
        mask = torch.zeros(B, 14, dtype=torch.bool)
        mask[:, real] = True
        padded = []
        for x, size in zip(qkv, (100.0, garbage, garbage), strict=True):
            padded.append(size * torch.randn(B, H, 14, x.shape[-1], dtype=x.dtype))
            padded[-1][:, :, real] = x.detach()
            padded[-1].requires_grad_()
        got = output_and_gradients(partial(attention, key_mask=mask), *padded, tokens=real)
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
@pytest.mark.parametrize("mode", CAUSAL_MODES)
def test_the_future_changes_no_past_output(model, mode, size):
    """Exactly, in float32, even if the future is large enough to swamp the past."""
    for feature_map, cut in itertools.product(FEATURE_MAPS, (1, 4, 7, 12)):
        q, k, v = (x.detach().float() for x in random_qkv(13))
        before = model.nala_attention(q, k, v, feature_map=feature_map, **MODES[mode])
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
    for b, h in itertools.product(range(B), range(H)):
        one = (x[b : b + 1, h : h + 1] for x in (q, k, v))
        got = model.nala_attention(*one, **MODES[mode])
        assert_close(got[0, 0], want[b, h], rtol=1e-12, atol=1e-12)


# --- 4. The gated block ---------------------------------------------------------------------------


SMALL = {"num_layers": 2, "num_heads": 2, "dim": 16, "conv_size": 3}


def small_lm(model, **options):
    return model.NaLaLM(model.Config(**SMALL | {"vocab_size": 11} | options))


def small_vit(model, **options):
    return model.NaLaViT(model.Config(**SMALL | {"num_classes": 7, "patch_size": 2} | options))


MODELS = {"LM": small_lm, "ViT": small_vit}


def small_inputs(kind, batch=2):
    return torch.randint(11, (batch, 9)) if kind == "LM" else torch.randn(batch, 3, 9, 6)


def run(net, inputs):
    """The logits, without the state of a language model."""
    out = net(inputs)
    return out[0] if isinstance(out, tuple) else out


def test_gated_block_by_hand(model):
    """(16), with the local convolution as a sum over tokens."""
    block = model.GatedAttention(model.Config(num_heads=2, dim=8), "nala", causal=True).double()
    x = torch.randn(1, 6, 8, dtype=torch.float64)
    q, k, v, gate = (x @ w.T for w in block.project.weight.chunk(4))
    heads = [y.view(1, 6, 2, 4).transpose(1, 2) for y in (q, k, v)]
    o = loop_attention(model, *heads, "cosine", causal=True).transpose(1, 2).reshape(1, 6, 8)
    w, bias = block.local.conv.weight[:, 0], block.local.conv.bias
    local = torch.stack(
        [sum(w[:, j] * v[:, t + j - 3] for j in range(4) if t + j >= 3) + bias for t in range(6)], 1
    )
    y = F.layer_norm(o + local, (8,), block.norm.weight, block.norm.bias)
    want = (y * gate * torch.sigmoid(gate)) @ block.out.weight.T
    assert_close(block(x, (None, None))[0], want)


@pytest.mark.parametrize("attention", ["nala", "softmax"])
def test_gated_block_on_a_grid_by_hand(model, attention):
    """(16), with every sum written out: 5 x 5 neighbours, patches row by row."""
    config = model.Config(num_heads=2, dim=8)
    block = model.GatedAttention(config, attention, causal=False).double()
    for parameter in block.norm.parameters():
        parameter.data.normal_()
    x = torch.randn(2, 3, 4, 8, dtype=torch.float64)
    q, k, v, gate = (x @ w.T for w in block.project.weight.chunk(4))
    local = torch.zeros_like(v) + block.local.conv.bias
    for r, s, i, j in itertools.product(range(3), range(4), range(-2, 3), range(-2, 3)):
        if 0 <= r + i < 3 and 0 <= s + j < 4:
            local[:, r, s] += block.local.conv.weight[:, 0, i + 2, j + 2] * v[:, r + i, s + j]
    q, k, v = (
        torch.stack([y[:, r, s].view(2, 2, 4) for r in range(3) for s in range(4)], 2)
        for y in (q, k, v)
    )
    if attention == "softmax":
        o = torch.softmax(q @ k.mT / 2, -1) @ v
    else:
        o = loop_attention(model, q, k, v, "cosine", causal=False)
    o = torch.stack([o[:, :, n].reshape(2, 8) for n in range(12)], 1).view(x.shape)
    y = F.layer_norm(o + local, (8,), block.norm.weight, block.norm.bias)
    got, _ = block(x, (None, None))
    assert_close(got, (y * gate * torch.sigmoid(gate)) @ block.out.weight.T)


def test_a_block_adds_both_branches(model):
    """Pre-norm and residual: x + attention(norm(x)), then x + mlp(norm(x))."""
    block = small_lm(model).blocks[0].double()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    y, _ = block.attention(block.norm1(x), (None, None))
    want = x + y + block.mlp(block.norm2(x + y))
    assert_close(block(x, (None, None))[0], want)


# --- 5. Both models -------------------------------------------------------------------------------

VARIANTS = [{"attention": name} for name in ("nala", "elu", "softmax", "polar")]
VARIANTS += [{"attention": ["softmax", "split"], "conv_size": 1}]
every_kind = pytest.mark.parametrize("kind", MODELS)


@every_kind
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_every_parameter_gets_a_gradient(model, kind, options):
    net = MODELS[kind](model, **options)
    logits = run(net, small_inputs(kind)).flatten(0, -2)
    F.cross_entropy(logits, torch.randint(7, (len(logits),))).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@every_kind
def test_models_run_on_tensors_without_values(model, kind):
    """Forward and backward, on "meta" (not the default device) and with fake tensors."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    for attention in ("nala", "softmax"):
        for context, device in ((contextlib.nullcontext(), "meta"), (fake, "cpu")):
            inputs = small_inputs(kind)
            with context:
                with torch.device(device):
                    net = MODELS[kind](model, attention=attention)
                out = run(net, inputs.to(device))
                out.sum().backward()
            assert out.shape == ((2, 9, 11) if kind == "LM" else (2, 7))
            assert all(parameter.grad.shape == parameter.shape for parameter in net.parameters())


@every_kind
def test_a_saved_export_gives_the_same_output(kind, tmp_path):
    net, inputs = MODELS[kind](nala_min.model).eval(), small_inputs(kind)
    torch.export.save(torch.export.export(net, (inputs,)), tmp_path / "model.pt2")
    assert_close(torch.export.load(tmp_path / "model.pt2").module()(inputs), net(inputs))


@every_kind
def test_dropout_acts_in_training_only(model, kind):
    """After the embedding or the stem, and after both branches of each block."""
    net, inputs, calls = MODELS[kind](model, dropout=0.5), small_inputs(kind), []
    for module in net.modules():
        if isinstance(module, torch.nn.Dropout):
            module.register_forward_hook(lambda *_: calls.append(1))
    assert not torch.equal(run(net, inputs), run(net, inputs))
    assert len(calls) == 2 * (1 + 2 * len(net.blocks))
    net.eval()
    without = MODELS[kind](model)
    without.load_state_dict(net.state_dict())
    assert torch.equal(run(net, inputs), run(without, inputs))


@every_kind
def test_initial_weights(model, kind):
    """The standard deviation is 0.02. In the layers that end a residual branch, it is divided by
    the root of the number of branches. The first loss is close to that of uniform guesses."""
    net = MODELS[kind](model, num_layers=8, dim=128)
    ends = [end for block in net.blocks for end in (block.attention.out, block.mlp[-1])]
    for module in net.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            want = 0.02 / math.sqrt(len(ends)) if module in ends else 0.02
            assert module.weight.std().item() == pytest.approx(want, rel=0.1)
    logits = run(net, small_inputs(kind, batch=64)).flatten(0, -2)
    loss = F.cross_entropy(logits, torch.arange(len(logits)) % logits.shape[1]).item()
    assert loss == pytest.approx(math.log(logits.shape[1]), abs=0.2)


def test_the_package_has_the_names_of_model_py():
    """The same objects: a debugger steps from nala_min.nala_attention right into model.py."""
    for name in nala_min.__all__:
        assert getattr(nala_min, name) is getattr(nala_min.model, name)


# --- 6. The language model ------------------------------------------------------------------------


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


@pytest.mark.parametrize("names", [("nala", "softmax"), ("softmax", "nala")], ids="-".join)
def test_each_block_of_the_language_model_has_its_attention(model, names):
    """NaLa's state is a tensor of constant size; softmax's, keys and values, grows. A state is not
    modified, and may be a tuple."""
    lm, tokens = small_lm(model, attention=names), torch.zeros(1, 2, dtype=torch.long)
    _, state = lm(tokens)
    before = tuple(state)
    assert torch.equal(lm(tokens, state)[0], lm(tokens, before)[0])
    assert all(x is y for x, y in zip(state, before, strict=True))
    (_, short), (_, long) = (lm(torch.randint(11, (1, size))) for size in (8, 80))
    for name, (x, past_x), (y, past_y) in zip(names, short, long, strict=True):
        assert past_x.shape == past_y.shape == (1, 2, 16)
        if name == "nala":
            assert x.shape == y.shape == (1, 2, 16, 9)
        else:
            assert [z.shape for z in y] == [(1, 2, 80, 8)] * 2


def test_generate_is_seeded_and_keeps_the_mode(model):
    lm, prompt, enabled = small_lm(model, dropout=0.5), torch.randint(11, (2, 3)), []
    a, b, c = (lm.generate(prompt, 40, seed=seed) for seed in (1, np.int64(1), 2))
    assert a.shape == (2, 43) and torch.equal(a[:, :3], prompt)
    assert torch.equal(a, b) and not torch.equal(a, c)
    greedy = lm.generate(prompt, 40, temperature=0)
    for options in ({"top_k": 1}, {"temperature": 1e-30}, {"temperature": 1e-40}):
        assert torch.equal(lm.generate(prompt, 40, **options), greedy)
    assert torch.equal(lm.generate(prompt, 40, top_k=99, seed=1), a)
    a, b = (lm.generate(prompt, 40) for _ in range(2))  # from the global generator
    assert not torch.equal(a, b)
    lm.head.register_forward_hook(lambda *_: enabled.append(torch.is_grad_enabled()))
    lm.generate(prompt, 1)
    assert enabled == [False]


def test_generate_restores_the_mode_of_every_module(model):
    """Also after an error, and if modules are in different modes."""
    lm, prompt = small_lm(model, dropout=0.5).train(), torch.zeros(1, 2, dtype=torch.long)
    lm.blocks[0].eval()
    modes = [module.training for module in lm.modules()]
    lm.generate(prompt, 2)
    assert [module.training for module in lm.modules()] == modes
    with model.in_mode(lm, training=True):  # what is frozen in a training net stays frozen
        assert [module.training for module in lm.modules()] == modes
    with model.in_mode(lm.eval(), training=True):
        assert all(module.training for module in lm.modules())
    assert not any(module.training for module in lm.modules())
    lm.train().head.register_forward_hook(lambda *call: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        lm.generate(prompt, 2)
    assert all(module.training for module in lm.modules())


def test_temperature_and_top_k_shape_the_draw(model):
    lm, prompt = small_lm(model), torch.zeros(4000, 1, dtype=torch.long)
    logits = lm(prompt[:1])[0][0, -1]
    for options in ({}, {"temperature": 0.1}, {"top_k": 3}):
        smallest = logits.topk(options.get("top_k", 11)).values[-1]
        kept = logits.where(logits >= smallest, -math.inf)
        want = torch.softmax(kept / options.get("temperature", 1.0), 0)
        drawn = lm.generate(prompt, 1, seed=0, **options)[:, 1]
        got = torch.bincount(drawn, minlength=11) / 4000
        assert (got - want).abs().max() < 0.04
        assert (got[want == 0] == 0).all()
    lm.head.weight.data.zero_()  # all logits are equal: top_k keeps k of them
    assert len(lm.generate(prompt, 1, top_k=3, seed=0)[:, 1].unique()) == 3


# --- 7. The image model ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patch_size", "strides"), [(1, [1, 1]), (2, [1, 2, 1]), (4, [1, 2, 1, 2, 1])]
)
def test_the_stem_has_two_convolutions_per_halving(model, patch_size, strides):
    """It goes from 3 channels to half the width, then to the full width, and normalises each whole
    image before every later convolution. Sizes are rounded up to whole patches."""
    stem = small_vit(model, patch_size=patch_size, dim=14).stem.double()
    convolutions = [x for x in stem if hasattr(x, "stride")]
    assert [x.stride for x in convolutions] == [(stride, stride) for stride in strides]
    assert [x.in_channels for x in convolutions] == [3, 7, *[14] * (len(strides) - 2)]
    assert [x.out_channels for x in convolutions] == [7, *[14] * (len(strides) - 1)]
    for height, width in ((1, 1), (5, 7), (16, 12)):
        images = torch.randn(2, 3, height, width, dtype=torch.float64)
        before = stem(images)
        patches = math.ceil(height / patch_size), math.ceil(width / patch_size)
        assert before.shape == (2, 14, *patches)
    for parameter in stem[0].parameters():
        parameter.data.mul_(7.0)
    assert_close(stem(images), before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "names", [("nala", "softmax"), ("softmax", "nala"), ("elu", "split")], ids="-".join
)
def test_each_block_has_the_configured_attention(model, names):
    """The model equals one assembled from blocks of models with a single attention."""
    vit = small_vit(model, attention=names).double()
    images = torch.randn(2, 3, 6, 10, dtype=torch.float64)
    x = vit.stem(images).movedim(1, -1)
    for i, name in enumerate(names):
        single = small_vit(model, attention=name).double()
        single.load_state_dict(vit.state_dict())
        x, _ = single.blocks[i](x, (None, None))
    x = F.layer_norm(x, (16,), vit.norm.weight, vit.norm.bias)
    mean = sum(x[:, r, s] for r in range(3) for s in range(5)) / 15
    assert_close(vit(images), mean @ vit.head.weight.T + vit.head.bias)
