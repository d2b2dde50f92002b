"""The attention of model.py, Eqs. (13) and (15) with the paper's features, in less time and memory.

A sequence is processed in segments that fit into a processor's cache. The first segments keep their
features for the backward pass; later ones keep only the state before them. The gradient is short:
if total_t = q_t S_t, where S_t is the sum of k_i^T v_i over i <= t, has the gradient g_t, then

  dq_t = g_t S_t^T,   dv_i = k_i G_i,   dk_i = v_i G_i^T,   G_i = sum over t >= i of q_t^T g_t,

so one state runs forwards in time and one backwards. And the features of a channel, (a cos(theta),
a sin(theta)), are a vector in a plane: stretching it changes log(a), turning it changes theta.

model.py is meant to be edited. A fingerprint tells whether its code is still the code for which
this gradient was written. If not, or for features of your own, model.py does it all with autograd.
Shapes use the letters of model.py, and L for the tokens of a segment. M counts the column of ones.
"""

import ast
import hashlib
import inspect
import math
from collections.abc import Callable
from functools import lru_cache, partial
from types import CodeType, SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function, forward_ad

# Elements of q per segment, and those kept for a backward pass; on a CPU about the fastest power
# of 2, and at most twice softmax's memory at 16,384 tokens. Elsewhere: not measured yet.
SEGMENT, KEPT = 2**17, 11 * 2**20
LARGE_SEGMENT, LARGE_KEPT = 2**26, 2**28


def attention(
    reference: Callable, q: Tensor, k: Tensor, v: Tensor, query_map: Callable, key_map: Callable,
    causal: bool, chunk_size: int | None, key_mask: Tensor | None, state: Tensor | None,
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """What reference returns for these arguments with return_state=True. None if it must run
    itself: for other code or features, in torch.compile or torch.func, in forward-mode AD."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return None
    if q.is_meta or q.numel() == 0 or k.numel() == 0 or (causal and q.shape[2] == 1):
        return None
    tensors = [x for x in (q, k, v, state) if isinstance(x, Tensor)]
    forward_mode = any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)
    if forward_mode or not is_known(reference, query_map, key_map):
        return None
    if key_mask is not None:  # the paper's features of a zero are zero
        k, v = (x.masked_fill(~key_mask[:, None, :, None], 0.0) for x in (k, v))
    batch, heads, num_tokens, dim = q.shape
    shape = batch, heads, 2 * dim, v.shape[3] + 1
    state = v.new_zeros(shape) if state is None else state  # no token read yet
    reference.__globals__["check_tensor"]("state", state, shape, v)
    # With chunks of D tokens, the work within chunks is about that between them.
    chunk_size = min(chunk_size or 2 ** max(round(math.log2(dim)), 4), num_tokens)
    segment, budget = (SEGMENT, KEPT) if q.is_cpu else (LARGE_SEGMENT, LARGE_KEPT)
    length = chunk_size * max(segment // (batch * heads * dim * chunk_size), 1)
    queries, keys = ([slice(i, i + length) for i in range(0, x.shape[2], length)] for x in (q, k))
    steps = [*zip(queries, keys, strict=False)]  # tokens of q that read, tokens of k and v that add
    if not causal and len(queries) + len(keys) > 2:  # all keys are added before the first query
        steps = [(None, x) for x in keys] + [(x, None) for x in queries]
    call = SimpleNamespace(reference=reference, query_map=query_map, key_map=key_map, steps=steps)
    call.causal, call.chunk_size = causal, chunk_size
    call.budget = budget if torch.is_grad_enabled() else 0
    with torch.autocast(q.device.type, enabled=False):
        return _Attention.apply(call, q, k, v, part_of(state, slice(None)))


# --- Segment by segment ---------------------------------------------------------------------------


class _Attention(Function):
    @staticmethod
    def forward(ctx, call, q, k, v, state):
        ctx.call, inputs, saved, kept, budget = call, (q, k, v, state), [], [], call.budget
        square = q.shape[2] == v.shape[2]  # then out is laid out like v
        out = torch.empty_like(v) if square else v.new_empty(*q.shape[:3], v.shape[3])
        for queries, keys in call.steps:
            parts = part_of(q, queries), part_of(k, keys), part_of(v, keys)
            saved += [state, None]  # state and normaliser
            state, total, *features = products(call, *parts, state)
            if queries is not None:
                mass = total[..., -1:]
                saved[-1] = mass.masked_fill(mass == 0, math.inf)  # no mass: x / inf = 0
                torch.div(total[..., :-1], saved[-1], out=out[:, :, queries])
            budget -= sum(x.numel() for x in features if x is not None)
            kept += features if budget >= 0 else []
        ctx.save_for_backward(*inputs, out, *saved, *kept)
        return out, state

    @staticmethod
    def backward(ctx, *grads):
        call, (q, k, v, state, out, *saved) = ctx.call, ctx.saved_tensors
        kept = saved[2 * len(call.steps) :]
        with torch.autocast(q.device.type, enabled=False):
            batched = any(map(torch._C._functorch.is_legacy_batchedtensor, grads))
            if batched or torch._C._are_functorch_transforms_active() or torch.is_grad_enabled():
                return None, *by_autograd(call, (q, k, v, state), grads)
            (grad_out, grad_state), grads = grads, [torch.empty_like(x) for x in (q, k, v)]
            for i, (queries, keys) in reversed([*enumerate(call.steps)]):
                parts = part_of(q, queries), part_of(k, keys), part_of(v, keys)
                state, normaliser = saved[2 * i : 2 * i + 2]
                features = kept[4 * i : 4 * i + 4] or products(call, *parts, state)[2:]
                outs = normaliser, *(x[:, :, queries or slice(0)] for x in (out, grad_out))
                *found, grad_state = products_gradient(call, parts, features, outs, grad_state)
                for whole, part, tokens in zip(grads, found, (queries, keys, keys), strict=True):
                    if tokens is not None:
                        whole[:, :, tokens] = part
                del parts, features, outs, found, part  # before the next ones are made
            return None, *grads, grad_state


def part_of(x, tokens):
    dtype = torch.promote_types(x.dtype, torch.float32)
    return None if tokens is None else x[:, :, tokens].to(dtype).contiguous()


def products(call, q, k, v, state):
    """The state (B, H, F, M) after a step, totals (B, H, L, M), and what the gradient needs: phi_q,
    phi_k, scores (B, H, T, C, C) and the states that chunks read. q, or k and v, may be None."""
    total = phi_q = phi_k = scores = None
    states = state[:, :, None]
    if k is not None:
        phi_k = to_chunks(call, call.key_map(k))
        values = to_chunks(call, F.pad(v, (0, 1), value=1.0))  # [v 1]: (B, H, T, C, M)
        states, state = running_sum(call, phi_k.mT @ values, state)
    if q is not None:
        phi_q = to_chunks(call, call.query_map(q))
        total = phi_q @ states  # (B, H, T, C, M)
        if call.causal:
            scores = (phi_q @ phi_k.mT).tril_()
            add_product(total, scores, values)
        total = to_tokens(total, q)
    return state, total, phi_q, phi_k, scores, states


def products_gradient(call, parts, features, outs, grad_state):
    """Gradients with respect to q, k, v and the state before the step."""
    (q, k, v), (phi_q, phi_k, scores, states), (normaliser, out, grad_out) = parts, features, outs
    dq = dk = dv = None
    later = grad_state[:, :, None]  # G of the queries after this step
    values = None if v is None else to_chunks(call, F.pad(v, (0, 1), value=1.0))  # (B, H, T, C, M)
    if q is not None:
        grad = grad_out / normaliser
        grad = to_chunks(call, torch.cat([grad, -(grad * out).sum(-1, keepdim=True)], dim=-1))
        later, grad_state = running_sum(call, phi_q.mT @ grad, grad_state, backwards=True)
        dq = grad @ states.mT  # (B, H, T, C, F)
        if call.causal:
            grad_scores = (grad @ values.mT).tril_()  # (B, H, T, C, C)
            add_product(dq, grad_scores, phi_k)
        dq = feature_gradient(q, to_tokens(phi_q, q), to_tokens(dq, q), **call.query_map.keywords)
    if k is not None:
        dk, dv = values @ later.mT, phi_k @ later  # (B, H, T, C, F), (B, H, T, C, M)
        if call.causal:
            add_product(dk, grad_scores.mT, phi_q)
            add_product(dv, scores.mT, grad)
        dk = feature_gradient(k, to_tokens(phi_k, k), to_tokens(dk, k), **call.key_map.keywords)
        dv = to_tokens(dv, k)[..., :-1]
    return dq, dk, dv, grad_state


def running_sum(call, added, state, backwards=False):
    """The state that each chunk reads, (B, H, T, F, M), and the last state. A causal chunk reads
    what was added before it (backwards: after it)."""
    if not call.causal:
        state = state + added[:, :, 0]
        return state[:, :, None], state
    chunks = range(added.shape[2])
    for t in reversed(chunks) if backwards else chunks:
        state, added[:, :, t] = state + added[:, :, t], state
    return added, state


def add_product(x, y, z):
    x.flatten(0, 2).baddbmm_(y.flatten(0, 2), z.flatten(0, 2))


def to_chunks(call, x):
    """(B, H, L, X) to (B, H, T, C, X), padded with zero tokens, which add nothing."""
    size = call.chunk_size if call.causal else x.shape[2]
    if padding := -x.shape[2] % size:
        x = F.pad(x, (0, 0, 0, padding))
    return x.unflatten(2, (-1, size))


def to_tokens(x, like):
    return x.flatten(2, 3)[:, :, : like.shape[2]]


def by_autograd(call, inputs, grads):
    """Gradients by model.py's own form, to be differentiated again or vectorised."""
    inputs = [x if x.requires_grad else x.detach().requires_grad_() for x in inputs]
    (*qkv, state), mode = inputs, "chunked" if call.causal else "parallel"
    options = {"causal": call.causal, "mode": mode, "state": state, "return_state": True}
    with torch.enable_grad():
        results = call.reference(*qkv, call.query_map, call.key_map, **options)
    options = {"create_graph": torch.is_grad_enabled(), "allow_unused": True}
    return torch.autograd.grad(results, inputs, grads, **options)


# --- The gradient of the paper's features ---------------------------------------------------------


def feature_gradient(x, phi, grad, *, feature_map, lam, alpha, tau=None):
    """Gradient with respect to x (..., D), through Eqs. (7) or, without tau, (8), and (9) or (11).
    phi, grad: the features (..., F) of x, and the gradient with respect to them. Omits what scales
    all features of a query by the same factor, such as Eq. (12): Eq. (5) cancels it."""
    (cos, sin), (grad_cos, grad_sin) = phi.chunk(2, dim=-1), grad.chunk(2, dim=-1)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)  # (..., 1)
    inverse = 1 / norm.masked_fill(norm == 0, 1.0)
    size = x.abs().clamp_min_(torch.finfo(x.dtype).tiny)
    dlog_a = torch.addcmul(grad_cos * cos, grad_sin, sin)  # a stretch: (..., D)
    power, dnorm = lam, torch.zeros_like(norm)
    if tau is not None:  # log(a) = p log|x| + a constant, and p grows with the norm
        tanh = torch.tanh(norm)
        power = lam * (tau + tanh)
        dnorm = (dlog_a * size.log()).sum(dim=-1, keepdim=True) * lam * (1 - tanh * tanh)
    dx = dlog_a.mul_(power).div_(size.copysign_(x))
    if feature_map == "cosine":  # theta = pi/2 sigmoid(2 alpha x / |x|)
        dtheta = torch.addcmul(grad_sin * cos, grad_cos, sin, value=-1)  # a turn: (..., D)
        sigmoid = (x * (2 * alpha * inverse)).sigmoid_()
        dtheta.mul_(sigmoid.addcmul_(sigmoid, sigmoid, value=-1))
        slope = math.pi * alpha * inverse
        dx.addcmul_(dtheta, slope)
        dnorm = dnorm - (dtheta * x).sum(dim=-1, keepdim=True) * slope * inverse
    return dx.addcmul_(x, dnorm * inverse)


# --- Is model.py the code for which this file was written? ----------------------------------------

FUNCTIONS = (
    "at_least_float32 decompose query_power query_magnitude key_magnitude cosine_map sign_split"
    " query_features key_features parallel quadratic chunked linear_attention"
).split()
FINGERPRINT = "9d72d6e7df968961"  # of these functions of model.py


def is_known(reference: Callable, query_map: Callable, key_map: Callable) -> bool:
    """Whether these are the paper's features, as nala_attention passes them, in the known code."""
    scope = reference.__globals__
    functions = [scope.get(name) for name in FUNCTIONS]
    if not all(inspect.isfunction(x) and x.__globals__ is scope for x in functions):
        return False
    for features, name in ((query_map, "query_features"), (key_map, "key_features")):
        if not isinstance(features, partial) or features.func is not scope[name] or features.args:
            return False
        options = {"feature_map", *scope[name].__kwdefaults__}
        known_map = features.keywords.get("feature_map") in {"cosine", "split"} - {
            *scope["BASELINES"]
        }
        learned = any(isinstance(x, Tensor) for x in features.keywords.values())
        if not known_map or learned or features.keywords.keys() != options:
            return False
    codes = tuple(x.__code__ for x in functions)
    return fingerprint(codes, codes[0].co_filename) == FINGERPRINT


@lru_cache
def fingerprint(codes: tuple[CodeType, ...], file: str) -> str | None:
    """Hash of the syntax of these functions of file, without comments and docstrings. None if the
    file says something else now."""
    try:
        source = "".join(inspect.findsource(codes[0])[0])
        compiled = compile(source, file, "exec", dont_inherit=True).co_consts
    except (OSError, SyntaxError):
        return None
    if not all(code in compiled for code in codes):
        return None
    functions = {x.name: x for x in ast.parse(source).body if isinstance(x, ast.FunctionDef)}
    found = [functions[code.co_name] for code in codes]
    for x in found:
        x.body = x.body[ast.get_docstring(x) is not None :]
    return hashlib.sha256("\n".join(map(ast.unparse, found)).encode()).hexdigest()[:16]
