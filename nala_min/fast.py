"""Attention in less time and memory: the numbers of Eqs. (13) and (15), their gradients by hand.

model.py is written to be read, this file to be run; tests hold the two to the same outputs and
gradients. Autograd would keep every intermediate tensor of the features for its backward pass. Here
the sequence is taken in segments, which fit into a processor's cache, and of a long one only q, k,
v, the output, a normaliser a token and a state a segment are kept: the backward pass computes a
segment's features anew.

Two things make the gradient short. The gradient of linear attention is linear attention: with
total_t = q_t S_t and S_t = sum over i <= t of k_i^T v_i, and a gradient g of the totals,

  dq_t = g_t S_t^T,   dv_i = k_i R_i,   dk_i = v_i R_i^T,   R_i = sum over t >= i of q_t^T g_t,

so that one state runs forwards in time and one backwards. And the two features of a channel,
a cos(theta) and a sin(theta), are a vector in a plane: what stretches it changes log(a), what turns
it changes theta.

Letters are those of model.py's glossary, and L tokens in a segment. Where totals are computed, q, k
and v stand for phi_q, phi_k and [v 1].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

SEGMENT = 2**17  # numbers of q in a segment on a CPU: the fastest power of 2
LARGE_SEGMENT = 2**26  # on another device, which wants few large steps; not measured yet
# Numbers of features and scores that a call keeps for its backward pass: as many as let it take at
# most twice the memory of the fused softmax at 16,384 tokens of 4 heads of 64 channels.
KEEP = 11 * 2**20


class Kernel(NamedTuple):
    """The features of model.py, and what their gradients depend on."""

    query: Callable[[Tensor], Tensor]  # (..., D) to (..., F)
    key: Callable[[Tensor], Tensor]
    feature_map: str
    lam: float
    tau: float
    alpha: float
    norm_scale: float | Tensor


# --- Gradients of the features --------------------------------------------------------------------
# x: (..., D), phi: (..., F), the features of x, and grad: (..., F), the gradient of a loss with
# respect to them. Return the gradient with respect to x, (..., D).


def query_gradient(x: Tensor, phi: Tensor, grad: Tensor, kernel: Kernel) -> tuple[Tensor, Tensor]:
    """Of Eqs. (7) and (9) or (11), and also with respect to norm_scale, (..., 1), for each query.

    Leaves out what would move all features of a query by one factor, which Eq. (5) cancels.
    """
    if kernel.feature_map in ("elu", "relu"):
        return _baseline_gradient(phi, grad, kernel.feature_map), torch.zeros_like(grad[..., :1])
    norm, direction = _decompose(x)
    scaled = norm / kernel.norm_scale  # (..., 1)
    tanh = torch.tanh(scaled)  # (..., 1)
    stretch = _stretch(phi, grad)  # (..., D)
    size = direction.abs()
    tiny = torch.finfo(size.dtype).tiny
    ratio = (size / size.amax(dim=-1, keepdim=True).clamp_min_(tiny)).clamp_min_(tiny)
    # log(a) = p log(ratio): through p, and through |x|
    slope = kernel.lam * (1 - tanh * tanh) * (stretch * ratio.log_()).sum(dim=-1, keepdim=True)
    stretch *= kernel.lam * (kernel.tau + tanh)
    dx = stretch.div_(x.masked_fill(x == 0, math.inf))
    dx.addcmul_(direction, slope / kernel.norm_scale)
    if kernel.feature_map == "cosine":
        _add_turn(dx, phi, grad, norm, direction, kernel.alpha)
    return dx, -slope * scaled / kernel.norm_scale


def key_gradient(x: Tensor, phi: Tensor, grad: Tensor, kernel: Kernel) -> Tensor:
    """Of Eqs. (8) and (9) or (11)."""
    if kernel.feature_map in ("elu", "relu"):
        return _baseline_gradient(phi, grad, kernel.feature_map)
    dx = _stretch(phi, grad).mul_(kernel.lam).div_(x.masked_fill(x == 0, math.inf))
    if kernel.feature_map == "cosine":
        _add_turn(dx, phi, grad, *_decompose(x), kernel.alpha)
    return dx


def _decompose(x: Tensor) -> tuple[Tensor, Tensor]:
    """Norm (..., 1) and direction (..., D), Eq. (2)."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm, x / norm.masked_fill(norm == 0, 1.0)


def _stretch(phi: Tensor, grad: Tensor) -> Tensor:
    """d loss / d log(a) of every channel: gradient times vector."""
    return (phi * grad).unflatten(-1, (2, -1)).sum(dim=-2)  # (..., D)


def _add_turn(
    dx: Tensor, phi: Tensor, grad: Tensor, norm: Tensor, direction: Tensor, alpha: float
) -> None:
    """Add to dx what comes through the angle pi/2 sigmoid(2 alpha d) of every channel."""
    cos, sin = phi.chunk(2, dim=-1)
    grad_cos, grad_sin = grad.chunk(2, dim=-1)
    turn = torch.addcmul(grad_sin * cos, grad_cos, sin, value=-1)  # d loss / d theta
    sigmoid = torch.sigmoid(2 * alpha * direction)
    slope = sigmoid.addcmul_(sigmoid, sigmoid, value=-1)  # sigmoid (1 - sigmoid)
    turn.mul_(slope).mul_(math.pi * alpha)  # d loss / d direction
    turn.div_(norm.masked_fill(norm == 0, 1.0))
    along = (turn * direction).sum(dim=-1, keepdim=True)
    dx.add_(turn).addcmul_(direction, along, value=-1)  # x / |x| moves only across x


def _baseline_gradient(phi: Tensor, grad: Tensor, feature_map: str) -> Tensor:
    """relu: 1 where it is positive; elu + 1: exp(x) below 1, and 1 above."""
    return grad * (phi.sign() if feature_map == "relu" else phi.clamp(max=1.0))


# --- Eq. (15) and its gradient --------------------------------------------------------------------


def chunked(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor | None, chunk_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Totals (B, H, L, M), the state after them (B, H, F, M), and scores (BHT, C, C), for the
    gradient. q, k: (B, H, L, F), v: (B, H, L, M), state: (B, H, F, M)."""
    shape = v.shape
    q, k, v = _in_chunks(chunk_size, q, k, v)  # (BHT, C, F), (BHT, C, F), (BHT, C, M)
    before, after = _running(k, v, state, shape)  # (BHT, F, M), (B, H, F, M)
    scores = (q @ k.mT).tril_()  # (BHT, C, C)
    total = scores @ v  # (BHT, C, M)
    if before is not None:
        total.baddbmm_(q, before)
    return _in_tokens(total, shape), after, scores


def chunked_gradient(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None,
    scores: Tensor | None,
    grad: Tensor,
    grad_after: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients with respect to q, k, v and state, if there is one, from those of the totals and
    of the state after them. scores: what chunked returned, or None to compute them anew."""
    shape = v.shape
    q, k, v, grad = _in_chunks(chunk_size, q, k, v, grad)
    before, _ = _running(k, v, state, shape, after=False)
    later, grad_state = _running(q, grad, grad_after, shape, True, after=state is not None)
    scores = (q @ k.mT).tril_() if scores is None else scores  # (BHT, C, C)
    grad_scores = (grad @ v.mT).tril_()  # (BHT, C, C)
    dq, dk, dv = grad_scores @ k, grad_scores.mT @ q, scores.mT @ grad
    if before is not None:
        dq.baddbmm_(grad, before.mT)
    if later is not None:
        dk.baddbmm_(v, later.mT)
        dv.baddbmm_(k, later)
    return *(_in_tokens(x, shape) for x in (dq, dk, dv)), grad_state


def _in_chunks(chunk_size: int, *tensors: Tensor) -> list[Tensor]:
    """(B, H, L, X) to (BHT, C, X), padded with tokens of zeros, which add nothing."""
    num_tokens = tensors[0].shape[2]
    chunk_size = min(chunk_size, num_tokens)
    if padding := -num_tokens % chunk_size:
        tensors = tuple(F.pad(x, (0, 0, 0, padding)) for x in tensors)
    return [x.reshape(-1, chunk_size, x.shape[3]) for x in tensors]


def _in_tokens(chunks: Tensor, shape: torch.Size) -> Tensor:
    """(BHT, C, X) to (B, H, L, X), without padding."""
    return chunks.view(*shape[:2], -1, chunks.shape[2])[:, :, : shape[2]]


def _running(
    x: Tensor,
    y: Tensor,
    state: Tensor | None,
    shape: torch.Size,
    backwards: bool = False,
    after: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """The state before each chunk, (BHT, F, M) or None for no state, and, if wanted, that after all
    of them, (B, H, F, M).

    x: (BHT, C, F), y: (BHT, C, M): each chunk adds x^T y.
    """
    heads = shape[0] * shape[1]
    num_chunks = x.shape[0] // heads
    if num_chunks == 1 and not after:
        return (None if state is None else state.flatten(0, 1)), None
    size = x.shape[2], y.shape[2]
    sums = (x.mT @ y).view(heads, num_chunks, -1)  # (BH, T, FM)
    if num_chunks == 1 and state is None:
        return None, sums.view(*shape[:2], *size)
    before = _exclusive_cumsum(sums, backwards)  # (BH, T, FM)
    if state is not None:
        before += state.reshape(heads, 1, -1)
    last = 0 if backwards else -1
    total = before[:, last] + sums[:, last] if after else None
    return before.view(-1, *size), total.view(*shape[:2], *size) if after else None


def _exclusive_cumsum(sums: Tensor, backwards: bool) -> Tensor:
    """What the chunks before each, or those after it, add up to. sums: (BH, T, FM)."""
    if sums.is_cpu:  # for the few chunks of a segment many times faster than cumsum
        ones = sums.new_ones(sums.shape[1], sums.shape[1])
        return (ones.triu_(1) if backwards else ones.tril_(-1)) @ sums
    sums = sums.flip(1) if backwards else sums
    before = F.pad(sums[:, :-1], (0, 0, 1, 0)).cumsum(dim=1)
    return before.flip(1) if backwards else before


# --- Segment by segment ---------------------------------------------------------------------------


def applies(q: Tensor) -> bool:
    """Whether this file may be used: torch.compile and torch.func work on model.py's own forms."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return q.numel() > 0


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel: Kernel,
    causal: bool,
    key_mask: Tensor | None,
    state: Tensor | None,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor | None]:
    """What nala_attention returns with return_state, the state being None if not causal.

    Shapes as there. Can be differentiated once; to go further, take another mode.
    """
    if state is not None:
        state = state.to(torch.promote_types(q.dtype, torch.float32))
    room = KEEP if torch.is_grad_enabled() else None
    if not causal:
        return _Parallel.apply(q, k, v, kernel.norm_scale, kernel, key_mask, room), None
    if chunk_size is None:
        chunk_size = _balanced_chunk(kernel.feature_map, *q.shape[2:], v.shape[3] + 1)
    return _Chunked.apply(q, k, v, state, kernel.norm_scale, kernel, key_mask, room, chunk_size)


def _balanced_chunk(feature_map: str, num_tokens: int, dim: int, size: int) -> int:
    """The power of 2, at least 16, below the C at which what is computed within chunks,
    N C (F + M), costs as much as what is between them, 2 N F M; one chunk for up to 64 tokens."""
    num_features = dim if feature_map in ("elu", "relu") else 2 * dim
    even = 2 * num_features * size / (num_features + size)
    return 64 if num_tokens <= 64 else 2 ** max(int(math.log2(even)), 4)


def _backward(backward: Callable) -> Callable:
    """A backward pass in full precision even under autocast, that cannot be differentiated."""

    def run(ctx, *grads):
        with torch.autocast(ctx.device_type, enabled=False):
            return backward(ctx, *grads)

    return staticmethod(once_differentiable(run))


class _Chunked(Function):
    """Eq. (15)."""

    @staticmethod
    def forward(ctx, q, k, v, state, norm_scale, kernel, key_mask, room, chunk_size):
        out, saved, shelf = torch.empty_like(v), [], _Shelf(room)
        segments = _segments(q, chunk_size)
        for segment in segments:
            before, features = state, _features(kernel, key_mask, segment, q, k)
            total, state, scores = chunked(*features, _values(v, segment), before, chunk_size)
            mass = _divide(total, out[:, :, segment])
            if room is not None:
                saved += [mass, before, *shelf.keep(*features, scores)]
        ctx.save_for_backward(_tensor(norm_scale), q, k, v, key_mask, out, *saved)
        ctx.kernel, ctx.segments, ctx.chunk_size = kernel, segments, chunk_size
        ctx.device_type = q.device.type
        ctx.set_materialize_grads(False)
        return out, state

    @_backward
    def backward(ctx, grad_out, grad_state):
        _, q, k, v, key_mask, out, *saved = ctx.saved_tensors
        kernel, grads = ctx.kernel, [torch.empty_like(x) for x in (q, k, v)]
        grad_scale = _zero_of(kernel.norm_scale)
        for segment in reversed(ctx.segments):
            mass, state, phi_q, phi_k, scores = saved[-5:]
            del saved[-5:]
            if scores is None:
                phi_q, phi_k = _features(kernel, key_mask, segment, q, k)
            grad = _total_gradient(grad_out, out, mass, segment)
            values = _values(v, segment)
            dphi_q, dphi_k, dvalues, grad_state = chunked_gradient(
                phi_q, phi_k, values, state, scores, grad, grad_state, ctx.chunk_size
            )
            dq, dscale = query_gradient(_part(q, segment), phi_q, dphi_q, kernel)
            dk = key_gradient(_part(k, segment), phi_k, dphi_k, kernel)
            for whole, part in zip(grads, (dq, dk, dvalues[..., :-1]), strict=True):
                whole[:, :, segment] = part
            grad_scale = _add_scale(grad_scale, dscale)
        grad_state = grad_state if ctx.needs_input_grad[3] else None
        return *grads, grad_state, grad_scale, None, None, None, None


class _Parallel(Function):
    """Eq. (13): one state, of all tokens."""

    @staticmethod
    def forward(ctx, q, k, v, norm_scale, kernel, key_mask, room):
        out, saved, shelf = torch.empty_like(v), [], _Shelf(room)
        segments, state = _segments(q, 1), 0
        for segment in segments:
            phi_k = _key_features(kernel, key_mask, segment, k)
            state = state + phi_k.mT @ _values(v, segment)  # (B, H, F, M + 1)
            saved += shelf.keep(phi_k)
        for segment in segments:
            phi_q = kernel.query(_part(q, segment))
            mass = _divide(phi_q @ state, out[:, :, segment])
            saved += [mass, *shelf.keep(phi_q)]
        ctx.save_for_backward(_tensor(norm_scale), q, k, v, key_mask, out, state, *saved)
        ctx.kernel, ctx.segments, ctx.device_type = kernel, segments, q.device.type
        return out

    @_backward
    def backward(ctx, grad_out):
        _, q, k, v, key_mask, out, state, *saved = ctx.saved_tensors
        kernel, grads = ctx.kernel, [torch.empty_like(x) for x in (q, k, v)]
        grad_scale, grad_state = _zero_of(kernel.norm_scale), 0
        for segment in reversed(ctx.segments):
            phi_q, mass = saved.pop(), saved.pop()
            if phi_q is None:
                phi_q = kernel.query(_part(q, segment))
            grad = _total_gradient(grad_out, out, mass, segment)
            grad_state = grad_state + phi_q.mT @ grad  # (B, H, F, M + 1)
            part = _part(q, segment)
            grads[0][:, :, segment], dscale = query_gradient(part, phi_q, grad @ state.mT, kernel)
            grad_scale = _add_scale(grad_scale, dscale)
        for segment in reversed(ctx.segments):
            phi_k = saved.pop()
            if phi_k is None:
                phi_k = _key_features(kernel, key_mask, segment, k)
            dphi_k = _values(v, segment) @ grad_state.mT
            grads[1][:, :, segment] = key_gradient(_part(k, segment), phi_k, dphi_k, kernel)
            grads[2][:, :, segment] = (phi_k @ grad_state)[..., :-1]
        return *grads, grad_scale, None, None, None


class _Shelf:
    """Keeps features for the backward pass while there is room for their numbers."""

    def __init__(self, room: int | None) -> None:
        self.room = room or 0

    def keep(self, *tensors: Tensor) -> tuple[Tensor | None, ...]:
        self.room -= sum(x.numel() for x in tensors)
        return tensors if self.room >= 0 else (None,) * len(tensors)


def _segments(q: Tensor, multiple: int) -> list[slice]:
    """The tokens of q cut into pieces of SEGMENT numbers, a multiple of tokens each."""
    batch, heads, num_tokens, dim = q.shape
    numbers = SEGMENT if q.device.type == "cpu" else LARGE_SEGMENT
    length = multiple * max(numbers // (batch * heads * dim * multiple), 1)
    return [slice(i, i + length) for i in range(0, num_tokens, length)]


def _features(kernel, key_mask, segment, q, k):
    return kernel.query(_part(q, segment)), _key_features(kernel, key_mask, segment, k)


def _key_features(kernel, key_mask, segment, k):
    phi_k = kernel.key(_part(k, segment))  # (B, H, L, F)
    if key_mask is not None:  # out of numerator and denominator alike
        phi_k = phi_k.masked_fill(~key_mask[:, None, segment, None], 0.0)
    return phi_k


def _part(x: Tensor, segment: slice) -> Tensor:
    """One segment, in float32 at least, and laid out heads first: products copy what is not."""
    return x[:, :, segment].to(torch.promote_types(x.dtype, torch.float32)).contiguous()


def _values(v: Tensor, segment: slice) -> Tensor:
    """[v 1] of one segment, (B, H, L, M + 1)."""
    return F.pad(_part(v, segment), (0, 1), value=1.0)


def _divide(total: Tensor, out: Tensor) -> Tensor:
    """Write Eq. (5) to out; return the normaliser, infinite where there is no mass: output 0."""
    mass = total[..., -1:]  # (B, H, L, 1)
    mass = mass.masked_fill(mass == 0, math.inf)
    torch.div(total[..., :-1], mass, out=out)
    return mass


def _total_gradient(grad_out: Tensor | None, out: Tensor, mass: Tensor, segment: slice) -> Tensor:
    """From the gradient of the output to that of the totals, of [v 1], (B, H, L, M + 1)."""
    out = out[:, :, segment]
    grad = mass.new_empty(*out.shape[:3], out.shape[3] + 1)
    if grad_out is None:  # only the state is of interest
        return grad.zero_()
    torch.div(grad_out[:, :, segment], mass, out=grad[..., :-1])
    torch.neg((grad[..., :-1] * out).sum(dim=-1), out=grad[..., -1])
    return grad


def _tensor(norm_scale: float | Tensor) -> Tensor | None:
    """To be saved, so that autograd notices a change in place."""
    return norm_scale if isinstance(norm_scale, Tensor) else None


def _zero_of(norm_scale: float | Tensor) -> Tensor | None:
    return torch.zeros_like(norm_scale) if isinstance(norm_scale, Tensor) else None


def _add_scale(grad_scale: Tensor | None, dscale: Tensor) -> Tensor | None:
    """The gradient with respect to norm_scale, summed to its shape."""
    return None if grad_scale is None else grad_scale + dscale.sum_to_size(grad_scale.shape)
