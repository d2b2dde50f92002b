"""Attention in less time and memory: Eqs. (13) and (15) of model.py, for any features.

model.py is written to be read, this file to be run. Autograd would keep every intermediate tensor
for the backward pass. Here a sequence is processed in segments that fit into a processor's cache.
For a long sequence, we keep only q, k, v, the output, a normaliser per token and a state per
segment, and recompute the features in the backward pass. Two facts keep the gradient short.

First, the gradient of linear attention is linear attention. Let total_t = q_t S_t, where S_t is the
sum of k_i^T v_i over i <= t, and let g_t be the gradient with respect to total_t. Then

  dq_t = g_t S_t^T,   dv_i = k_i R_i,   dk_i = v_i R_i^T,   R_i = sum over t >= i of q_t^T g_t,

so one state runs forwards in time and one backwards. Second, the gradient of the paper's features
is simple enough to write by hand: (a cos(theta), a sin(theta)) is a vector in a plane. Stretching
it changes log(a), turning it changes theta.

model.py is meant to be edited, so this file checks itself. Before it serves a kind of call for the
first time, and whenever anything in model.py has changed, it runs a few tokens through both files
and compares (`verify`). If the hand-written gradient differs, autograd differentiates the
features. If the result still differs, model.py does the work.

Shapes use the letters of model.py, and L for the tokens of a segment. In the functions that compute
totals, q, k and v mean phi_q, phi_k and [v 1].
"""

from __future__ import annotations

import functools
import math
import sys
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from types import FunctionType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from torch.autograd.function import Function
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import _disable_current_modes

SEGMENT = 2**17  # elements of q per segment on a CPU: about the fastest power of 2
LARGE_SEGMENT = 2**26  # on other devices, which prefer few large steps; not measured yet
# How many elements (of features and scores) a call saves for its backward pass. With 16,384 tokens,
# 4 heads and 64 channels per head, it then needs at most twice the memory of the fused softmax.
SAVED_ELEMENTS = 11 * 2**20
LARGE_SAVED_ELEMENTS = 2**28  # on other devices: enough for all presets; not measured yet


class Call(NamedTuple):
    """A call of reference (model.py's linear_attention), and how this file computes it."""

    reference: Callable
    query: Callable[[Tensor], Tensor]  # (..., D) to (..., F)
    key: Callable[[Tensor], Tensor]
    by_hand: bool  # use query_gradient and key_gradient instead of autograd
    causal: bool
    chunk_size: int
    key_mask: Tensor | None
    segments: list[slice]  # of the tokens
    budget: int | None  # elements to save for the backward pass; None: no backward pass


def attention(
    reference: Callable,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query: Callable[[Tensor], Tensor],
    key: Callable[[Tensor], Tensor],
    *,
    causal: bool,
    chunk_size: int | None,
    key_mask: Tensor | None,
    state: Tensor | None,
) -> tuple[Tensor, Tensor | None] | None:
    """What reference returns for these arguments with return_state=True. Returns None if reference
    must run itself: inside torch.compile or torch.func, in forward-mode AD, for a single token."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return None
    if q.numel() == 0 or q.is_meta or (causal and q.shape[2] == 1):
        return None
    if any(unpack_dual(x).tangent is not None for x in (q, k, v)):
        return None
    with torch.autocast(q.device.type, enabled=False):
        verdict = verify(reference, query, key, q, v, causal)
        if verdict is None:
            return None
        if chunk_size is None:
            chunk_size = _balanced_chunk(verdict.num_features, q.shape[2], v.shape[3] + 1)
        segments = _segments(q, chunk_size if causal else 1)
        saved = SAVED_ELEMENTS if q.device.type == "cpu" else LARGE_SAVED_ELEMENTS
        by_hand, budget = verdict.by_hand, saved if torch.is_grad_enabled() else None
        return _fast_attention(
            Call(reference, query, key, by_hand, causal, chunk_size, key_mask, segments, budget),
            *(q, k, v, state),
        )


def _fast_attention(call: Call, q: Tensor, k: Tensor, v: Tensor, state: Tensor | None = None):
    if not call.causal:
        return _Parallel.apply(call, q, k, v, _learned_norm_scale(call.query)), None
    if state is not None:
        state = state.to(torch.promote_types(q.dtype, torch.float32))
    return _Chunked.apply(call, q, k, v, _learned_norm_scale(call.query), state)


def _learned_norm_scale(query: Callable) -> Tensor | None:
    """norm_scale if it is a tensor: it may be learned. Other parameters cannot be learned here."""
    scale = getattr(query, "keywords", {}).get("norm_scale")
    return scale if isinstance(scale, Tensor) else None


def _balanced_chunk(num_features: int, num_tokens: int, value_dim: int) -> int:
    """Chunk size: 64 for up to 64 tokens. Otherwise the largest power of 2, but at least 16, up to
    the C at which the work within chunks, N C (F + M), equals the work between them, 2 N F M."""
    balanced = 2 * num_features * value_dim / (num_features + value_dim)
    return 64 if num_tokens <= 64 else 2 ** max(int(math.log2(balanced)), 4)


def _segments(q: Tensor, granularity: int) -> list[slice]:
    """Slices of q's tokens, about SEGMENT elements each, with lengths divisible by granularity."""
    batch, heads, num_tokens, dim = q.shape
    elements = SEGMENT if q.device.type == "cpu" else LARGE_SEGMENT
    length = granularity * max(elements // (batch * heads * dim * granularity), 1)
    return [slice(i, i + length) for i in range(0, num_tokens, length)]


# --- Does this file compute what model.py computes? -----------------------------------------------


class Verdict(NamedTuple):
    """How a kind of call is served."""

    by_hand: bool
    num_features: int


class _Verdicts(NamedTuple):
    """Verdicts by kind of call, and the code for which they hold: all globals of model.py."""

    objects: tuple
    code: tuple
    by_kind: dict[Any, Verdict | None]


_verdict_cache: weakref.WeakKeyDictionary[Callable, _Verdicts] = weakref.WeakKeyDictionary()


def verify(
    reference: Callable, query: Callable, key: Callable, q: Tensor, v: Tensor, causal: bool
) -> Verdict | None:
    """How this file serves a call, or None if it cannot. Tried once per process, code and kind.

    The kind of a call is all that the verdict can depend on: features and their options, heads,
    channels, causality, device.
    """
    objects = tuple(_module_objects(reference))
    code = tuple([(id(x), x.__code__, x.__defaults__) for x in objects if type(x) is FunctionType])
    entry = _verdict_cache.get(reference)
    if entry is None or entry.code != code or [*map(id, entry.objects)] != [*map(id, objects)]:
        entry = _verdict_cache[reference] = _Verdicts(objects, code, {})
    try:
        features = _cache_key(query), _cache_key(key)
        kind = (causal, q.shape[1], q.shape[3], v.shape[3], q.device, *features)
        if kind not in entry.by_kind:
            if len(entry.by_kind) > 1000:  # features that are new objects in every call
                entry.by_kind.clear()
            entry.by_kind[kind] = _verify(reference, query, key, q, v, causal)
        return entry.by_kind[kind]
    except TypeError:  # unhashable features
        return None


def _module_objects(reference: Callable) -> list[Any]:
    """The globals of model.py, without the functions that torch.compile adds."""
    added = ("__compiled_fn_", "__resume_at_")
    return [x for name, x in reference.__globals__.items() if not name.startswith(added)]


def _cache_key(features: Callable) -> Any:
    """Cache key: the function itself, or what a partial binds, with tensors by shape."""
    if not isinstance(features, functools.partial):
        return features
    bound = features.keywords.items()
    shapes = [(n, (x.shape, x.requires_grad) if isinstance(x, Tensor) else x) for n, x in bound]
    return features.func, features.args, tuple(shapes)


def _verify(
    reference: Callable, query: Callable, key: Callable, q: Tensor, v: Tensor, causal: bool
) -> Verdict | None:
    """Try the hand-written gradient, then autograd. Returns None if neither agrees."""
    with ExitStack() as stack:  # isolate the trial from the caller's settings
        stack.enter_context(_disable_current_modes())
        stack.enter_context(torch.device("cpu"))  # for tensors without an explicit device
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(saved_tensors_hooks(lambda x: x, lambda x: x))
        for by_hand in (True, False):
            call = Call(reference, query, key, by_hand, causal, 4, None, [], None)
            if by_hand and not _may_be_by_hand(call):
                continue
            try:
                if num_features := _matches_reference(call, q, v):
                    return Verdict(by_hand, num_features)
            except Exception:  # reference or the features reject this: they will raise it
                pass
    return None


def _matches_reference(call: Call, q: Tensor, v: Tensor) -> int | None:
    """F if outputs and gradients of a few tokens equal those of reference, otherwise None. There
    are several segments and chunks, zeros, padding and a state. The hand-written gradient is tried
    at norms from 1e-3 to 1e3, a range that other features need not support."""
    tensors = _sample(q, v, decades=3 if call.by_hand else 0)
    scale = _learned_norm_scale(call.query)
    if scale is not None:
        if not call.by_hand:
            return None
        scale = (scale[:1] if scale.ndim == 4 else scale).detach().to(tensors[0])
        call = call._replace(query=functools.partial(call.query, norm_scale=scale))
    phi_q, phi_k = call.query(tensors[0].detach()), call.key(tensors[1].detach())
    if (
        phi_q.requires_grad or phi_k.requires_grad
    ):  # they have parameters, which get no gradient here
        return None
    if scale is not None:
        tensors.append(scale.requires_grad_())
    if call.causal:
        shape = *phi_k.shape[:2], phi_k.shape[3], v.shape[3] + 1
        tensors.append(torch.zeros(shape).to(tensors[0]).requires_grad_())
        tensors[-1].data[0] = 0.01
    visible = torch.arange(24, device=q.device) % 7 != 5
    call = call._replace(
        key_mask=torch.stack([visible, torch.zeros_like(visible)]),
        segments=[slice(i, i + 8) for i in range(0, 24, 8)],
        budget=3 * phi_k[:, :, :8].numel(),  # enough for some segments, not for all
    )

    def outputs_and_grads(compute: Callable) -> list[Tensor]:
        results = compute(call, *tensors[:3], tensors[-1] if call.causal else None)
        results = [x for x in results if x is not None]
        cotangents = [torch.arange(x.numel()).to(x).cos().view(x.shape) for x in results]
        grads = torch.autograd.grad(
            results, tensors, cotangents, allow_unused=True, materialize_grads=True
        )
        return [*results, *grads]

    fast, reference = map(outputs_and_grads, (_fast_attention, _reference_attention))
    return phi_k.shape[3] if _close(fast, reference) else None


def _reference_attention(call: Call, q: Tensor, k: Tensor, v: Tensor, state: Tensor | None):
    """The same call, computed by model.py's own forms."""
    options = {"causal": call.causal, "mode": "chunked" if call.causal else "parallel"}
    options |= {"chunk_size": call.chunk_size, "key_mask": call.key_mask, "state": state}
    return call.reference(q, k, v, call.query, call.key, return_state=True, **options)


def _sample(q: Tensor, v: Tensor, decades: float) -> list[Tensor]:
    """Random queries, keys and values: 2 x 24 tokens, with the heads and channels of q and v. Query
    norms vary by this many decades in both directions, key norms by a third as many."""
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float32 if q.device.type == "mps" else torch.float64
    tensors = []
    for dim, exponent in ((q.shape[3], decades), (q.shape[3], decades / 3), (v.shape[3], 0)):
        x = torch.randn(2, q.shape[1], 24, dim, generator=generator, dtype=dtype)
        scales = 10 ** torch.linspace(-exponent, exponent, 24, dtype=dtype)
        tensors.append(x * scales[torch.randperm(24, generator=generator), None])
    queries, keys, _ = tensors
    queries[:, :, 1], queries[:, :, 9, ::2], keys[:, :, 2], keys[:, :, 10, 1::2] = 0, 0, 0, 0
    return [x.to(q.device).requires_grad_() for x in tensors]


def _close(got: list[Tensor], expected: list[Tensor]) -> bool:
    """Whether rows agree to within 1e-6 of their norm (1e-3 in float32), or are negligible next to
    the largest row."""
    for x, y in zip(got, expected, strict=True):
        rtol = 1e-3 if y.dtype == torch.float32 else 1e-6
        norm = y.norm(dim=-1)
        tolerance = rtol * norm + 1e-6 * rtol * norm.amax()
        if x.shape != y.shape or not ((x - y).norm(dim=-1) <= tolerance).all():  # NaN fails
            return False
    return True


def _may_be_by_hand(call: Call) -> bool:
    """Whether these may be the paper's features, in model.py's own code. Code from elsewhere could
    change unnoticed."""
    namespace = call.reference.__globals__
    query, key = (getattr(features, "keywords", {}) for features in (call.query, call.key))
    return (
        query.keys() == {"feature_map", "lam", "alpha", "tau", "norm_scale"}
        and key.keys() == {"feature_map", "lam", "alpha"}
        and all(
            x.__globals__ is namespace or x.__module__ in sys.stdlib_module_names
            if type(x) is FunctionType
            else isinstance(x, type) or not callable(x)
            for x in _module_objects(call.reference)
        )
    )


# --- Gradients of the features --------------------------------------------------------------------
# x: (..., D). phi: (..., F), the features of x. grad: (..., F), the gradient of a loss with respect
# to phi. Each function returns the gradient with respect to x, (..., D).


def by_autograd(features: Callable, x: Tensor, grad: Tensor) -> Tensor:
    """Gradient of any features, which are computed again for it."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        phi = features(x)
        if not phi.requires_grad:  # constant
            return torch.zeros_like(x)
        return torch.autograd.grad(phi, x, grad)[0]


def query_gradient(
    x: Tensor, phi: Tensor, grad: Tensor, *, feature_map, lam, tau, alpha, norm_scale
) -> tuple[Tensor, Tensor]:
    """Gradient of Eqs. (7) and (9) or (11), also with respect to norm_scale: (..., 1), per query.

    Omits the part that scales all features of a query by the same factor: Eq. (5) cancels it.
    """
    if feature_map in ("elu", "relu"):
        return _baseline_gradient(phi, grad, feature_map), torch.zeros_like(grad[..., :1])
    norm, direction = _decompose(x)
    scaled = norm / norm_scale  # (..., 1)
    tanh = torch.tanh(scaled)  # (..., 1)
    dlog_a = _magnitude_gradient(phi, grad)  # (..., D)
    size = direction.abs()
    tiny = torch.finfo(size.dtype).tiny
    ratio = (size / size.amax(dim=-1, keepdim=True).clamp_min_(tiny)).clamp_min_(tiny)
    # log(a) = p log(ratio): through p, and through |x|
    slope = lam * (1 - tanh * tanh) * (dlog_a * ratio.log_()).sum(dim=-1, keepdim=True)
    dx = dlog_a.mul_(lam * (tau + tanh)).mul_(_reciprocal(x))
    dx.addcmul_(direction, slope / norm_scale)
    if feature_map == "cosine":
        _add_angle_gradient(dx, phi, grad, norm, direction, alpha)
    return dx, -slope * scaled / norm_scale


def key_gradient(x: Tensor, phi: Tensor, grad: Tensor, *, feature_map, lam, alpha) -> Tensor:
    """Gradient of Eqs. (8) and (9) or (11)."""
    if feature_map in ("elu", "relu"):
        return _baseline_gradient(phi, grad, feature_map)
    dx = _magnitude_gradient(phi, grad).mul_(lam).mul_(_reciprocal(x))
    if feature_map == "cosine":
        _add_angle_gradient(dx, phi, grad, *_decompose(x), alpha)
    return dx


def _decompose(x: Tensor) -> tuple[Tensor, Tensor]:
    """Norm (..., 1) and direction (..., D), Eq. (2)."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm, x / norm.masked_fill(norm == 0, 1.0)


def _magnitude_gradient(phi: Tensor, grad: Tensor) -> Tensor:
    """d loss / d log(a) per channel: the dot product of gradient and vector."""
    (cos, sin), (grad_cos, grad_sin) = phi.chunk(2, dim=-1), grad.chunk(2, dim=-1)
    return torch.addcmul(grad_cos * cos, grad_sin, sin)  # (..., D)


def _reciprocal(x: Tensor) -> Tensor:
    """1 / x, or 0 where x is 0. Many times faster than with a mask."""
    return x.sign().div_(x.abs().clamp_min_(torch.finfo(x.dtype).tiny))


def _add_angle_gradient(
    dx: Tensor, phi: Tensor, grad: Tensor, norm: Tensor, direction: Tensor, alpha: float
) -> None:
    """Add to dx the gradient through the angle of each channel, pi/2 sigmoid(2 alpha d)."""
    cos, sin = phi.chunk(2, dim=-1)
    grad_cos, grad_sin = grad.chunk(2, dim=-1)
    dtheta = torch.addcmul(grad_sin * cos, grad_cos, sin, value=-1)  # d loss / d theta
    sigmoid = torch.sigmoid(2 * alpha * direction)
    dtheta.mul_(sigmoid.addcmul_(sigmoid, sigmoid, value=-1))  # sigmoid (1 - sigmoid)
    dtheta.mul_(math.pi * alpha / norm.masked_fill(norm == 0, 1.0))  # (d loss / d direction) / |x|
    radial = (dtheta * direction).sum(dim=-1, keepdim=True)
    dx.add_(dtheta).addcmul_(direction, radial, value=-1)  # x / |x| moves only at right angles to x


def _baseline_gradient(phi: Tensor, grad: Tensor, feature_map: str) -> Tensor:
    """Slope of relu: 1 where phi > 0. Slope of elu + 1: exp(x) = phi where phi < 1, else 1."""
    return grad * (phi.sign() if feature_map == "relu" else phi.clamp(max=1.0))


# --- Eq. (15) and its gradient --------------------------------------------------------------------


def chunked(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor | None, chunk_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Totals (B, H, L, M), the state after them (B, H, F, M) and, for the gradient, the scores
    (BHT, C, C) and the state before each chunk (BHT, F, M) or None. q, k: (B, H, L, F), v:
    (B, H, L, M), state: (B, H, F, M)."""
    shape = v.shape
    q, k, v = _to_chunks(chunk_size, q, k, v)  # (BHT, C, F), (BHT, C, F), (BHT, C, M)
    states, new_state = _chunk_states(k, v, state, shape)  # (BHT, F, M), (B, H, F, M)
    scores = (q @ k.mT).tril_()  # (BHT, C, C)
    total = scores @ v  # (BHT, C, M)
    if states is not None:
        total.baddbmm_(q, states)
    return _from_chunks(total, shape), new_state, scores, states


def chunked_gradient(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None,
    scores: Tensor | None,
    states: Tensor | None,
    grad: Tensor,
    grad_new_state: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients with respect to q, k, v and state (if any), given those of the totals and of the
    state after them. scores, states: from chunked; if scores is None, both are recomputed."""
    shape = v.shape
    q, k, v, grad = _to_chunks(chunk_size, q, k, v, grad)
    if scores is None:
        scores = (q @ k.mT).tril_()  # (BHT, C, C)
        states, _ = _chunk_states(k, v, state, shape, return_last=False)
    grad_states, grad_state = _chunk_states(q, grad, grad_new_state, shape, True, state is not None)
    grad_scores = (grad @ v.mT).tril_()  # (BHT, C, C)
    dq, dk, dv = grad_scores @ k, grad_scores.mT @ q, scores.mT @ grad
    if states is not None:
        dq.baddbmm_(grad, states.mT)
    if grad_states is not None:
        dk.baddbmm_(v, grad_states.mT)
        dv.baddbmm_(k, grad_states)
    return *(_from_chunks(x, shape) for x in (dq, dk, dv)), grad_state


def _to_chunks(chunk_size: int, *tensors: Tensor) -> list[Tensor]:
    """(B, H, L, X) to (BHT, C, X), padded with zero tokens, which add nothing."""
    num_tokens = tensors[0].shape[2]
    chunk_size = min(chunk_size, num_tokens)
    if padding := -num_tokens % chunk_size:
        tensors = tuple(F.pad(x, (0, 0, 0, padding)) for x in tensors)
    return [x.reshape(-1, chunk_size, x.shape[3]) for x in tensors]


def _from_chunks(chunks: Tensor, shape: torch.Size) -> Tensor:
    """(BHT, C, X) to (B, H, L, X), without padding."""
    return chunks.view(*shape[:2], -1, chunks.shape[2])[:, :, : shape[2]]


def _chunk_states(
    x: Tensor,
    y: Tensor,
    state: Tensor | None,
    shape: torch.Size,
    backwards: bool = False,
    return_last: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """The state before each chunk, (BHT, F, M) or None if there is none, and the state after all
    chunks, (B, H, F, M), if return_last is set.

    x: (BHT, C, F), y: (BHT, C, M): each chunk adds x^T y.
    """
    heads = shape[0] * shape[1]
    num_chunks = x.shape[0] // heads
    if num_chunks == 1 and not return_last:
        return (None if state is None else state.flatten(0, 1)), None
    size = x.shape[2], y.shape[2]
    sums = (x.mT @ y).view(heads, num_chunks, -1)  # (BH, T, FM)
    if num_chunks == 1 and state is None:
        return None, sums.view(*shape[:2], *size)
    states = _exclusive_cumsum(sums, backwards)  # (BH, T, FM)
    if state is not None:
        states += state.reshape(heads, 1, -1)
    last = 0 if backwards else -1
    new_state = states[:, last] + sums[:, last] if return_last else None
    return states.view(-1, *size), new_state.view(*shape[:2], *size) if return_last else None


def _exclusive_cumsum(sums: Tensor, backwards: bool) -> Tensor:
    """Per chunk, the sum over the chunks before it (backwards: after it). sums: (BH, T, FM)."""
    if sums.is_cpu:  # many times faster than cumsum for the few chunks of a segment
        ones = sums.new_ones(sums.shape[1], sums.shape[1])
        return (ones.triu_(1) if backwards else ones.tril_(-1)) @ sums
    sums = sums.flip(1) if backwards else sums
    before = F.pad(sums[:, :-1], (0, 0, 1, 0)).cumsum(dim=1)
    return before.flip(1) if backwards else before


# --- Segment by segment ---------------------------------------------------------------------------


def _backward(backward: Callable) -> Callable:
    """Run a backward pass in full precision, even under autocast. If it is itself differentiated or
    vectorised, compute the gradient with model.py's own forms."""

    def run(ctx, *grads):
        with torch.autocast(ctx.device_type, enabled=False):
            if torch.is_grad_enabled() or any(map(_is_batched, grads)):
                return None, *_reference_gradient(ctx, grads)
            return None, *backward(ctx, *grads)

    return staticmethod(run)


def _is_batched(grad: Tensor | None) -> bool:
    """Whether grad is a batch of gradients, as in autograd.grad(..., is_grads_batched=True)."""
    functorch = torch._C._functorch
    return grad is not None and (
        functorch.is_legacy_batchedtensor(grad) or functorch.is_batchedtensor(grad)
    )


def _reference_gradient(ctx, grads: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    needed = ctx.needs_input_grad[1:]
    inputs = ctx.saved_tensors[: len(needed)]  # q, k, v, norm_scale and, in _Chunked, a state
    with torch.enable_grad():
        results = _reference_attention(
            ctx.call, *inputs[:3], inputs[4] if ctx.call.causal else None
        )
    pairs = [(x, grad) for x, grad in zip(results, grads, strict=False) if grad is not None]
    input_grads = torch.autograd.grad(
        [x for x, _ in pairs],
        [x for x, need in zip(inputs, needed, strict=True) if need],
        [grad for _, grad in pairs],
        create_graph=torch.is_grad_enabled(),
        allow_unused=True,
    )
    input_grads = iter(input_grads)
    return [next(input_grads) if need else None for need in needed]


class _Chunked(Function):
    """Eq. (15)."""

    @staticmethod
    def forward(ctx, call, q, k, v, scale, state):
        inputs, saved, budget = (q, k, v, scale, state), [], _Budget(call.budget)
        out = torch.empty_like(v)
        for segment in call.segments:
            previous, phi_q = state, call.query(_segment_of(q, segment))
            phi_k = _key_features(call, segment, k)
            total, state, *chunks = chunked(
                phi_q, phi_k, _values(v, segment), previous, call.chunk_size
            )
            normaliser = _divide(total, out[:, :, segment])
            if call.budget is not None:
                saved += [normaliser, previous, *budget.save(phi_q, phi_k, *chunks)]
        ctx.save_for_backward(*inputs, out, *saved)
        ctx.call, ctx.device_type = call, q.device.type
        ctx.set_materialize_grads(False)
        return out, state

    @_backward
    def backward(ctx, grad_out, grad_state):
        q, k, v, _, _, out, *saved = ctx.saved_tensors
        call, grads, grad_scale = ctx.call, [torch.empty_like(x) for x in (q, k, v)], None
        for segment in reversed(call.segments):
            normaliser, state, phi_q, phi_k, *chunks = saved[-6:]
            del saved[-6:]
            if phi_q is None:
                phi_q, phi_k = call.query(_segment_of(q, segment)), _key_features(call, segment, k)
            grad = _total_gradient(grad_out, out, normaliser, segment)
            dphi_q, dphi_k, dvalues, grad_state = chunked_gradient(
                *(phi_q, phi_k, _values(v, segment), state, *chunks),
                *(grad, grad_state, call.chunk_size),
            )
            dq, grad_scale = _query_gradient(call, segment, q, phi_q, dphi_q, grad_scale)
            dk = _key_gradient(call, segment, k, phi_k, dphi_k)
            for whole, part in zip(grads, (dq, dk, dvalues[..., :-1]), strict=True):
                whole[:, :, segment] = part
        return *grads, grad_scale, grad_state if ctx.needs_input_grad[5] else None


class _Parallel(Function):
    """Eq. (13): one state for all tokens."""

    @staticmethod
    def forward(ctx, call, q, k, v, scale):
        out, saved, budget, state = torch.empty_like(v), [], _Budget(call.budget), 0
        for segment in call.segments:
            phi_k = _key_features(call, segment, k)
            state = state + phi_k.mT @ _values(v, segment)  # (B, H, F, M + 1)
            saved += budget.save(phi_k)
        for segment in call.segments:
            phi_q = call.query(_segment_of(q, segment))
            normaliser = _divide(phi_q @ state, out[:, :, segment])
            saved += [normaliser, *budget.save(phi_q)]
        ctx.save_for_backward(q, k, v, scale, out, state, *saved)
        ctx.call, ctx.device_type = call, q.device.type
        return out

    @_backward
    def backward(ctx, grad_out):
        q, k, v, _, out, state, *saved = ctx.saved_tensors
        call, grads, grad_scale = ctx.call, [torch.empty_like(x) for x in (q, k, v)], None
        grad_state = 0
        for segment in reversed(call.segments):
            phi_q, normaliser = saved.pop(), saved.pop()
            if phi_q is None:
                phi_q = call.query(_segment_of(q, segment))
            grad = _total_gradient(grad_out, out, normaliser, segment)
            grad_state = grad_state + phi_q.mT @ grad  # (B, H, F, M + 1)
            dphi_q = grad @ state.mT
            grads[0][:, :, segment], grad_scale = _query_gradient(
                call, segment, q, phi_q, dphi_q, grad_scale
            )
        for segment in reversed(call.segments):
            phi_k = saved.pop()
            if phi_k is None:
                phi_k = _key_features(call, segment, k)
            dphi_k = _values(v, segment) @ grad_state.mT
            grads[1][:, :, segment] = _key_gradient(call, segment, k, phi_k, dphi_k)
            grads[2][:, :, segment] = (phi_k @ grad_state)[..., :-1]
        return *grads, grad_scale


class _Budget:
    """Saves features for the backward pass until the budget of elements is spent."""

    def __init__(self, elements: int | None) -> None:
        self.remaining = elements or 0

    def save(self, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        self.remaining -= sum(x.numel() for x in tensors if x is not None)
        return tensors if self.remaining >= 0 else (None,) * len(tensors)


def _key_features(call: Call, segment: slice, k: Tensor) -> Tensor:
    phi_k = call.key(_segment_of(k, segment))  # (B, H, L, F)
    if call.key_mask is not None:  # excluded from numerator and normaliser
        phi_k = phi_k.masked_fill(~call.key_mask[:, None, segment, None], 0.0)
    return phi_k


def _key_gradient(call: Call, segment: slice, k: Tensor, phi: Tensor, grad: Tensor) -> Tensor:
    if call.by_hand:
        return key_gradient(_segment_of(k, segment), phi, grad, **call.key.keywords)
    if call.key_mask is not None:
        grad = grad.masked_fill(~call.key_mask[:, None, segment, None], 0.0)
    return by_autograd(call.key, _segment_of(k, segment), grad)


def _query_gradient(
    call: Call, segment: slice, q: Tensor, phi: Tensor, grad: Tensor, grad_scale: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Gradients for one segment's queries and for norm_scale, summed over the segments so far."""
    if not call.by_hand:
        return by_autograd(call.query, _segment_of(q, segment), grad), None
    dq, dscale = query_gradient(_segment_of(q, segment), phi, grad, **call.query.keywords)
    if (scale := _learned_norm_scale(call.query)) is not None:
        dscale = dscale.sum_to_size(scale.shape)
        grad_scale = dscale if grad_scale is None else grad_scale + dscale
    return dq, grad_scale


def _segment_of(x: Tensor, segment: slice) -> Tensor:
    """One segment, in float32 or higher, contiguous by head: products would copy it otherwise."""
    return x[:, :, segment].to(torch.promote_types(x.dtype, torch.float32)).contiguous()


def _values(v: Tensor, segment: slice) -> Tensor:
    """[v 1] of one segment, (B, H, L, M + 1)."""
    return F.pad(_segment_of(v, segment), (0, 1), value=1.0)


def _divide(total: Tensor, out: Tensor) -> Tensor:
    """Write Eq. (5) to out. Return the normaliser, infinite where it is 0: output 0."""
    normaliser = total[..., -1:]  # (B, H, L, 1)
    normaliser = normaliser.masked_fill(normaliser == 0, math.inf)
    torch.div(total[..., :-1], normaliser, out=out)
    return normaliser


def _total_gradient(
    grad_out: Tensor | None, out: Tensor, normaliser: Tensor, segment: slice
) -> Tensor:
    """Gradient with respect to the totals of [v 1], (B, H, L, M + 1), from that of the output."""
    out = out[:, :, segment]
    grad = normaliser.new_empty(*out.shape[:3], out.shape[3] + 1)
    if grad_out is None:  # only the state was used
        return grad.zero_()
    torch.div(grad_out[:, :, segment], normaliser, out=grad[..., :-1])
    torch.neg((grad[..., :-1] * out).sum(dim=-1), out=grad[..., -1])
    return grad
