"""fast.py gives the outputs and gradients of model.py's readable forms, for the code that its
fingerprint names, and leaves everything else to model.py. test_edits.py edits model.py."""

import functools
import inspect
import itertools
import shutil
import warnings

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
import torch.utils.checkpoint
from mutants import load_model
from torch import nn
from torch.testing import assert_close

from nala_min import Config, NaLaLM, NaLaViT, fast, linear_attention, measure, model, nala_attention

B, H, D, M = 2, 3, 8, 5
REFERENCE = {True: "chunked", False: "parallel"}
BOTH = pytest.mark.parametrize("causal", [False, True])


def inputs(num_tokens, dtype=torch.float64, zeros=False, num_keys=None):
    """Random q, k, v. If zeros, some rows and channels of q and k are 0, and some queries tiny."""
    q = torch.randn(B, H, num_tokens, D, dtype=dtype)
    k, v = (torch.randn(B, H, num_keys or num_tokens, size, dtype=dtype) for size in (D, M))
    if zeros:
        q[0, 0, 1], k[0, 1, 2], q[1, :, 3, :4], k[1, :, 4, 5:] = 0, 0, 0, 0
        q[:, :, 5:9] *= 0.01
    return [x.requires_grad_() for x in (q, k, v)]


def outputs_and_grads(attention, tensors, **options):
    """What attention returns, and the gradients of a fixed weighted sum of all of it."""
    results = attention(*tensors[:3], **options)
    results = results if isinstance(results, tuple) else (results,)
    weights = (torch.arange(x.numel()).cos().view(x.shape).to(x) for x in results)
    loss = sum((x * y).sum() for x, y in zip(results, weights, strict=True))
    unused = {"allow_unused": True, "materialize_grads": True}
    return *results, *torch.autograd.grad(loss, tensors, **unused)


def assert_agree(attention, tensors, *, causal, tolerance=1e-10, **options):
    """The fast and the readable form agree, and the fast one runs."""
    run = functools.partial(attention, causal=causal, **options)
    got = outputs_and_grads(run, tensors)
    want = outputs_and_grads(run, tensors, mode=REFERENCE[causal])
    assert "_Attention" in type(got[0].grad_fn).__name__
    assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.fixture(params=["one segment", "many, kept", "many, some kept", "many, recomputed"])
def segments(request, monkeypatch):
    """Whether a sequence has one segment or several, and how many of their features are kept."""
    if request.param != "one segment":
        monkeypatch.setattr(fast, "SEGMENT", B * H * D * 16)
        kept = {"many, kept": 2**30, "many, some kept": 10_000, "many, recomputed": 0}
        monkeypatch.setattr(fast, "KEPT", kept[request.param])


# --- The same results -----------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("feature_map", ["cosine", "split"])
def test_fast_equals_readable(segments, feature_map, causal):
    """Any length and chunk size; zeros; padding keys, also a text of padding only; states."""
    for num_tokens, chunk_size in itertools.product((2, 17, 70), (None, 3, 1000)):
        options = {"causal": causal, "feature_map": feature_map, "chunk_size": chunk_size}
        assert_agree(nala_attention, inputs(num_tokens), **options)
        mask = torch.rand(B, num_tokens) < 0.7
        mask[1] = False
        tensors = inputs(num_tokens, zeros=num_tokens > 17)
        assert_agree(nala_attention, tensors, key_mask=mask, **options)
        state = torch.rand(B, H, 2 * D, M + 1, dtype=torch.float64, requires_grad=True)
        for chosen in (slice(None), slice(0, 1), slice(1, 2)):  # of the output and the new state

            def attention(*qkv, chosen=chosen, state=state, **kwargs):
                return nala_attention(*qkv, state=state, return_state=True, **kwargs)[chosen]

            run = functools.partial(attention, **options)
            tensors = [*inputs(num_tokens), state]
            got = outputs_and_grads(run, tensors)
            want = outputs_and_grads(run, tensors, mode=REFERENCE[causal])
            assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("num_keys", [1, 5, 100])
def test_queries_and_keys_of_unequal_number(segments, num_keys):
    assert_agree(nala_attention, inputs(40, num_keys=num_keys), causal=False)


@BOTH
@pytest.mark.parametrize("options", [{"lam": 2}, {"tau": 0}, {"alpha": 1.5}], ids=str)
def test_every_option(causal, options):
    assert_agree(nala_attention, inputs(20), causal=causal, **options)


@BOTH
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)]
)
def test_low_precision(segments, dtype, bound, causal):
    low = [x.detach().to(dtype).requires_grad_() for x in inputs(200)]
    high = [x.detach().double().requires_grad_() for x in low]
    got = outputs_and_grads(functools.partial(nala_attention, causal=causal), low)
    reference = functools.partial(nala_attention, mode=REFERENCE[causal], causal=causal)
    for g, w in zip(got, outputs_and_grads(reference, high), strict=True):
        assert g.dtype == dtype
        assert ((g.double() - w).square().mean() / w.square().mean()).sqrt() <= bound


@BOTH
def test_any_layout(segments, causal):
    """Heads after tokens, as in a model; one key for all tokens; a single channel."""
    q, k, v = (x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in inputs(40))
    k = k[:, :, :1].expand_as(k)
    assert_agree(nala_attention, [x.requires_grad_() for x in (q, k, v)], causal=causal)
    q, k, v = inputs(40)
    assert_agree(nala_attention, [q[..., :1], k[..., :1], v[..., :2]], causal=causal)
    assert nala_attention(q[:0], k[:0], v[:0], causal=causal).shape == (0, H, 40, M)


@BOTH
def test_outputs_are_the_same_without_gradients(segments, causal):
    want = nala_attention(*(tensors := inputs(70)), causal=causal)
    for guard in (torch.no_grad, torch.inference_mode):
        with guard():
            assert torch.equal(nala_attention(*tensors, causal=causal), want)


@BOTH
@pytest.mark.parametrize("kept", [0, 2**21])
def test_long_texts_need_little_memory_beyond_outputs_and_gradients(causal, kept, monkeypatch):
    """Beyond the output and three gradients: one such tensor, KEPT and a few segments."""
    monkeypatch.setattr(fast, "KEPT", kept)
    q, k, v = (torch.randn(1, 4, 8192, 64, requires_grad=True) for _ in range(3))
    peaks = {}
    for mode in ("auto", REFERENCE[causal]):
        with measure.Recorder() as recorder:
            out = nala_attention(q, k, v, causal=causal, mode=mode)
            torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
        peaks[mode] = recorder.peak / 4  # float32
    assert 4 * q.numel() < peaks["auto"] < 5 * q.numel() + kept + 32 * fast.SEGMENT
    assert peaks["auto"] < 0.6 * peaks[REFERENCE[causal]]


# --- Transforms, derivatives and compilation ------------------------------------------------------


@BOTH
def test_inside_a_checkpoint_and_under_vmap(causal):
    tensors = inputs(70)
    attention = functools.partial(nala_attention, causal=causal)
    checkpoint = torch.utils.checkpoint.checkpoint
    checkpointed = functools.partial(checkpoint, attention, use_reentrant=False)
    assert_close(outputs_and_grads(checkpointed, tensors), outputs_and_grads(attention, tensors))
    q, k, v = tensors
    batched = torch.func.vmap(lambda q: attention(q[None], k[:1], v[:1]))(q)
    assert_close(batched[0, 0], attention(q[:1], k[:1], v[:1])[0])


@BOTH
def test_derivatives_of_every_kind(causal):
    """Second ones against finite differences; Hessians, vectorised Jacobians and forward mode."""
    q, k, v = (x.detach()[:1, :1] for x in inputs(7))
    mask = torch.ones(1, 7, dtype=torch.bool)
    mask[0, 4] = False

    def attention(q, mode="auto"):
        return nala_attention(q, k, v, causal=causal, key_mask=mask, mode=mode)

    qkv = [x.clone().requires_grad_() for x in (q, k, v)]
    function = functools.partial(nala_attention, causal=causal, key_mask=mask)
    assert torch.autograd.gradgradcheck(function, qkv, fast_mode=True)
    for derivative in (
        lambda f: torch.autograd.functional.hessian(lambda q: f(q).square().sum(), q),
        lambda f: torch.autograd.functional.jacobian(f, q, vectorize=True),
        lambda f: torch.autograd.functional.jacobian(f, q, strategy="forward-mode", vectorize=True),
        lambda f: torch.func.hessian(lambda q: f(q).square().sum())(q),
        lambda f: torch.func.jvp(f, (q,), (v[..., :1].expand_as(q),))[1],
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # from PyTorch's forward mode
            got, want = (
                derivative(functools.partial(attention, mode=mode))
                for mode in ("auto", REFERENCE[causal])
            )
        assert got.abs().max() > 1e-3
        assert_close(got, want, rtol=1e-9, atol=1e-9)


@BOTH
def test_torch_compile_has_no_graph_break_and_few_graphs(causal):
    """Any order of lengths needs one graph per power of 2 of chunks, and one for the first."""
    torch._dynamo.reset()
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    attention = functools.partial(nala_attention, causal=causal)
    compiled = torch.compile(attention, backend=graphs, fullgraph=True)
    for num_tokens in (128, 70, 333, 5, 64, 300, 12, 100, 257, 90):
        tensors = inputs(num_tokens)
        got, want = outputs_and_grads(compiled, tensors), outputs_and_grads(attention, tensors)
        assert_close(got, want, rtol=1e-9, atol=1e-9)
    assert graphs.frame_count <= (5 if causal else 2)


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # about the compiler's own code
@pytest.mark.parametrize("kind", ["texts", "images"])
def test_a_compiled_model_trains_at_changing_sizes(kind):
    """With the default backend, which generates code: half a minute per size."""
    torch._dynamo.reset()
    sizes = {"num_layers": 1, "num_heads": 2, "dim": 16}
    if kind == "texts":
        net = NaLaLM(Config(vocab_size=7, **sizes))
        batches = [torch.randint(7, (2, num_tokens)) for num_tokens in (9, 70)]
    else:
        net = NaLaViT(Config(num_classes=7, **sizes))
        batches = [torch.randn(2, 3, 8 * size, 16 + 4 * size) for size in (1, 2)]
    compiled = torch.compile(net, fullgraph=True)
    for x in batches:
        grads = []
        for run in (compiled, net):
            logits = run(x)[0] if kind == "texts" else run(x)
            grads.append(torch.autograd.grad(logits.square().sum(), list(net.parameters())))
        assert_close(*grads, rtol=1e-3, atol=1e-4)


# --- Everything else is model.py's, with autograd -------------------------------------------------


def test_the_fingerprint_is_that_of_model_py():
    """If this fails after an edit of model.py's features or forms, check that the gradients in
    fast.py are still theirs (test_fast_equals_readable), and then write the new fingerprint."""
    codes = tuple(getattr(model, name).__code__ for name in fast.FUNCTIONS)
    assert fast.fingerprint(codes, model.__file__) == fast.FINGERPRINT


def is_fast(*args, **options):
    return "_Attention" in type(nala_attention(*args, **options).grad_fn).__name__


def test_only_the_paper_s_features_are_served():
    tensors = inputs(9)
    assert is_fast(*tensors) and is_fast(*tensors, feature_map="split", lam=2, causal=True)
    assert not is_fast(*tensors, feature_map="elu") and not is_fast(*tensors, mode="parallel")
    lam = torch.full((H, 1, 1), 3.0, dtype=torch.float64, requires_grad=True)
    out = nala_attention(*tensors, lam=lam)  # learned, one number per head
    assert torch.autograd.grad(out.square().sum(), lam)[0].abs().min() > 0
    assert_close(out, nala_attention(*tensors))


WEIGHT = torch.full((D,), 2.0, dtype=torch.float64, requires_grad=True)


@BOTH
@pytest.mark.parametrize(
    "query_map",
    [
        lambda q: F.relu(q) * WEIGHT,
        nn.Sequential(nn.Linear(D, D, dtype=torch.float64), nn.Softplus()),
        functools.partial(lambda q, scale: F.relu(q) * scale[0], scale=[2.0]),  # unhashable
        lambda q: torch.ones_like(q),
    ],
)
def test_features_of_your_own(query_map, causal):
    """Learned, unhashable or constant ones: the same as with the readable form, gradients too."""
    tensors = inputs(70)
    parameters = [WEIGHT, *(query_map.parameters() if isinstance(query_map, nn.Module) else ())]

    def attention(q, k, v, **options):
        return linear_attention(q, k, v, query_map, torch.exp, causal=causal, **options)

    got = outputs_and_grads(attention, [*tensors, *parameters])
    want = outputs_and_grads(attention, [*tensors, *parameters], mode=REFERENCE[causal])
    assert_close(got, want, rtol=1e-10, atol=1e-10)


@BOTH
def test_features_that_change_between_calls(causal):
    """Each call uses them as they are: a weight that is unfrozen, dropout that is switched on."""
    q, k, v = (x.detach() for x in inputs(20))
    scale = nn.Parameter(torch.ones(D, dtype=torch.float64), requires_grad=False)

    def features(x):
        return F.softplus(x * scale)

    assert not linear_attention(q, k, v, features, features, causal=causal).requires_grad
    scale.requires_grad_()
    assert linear_attention(q, k, v, features, features, causal=causal).requires_grad
    dropout = nn.Dropout(0.5).eval()
    outs = []
    for training in (False, True):
        dropout.train(training)
        outs.append(linear_attention(q, k, v, lambda x: dropout(x.exp()), torch.exp, causal=causal))
    assert not torch.allclose(*outs)


@BOTH
def test_the_gradient_is_that_of_the_forward_pass_that_ran(causal):
    """Random features draw once; a temperature may change before the backward pass."""
    temperature = [1.0]

    def features(x):
        return F.dropout(x.exp() * temperature[0], 0.3)

    grads = []
    for change in (1.0, 5.0):
        temperature[0] = 1.0
        torch.manual_seed(1)
        tensors = inputs(20)
        out = linear_attention(*tensors, features, features, causal=causal)
        temperature[0] = change
        torch.manual_seed(2)
        grads.append(torch.autograd.grad(out.square().sum(), tensors))
    assert_close(*grads, rtol=0, atol=0)


@BOTH
@pytest.mark.parametrize("changed", ["mask", "q", "k", "v", "state"])
def test_a_tensor_that_changes_before_the_backward_pass(segments, changed, causal):
    """The gradient is unchanged, or autograd raises an error."""
    mask = torch.rand(B, 40) < 0.7
    state = torch.rand(B, H, 2 * D, M + 1, dtype=torch.float64)
    grads = []
    for change in (False, True):
        torch.manual_seed(0)
        tensors = dict(zip("qkv", inputs(40), strict=True)) | {"mask": mask.clone()}
        tensors["state"] = state.clone().requires_grad_()
        leaves = [tensors[name] for name in ("q", "k", "v", "state")]
        options = {"key_mask": tensors["mask"], "state": tensors["state"]}
        loss = nala_attention(*leaves[:3], causal=causal, **options).square().sum()
        with torch.no_grad():
            if change and changed == "mask":
                tensors["mask"].logical_not_()
            elif change:
                tensors[changed].mul_(3)
        try:
            grads.append(torch.autograd.grad(loss, leaves))
        except RuntimeError as error:
            assert change and "modified by an inplace operation" in str(error)
            return
    assert_close(*grads, rtol=0, atol=0)


def test_random_numbers_and_hooks_of_the_user_are_left_alone():
    packed, before = [], torch.get_rng_state()
    tensors = [torch.ones(B, H, 9, size, requires_grad=True) for size in (D, D, M)]
    counts = []
    for _ in range(2):
        packed.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: packed.append(x) or x, lambda x: x):
            nala_attention(*tensors, causal=True).sum().backward()
        counts.append(len(packed))
    assert counts[0] == counts[1] > 0
    assert torch.equal(torch.get_rng_state(), before)


# --- These tests can fail -------------------------------------------------------------------------

MISTAKES = {
    "the power's slope is lost": ("(1 - tanh * tanh)", "0"),
    "the norm is not in the angle": ("* x).sum(dim=-1, keepdim=True) * slope", "* x).sum() * 0"),
    "angles rotate the wrong way": ("grad_cos, sin, value=-1)", "grad_cos, sin, value=1)"),
    "the power is 1": ("mul_(power)", "mul_(1)"),
    "division by a zero channel": ("clamp_min_(torch.finfo(x.dtype).tiny)", "clamp_min_(0.0)"),
    "a key does not see its own token": ("grad_scores = (grad @ values.mT).tril_()",
                                         "grad_scores = (grad @ values.mT).tril_(-1)"),
    "the state runs the wrong way": ("if backwards else chunks", "if not backwards else chunks"),
    "a token does not see later queries": ("values @ later.mT", "values @ (0 * later).mT"),
    "the state forgets": ("state + added[:, :, t], state", "added[:, :, t].clone(), state"),
    "no gradient through the normaliser": ("-(grad * out)", "0 * (grad * out)"),
    "padding is not masked": ("k, v = (x.masked_fill(~key_mask", "_, v = (x.masked_fill(~key_mask"),
    "division by zero mass": ("mass == 0, math.inf", "mass < 0, math.inf"),
    "the wrong segment is recomputed": ("saved[2 * i : 2 * i + 2]", "saved[0:2]"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_gradient_is_detected(mistake, monkeypatch):
    old, new = MISTAKES[mistake]
    source = inspect.getsource(fast)
    assert source.count(old) == 1
    broken = load_model(source.replace(old, new), "mutant_of_fast.py")
    broken.SEGMENT, broken.KEPT = B * H * D * 16, 0
    monkeypatch.setattr(model, "fast", broken)
    with pytest.raises((AssertionError, RuntimeError)):
        for causal in (True, False):
            mask = torch.rand(B, 70) < 0.7
            mask[1] = False
            options = {"causal": causal, "chunk_size": 8}
            assert_agree(nala_attention, inputs(70, zeros=True), key_mask=mask, **options)
            assert_agree(nala_attention, inputs(70), **options)
