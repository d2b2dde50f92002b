"""fast.py gives the outputs and gradients of model.py's readable forms in less memory. What it was
not written for, it leaves to model.py: so model.py may be edited, and still trains right."""

import functools
import importlib
import linecache
import shutil
import warnings

import pytest
import torch
import torch._dynamo.testing
from mutants import SOURCE, load_model, mutant
from torch import nn
from torch.testing import assert_close

from nala_min import Config, NaLaLM, NaLaViT, fast, linear_attention, measure, model, nala_attention

B, H, D, M = 2, 3, 8, 5
READABLE = {True: "chunked", False: "parallel"}
both = pytest.mark.parametrize("causal", [False, True])


def inputs(num_tokens, num_keys=None, dtype=torch.float64):
    sizes = (num_tokens, D), (num_keys or num_tokens, D), (num_keys or num_tokens, M)
    return [torch.randn(B, H, *x, dtype=dtype, requires_grad=True) for x in sizes]


def is_fast(*args, attention=nala_attention, **options):
    return "_Attention" in type(attention(*args, **options).grad_fn).__name__


def outputs_and_grads(attention, tensors, of=slice(None)):
    """The output and state, and the gradients of a weighted sum of both, or of one of them."""
    results = attention(*tensors)
    results = results if isinstance(results, tuple) else (results,)
    losses = [(x * torch.arange(x.numel()).cos().view(x.shape).to(x)).sum() for x in results]
    unused = {"allow_unused": True, "materialize_grads": True}
    return *results, *torch.autograd.grad(sum(losses[of]), tensors, **unused)


def assert_agree(tensors, *, causal, of=slice(None), **options):
    """The fast and the readable form agree. tensors: q, k, v, and perhaps an initial state."""

    def attention(q, k, v, state=None, mode="auto"):
        more = options | {"causal": causal, "state": state, "return_state": True}
        return nala_attention(q, k, v, mode=mode, **more)

    got = outputs_and_grads(attention, tensors, of)
    assert "_Attention" in type(got[0].grad_fn).__name__
    readable = functools.partial(attention, mode=READABLE[causal])
    assert_close(got, outputs_and_grads(readable, tensors, of), rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        assert torch.equal(attention(*tensors)[0], got[0])


@pytest.fixture(params=[(2**17, 2**20), (768, 10_000), (768, 0)], ids=str)
def segments(request, monkeypatch):
    """One segment or several of B H D 16 elements, and how many of their features are kept."""
    monkeypatch.setattr(fast, "SEGMENT", request.param[0])
    monkeypatch.setattr(fast, "KEPT", request.param[1])


@both
@pytest.mark.parametrize("feature_map", ["cosine", "split"])
def test_it_equals_the_readable_form(segments, feature_map, causal):
    """For any length, chunk size and option, with zeros, padding and states."""
    options = {"causal": causal, "feature_map": feature_map}
    for num_tokens, chunk_size, num_keys in ((2, None, 1), (17, 3, 5), (70, None, 100)):
        q, k, v = inputs(num_tokens)
        with torch.no_grad():
            q[0, 0, 1], q[:, :, 0, :4], k[0, 1, 1:3], k[:, :, 0, 5:] = 0, 0, 0, 0
            q[:, :, 5:9] *= 0.01
            k[1], v[1] = torch.inf, torch.nan  # a text of padding only
        mask = torch.rand(B, num_tokens) < 0.7
        mask[1] = False
        assert_agree([q, k, v], key_mask=mask, chunk_size=chunk_size, **options)
        state = torch.rand(B, H, 2 * D, M + 1, dtype=torch.float64, requires_grad=True)
        for of in (slice(None), slice(0, 1), slice(1, 2)):  # both results, or one of them
            tensors = [*inputs(num_tokens, None if causal else num_keys), state]
            assert_agree(tensors, chunk_size=chunk_size, of=of, **options)
    for option in ({"lam": 2}, {"tau": 0}, {"alpha": 1.5}):
        assert_agree(inputs(20), **options, **option)


@both
def test_any_layout(causal):
    """The output has that of the values, such as heads after tokens. No text is a text, too."""
    q, k, v = (x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in inputs(40))
    assert nala_attention(q, k, v, causal=causal).stride() == v.stride()
    assert_agree([x[..., :1].requires_grad_() for x in (q, k, v)], causal=causal)
    assert nala_attention(q[:0], k[:0], v[:0], causal=causal).shape == (0, H, 40, M)


@both
def test_a_long_text_needs_little_memory(causal, monkeypatch):
    """Beyond inputs, outputs and gradients: one such tensor, KEPT features and a few segments. How
    large these are was measured: see speed_cpu_segments.json."""
    assert (fast.SEGMENT, fast.KEPT) == (2**17, 11 * 2**20)
    assert (fast.LARGE_SEGMENT, fast.LARGE_KEPT) == (2**26, 2**28)
    monkeypatch.setattr(fast, "SEGMENT", 2**15)
    q, k, v = (torch.randn(1, 4, 4096, 32, requires_grad=True) for _ in range(3))

    def peak(mode="auto", kept=0, gradients=True):
        monkeypatch.setattr(fast, "KEPT", kept)
        with measure.Recorder() as recorder, torch.set_grad_enabled(gradients):
            out = nala_attention(q, k, v, causal=causal, mode=mode)
            if gradients:
                torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
        return recorder.peak / 4  # float32

    least, budget = peak(), 2**19
    assert 4 * q.numel() < least < 5 * q.numel() + 32 * fast.SEGMENT
    assert 0.7 * budget < peak(kept=budget) - least < budget
    assert peak(kept=10 * budget, gradients=False) < q.numel() + 32 * fast.SEGMENT
    assert least < 0.6 * peak(READABLE[causal])


@both
def test_derivatives_of_every_kind(causal):
    """Second ones equal finite differences. Hessians, Jacobians, forward mode and vmap equal those
    of the readable form."""
    q, k, v = (x.detach()[:1, :1] for x in inputs(5))
    mask = torch.ones(1, 5, dtype=torch.bool)
    mask[0, 3] = False
    function = functools.partial(nala_attention, causal=causal, key_mask=mask)
    qkv = [x.clone().requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradgradcheck(function, qkv, fast_mode=True)
    for derivative in (
        lambda f: torch.autograd.functional.hessian(lambda q: f(q).square().sum(), q),
        lambda f: torch.autograd.functional.jacobian(f, q, vectorize=True),
        lambda f: torch.func.vmap(f)(torch.stack([q, 2 * q])),
        lambda f: torch.func.hessian(lambda q: f(q).square().sum())(q),
        lambda f: torch.func.jvp(f, (q,), (v[..., :1].expand_as(q),))[1],
        lambda f: torch.autograd.functional.jacobian(f, q, strategy="forward-mode", vectorize=True),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # from PyTorch's forward mode
            got, want = (
                derivative(lambda q, mode=mode: function(q, k, v, mode=mode))
                for mode in ("auto", READABLE[causal])
            )
        assert got.abs().max() > 1e-3
        assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_the_fingerprint_is_that_of_model_py():
    """If this fails after an edit of model.py's features or forms, check that the gradients in
    fast.py are still theirs (test_it_equals_the_readable_form), and write the new fingerprint."""
    codes = tuple(getattr(model, name).__code__ for name in fast.FUNCTIONS)
    assert fast.fingerprint(codes, model.__file__) == fast.FINGERPRINT


def test_only_the_paper_s_features_are_served():
    """Not decoding, a baseline, a learned exponent or features of your own: autograd does these."""
    tensors = inputs(9)
    assert is_fast(*tensors) and is_fast(*tensors, feature_map="split", lam=2, causal=True)
    assert not is_fast(*tensors, feature_map="elu") and not is_fast(*tensors, mode="parallel")
    assert not is_fast(*(x[:, :, :1] for x in tensors), causal=True)  # one step of decoding
    assert not is_fast(*tensors, lam=torch.full((H, 1, 1), 3.0, dtype=torch.float64))
    paper = functools.partial(model.key_features, feature_map="cosine", lam=3.0, alpha=20.0)
    shorter = functools.partial(model.key_features, feature_map="cosine")
    learned = nn.Sequential(nn.Linear(D, 2 * D), nn.Softplus()).double()
    for query_map in (learned, shorter, paper):
        attention = functools.partial(linear_attention, query_map=query_map, key_map=paper)
        assert not is_fast(*tensors, attention=attention)


# --- model.py, edited -----------------------------------------------------------------------------

EDITS = {  # of each function that fast.py replaces
    "at_least_float32": ("x.to(torch.promote_types", "2 * x.to(torch.promote_types"),
    "decompose": ("vector_norm(x, dim=-1", "vector_norm(x, ord=1, dim=-1"),
    "query_power": ("torch.tanh(norm)", "norm / (1 + norm)"),
    "query_magnitude": ("(ratio.clamp_min(tiny)))", "(ratio.clamp_min(tiny))) + size"),
    "key_magnitude": (".pow(lam)", ".pow(lam) * (1 + k * k)"),
    "cosine_map": ("torch.sigmoid(2 * alpha", "torch.sigmoid(3 * alpha"),
    "sign_split": ("(direction > 0)", "direction.sigmoid()"),
    "query_features": ("= decompose(q)", "= decompose(q.sinh())"),
    "key_features": ("cosine_map(key_magnitude(k, lam)", "cosine_map(k.exp()"),
    "parallel": ("return phi_q @ state", "return (phi_q @ phi_k.mT).square() @ values"),
    "quadratic": ("(phi_q @ phi_k.mT).tril()", "(phi_q @ phi_k.mT).tril(-1)"),
    "chunked": ("sums = q @ torch", "sums = 0.5 * q @ torch"),
    "linear_attention": ("normaliser.masked_fill(normaliser == 0, math.inf)", "1.0"),
}


def assert_edited(module, causal=True, feature_map="cosine"):
    """It gives other outputs than model.py, the same in every form, with correct gradients."""
    options = {"causal": causal, "feature_map": feature_map, "chunk_size": 4}
    attention, tensors = functools.partial(module.nala_attention, **options), inputs(9)
    assert not torch.allclose(attention(*tensors), nala_attention(*tensors, **options))
    assert_close(attention(*tensors), attention(*tensors, mode=READABLE[causal]))
    assert torch.autograd.gradcheck(attention, tensors, fast_mode=True)


@pytest.mark.parametrize("name", fast.FUNCTIONS)
def test_an_edited_model_has_correct_gradients(name):
    feature_map = "split" if name == "sign_split" else "cosine"
    assert_edited(mutant(*EDITS[name]), name != "parallel", feature_map)


def test_code_may_be_replaced_at_any_time(monkeypatch):
    """A function, by hand or by a notebook's autoreload, or a feature map."""
    replaced, reloaded, mapped = (load_model(SOURCE, model.__file__) for _ in range(3))
    assert is_fast(*inputs(9), attention=reloaded.nala_attention)
    replaced.query_power = functools.partial(mutant(*EDITS["query_power"]).query_power)
    reloaded.query_power.__code__ = mutant(*EDITS["query_power"]).query_power.__code__
    mapped.BASELINES["cosine"] = torch.exp
    for module in (replaced, reloaded, mapped):
        assert_edited(module)
    monkeypatch.setattr(model, "query_power", lambda norm, lam, tau: lam * (tau + norm))
    assert not is_fast(*inputs(9))  # the exported function changes as well


def test_only_the_original_is_fast(tmp_path, monkeypatch):
    """In any file; comments and docstrings may change. A file that is edited after its import is
    not trusted; once it is reloaded, its new code runs."""
    path = tmp_path / "my_model.py"
    commented = SOURCE.replace("    return lam * (tau", "    # why\n    return lam * (tau")
    path.write_text(commented.replace("Exponent that", "What"), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("my_model")
    assert is_fast(*inputs(9), attention=module.nala_attention)
    assert not is_fast(*inputs(9), attention=load_model(SOURCE).nala_attention)  # without a file
    path.write_text(commented.replace(*EDITS["query_power"]) + "\n# longer\n", encoding="utf-8")
    fast.fingerprint.cache_clear()
    linecache.checkcache()
    assert not is_fast(*inputs(9), attention=module.nala_attention)
    importlib.invalidate_caches()
    assert_edited(importlib.reload(module))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # about the compiler's own code
@pytest.mark.parametrize("make", [NaLaLM, NaLaViT])
def test_a_compiled_model_trains_at_changing_sizes(make):
    """Without graph breaks. Any order of lengths needs one graph per power of 2 of chunks, and one
    for the first; images, one per size. Once with the default backend, which generates code."""
    torch._dynamo.reset()
    net = make(Config(num_layers=1, num_heads=2, dim=16))
    batches = [torch.randint(7, (2, size)) for size in (128, 70, 333, 5, 64, 300, 12, 100, 90)]
    if make is NaLaViT:
        batches = [torch.randn(2, 3, 8, 20), torch.randn(2, 3, 16, 24)]
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    for backend, chosen in ((graphs, batches), ("inductor", batches[:1])):
        compiled = torch.compile(net, backend=backend, fullgraph=True)
        for x in chosen:
            outs = [run(x)[0] if make is NaLaLM else run(x) for run in (compiled, net)]
            grads = [torch.autograd.grad(y.square().sum(), [*net.parameters()]) for y in outs]
            assert_close(*grads, rtol=1e-3, atol=1e-4)
    assert graphs.frame_count <= (5 if make is NaLaLM else 2)
