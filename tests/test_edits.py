"""After an edit to model.py, gradients still match outputs, by finite differences, although fast.py
has hand-written gradients for the paper's features: its fingerprint notices every edit."""

import importlib
import itertools
import linecache

import pytest
import torch
from mutants import SOURCE, load_model, mutant
from torch.testing import assert_close

import nala_min
from nala_min import fast

B, H, D, M = 2, 2, 6, 3

# Edits that a student may try: (old, new), in model.py.
EDITS = {
    "n / (1 + n) for tanh": ("torch.tanh(norm)", "norm / (1 + norm)"),
    "no query norm": ("torch.tanh(norm)", "1.0"),
    "an unbounded power": ("lam * (tau + torch.tanh(norm))", "tau + norm"),
    "tanh clipped beyond 2": ("torch.tanh(norm)", "torch.tanh(norm.clamp(max=2.0))"),
    "another norm": ("vector_norm(x, dim=-1", "vector_norm(x, ord=1, dim=-1"),
    "a direction with an eps": ("norm.masked_fill(norm == 0, 1.0)", "(norm + 1e-2)"),
    "a scale that does not cancel": (
        "return torch.exp2(power * torch.log2(ratio.clamp_min(tiny)))",
        "return torch.exp2(power * torch.log2(ratio.clamp_min(tiny))) + direction.square()",
    ),
    "an extra factor in the key": (".pow(lam)", ".pow(lam) * (1 + k * k)"),
    "another key power": (".pow(lam)", ".pow(lam - 1)"),
    "a bounded key": ("size = k.abs()", "size = torch.tanh(k.abs())"),
    "a linear angle": (
        "torch.sin((math.pi / 2) * torch.sigmoid(2 * alpha * direction))",
        "torch.sin((math.pi / 4) * (1 + direction))",
    ),
    "a steeper angle": ("torch.sigmoid(2 * alpha", "torch.sigmoid(3 * alpha"),
    "a cosine instead of the complement's sine": (
        "torch.sin((math.pi / 2) * torch.sigmoid(-2 * alpha * direction))",
        "torch.cos((math.pi / 2) * torch.sigmoid(2 * alpha * direction))",
    ),
    "no angles": ("magnitude * cos, magnitude * sin", "magnitude, 2 * magnitude"),
    "a soft sign split": ("magnitude * (direction > 0)", "magnitude * direction.sigmoid()"),
    "a softplus for elu": ("F.relu(x) + x.masked_fill(x > 0, 0.0).exp()", "F.softplus(x)"),
    "a squared ReLU": ('"relu": F.relu,', '"relu": lambda x: F.relu(x).square(),'),
    "an eps in the normaliser": (
        "normaliser.masked_fill(normaliser == 0, math.inf)",
        "(normaliser + 0.1)",
    ),
    "no normaliser": ("normaliser.masked_fill(normaliser == 0, math.inf)", "1.0"),
    "bounded values": ("F.pad(at_least_float32(v), (0, 1)", "F.pad(torch.tanh(v), (0, 1)"),
    "tokens that do not see themselves": (
        "(phi_q @ phi_k.mT).tril()",
        "(phi_q @ phi_k.mT).tril(-1)",
    ),
    "squared weights": (
        "return phi_q @ state, state",
        "return (phi_q @ phi_k.mT).square() @ values, state",
    ),
    "a learned number": (".pow(lam)", ".pow(lam) * LEARNED"),
}
MAPS = ("cosine", "split", "elu", "relu")


def inputs(num_tokens):
    generator = torch.Generator().manual_seed(num_tokens)
    return [
        torch.randn(B, H, num_tokens, size, dtype=torch.float64, generator=generator)
        for size in (D, D, M)
    ]


def check_gradients(model, causal, num_tokens, **options):
    """Compare autograd with finite differences, for a fixed weighted sum of the output and random
    directions of q, k and v."""
    tensors = [x.requires_grad_() for x in inputs(num_tokens)]

    def loss(q, k, v):
        out = model.nala_attention(q, k, v, causal=causal, **options)
        return (out * torch.linspace(1, 2, out.numel()).to(out).view(out.shape)).sum()

    grads = torch.autograd.grad(loss(*tensors), tensors)
    for i, (x, grad) in enumerate(zip(tensors, grads, strict=True)):
        direction = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(i))
        with torch.no_grad():
            ends = (
                loss(*tensors[:i], x + step * direction, *tensors[i + 1 :])
                for step in (1e-6, -1e-6)
            )
            want = (next(ends) - next(ends)) / 2e-6
        got = (grad * direction).sum()
        assert_close(got, want, rtol=2e-5, atol=2e-5, msg=lambda text, i=i: f"{'qkv'[i]}: {text}")


def check_outputs(model, causal, num_tokens, **options):
    """Compare the default mode with the readable form."""
    tensors = inputs(num_tokens)
    got = model.nala_attention(*tensors, causal=causal, **options)
    mode = "chunked" if causal else "parallel"
    want = model.nala_attention(*tensors, causal=causal, mode=mode, **options)
    assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.fixture
def segments(monkeypatch):
    """Segments of 16 tokens. The features of some are saved for the backward pass."""
    monkeypatch.setattr(fast, "SEGMENT", B * H * D * 16)
    monkeypatch.setattr(fast, "KEPT", 3000)


def edited(name):
    old, new = EDITS[name]
    module = mutant(old, new)
    module.LEARNED = torch.linspace(1, 2, D, dtype=torch.float64).requires_grad_()
    return module


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", EDITS)
def test_an_edited_model_has_correct_gradients(segments, name, causal):
    model = edited(name)
    for feature_map, num_tokens in itertools.product(MAPS, (2, 50)):
        options = {"feature_map": feature_map, "chunk_size": 16}
        check_outputs(model, causal, num_tokens, **options)
        check_gradients(model, causal, num_tokens, **options)


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_changes_something(name):
    """Otherwise, the test above proves nothing."""
    changed = edited(name)
    outs = [
        [
            model.nala_attention(*inputs(17), causal=causal, feature_map=feature_map)
            for causal in (False, True)
            for feature_map in MAPS
        ]
        for model in (nala_min.model, changed)
    ]
    moved = any((x - y).abs().max() > 1e-6 for x, y in zip(*outs, strict=True))
    assert moved or name == "a cosine instead of the complement's sine"  # the same function


def test_a_parameter_added_by_an_edit_gets_a_gradient():
    model = edited("a learned number")
    for causal in (False, True):
        model.nala_attention(*inputs(17), causal=causal).square().sum().backward()
        assert model.LEARNED.grad.abs().min() > 0
        model.LEARNED.grad = None


REPLACEMENTS = {  # functions to assign to names of model.py
    "query_power": lambda norm, lam, tau: lam * (tau + norm / (1 + norm)),
    "query_magnitude": lambda direction, power: direction.abs().pow(2) * power,
    "key_magnitude": lambda k, lam: k.abs().pow(lam) * (1 + k.abs()),
    "cosine_map": lambda magnitude, direction, alpha: torch.cat(
        [magnitude * torch.sigmoid(-direction), magnitude * torch.sigmoid(direction)], dim=-1
    ),
    "decompose": lambda x: (0.1 * x.abs().sum(dim=-1, keepdim=True), x.tanh()),
    "query_features": lambda q, feature_map, *, lam, tau, alpha: torch.cat(
        [q.cosh(), q.square()], dim=-1
    ),
    "key_features": lambda k, feature_map, *, lam, alpha: torch.cat([k.exp(), (-k).exp()], dim=-1),
    "parallel": lambda phi_q, phi_k, values, state: ((phi_q @ phi_k.mT).square() @ values, state),
    "chunked": lambda phi_q, phi_k, values, state, chunk_size: (
        (phi_q @ phi_k.mT).tril().sqrt() @ values,
        state,
    ),
    "at_least_float32": lambda x: 2 * x,
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", REPLACEMENTS)
def test_an_assigned_function_has_correct_gradients_at_once(segments, monkeypatch, name, causal):
    """It replaces a function of the module after the first call. Undoing it restores the output."""
    model, options = nala_min.model, {"causal": causal, "chunk_size": 16}
    before = model.nala_attention(*inputs(40), **options)
    with monkeypatch.context() as patch:
        patch.setattr(model, name, REPLACEMENTS[name])
        for num_tokens in (2, 40):
            check_outputs(model, causal, num_tokens, chunk_size=16)
            check_gradients(model, causal, num_tokens, chunk_size=16)
        out = nala_min.nala_attention(*inputs(40), **options)  # the exported function also changes
        assert torch.equal(out, model.nala_attention(*inputs(40), **options))
    moved = (out - before).abs().max() > 1e-4
    assert moved or (name, causal) in (("parallel", True), ("chunked", False))
    assert torch.equal(model.nala_attention(*inputs(40), **options), before)


GAIN = 1.0


def test_an_assigned_function_may_depend_on_a_global(monkeypatch):
    """It equals the paper's function until a global outside model.py changes."""

    def query_power(norm, lam, tau):
        return lam * (tau + torch.tanh(GAIN * norm))

    monkeypatch.setattr(nala_min.model, "query_power", query_power)
    for gain in (1.0, 0.3):
        monkeypatch.setitem(globals(), "GAIN", gain)
        for causal in (False, True):
            check_gradients(nala_min.model, causal, 17)


def test_code_that_is_replaced_in_place_is_noticed():
    """A notebook's autoreload does this."""
    model, other = load_model(SOURCE), edited("n / (1 + n) for tanh")
    check_gradients(model, True, 17)
    model.query_power.__code__ = other.query_power.__code__
    check_gradients(model, True, 17)
    model.query_power.__defaults__ = (2.0, 0.5)
    check_gradients(model, True, 17)


def test_a_reloaded_module_is_noticed(tmp_path, monkeypatch):
    """The file is edited and read again by importlib.reload."""
    old, new = EDITS["a linear angle"]
    path = tmp_path / "my_model.py"
    path.write_text(SOURCE, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("my_model")
    check_gradients(module, True, 17)
    before = module.nala_attention(*inputs(17), causal=True)
    path.write_text(SOURCE.replace(old, new) + "\n# longer\n", encoding="utf-8")
    importlib.invalidate_caches()
    module = importlib.reload(module)
    assert not torch.equal(module.nala_attention(*inputs(17), causal=True), before)
    check_gradients(module, True, 17)


def test_only_the_original_is_served(tmp_path, monkeypatch):
    """A copy of model.py in another file is; an edited copy is not, nor one whose file has changed
    since it was imported, nor one without a file. Comments and docstrings do not count."""

    def is_fast(module):
        grad_fn = module.nala_attention(*(x.requires_grad_() for x in inputs(17))).grad_fn
        return "_Attention" in type(grad_fn).__name__

    path = tmp_path / "copied_model.py"
    commented = SOURCE.replace("    return lam * (tau", "    # why\n    return lam * (tau")
    monkeypatch.syspath_prepend(tmp_path)
    path.write_text(commented, encoding="utf-8")
    module = importlib.import_module("copied_model")
    assert is_fast(module) and is_fast(nala_min.model)
    assert not is_fast(load_model(SOURCE)) and not is_fast(edited("a linear angle"))
    path.write_text(SOURCE.replace("tau=0.5", "tau=0.4"), encoding="utf-8")
    fast.fingerprint.cache_clear()
    linecache.checkcache()
    assert not is_fast(module)
