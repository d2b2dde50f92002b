"""relatives.py: each attention equals its paper's sum over keys, as a loop in float64. Also tests
what the file of a custom attention must define."""

import math
import pickle
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from nala_min import ATTENTIONS, NaLaLM, NaLaViT, nala_attention, relatives
from nala_min.model import Config

B, H, N, D = 2, 3, 7, 4
NAMES = ("focused", "clipped", "polar", "magnitude-aware", "hedgehog", "injective", "delta")
PARAMETERS = {"polar": "exponent", "delta": "share"}  # the others have none


def attention(name):
    """The attention called name, in float64. If it has a parameter, the values are random."""
    attend = ATTENTIONS[name]
    if isinstance(attend, type):
        attend = attend(Config(num_heads=H, dim=H * D)).double()
        parameter = getattr(attend, PARAMETERS[name])
        parameter.data = torch.randn_like(parameter)
    return attend


def qkv(num_tokens=N):
    return torch.randn(3, B, H, num_tokens, D, dtype=torch.float64)


def weighted(weight, q, k, v, causal):
    """The sum over visible keys of weight(q_t, k_i, h) v_i, divided by the sum of the weights."""
    out = torch.zeros_like(v)
    for b, h, t in ((b, h, t) for b in range(B) for h in range(H) for t in range(N)):
        last = t + 1 if causal else N
        w = torch.stack([weight(q[b, h, t], k[b, h, i], h) for i in range(last)])
        out[b, h, t] = w @ v[b, h, :last] / (w.sum() or 1.0)
    return out


def focused_features(x):
    x = x.clamp_min(0)
    return x**3 * (x.norm() / (x**3).norm()) if x.any() else x


def hedgehog_features(x):
    exps = torch.cat([x, -x]).exp()
    return exps / exps.sum()


def clipped_weight(q, k, h):
    d = q / q.norm()
    power = 3 * (0.5 + torch.tanh(q.norm()))
    return (d.clamp_min(0) ** power * k.clamp_min(0) ** 3).sum()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("name", "weight"),
    [
        ("focused", lambda q, k, h: focused_features(q) @ focused_features(k)),
        ("clipped", clipped_weight),
        ("hedgehog", lambda q, k, h: hedgehog_features(q) @ hedgehog_features(k)),
    ],
)
def test_linear_relatives_equal_the_loop(name, weight, causal):
    q, k, v = qkv()
    assert_close(attention(name)(q, k, v, causal=causal), weighted(weight, q, k, v, causal))


@pytest.mark.parametrize("causal", [True, False])
def test_polar_has_half_the_channels_for_equal_and_half_for_opposite_signs(causal):
    polar, (q, k, v) = attention("polar"), qkv()
    power = 1 + 3 * torch.sigmoid(polar.exponent.detach())[:, 0]

    def weight(sign, q, k, h):
        selected = q * k * sign > 0
        return ((q.abs() * k.abs()) ** power[h] * selected).sum()

    same = weighted(partial(weight, 1), q, k, v, causal)
    opposite = weighted(partial(weight, -1), q, k, v, causal)
    out = polar(q, k, v, causal=causal)
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
    assert_close(attention("magnitude-aware")(q, k, v, causal=causal), want)


@pytest.mark.parametrize("causal", [True, False])
def test_injective_weights_are_centred_scores_plus_an_equal_share(causal):
    q, k, v = qkv()
    want = torch.zeros_like(v)
    for b, h, t in ((b, h, t) for b in range(B) for h in range(H) for t in range(N)):
        n = t + 1 if causal else N
        a = k[b, h, :n] @ q[b, h, t] / (n * math.sqrt(D))
        w = a - a.mean() + 1 / n
        assert_close(w.sum().item(), 1.0)
        want[b, h, t] = w @ v[b, h, :n]
    assert_close(attention("injective")(q, k, v, causal=causal), want)


@pytest.mark.parametrize("causal", [True, False])
def test_delta_corrects_its_state_at_each_key(causal):
    delta, (q, k, v) = attention("delta"), qkv()
    share, want = torch.sigmoid(delta.share.detach()), torch.zeros_like(v)
    for b, h in ((b, h) for b in range(B) for h in range(H)):
        state, states = torch.zeros(D, D, dtype=torch.float64), []
        for t in range(N):
            key = F.normalize(F.silu(k[b, h, t]), dim=0)
            state = state + share[h] * torch.outer(key, v[b, h, t] - key @ state)
            states.append(state)
        for t in range(N):
            query = F.normalize(F.silu(q[b, h, t]), dim=0)
            want[b, h, t] = query @ states[t if causal else -1]
    assert_close(delta(q, k, v, causal=causal), want)


def test_magnitude_aware_attention_differs_more_for_longer_queries():
    """It adds a term to linear attention that grows with the sum of the scores."""
    q, k, v = qkv()
    q = q.abs()
    plain = nala_attention(q * 9, k, v, feature_map="elu")
    outs = [attention("magnitude-aware")(c * q, k, v) for c in (1, 9)]
    assert (outs[1] - plain).norm() > 2 * (outs[0] - plain).norm()


@pytest.mark.parametrize("name", NAMES)
def test_a_text_may_be_cut_anywhere(name):
    """It continues from its state, as nala_attention does."""
    attend, (q, k, v) = attention(name), qkv(20)
    want, pieces, state, start = attend(q, k, v, causal=True), [], None, 0
    for size in (1, 5, 1, 1, 12):
        piece = (x[:, :, start : start + size] for x in (q, k, v))
        out, state = attend(*piece, causal=True, state=state, return_state=True)
        pieces.append(out)
        start += size
    assert_close(torch.cat(pieces, dim=2), want)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("causal", [True, False])
def test_bfloat16_inputs_give_nearly_correct_bfloat16_outputs(name, causal):
    attend, tensors = attention(name), [x.bfloat16() for x in qkv()]
    want = attend(*(x.double() for x in tensors), causal=causal)
    attend = attend.float() if isinstance(attend, torch.nn.Module) else attend
    out = attend(*tensors, causal=causal)
    assert out.dtype == torch.bfloat16
    assert_close(out.double(), want, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", NAMES)
def test_zero_queries_and_keys_have_finite_outputs_and_gradients(name):
    q, k, v = (x.clone() for x in qkv())
    q[:, :, 2], k[:, :, 3], q[:, :, 4, 0], k[:, :, 5, 1] = 0, 0, 0, 0
    for x in (q, k, v):
        x.requires_grad_()
    out = attention(name)(q, k, v, causal=True)
    out.square().sum().backward()
    assert out.isfinite().all()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


@pytest.mark.parametrize("name", NAMES)
def test_a_model_trains_with_it_and_continues_from_its_state(name):
    model = NaLaLM(Config(vocab_size=7, num_layers=1, num_heads=2, dim=8, attention=name))
    tokens = torch.randint(7, (2, 9))
    before = model(tokens)[0]
    changed = tokens.clone()
    changed[:, 5] = (tokens[:, 5] + 1) % 7
    after = model(changed)[0]
    assert_close(before[:, :5], after[:, :5])  # causal
    head, state = model(tokens[:, :4])
    assert_close(torch.cat([head, model(tokens[:, 4:], state)[0]], dim=1), before)
    before.sum().backward()
    layer = model.blocks[0].attention
    assert layer.project.weight.grad[: 2 * 8].abs().sum() > 0
    assert isinstance(layer.attend, torch.nn.Module) == (name in PARAMETERS)
    if name in PARAMETERS:
        assert getattr(layer.attend, PARAMETERS[name]).grad.abs().sum() > 0


@pytest.mark.parametrize("name", [*NAMES, "nala", "split", "elu", "relu", "softmax"])
def test_an_image_model_with_it_survives_pickling(name):
    vit = NaLaViT(Config(num_layers=1, num_heads=2, dim=16, attention=name)).double()
    images = torch.randn(2, 3, 9, 12, dtype=torch.float64)
    loaded = pickle.loads(pickle.dumps(vit))
    assert torch.equal(loaded(images), vit(images))


# --- Custom files ---------------------------------------------------------------------------------

FEATURES = """
import torch

def query_features(q):
    return torch.cat([q.relu(), (-q).relu()], dim=-1)

def key_features(k):
    return torch.cat([k.relu(), (-k).relu()], dim=-1).square()
"""
ATTENTION = """
import torch
from nala_min.model import nala_attention

def attention(q, k, v, *, causal, state=None, return_state=False):
    out, after = nala_attention(q, k, v, causal=causal, state=state, return_state=True)
    return (2 * out, after) if return_state else 2 * out
"""


@pytest.fixture
def write(tmp_path):
    def write(source):
        path = tmp_path / "mine.py"
        path.write_text(source, encoding="utf-8")
        return str(path)

    yield write
    ATTENTIONS.pop(str(tmp_path / "mine.py"), None)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("source", [FEATURES, ATTENTION])
def test_a_file_is_registered_under_its_name(write, source, causal):
    path = write(source)
    state = torch.get_rng_state()
    digest = relatives.register(path, D, causal=causal)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(digest) == 64 and digest == relatives.register(path, D, causal=causal)
    q, k, v = qkv()
    out = ATTENTIONS[path](q, k, v, causal=causal)
    if source == ATTENTION:
        want = 2 * nala_attention(q, k, v, causal=causal)
    else:
        phi_q = torch.cat([q.relu(), (-q).relu()], dim=-1)
        weights = phi_q @ torch.cat([k.relu(), (-k).relu()], dim=-1).square().mT
        weights = weights.tril() if causal else weights
        want = weights @ v / weights.sum(-1, keepdim=True).clamp_min(1e-300)
    assert_close(out, want)


BROKEN = {  # content of a file: part of the error message
    "x = 1": "define query_features and key_features, or attention, got neither",
    "def query_features(q): return q": "or attention, got query_features",
    FEATURES + ATTENTION: "or attention, got query_features, key_features, attention",
    "def f(:": "does not run: SyntaxError",
    "import torch\nraise KeyError('k')": "does not run: KeyError",
    "import sys\nsys.exit(3)": "does not run: SystemExit",
    FEATURES.replace("return torch.cat([q.relu(), (-q).relu()], dim=-1)", "return q"): (
        "query_features must be finite and non-negative, got tensor([-"
    ),
    FEATURES.replace("return torch.cat([q.relu(), (-q).relu()], dim=-1)", "return q.relu()"): (
        "RuntimeError: "
    ),
    FEATURES.replace("return torch.cat([q.relu(), (-q).relu()], dim=-1)", "return q.sum(-1)"): (
        "query_features's result must be floating-point (B, H, N, F), got torch.float32 (2, 3, 6)"
    ),
    FEATURES.replace("return torch.cat([q.relu(), (-q).relu()], dim=-1)", "return 3"): (
        "query_features's result must be floating-point (B, H, N, F), got tensor(3)"
    ),
    FEATURES.replace("return torch.cat([q.relu(), (-q).relu()], dim=-1)", "return q > 0"): (
        "query_features's result must be floating-point (B, H, N, F), got torch.bool"
    ),
    FEATURES.replace("return torch.cat([q.relu(), (-q).relu()], dim=-1)", "return q.log()"): (
        "query_features must be finite and non-negative, got tensor([nan])"
    ),
    FEATURES.replace("[q.relu(), (-q).relu()]", "[q, q2]"): "NameError: name 'q2'",
    FEATURES.replace("def query_features(q)", "def query_features()"): (
        "TypeError: query_features()"
    ),
    FEATURES.replace("def query_features(q):", "query_features = 3\ndef f(q):"): (
        "TypeError: 'int' object is not callable"
    ),
    ATTENTION.replace("(2 * out, after) if return_state else 2 * out", "2 * out"): (
        "attention's result must be output and state with return_state=True"
    ),
    ATTENTION.replace("(2 * out, after)", "(out[..., :1], after)"): (
        "attention's output must be (2, 3, 6, 4), got torch.float32 (2, 3, 6, 1)"
    ),
    ATTENTION.replace("(2 * out, after)", "(out / 0, after)"): "attention's output must be finite",
    ATTENTION.replace("causal, state=None", "state=None"): "TypeError: attention()",
    ATTENTION.replace("2 * out, after", "out - out.mean(2, keepdim=True), after"): (
        "attention sees the future"
    ),
    ATTENTION.replace("state=state, ", ""): "attention does not continue from its state",
    FEATURES.replace("(k):", "(k):\n    k = k.softmax(dim=-2)"): (
        "key_features must be features of each token by itself"
    ),
    FEATURES.replace("(k):", "(k):\n    k = k - k.mean(2, keepdim=True)"): (
        "key_features must be features of each token by itself"
    ),
}  # fmt: skip


@pytest.mark.parametrize("source", BROKEN)
def test_an_invalid_file_is_rejected_in_one_line(write, source):
    path = write(source)
    with pytest.raises(ValueError) as error:
        relatives.register(path, D, causal=True)
    message = str(error.value)
    assert message.startswith(path) and "\n" not in message
    assert BROKEN[source] in message
    assert path not in ATTENTIONS


def test_an_edited_file_is_registered_again(write):
    q, k, v = qkv()
    outs = []
    for source in (ATTENTION, ATTENTION.replace("2 * out", "3 * out")):
        relatives.register(path := write(source), D, causal=True)
        outs.append(ATTENTIONS[path](q, k, v, causal=True))
    assert_close(3 * outs[0], 2 * outs[1])


def test_a_file_may_be_a_path_object(write):
    path = Path(write(ATTENTION))
    relatives.register(path, D, causal=True)
    assert str(path) in ATTENTIONS


def test_a_missing_file_is_named(tmp_path):
    for name in ("nowhere.py", "."):
        with pytest.raises(ValueError, match="cannot be read: "):
            relatives.register(str(tmp_path / name), D, causal=True)


def test_attention_for_images_need_not_be_causal(write):
    path = write(ATTENTION.replace("2 * out, after", "out - out.mean(2, keepdim=True), after"))
    relatives.register(path, D, causal=False)
    with pytest.raises(ValueError, match="sees the future"):
        relatives.register(path, D, causal=True)
