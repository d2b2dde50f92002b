"""The equations of nala_min/model.py in their order, (1) to (16): each test names its equation and
compares the code with a loop, a theorem, published outputs or numbers worked by hand. The loops of
(5) and (13) to (15) are in test_2_forms.py."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from nala_min import model

B, H, D, M = 2, 3, 4, 5
FEATURE_MAPS = ("cosine", "split", "elu", "relu")


def random_qkv(num_tokens, num_keys=None, dtype=torch.float64, batch=B, heads=H):
    """Random q, k, v that require gradients."""
    num_keys = num_tokens if num_keys is None else num_keys
    sizes = (num_tokens, D), (num_keys, D), (num_keys, M)
    return tuple(torch.randn(batch, heads, *x, dtype=dtype, requires_grad=True) for x in sizes)


def numbers(*x):
    return torch.tensor(x, dtype=torch.float64)


def paper_weights(q, k, feature_map="cosine", lam=3.0, tau=0.5, alpha=20.0):
    """phi(q_t) . phi(k_i) of each pair, (B, H, N, K), by Eqs. (7), (8), and (10) or (11)."""
    q, k = q[:, :, :, None], k[:, :, None]  # (B, H, N, 1, D), (B, H, 1, K, D)
    if feature_map in ("elu", "relu"):
        phi = {"elu": lambda x: F.elu(x) + 1, "relu": F.relu}[feature_map]
        return (phi(q) * phi(k)).sum(-1)
    norm = q.square().sum(-1, keepdim=True).sqrt()
    d_q, d_k = q / norm, k / k.square().sum(-1, keepdim=True).sqrt()
    a_q, a_k = d_q.abs() ** (lam * (tau + norm.tanh())), k.abs() ** lam
    if feature_map == "split":
        return (a_q * a_k * (d_q * d_k > 0)).sum(-1)
    theta_q, theta_k = (math.pi / 4 * torch.tanh(alpha * d) for d in (d_q, d_k))
    return (a_q * a_k * torch.cos(theta_q - theta_k)).sum(-1)


def paper_attention(q, k, v, *, causal=False, key_mask=None, **options):
    """Eq. (5), one query at a time. Without a visible key, the output is 0."""
    weights, rows = paper_weights(q, k, **options), []
    if key_mask is not None:
        weights = weights * key_mask[:, None, None]
    for t in range(q.shape[2]):
        visible = slice(0, t + 1) if causal else slice(None)
        w = weights[:, :, t, visible, None]
        mass = w.sum(2)
        rows.append((w * v[:, :, visible]).sum(2) / torch.where(mass != 0, mass, 1.0))
    return torch.stack(rows, dim=2)


@pytest.mark.parametrize("causal", [False, True])
def test_softmax_attention_by_hand(causal):
    """(1), one query at a time, and its weights. If queries are fewer than keys, they are the last:
    with a state, with a mask, and without."""
    q, k, v = random_qkv(5)
    out = model.softmax_attention(q, k, v, causal=causal)
    weights = model.attention_weights(q, k, "softmax", causal=causal)
    _, state = model.softmax_attention(q, k[:, :, :2], v[:, :, :2], return_state=True)
    part, options = [x[:, :, 2:] for x in (q, k, v)], {"causal": causal}
    mask = torch.ones(B, 5, dtype=torch.bool)
    last = [
        model.softmax_attention(*part, state=state, **options),
        model.softmax_attention(part[0], k, v, key_mask=mask, **options),
        model.softmax_attention(part[0], k, v, **options),
    ]
    for b, h, t in itertools.product(range(B), range(H), range(5)):
        visible = range(t + 1 if causal else 5)
        scores = [math.exp((q[b, h, t] @ k[b, h, i]).item() / math.sqrt(D)) for i in visible]
        want = sum(scores[i] * v[b, h, i] for i in visible) / sum(scores)
        assert_close(out[b, h, t], want)
        assert_close(weights[b, h, t] @ v[b, h], want)
        assert t < 2 or all(torch.allclose(x[b, h, t - 2], want, 1e-9) for x in last)


def test_decompose():
    """(2), on a 2 x 3 tensor: the zero vector has direction 0 and finite gradients."""
    x = numbers([3.0, 0.0, -4.0], [0.0, 0.0, 0.0]).requires_grad_()
    norm, direction = model.decompose(x)
    assert_close(norm, numbers([5.0], [0.0]))
    assert_close(direction, numbers([0.6, 0.0, -0.8], [0.0, 0.0, 0.0]))
    (gradient,) = torch.autograd.grad((norm + direction).sum(), x)
    assert torch.isfinite(gradient).all()
    norm, direction = model.decompose(torch.full((64,), 1e4, dtype=torch.float16))
    assert (norm.item(), direction[0].item()) == (8e4, 0.125)  # its square would be inf


def test_entropy_by_hand():
    """(3) for the weights of four keys: all equal, only one, none, and 3 to 1."""
    weights = numbers([1.0] * 4, [0.0, 5.0, 0.0, 0.0], [0.0] * 4, [3.0, 1.0, 0.0, 0.0])
    want = [math.log(4), 0, 0, 0.25 * math.log(4) + 0.75 * math.log(4 / 3)]
    assert_close(model.entropy(weights), numbers(*want))
    weights = torch.rand(3, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(model.entropy, weights, raise_exception=False)
    ones = torch.ones(70_000, dtype=torch.float16)  # their sum would be inf
    assert_close(model.entropy(ones).item(), math.log(70_000), rtol=1e-5, atol=0)


def test_softmax_entropy_falls_with_the_query_norm():
    """(4): dPSE/dc = -c Var_p(s), by autograd through the attention weights."""
    k = torch.randn(1, 1, 9, D, dtype=torch.float64)
    direction = numbers(0.5, -0.5, 0.1, -0.7)
    s = (k @ direction).flatten()
    for c in (0.01, 0.5, 1.0, 3.0):
        c = torch.tensor(c, dtype=torch.float64, requires_grad=True)
        q = (c * math.sqrt(D) * direction).expand(1, 1, 9, D)
        pse = model.entropy(model.attention_weights(q, k, "softmax"))[0, 0, 0]
        p = torch.softmax(c.detach() * s, 0)
        variance = (p * s**2).sum() - (p * s).sum() ** 2
        assert_close(torch.autograd.grad(pse, c)[0], -c.detach() * variance)


def test_relu_cancels_the_query_norm_and_elu_does_not():
    """(6). Scaling by 4 is exact in floating point, so ReLU's entropies must be identical."""
    k, q = torch.randn(1, 1, 32, D, dtype=torch.float64), numbers(0.7, -0.2, 1.1, -0.4)
    queries = torch.stack([0.25 * q, q, 4 * q])[None, None]
    weights = (model.attention_weights(queries, k, name) for name in ("relu", "elu", "softmax"))
    relu, elu, softmax = (model.entropy(x)[0, 0] for x in weights)
    assert relu[0] == relu[1] == relu[2]
    assert 0 < (elu[0] - elu[2]).abs() < 0.2 * (softmax[0] - softmax[2])


def test_baselines_are_elu_plus_one_and_relu():
    """At x = -20, elu(x) + 1 = exp(x) must not be 0, as it is if elu(x) is rounded first."""
    x, low = numbers(-1.0, 0.0, 2.0), torch.tensor([[-20.0]], dtype=torch.bfloat16)
    for features in (model.query_features, model.key_features):
        assert_close(features(x, "elu"), numbers(math.exp(-1), 1.0, 3.0))
        assert features(x, "relu").tolist() == [0, 0, 2]
        zero = torch.zeros(1, 1, requires_grad=True)  # elu is smooth: its slope at 0 is 1
        assert torch.autograd.grad(features(zero, "elu").sum(), zero)[0] == 1
        assert_close(features(low, "elu").double(), low.double().exp(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("feature_map", ["cosine", "split"])
def test_query_norm_acts_as_an_exponent(feature_map):
    """(7): features are |d|^p up to a factor per query, p = 3 (0.5 + tanh|q|)."""
    direction = numbers(0.8, -0.6, 0.0)
    for norm in (0.05, 0.3, 1.0, 2.0, 50.0):
        features = model.query_features(norm * direction, feature_map)
        magnitude = features.unflatten(0, (2, 3)).norm(dim=0)  # cos^2 + sin^2 = 1, 1^2 + 0^2 = 1
        power = 3 * (0.5 + math.tanh(norm))
        assert_close(model.query_power(numbers(norm)).item(), power)
        assert_close(magnitude[1] / magnitude[0], numbers(0.75)[0] ** power)
        assert magnitude[2] == 0


def test_key_keeps_its_norm():
    """(8): a key with twice the norm has 2^lam times the weight."""
    k = torch.randn(10, D, dtype=torch.float64)
    for feature_map in ("cosine", "split"):
        once, twice = (model.key_features(c * k, feature_map) for c in (1.0, 2.0))
        assert_close(twice, 8 * once)
    assert model.key_magnitude(torch.tensor([2.0, 0.0, -1.0])).tolist() == [8, 0, 1]
    assert model.key_magnitude(torch.tensor([3.0]), lam=2.0).tolist() == [9]
    assert model.key_magnitude(torch.tensor([100.0]).half()).tolist() == [1e6]  # more than 65,504


PUBLISHED = np.load(Path(__file__).parent / "published_forms.npz")


@pytest.mark.parametrize("case", sorted({name.rpartition("/")[0] for name in PUBLISHED.files}))
def test_published_forms(case):
    """(9), (11): outputs equal those of the released code with eps = 0, for both forms."""
    q, k, v, exact = (torch.from_numpy(PUBLISHED[f"{case}/{x}"]) for x in ("q", "k", "v", "exact"))
    for mode in ("auto", "parallel"):
        out = model.nala_attention(q, k, v, feature_map=case.partition("/")[0], mode=mode)
        assert_close(out, exact, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("feature_map", ["cosine", "split"])
@pytest.mark.parametrize("options", [{}, {"lam": 2.0, "tau": 0.3, "alpha": 1.5}], ids=str)
def test_weights_are_those_of_the_paper(feature_map, options):
    """Eqs. (7) to (12) together, with the paper's defaults lam = 3, tau = 0.5, alpha = 20, and with
    others: each option reaches its equation. A factor per query cancels."""
    q, k, v = random_qkv(9, 6)
    weights = paper_weights(q, k, feature_map, **options)
    want = weights / weights.sum(-1, keepdim=True)
    if feature_map != "cosine":  # the default
        options = {"feature_map": feature_map, **options}
    key_options = {name: x for name, x in options.items() if name != "tau"}
    scores = model.query_features(q, **options) @ model.key_features(k, **key_options).mT
    assert_close(scores / scores.sum(-1, keepdim=True), want)
    assert_close(model.nala_attention(q, k, v, **options), want @ v)
    assert_close(model.attention_weights(q, k, **options), want)
    assert_close(model.attention_weights(q, k, model.nala_attention, **options), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_weights_are_not_negative(feature_map, dtype):
    """(10), exactly: no weight is negative even after rounding."""
    grid = torch.tensor([-1e3, -1.0, -1e-8, 0.0, 1e-8, 1.0, 1e3], dtype=dtype)
    for x in (torch.cartesian_prod(grid, grid, grid), torch.randn(300, 3, dtype=dtype)):
        scores = model.query_features(x, feature_map) @ model.key_features(x, feature_map).mT
        assert scores.min() >= 0 and torch.isfinite(scores).all()


@pytest.mark.parametrize("name", ["cosine_map", "sign_split"])
def test_maps_keep_the_norm(name):
    """(10): |phi(x)| = |a|; equal signs have weight 1, opposite signs 0."""
    magnitude, direction = torch.rand(100, D).double(), torch.randn(100, D).double()
    norms = getattr(model, name)(magnitude, direction).norm(dim=-1)
    assert_close(norms, magnitude.norm(dim=-1), rtol=1e-12, atol=1e-12)
    plus, minus = (getattr(model, name)(numbers(1), numbers(x)) for x in (1, -1))
    assert_close((plus @ plus).item(), 1.0)
    assert 0 <= plus @ minus < 1e-15


def test_cosine_map_tends_to_the_sign_split():
    """(11): the difference vanishes as alpha grows. A channel of 0 is in neither half."""
    a, d = torch.rand(200, D, dtype=torch.float64), torch.randn(200, D, dtype=torch.float64)
    limit = model.sign_split(a, d).roll(D, dims=-1)  # its halves are swapped
    gaps = [(model.cosine_map(a, d, alpha) - limit).abs().max() for alpha in (2, 20, 200, 1e9)]
    assert gaps == sorted(gaps, reverse=True) and gaps[3] < 1e-12
    assert torch.equal(model.cosine_map(a, d), model.cosine_map(a, d, 20))
    split = model.sign_split(torch.tensor([2.0, 3.0, 5.0]), torch.tensor([1.0, -1.0, 0.0]))
    assert split.tolist() == [2, 0, 0, 0, 3, 0]


def test_safe_power_changes_no_weight():
    """(12): the largest channel is 1, the others keep their ratio to it."""
    direction, power = numbers([0.6, 0.0, -0.8]), numbers([4.0])
    want = numbers([0.75**4, 0.0, 1.0])
    assert_close(model.query_magnitude(direction, power), want)
    assert_close(model.query_magnitude(1e-30 * direction, power), want)


def test_gated_block_by_hand():
    """(16), with the local convolution as a sum over the last four tokens."""
    block = model.GatedAttention(model.Config(num_heads=2, dim=8), "nala", causal=True).double()
    x = torch.randn(1, 6, 8, dtype=torch.float64)
    q, k, v, gate = (x @ w.T for w in block.project.weight.chunk(4))
    heads = [y.view(1, 6, 2, 4).transpose(1, 2) for y in (q, k, v)]
    o = paper_attention(*heads, causal=True).transpose(1, 2).reshape(1, 6, 8)
    local = torch.zeros_like(v) + block.local.conv.bias
    for t, j in itertools.product(range(6), range(4)):
        if t + j >= 3:
            local[:, t] += block.local.conv.weight[:, 0, j] * v[:, t + j - 3]
    y = F.layer_norm(o + local, (8,), block.norm.weight, block.norm.bias)
    want = (y * gate * torch.sigmoid(gate)) @ block.out.weight.T
    assert_close(block(x, (None, None))[0], want)


@pytest.mark.parametrize("attention", ["nala", "softmax"])
def test_gated_block_on_a_grid_by_hand(attention):
    """(16), with every sum written out: 5 x 5 neighbours, patches row by row."""
    block = model.GatedAttention(model.Config(num_heads=2, dim=8), attention, False).double()
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
    o = torch.softmax(q @ k.mT / 2, -1) @ v if attention == "softmax" else paper_attention(q, k, v)
    o = torch.stack([o[:, :, n].reshape(2, 8) for n in range(12)], 1).view(x.shape)
    y = F.layer_norm(o + local, (8,), block.norm.weight, block.norm.bias)
    got, _ = block(x, (None, None))
    assert_close(got, (y * gate * torch.sigmoid(gate)) @ block.out.weight.T)
