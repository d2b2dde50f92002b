"""The outputs and gradients of fast.py equal those of model.py's readable forms. test_edits.py does
the same for edited copies of model.py."""

import functools
import inspect
import shutil
import warnings

import pytest
import torch
import torch._dynamo.testing
import torch.utils.checkpoint
from mutants import load_model
from torch.testing import assert_close

import nala_min
from nala_min import (
    LMConfig,
    NaLaLM,
    NaLaViT,
    ViTConfig,
    fast,
    linear_attention,
    measure,
    nala_attention,
)

B, H, D, M = 2, 3, 8, 5
FEATURE_MAPS = ("cosine", "split", "elu", "relu")
REFERENCE = {True: "chunked", False: "parallel"}


def inputs(num_tokens, dtype=torch.float64, *, zeros=False):
    """Random q, k, v. If zeros, some rows and channels of q and k are 0, and some queries tiny."""
    q, k, v = (torch.randn(B, H, num_tokens, size, dtype=dtype) for size in (D, D, M))
    if zeros:
        q[0, 0, 1], k[0, 1, 2], q[1, :, 3, :4], k[1, :, 4, 5:] = 0, 0, 0, 0
        q[:, :, 5:9] *= 0.01
    return [x.requires_grad_() for x in (q, k, v)]


def outputs_and_grads(attention, tensors, **options):
    """What attention returns, and the gradients of a fixed random weighted sum of that."""
    results = attention(*tensors[:3], **options)
    results = results if isinstance(results, tuple) else (results,)
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(x.shape, generator=generator).to(x) for x in results]
    loss = sum((x * y).sum() for x, y in zip(results, cotangents, strict=True))
    unused = {"allow_unused": True, "materialize_grads": True}
    return *results, *torch.autograd.grad(loss, tensors, **unused)


def assert_agree(model, tensors, *, causal, tolerance=1e-10, **options):
    """The fast and the readable form of model's attention agree."""
    attention = functools.partial(model.nala_attention, causal=causal, **options)
    got = outputs_and_grads(attention, tensors)
    want = outputs_and_grads(attention, tensors, mode=REFERENCE[causal])
    assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.fixture(params=["one piece", "many, kept", "many, some kept", "many, recomputed"])
def pieces(request, monkeypatch):
    """Whether a sequence has one segment or several, and how many of their features are saved."""
    if request.param != "one piece":
        monkeypatch.setattr(fast, "SEGMENT", B * H * D * 16)
        keep = {"many, kept": 2**30, "many, some kept": 10_000, "many, recomputed": 0}
        monkeypatch.setattr(fast, "SAVED_ELEMENTS", keep[request.param])


# --- The same results -----------------------------------------------------------------------------


@pytest.mark.parametrize("num_tokens", [2, 15, 16, 17, 65, 200])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_fast_equals_readable(model, pieces, feature_map, causal, num_tokens):
    assert_agree(model, inputs(num_tokens), causal=causal, feature_map=feature_map)


@pytest.mark.parametrize("chunk_size", [1, 3, 16, 64, 1000])
def test_any_chunk_size(model, pieces, chunk_size):
    assert_agree(model, inputs(70), causal=True, chunk_size=chunk_size)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_zeros_and_padding(model, pieces, feature_map, causal):
    """Zero rows and channels, tiny queries, padding keys, and a text that is all padding."""
    mask = torch.rand(B, 70) < 0.7
    mask[1, :30] = False
    options = {"feature_map": feature_map, "key_mask": mask}
    assert_agree(model, inputs(70, zeros=True), causal=causal, **options)
    mask[1] = False
    assert_agree(model, inputs(70, zeros=True), causal=causal, **options)


@pytest.mark.parametrize("num_tokens", [5, 70])
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_states_in_and_out(model, pieces, feature_map, num_tokens):
    """From an initial state: results, and gradients through the output, the new state or both."""
    tensors = inputs(num_tokens)
    _, state = model.nala_attention(
        *(x.detach() for x in inputs(3)), causal=True, feature_map=feature_map, return_state=True
    )
    tensors.append(state.detach().requires_grad_())
    options = {"causal": True, "feature_map": feature_map}

    for chosen in (slice(None), slice(0, 1), slice(1, 2)):  # both, the output, the new state

        def attention(q, k, v, chosen=chosen, **mode):
            results = model.nala_attention(
                q, k, v, state=tensors[3], return_state=True, **options, **mode
            )
            return tuple(results)[chosen]

        got = results_and_gradients(attention, tensors)
        want = results_and_gradients(functools.partial(attention, mode="chunked"), tensors)
        assert_close(got, want, rtol=1e-10, atol=1e-10)


def results_and_gradients(attention, tensors):
    """What attention returns, and the gradients of a fixed weighted sum of it."""
    results = attention(*tensors[:3])
    loss = sum((x * torch.linspace(1, 2, x.numel()).to(x).view(x.shape)).sum() for x in results)
    grads = torch.autograd.grad(loss, tensors, allow_unused=True, materialize_grads=True)
    return [*results, *grads]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("shape", [(), (H, 1, 1), (B, 1, 1, 1)])
def test_a_learned_norm_scale(model, pieces, feature_map, causal, shape):
    scale = (2 + torch.rand(shape, dtype=torch.float64)).requires_grad_()

    def gradients(**mode):
        q, k, v = inputs(40)
        options = {"causal": causal, "feature_map": feature_map, "norm_scale": scale}
        options |= {"chunk_size": 16}
        torch.manual_seed(0)
        out = model.nala_attention(q, k, v, **options, **mode)
        cotangent = torch.randn(out.shape, dtype=out.dtype)
        return torch.autograd.grad(
            (out * cotangent).sum(), (q, scale), allow_unused=True, materialize_grads=True
        )

    torch.manual_seed(2)
    got = gradients()
    torch.manual_seed(2)
    want = gradients(mode=REFERENCE[causal])
    assert_close(got, want, rtol=1e-10, atol=1e-10)
    assert got[1].any() == (feature_map in ("cosine", "split"))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("options", [{"lam": 2.0}, {"tau": 0.1}, {"alpha": 1.5}], ids=str)
def test_every_option(model, causal, options):
    assert_agree(model, inputs(20), causal=causal, **options)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)]
)
def test_low_precision_in_many_pieces(model, pieces, dtype, bound, causal):
    low = [x.detach().to(dtype).requires_grad_() for x in inputs(200)]
    high = [x.detach().double().requires_grad_() for x in low]
    got = outputs_and_grads(functools.partial(model.nala_attention, causal=causal), low)
    reference = functools.partial(model.nala_attention, mode=REFERENCE[causal], causal=causal)
    for g, w in zip(got, outputs_and_grads(reference, high), strict=True):
        assert g.dtype == dtype
        assert ((g.double() - w).square().mean() / w.square().mean()).sqrt() <= bound


@pytest.mark.parametrize("causal", [False, True])
def test_any_layout_and_shape(model, pieces, causal):
    """Heads after tokens, as in a model; one key for all tokens; a single channel; M unlike D."""
    q, k, v = (x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in inputs(40))
    k = k[:, :, :1].expand_as(k)
    assert_agree(model, [x.requires_grad_() for x in (q, k, v)], causal=causal)
    q, k, v = inputs(40)
    assert_agree(model, [q[..., :1], k[..., :1], v[..., :2]], causal=causal)


def test_outputs_are_the_same_without_gradients(model, pieces):
    q, k, v = inputs(70)
    for causal in (False, True):
        want = model.nala_attention(q, k, v, causal=causal)
        with torch.no_grad():
            assert torch.equal(model.nala_attention(q, k, v, causal=causal), want)


# --- Memory and work ------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 2**21])
@pytest.mark.parametrize("causal", [False, True])
def test_long_texts_need_little_memory_beyond_outputs_and_gradients(causal, keep, monkeypatch):
    """Beyond the output and three gradients: one such tensor, SAVED_ELEMENTS and a few segments."""
    monkeypatch.setattr(fast, "SAVED_ELEMENTS", keep)
    shape = (1, 4, 8192, 64)
    q, k, v = (torch.randn(shape, requires_grad=True) for _ in range(3))
    needed = 4 * q.numel()
    peaks = {}
    for mode in ("auto", REFERENCE[causal]):
        with measure.Recorder() as recorder:
            out = nala_attention(q, k, v, causal=causal, mode=mode)
            torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
        peaks[mode] = recorder.peak / 4  # float32
    assert needed < peaks["auto"] < needed + q.numel() + fast.SAVED_ELEMENTS + 32 * fast.SEGMENT
    assert peaks["auto"] < 0.6 * peaks[REFERENCE[causal]]


def test_features_that_fit_are_not_computed_twice(monkeypatch):
    calls = []

    def query_features(q):
        calls.append(q.shape[2])
        return torch.relu(q)

    monkeypatch.setattr(fast, "SEGMENT", B * H * D * 16)
    for causal in (False, True):
        for keep, times in ((2**30, 3), (0, 6)):
            monkeypatch.setattr(fast, "SAVED_ELEMENTS", keep)
            with torch.no_grad():
                linear_attention(*inputs(40), query_features, torch.relu, causal=causal)  # verifies
            monkeypatch.setattr(fast, "by_autograd", lambda features, x, grad: torch.zeros_like(x))
            calls.clear()
            out = linear_attention(
                *inputs(40), query_features, torch.relu, causal=causal, chunk_size=16
            )
            out.sum().backward()
            monkeypatch.undo()
            monkeypatch.setattr(fast, "SEGMENT", B * H * D * 16)
            assert calls[:3] == [16, 16, 8] and len(calls) == times


@pytest.mark.parametrize("backwards", [False, True])
def test_both_cumulative_sums_agree(backwards):
    """On the CPU, and on other devices."""

    class NotOnCPU(torch.Tensor):
        is_cpu = False

    sums = torch.randn(3, 5, 7, dtype=torch.float64)
    want = fast._exclusive_cumsum(sums, backwards)
    assert_close(torch.Tensor(fast._exclusive_cumsum(sums.as_subclass(NotOnCPU), backwards)), want)
    assert_close(want[:, 2], sums[:, 3:].sum(1) if backwards else sums[:, :2].sum(1))


# --- Transforms, derivatives and compilation ------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
def test_torch_func_uses_the_readable_form(causal):
    q, k, v = inputs(10)

    def loss(q):
        return nala_attention(q, k, v, causal=causal).square().sum()

    assert_close(torch.func.grad(loss)(q), torch.autograd.grad(loss(q), q)[0])
    batched = torch.func.vmap(lambda q: nala_attention(q[None], k[:1], v[:1], causal=causal))(q)
    assert_close(batched[0, 0], nala_attention(q[:1], k[:1], v[:1], causal=causal)[0])


@pytest.mark.parametrize("causal", [False, True])
def test_inside_a_checkpoint(causal):
    """A checkpoint recomputes the forward pass, and unpacks each saved tensor only once."""
    tensors = inputs(70)
    attention = functools.partial(nala_attention, causal=causal)
    checkpoint = torch.utils.checkpoint.checkpoint
    checkpointed = functools.partial(checkpoint, attention, use_reentrant=False)
    assert_close(outputs_and_grads(checkpointed, tensors), outputs_and_grads(attention, tensors))


def test_a_state_of_another_dtype_and_without_a_gradient():
    q, k, v = (x.detach().float().requires_grad_() for x in inputs(70))
    _, state = nala_attention(q.detach(), k, v, causal=True, return_state=True)
    for num_tokens in (5, 70):
        tensors = [x[:, :, :num_tokens] for x in (q, k, v)]
        low = functools.partial(nala_attention, causal=True, state=state.detach().bfloat16())
        assert_close(
            outputs_and_grads(low, tensors), outputs_and_grads(low, tensors, mode="chunked")
        )


@pytest.mark.parametrize("causal", [False, True])
def test_an_empty_batch(causal):
    q, k, v = (x[:0] for x in inputs(5))
    assert nala_attention(q, k, v, causal=causal).shape == (0, H, 5, M)


def test_an_in_place_change_of_norm_scale_is_detected():
    scale = torch.ones(H, 1, 1, dtype=torch.float64, requires_grad=True)
    out = nala_attention(*inputs(5), causal=True, norm_scale=scale)
    with torch.no_grad():
        scale += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("causal", [False, True])
def test_second_derivatives_are_correct(causal, feature_map):
    """With padding, against finite differences of the first derivative in a random direction."""
    q, k, v = (x.detach()[:1, :1].requires_grad_() for x in inputs(18))
    mask = torch.ones(1, 18, dtype=torch.bool)
    mask[0, 4] = False
    options = {"causal": causal, "feature_map": feature_map, "key_mask": mask, "chunk_size": 4}
    assert torch.autograd.gradgradcheck(
        lambda *qkv: nala_attention(*qkv, **options),
        (q, k, v),
        raise_exception=False,
        fast_mode=True,
    )


@pytest.mark.parametrize("causal", [False, True])
def test_other_kinds_of_derivatives_are_correct(causal):
    """Hessians, vectorised Jacobians, forward mode and Hessian-vector products."""
    q, k, v = (x.detach()[:1, :1] for x in inputs(7))
    mode = REFERENCE[causal]

    def attention(q, mode="auto"):
        return nala_attention(q, k, v, causal=causal, mode=mode)

    for derivative in (
        lambda f: torch.autograd.functional.hessian(lambda q: f(q).sum(), q),
        lambda f: torch.autograd.functional.hessian(lambda q: f(q).square().sum(), q),
        lambda f: torch.autograd.functional.jacobian(f, q, vectorize=True),
        lambda f: torch.autograd.functional.jacobian(f, q, strategy="forward-mode", vectorize=True),
        lambda f: torch.func.hessian(lambda q: f(q).square().sum())(q),
        lambda f: torch.func.jvp(f, (q,), (v[..., :1].expand_as(q),))[1],
        lambda f: torch.autograd.functional.hvp(lambda q: f(q).square().sum(), q, k)[1],
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # from PyTorch's forward mode
            got = derivative(attention)
            want = derivative(functools.partial(attention, mode=mode))
        assert got.abs().max() > 1e-3
        assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("causal", [False, True])
def test_torch_compile_has_no_graph_break_and_few_graphs(causal):
    """Compiling causes no graph breaks, and three lengths need at most two graphs."""
    torch._dynamo.reset()
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    attention = functools.partial(nala_attention, causal=causal)
    compiled = torch.compile(attention, backend=graphs, fullgraph=True)
    for num_tokens in (128, 70, 333):
        tensors = inputs(num_tokens)
        got, want = outputs_and_grads(compiled, tensors), outputs_and_grads(attention, tensors)
        assert_close(got, want, rtol=1e-9, atol=1e-9)
    assert graphs.frame_count <= 2


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # about the compiler's own code
@pytest.mark.parametrize("kind", ["texts", "images"])
def test_a_compiled_model_trains_at_changing_sizes(kind):
    """With the default backend, which generates code: half a minute per size."""
    torch._dynamo.reset()
    sizes = {"num_layers": 1, "num_heads": 2, "dim": 16}
    if kind == "texts":
        model = NaLaLM(LMConfig(vocab_size=7, **sizes))
        inputs = [torch.randint(7, (2, num_tokens)) for num_tokens in (9, 70)]
    else:
        model = NaLaViT(ViTConfig(num_classes=7, **sizes))
        inputs = [torch.randn(2, 3, 8 * size, 16 + 4 * size) for size in (1, 2)]
    compiled = torch.compile(model, fullgraph=True)
    for x in inputs:
        grads = []
        for net in (compiled, model):
            logits = net(x)[0] if kind == "texts" else net(x)
            grads.append(torch.autograd.grad(logits.square().sum(), list(model.parameters())))
        assert_close(*grads, rtol=1e-3, atol=1e-4)


# --- Custom features ------------------------------------------------------------------------------

CUSTOM_FEATURES = {
    "two concatenated functions": (
        lambda q: torch.cat([q.exp(), q.square()], -1),
        lambda k: torch.cat([k.abs()] * 2, -1),
    ),
    "elementwise": (torch.relu, torch.sigmoid),
    "absolute value": (torch.abs, lambda k: k.abs().clone()),
    "constant": (lambda q: torch.ones_like(q), torch.exp),
    "NaLa's": (
        functools.partial(nala_min.model.query_features, lam=2.0),
        nala_min.model.key_features,
    ),
}


@pytest.mark.parametrize("name", CUSTOM_FEATURES)
@pytest.mark.parametrize("causal", [False, True])
def test_custom_features_use_autograd(pieces, name, causal):
    tensors, features = inputs(70, zeros=True), CUSTOM_FEATURES[name]
    mask = torch.rand(B, 70) < 0.7
    attention = functools.partial(linear_attention, causal=causal, key_mask=mask)
    got = outputs_and_grads(lambda q, k, v: attention(q, k, v, *features), tensors)
    want = outputs_and_grads(
        lambda q, k, v: attention(q, k, v, *features, mode=REFERENCE[causal]), tensors
    )
    assert_close(got, want, rtol=1e-10, atol=1e-10)
    q, _, v = tensors
    verdict = fast.verify(nala_min.model.linear_attention, *features, q, v, causal)
    assert verdict is not None and verdict.by_hand is False


def scaled(x, scale):
    return torch.relu(x) * scale


WEIGHT = torch.full((D,), 2.0, dtype=torch.float64, requires_grad=True)
UNSUPPORTED = {  # (query features, key features) that only the readable form supports
    "learned weight": (lambda q: torch.relu(q) * WEIGHT, torch.relu),
    "learned weight in a partial": (functools.partial(scaled, scale=WEIGHT), torch.relu),
    "random": (lambda q: torch.relu(q) * torch.rand_like(q), torch.relu),
    "mixes tokens": (torch.relu, lambda k: torch.relu(k) / (k.abs().amax(2, keepdim=True) + 1e-3)),
    "fails for other lengths": (torch.relu, lambda k: torch.relu(k).reshape(2, 3, 70, -1)),
    "unhashable": (functools.partial(scaled, scale=[2.0]), torch.relu),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_features_that_only_the_readable_form_supports(name):
    q, k, v = inputs(70)
    if name == "unhashable":
        UNSUPPORTED[name][0].keywords["scale"] = WEIGHT.detach()[0].item()
    verdict = fast.verify(nala_min.model.linear_attention, *UNSUPPORTED[name], q, v, True)
    assert verdict is None or name == "unhashable"
    state = torch.get_rng_state()
    linear_attention(q, k, v, *UNSUPPORTED[name], causal=True).sum().backward()
    if "learned" in name:
        assert WEIGHT.grad.abs().max() > 0
        WEIGHT.grad = None
    assert torch.equal(torch.get_rng_state(), state) == (name != "random")


def test_verify_has_no_side_effects():
    """It leaves the random state and saved-tensor hooks alone, and works in every gradient mode."""
    packed = []
    fast._verdict_cache.clear()
    state = torch.get_rng_state()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: packed.append(x) or x, lambda x: x):
        first = [outputs_and_grads(nala_attention, inputs(9)), len(packed)]
        packed.clear()
        torch.set_rng_state(state)
        assert [outputs_and_grads(nala_attention, inputs(9)), len(packed)][1] == first[1]
    fast._verdict_cache.clear()
    for guard in (torch.no_grad(), torch.inference_mode()):
        fast._verdict_cache.clear()
        with guard:
            nala_attention(*inputs(9), causal=True)
        (entry,) = fast._verdict_cache.values()
        assert [verdict.by_hand for verdict in entry.by_kind.values()] == [True]


def test_another_default_device_does_not_disable_the_fast_path():
    fast._verdict_cache.clear()
    tensors = inputs(9)
    with torch.device("meta"):
        nala_attention(*tensors, causal=True)
    (entry,) = fast._verdict_cache.values()
    assert [verdict.by_hand for verdict in entry.by_kind.values()] == [True]


def test_verify_runs_once_per_kind_of_call(monkeypatch):
    nala_attention(*inputs(9))
    monkeypatch.setattr(fast, "_verify", lambda *_: pytest.fail("verified again"))
    nala_attention(*inputs(11))
    nala_attention(*(x[:1] for x in inputs(12)))


# --- These tests can fail -------------------------------------------------------------------------

SOURCE = inspect.getsource(fast)
MISTAKES = {
    "the power's slope is lost": ("slope / norm_scale)", "0 * slope)"),
    "the norm is not in the angle": ("direction, radial, value=-1)", "direction, radial, value=0)"),
    "angles rotate the wrong way": ("grad_cos, sin, value=-1)", "grad_cos, sin, value=1)"),
    "the key's power is 1": ("mul_(lam).mul_(_rec", "mul_(1).mul_(_rec"),
    "elu has slope 1": ("phi.clamp(max=1.0)", "phi.sign()"),
    "a key does not see its own token": (
        "grad_scores = (grad @ v.mT).tril_()",
        "grad_scores = (grad @ v.mT).tril_(-1)",
    ),
    "the state runs the wrong way": ("ones.triu_(1) if backwards", "ones.tril_(-1) if backwards"),
    "the states before chunks are lost": ("scores, states\n", "scores, None\n"),
    "the last chunk is not in the state": (
        "states[:, last] + sums[",
        "states[:, last] + 0 * sums[",
    ),
    "a token does not see later queries": ("dk.baddbmm_(v, grad_states.mT)", "dk"),
    "padding has a gradient": (
        "segment, None], 0.0)\n    return by_autograd",
        "segment, None], 1.0)\n    return by_autograd",
    ),
    "only the last segment contributes to the state's gradient": (
        "grad_state = grad_state + phi_q.mT @ grad",
        "grad_state = phi_q.mT @ grad",
    ),
    "a query's norm scale has the wrong sign": ("dx, -slope * scaled", "dx, slope * scaled"),
    "no gradient through the normaliser": ("torch.neg((grad", "torch.mul(0, (grad"),
    "padding is not masked": (
        "phi_k = phi_k.masked_fill(~call.key_mask[:, None, segment, None], 0.0)",
        "phi_k = phi_k.masked_fill(~call.key_mask[:, None, segment, None], 1.0)",
    ),
    "division by a zero channel": ("return x.sign().div_(", "return torch.ones_like(x).div_("),
    "division by zero mass": ("normaliser == 0, math.inf", "normaliser < 0, math.inf"),
}


def check_all(model):
    """The checks above that reject every mistake and accept the original."""
    torch.manual_seed(0)
    for causal in (True, False):
        assert_agree(model, inputs(70), causal=causal, chunk_size=16)
        assert_agree(model, inputs(70), causal=causal, feature_map="elu")
        mask = torch.rand(B, 70) < 0.7
        mask[1] = False
        assert_agree(model, inputs(70, zeros=True), causal=causal, key_mask=mask)
        custom = functools.partial(
            model.linear_attention, query_features=torch.exp, key_features=torch.exp
        )
        tensors = inputs(70)
        got, want = (
            outputs_and_grads(custom, tensors, causal=causal, key_mask=mask, mode=mode)
            for mode in ("auto", REFERENCE[causal])
        )
        assert_close(got, want)
    scale = torch.rand(H, 1, 1, dtype=torch.float64, requires_grad=True)
    got, want = (
        torch.autograd.grad(
            model.nala_attention(*inputs(5), norm_scale=scale, mode=mode).square().sum(), scale
        )
        for mode in ("auto", "parallel")
        if torch.manual_seed(0)
    )
    assert_close(got, want)


def trusting_verify(module):
    """A replacement for verify that always trusts the hand-written gradient."""

    def verify(reference, query, key, q, v, causal):
        return module.Verdict(isinstance(query, functools.partial), key(q[:1, :, :1]).shape[3])

    return verify


def test_the_original_passes_all_checks(model, monkeypatch):
    monkeypatch.setattr(fast, "SEGMENT", B * H * D * 32)
    check_all(model)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_gradient_is_detected(model, mistake, monkeypatch):
    """By these checks, and by fast.py's own verify: it falls back, so the gradient is correct."""
    old, new = MISTAKES[mistake]
    assert old in SOURCE
    monkeypatch.setattr(fast, "SEGMENT", B * H * D * 32)
    broken = load_model(SOURCE.replace(old, new), "mutant_of_fast.py")
    broken.SEGMENT = fast.SEGMENT
    monkeypatch.setattr(model, "fast", broken)
    check_all(model)
    (entry,) = broken._verdict_cache.values()
    assert any(verdict is None or not verdict.by_hand for verdict in entry.by_kind.values())
    monkeypatch.setattr(broken, "verify", trusting_verify(broken))
    with pytest.raises(AssertionError):
        check_all(model)
