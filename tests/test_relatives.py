"""relatives.py: each attention against its paper's sum over keys, written as a loop in float64."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from nala_min import LMConfig, NaLaLM, ViTConfig, nala_attention, relatives
from nala_min.model import GatedAttention

B, H, N, D = 2, 3, 7, 4
OPTIONS = {"norm_scale": 1.0, "rope_positions": None}
NAMES = ("focused", "clipped", "polar", "magnitude_aware")


def layer(causal):
    config = LMConfig(vocab_size=5, num_heads=H, dim=H * D)
    if not causal:
        config = ViTConfig(num_heads=H, dim=H * D)
    made = GatedAttention(config, "relu").double()
    relatives.learn_polarity(made)
    made.exponent.data = torch.randn(H, 1, D, dtype=torch.float64)
    return made


def qkv():
    return torch.randn(3, B, H, N, D, dtype=torch.float64)


def weighted(weight, q, k, v, causal):
    """The sum over visible keys of weight(q_t, k_i, h) v_i, divided by the sum of the weights."""
    out = torch.zeros_like(v)
    for b, h, t in ((b, h, t) for b in range(B) for h in range(H) for t in range(N)):
        last = t + 1 if causal else N
        w = torch.stack([weight(q[b, h, t], k[b, h, i], h) for i in range(last)])
        out[b, h, t] = w @ v[b, h, :last] / (w.sum() or 1.0)
    return out


def focus(x):
    x = x.clamp_min(0)
    return x**3 * (x.norm() / (x**3).norm()) if x.any() else x


def powers(q, k, h):
    d = q / q.norm()
    power = 3 * (0.5 + torch.tanh(q.norm()))
    return (d.clamp_min(0) ** power * k.clamp_min(0) ** 3).sum()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("name", "weight"), [("focused", lambda q, k, h: focus(q) @ focus(k)), ("clipped", powers)]
)
def test_linear_relatives_are_the_loop(name, weight, causal):
    q, k, v = qkv()
    out, state = getattr(relatives, name)(layer(causal), q, k, v, OPTIONS, None)
    assert state is None
    assert_close(out, weighted(weight, q, k, v, causal))


@pytest.mark.parametrize("causal", [True, False])
def test_polar_gives_half_to_equal_and_half_to_opposite_signs(causal):
    made, (q, k, v) = layer(causal), qkv()
    power = 1 + 3 * torch.sigmoid(made.exponent.detach())[:, 0]

    def weight(sign, q, k, h):
        chosen = q * k * sign > 0
        return ((q.abs() * k.abs()) ** power[h] * chosen).sum()

    same = weighted(partial(weight, 1), q, k, v, causal)
    opposite = weighted(partial(weight, -1), q, k, v, causal)
    out, _ = relatives.polar(made, q, k, v, OPTIONS, None)
    assert_close(out, torch.cat([same[..., : D // 2], opposite[..., D // 2 :]], dim=-1))


@pytest.mark.parametrize("causal", [True, False])
def test_magnitude_aware_weights_are_beta_a_minus_gamma(causal):
    q, k, v = qkv()
    want = torch.zeros_like(v)
    for b, h, t in ((b, h, t) for b in range(B) for h in range(H) for t in range(N)):
        n = t + 1 if causal else N
        a = (F.elu(k[b, h, :n]) + 1) @ (F.elu(q[b, h, t]) + 1) / (n * math.sqrt(D))
        s = a.sum()
        w = (1 + 1 / s) * a - s / n
        assert_close(w.sum().item(), 1.0)
        want[b, h, t] = w @ v[b, h, :n]
    assert_close(relatives.magnitude_aware(layer(causal), q, k, v, OPTIONS, None)[0], want)


def test_a_longer_query_is_sharper_to_magnitude_aware_attention_only_in_size():
    """What is added to linear attention grows with S."""
    q, k, v = qkv()
    made, q = layer(causal=False), q.abs()
    plain = nala_attention(q * 9, k, v, feature_map="elu")
    far = [relatives.magnitude_aware(made, c * q, k, v, OPTIONS, None)[0] for c in (1, 9)]
    assert (far[1] - plain).norm() > 2 * (far[0] - plain).norm()


@pytest.mark.parametrize("name", NAMES)
def test_zero_queries_and_keys_have_finite_outputs_and_gradients(name):
    q, k, v = (x.clone() for x in qkv())
    q[:, :, 2], k[:, :, 3], q[:, :, 4, 0], k[:, :, 5, 1] = 0, 0, 0, 0
    made = layer(causal=True)
    for x in (q, k, v):
        x.requires_grad_()
    out, _ = getattr(relatives, name)(made, q, k, v, OPTIONS, None)
    out.square().sum().backward()
    assert out.isfinite().all()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


@pytest.mark.parametrize("name", NAMES)
def test_a_model_trains_with_it(name):
    model = NaLaLM(LMConfig(vocab_size=7, num_layers=1, num_heads=2, dim=8, attention="relu"))
    attention = model.blocks[0].attention
    relatives.learn_polarity(attention)
    attention.attend = partial(getattr(relatives, name), attention)
    tokens = torch.randint(7, (2, 9))
    before = model(tokens)[0]
    changed = tokens.clone()
    changed[:, 5] = (tokens[:, 5] + 1) % 7
    after = model(changed)[0]
    assert_close(before[:, :5], after[:, :5])  # causal
    before.sum().backward()
    assert attention.project.weight.grad[: 2 * 8].abs().sum() > 0
    assert (attention.exponent.grad is not None) == (name == "polar")
