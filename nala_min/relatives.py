"""Other attentions, registered by name: the closest relatives of NaLa, for `--attention NAME`, and
your own, for `--attention FILE.py`. Also the released code's rotary positions, Eq. (17).

Most are linear attention, Eq. (5), with other features. Features with parameters are computed first
and then passed to linear_attention.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import modulefinder
import os
import random
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nala_min.model import (
    ATTENTIONS, Config, at_least_float32, check_inputs, check_tensor, chunked, decompose,
    key_features, linear_attention, nala_attention, parallel, query_features, query_power, require,
)  # fmt: skip

# --- The closest relatives of NaLa ----------------------------------------------------------------


def focused_features(x: Tensor) -> Tensor:
    """Focused linear attention (FLatten, arXiv 2308.00442): ReLU(x) cubed per channel,
    rescaled to the norm of ReLU(x). FLatten's depthwise convolution is local(v) of Eq. (16)."""
    norm, direction = decompose(F.relu(x))  # (..., 1), (..., D)
    return norm * decompose(direction.pow(3))[1]  # (..., D)


def clipped_query_features(q: Tensor) -> Tensor:
    """NaLa without the cosine map: the power of Eq. (7), after ReLU."""
    norm, direction = decompose(q)  # (..., 1), (..., D)
    return clipped_power(direction, query_power(norm))


def clipped_key_features(k: Tensor) -> Tensor:
    """NaLa without the cosine map: the power of Eq. (8), after ReLU."""
    return clipped_power(k, 3.0)


def clipped_power(x: Tensor, power: Tensor | float) -> Tensor:
    """ReLU(x)^power, with a finite slope at 0."""
    x, positive = at_least_float32(x), x > 0
    return torch.where(positive, x, 1.0).pow(power) * positive


class Polar(nn.Module):
    """Polarity-aware linear attention (PolaFormer, arXiv 2501.15061): pairs of query and key
    channels of equal sign weight one half of a value's channels, pairs of opposite sign the other
    half. Each channel learns an exponent from 1 to 4, initially 2.5. The gate of Eq. (16) replaces
    PolaFormer's learned signs of the two halves."""

    def __init__(self, config: Config):
        super().__init__()
        size = config.num_heads, 1, config.dim // config.num_heads
        self.exponent = nn.Parameter(torch.zeros(size))  # (H, 1, D)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, causal, state=None, return_state=False):
        power = 1 + 3 * torch.sigmoid(self.exponent)
        plus_q, minus_q, plus_k, minus_k = (clipped_power(x, power) for x in (q, -q, k, -k))
        phi_q = torch.cat([plus_q, minus_q], dim=-1)  # (B, H, N, 2D)
        same, opposite = (torch.cat(x, dim=-1) for x in ((plus_k, minus_k), (minus_k, plus_k)))
        halves = zip((same, opposite), v.chunk(2, dim=-1), state or (None, None), strict=True)
        attend = with_features(at_least_float32, at_least_float32)  # they are features already
        attend = partial(attend, causal=causal, return_state=True)
        results = [attend(phi_q, *x, state=y) for *x, y in halves]
        (first, second), states = zip(*results, strict=True)
        out = torch.cat([first, second], dim=-1)
        return (out, states if causal else None) if return_state else out


def magnitude_aware(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, state=None, return_state=False
) -> Tensor | tuple[Tensor, Any]:
    """Magnitude-aware linear attention (MALA, arXiv 2507.00698): weights beta a_i - gamma over n
    visible keys, with a_i = phi(q) phi(k_i), S = sum a_i, beta = 1 + 1 / S and gamma = S / n. They
    sum to 1, can be negative, and get sharper as S grows with the query. The output is (1 + S)
    times Eq. (5) minus S times the mean value.

    phi is elu + 1. We divide a_i by n sqrt(D), so S does not grow with n.
    """
    # [S z] of Eq. (14), sum of v, number of tokens read.
    sums, value_sum, position = state or (None, 0.0, 0)
    dtype, v = v.dtype, at_least_float32(v)
    o, after = nala_attention(
        q, k, v, feature_map="elu", causal=causal, state=sums, return_state=True
    )  # (B, H, N, M), (B, H, F, M + 1)
    phi_q, phi_k = query_features(q, "elu"), key_features(k, "elu")  # (B, H, N, D) each
    if causal:
        key_sum = phi_k.cumsum(dim=2)
        key_sum = key_sum if sums is None else key_sum + sums[..., -1].unsqueeze(2)  # (B, H, N, D)
        value_sum = v.cumsum(dim=2) + value_sum  # (B, H, N, M)
        n = position + torch.arange(1, q.shape[2] + 1, device=q.device)[:, None]  # (N, 1)
    else:
        key_sum, value_sum, n = phi_k.sum(2, keepdim=True), v.sum(2, keepdim=True), k.shape[2]
    s = (phi_q * key_sum / n).sum(dim=-1, keepdim=True) / math.sqrt(q.shape[-1])  # (B, H, N, 1)
    out = ((1 + s) * o - s * value_sum / n).to(dtype)
    state = (after, value_sum[:, :, -1:].clone(), position + q.shape[2]) if causal else None
    return (out, state) if return_state else out


def softmax_features(x: Tensor) -> Tensor:
    """Features like Hedgehog's (arXiv 2402.04347): a softmax over the channels of x and -x, sharper
    for longer x. The block's projections already contain the matrix that Hedgehog learns."""
    return torch.cat([x, -x], dim=-1).softmax(dim=-1)  # (..., 2D)


def injective(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, state=None, return_state=False
) -> Tensor | tuple[Tensor, Any]:
    """Injective linear attention (InLine, arXiv 2412.06590): weights a_i - mean a + 1 / n over n
    visible keys, with a_i = q k_i. They sum to 1 without a division, can be negative, and differ
    more for longer queries. We divide a_i by n sqrt(D), so they do not grow with n."""
    check_inputs(q, k, v, causal, None)
    dtype = v.dtype
    q, k, v = (at_least_float32(x) for x in (q, k, v))
    values = F.pad(v, (0, 1), value=1.0)  # (B, H, N, M + 1)
    zeros = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3] + 1)
    sums, value_sum, position = state or (zeros, 0.0, 0)
    if causal:
        total, sums = chunked(q, k, values, sums)  # (B, H, N, M + 1), (B, H, D, M + 1)
        value_sum = v.cumsum(dim=2) + value_sum  # (B, H, N, M)
        n = position + torch.arange(1, q.shape[2] + 1, device=q.device)[:, None]  # (N, 1)
    else:
        total, _ = parallel(q, k, values)
        value_sum, n = v.sum(2, keepdim=True), k.shape[2]
    mean = value_sum / n
    out = mean + (total[..., :-1] - total[..., -1:] * mean) / (n * math.sqrt(q.shape[3]))
    state = (sums, value_sum[:, :, -1:].clone(), position + q.shape[2]) if causal else None
    return (out.to(dtype), state) if return_state else out.to(dtype)


class DeltaRule(nn.Module):
    """DeltaNet (arXiv 2406.06484): before a token's value is written, a share of what its key reads
    is erased. This share, and Gated DeltaNet's (arXiv 2412.06464) decay, depend on the token x.
    Features are SiLU's, of length 1; in the paper's language model (section 4.4) NaLa's. Nothing is
    divided: the query norm acts through the power alone. Images: all is written, then read."""

    takes_input, features, decays = True, (F.silu, F.silu), False

    def __init__(self, config: Config):
        super().__init__()
        size = config.num_heads, config.dim
        self.share = nn.Parameter(torch.zeros(size))  # initially half
        if self.decays:  # a token's decay is exp(-rate softplus(dt x + bias))
            spread = (torch.arange(config.num_heads) + 0.5) / config.num_heads
            self.dt = nn.Parameter(torch.zeros(size))
            self.bias = nn.Parameter((0.001 * 100**spread).expm1().log())
            self.log_rate = nn.Parameter((16 * spread).log())

    def forward(self, q, k, v, *, x, causal, state=None, return_state=False):
        check_inputs(q, k, v, causal, None)
        dtype = v.dtype
        with torch.autocast("cpu" if v.is_meta else v.device.type, enabled=False):
            q, k, v, x = (at_least_float32(y) for y in (q, k, v, x))
            q, k = (decompose(phi(y))[1] for phi, y in zip(self.features, (q, k), strict=True))
            share = F.linear(x, self.share).sigmoid().mT  # (B, H, N)
            log_decay = torch.zeros_like(share)
            if self.decays:
                dt = F.softplus(F.linear(x, self.dt, self.bias))  # (B, N, H)
                log_decay = -(self.log_rate.exp() * dt).mT
            if state is None:
                state = v.new_zeros(*v.shape[:2], k.shape[3], v.shape[3])
            o, state = delta_rule(q, k, v, share, log_decay, state)
            o = (o if causal else q @ state).to(dtype)  # (B, H, N, M)
        return (o, state if causal else None) if return_state else o


NALA = {"features": (query_features, key_features)}
NaLaDelta = type("NaLaDelta", (DeltaRule,), NALA)
GatedDelta = type("GatedDelta", (DeltaRule,), {"decays": True})
NaLaGatedDelta = type("NaLaGatedDelta", (GatedDelta,), NALA)


def delta_rule(q, k, v, share, log_decay, state, chunk_size=32):
    """S_t = a_t S_{t-1} + k_t^T u_t, u_t = b_t (v_t - a_t k_t S_{t-1}), o_t = q_t S_t, in chunks.

    q, k: (B, H, N, F), v: (B, H, N, M), share b and log_decay log(a): (B, H, N), state S: (B, H, F,
    M). Returns o (B, H, N, M) and the last state. In a chunk that begins with S_0, let A_t be the
    product of its decays up to t. Then u_t + b_t sum_{i<t} A_t / A_i (k_t k_i) u_i = b_t (v_t -
    A_t k_t S_0): solved in all chunks at once, up to the part linear in S_0, which a loop adds.
    """
    num_tokens, chunk_size = q.shape[2], min(chunk_size, q.shape[2])
    padding = -num_tokens % chunk_size  # with share 0: nothing is written
    q, k, v = (F.pad(x, (0, 0, 0, padding)) for x in (q, k, v))
    q, k, v = (x.unflatten(2, (-1, chunk_size)) for x in (q, k, v))  # (B, H, T, C, .)
    share, log_decay = (F.pad(x, (0, padding)) for x in (share, log_decay))
    share, log_decay = (x.unflatten(2, (-1, chunk_size)) for x in (share, log_decay))
    log_a = log_decay.cumsum(-1)[..., None]  # log A_t: (B, H, T, C, 1)
    a, share = log_a.exp(), share[..., None]
    ratio = (log_a - log_a.mT).tril().exp().tril()  # A_t / A_i for i <= t: (B, H, T, C, C)
    system = share * ratio * (k @ k.mT)  # below its diagonal, which is taken for 1
    both = share * torch.cat([v, a * k], dim=-1)  # (B, H, T, C, M + F)
    both = torch.linalg.solve_triangular(system, both, upper=False, unitriangular=True)
    alone, per_state = both.split([v.shape[-1], k.shape[-1]], dim=-1)  # u = alone - per_state S_0
    scores = ratio * (q @ k.mT)  # (B, H, T, C, C)
    q, last = a * q, (log_a[..., -1:, :] - log_a).exp() * k  # A_t q_t and A_C / A_t k_t
    outputs, end = [], a[..., -1:, :]
    for t in range(q.shape[2]):
        u = alone[:, :, t] - per_state[:, :, t] @ state  # (B, H, C, M)
        outputs.append(q[:, :, t] @ state + scores[:, :, t] @ u)
        state = end[:, :, t] * state + last[:, :, t].mT @ u
    return torch.cat(outputs, dim=2)[:, :, :num_tokens], state


def with_features(query_map: Callable, key_map: Callable) -> Callable:
    """Linear attention, Eq. (5), with these features."""
    return partial(linear_attention, query_map=query_map, key_map=key_map)


ATTENTIONS["focused"] = with_features(focused_features, focused_features)
ATTENTIONS["clipped"] = with_features(clipped_query_features, clipped_key_features)
ATTENTIONS["polar"] = Polar
ATTENTIONS["magnitude-aware"] = magnitude_aware
ATTENTIONS["hedgehog"] = with_features(softmax_features, softmax_features)
ATTENTIONS["injective"] = injective
ATTENTIONS |= {"delta": DeltaRule, "nala-delta": NaLaDelta}
ATTENTIONS |= {"gated-delta": GatedDelta, "nala-gated-delta": NaLaGatedDelta}

# --- Rotary positions, as the released code has them ----------------------------------------------


def rotary_attention(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, feature_map: str = "split"
) -> Tensor:
    """Bidirectional NaLa with the rotary positions of the released code, Eq. (17), in the numerator
    of (5) only: weights can be negative. positions: (N, A), A = 1 for text, 2 for images."""
    check_tensor("positions", positions, (q.shape[2], None), q, (positions.dtype,))
    angles = rotary_angles(positions, q.shape[3])  # (N, D / 2)
    phi_q, phi_k = query_features(q, feature_map), key_features(k, feature_map)  # (B, H, N, 2D)
    normaliser = phi_q @ phi_k.sum(dim=2)[..., None]  # (B, H, N, 1)
    sums, _ = parallel(rotate(phi_q, angles), rotate(phi_k, angles), v.to(phi_k.dtype))
    return (sums / normaliser.masked_fill(normaliser == 0, math.inf)).to(v.dtype)


def rotary_angles(positions: Tensor, dim: int) -> Tensor:
    """Angles (N, dim / 2), float64, for positions (N, A), Eq. (17): the first dim / A channels
    rotate by the first axis, the last by the last. Frequencies fall from 1 to 1 / 10,000."""
    axes = positions.shape[1]
    require(dim % (2 * axes) == 0, "D", f"divisible by {2 * axes} for {axes} axes", dim)
    count = dim // (2 * axes)  # frequencies per axis
    exponents = torch.arange(count, dtype=torch.float64, device=positions.device)
    frequencies = 10000.0 ** (-exponents / max(count - 1, 1))
    return (positions[:, :, None] * frequencies).flatten(1)


def rotate(features: Tensor, angles: Tensor) -> Tensor:
    """Rotate channels 2j, 2j+1 in each block of D of (..., N, F) by angles (N, D / 2), Eq. (17)."""
    first, second = features.unflatten(-1, (-1, angles.shape[1], 2)).unbind(-1)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]  # (N, 1, D / 2)
    rotated = torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1)
    return rotated.flatten(-3).to(features.dtype)


# --- Your own -------------------------------------------------------------------------------------


def is_file(name: str) -> bool:
    """Whether an attention's name is a file name."""
    return name.lower().endswith(".py")


def register(path: str | os.PathLike, dim: int, *, causal: bool) -> str:
    """Register the attention that the file at path defines, under the name path. Returns the
    SHA-256 of the file and of its neighbours that it imports.

    The file defines query_features(q) and key_features(k), (..., D) to non-negative (..., F), for
    linear_attention; or attention(q, k, v, *, causal, state=None, return_state=False), which takes
    and returns the same as nala_attention, with any object as its state; or such an nn.Module, made
    once per block with the config. Only a module's parameters are trained. The file is executed
    like any Python script, from a fixed seed, and tried on a few tokens of dim channels. Raises
    ValueError, in one line, if the file cannot be run, or its functions are wrong."""
    path = os.fspath(path)
    folder = str(Path(path).absolute().parent)
    numbers = np.random.get_state(), random.getstate()  # noqa: NPY002, the file may draw from them
    try:
        digest, neighbours = files_of(path)
        for name in neighbours:  # not another folder's of the same name
            sys.modules.pop(name, None)
        spec = importlib.util.spec_from_file_location(f"attention_{digest[:12]}", path)
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        with torch.random.fork_rng(devices=[]), patch.object(sys, "path", [folder, *sys.path]):
            for seed in (torch.default_generator.manual_seed, np.random.seed, random.seed):
                seed(0)
            spec.loader.exec_module(module)
            ATTENTIONS[path] = _attention_of(module, dim, causal)
    except (Exception, SystemExit) as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        line, *_ = str(error).splitlines() or [""]
        raise ValueError(f"{path}: {kind}{line}") from error
    finally:
        np.random.set_state(numbers[0])  # noqa: NPY002
        random.setstate(numbers[1])
    return digest


def files_of(path: str) -> tuple[str, list[str]]:
    """The SHA-256 of a file and of its neighbours that it imports; the neighbours' names."""
    finder = modulefinder.ModuleFinder([str(Path(path).absolute().parent)], excludes=["nala_min"])
    finder.run_script(path)  # runs nothing: finds what is imported
    files = {name: x.__file__ for name, x in finder.modules.items() if x.__file__}
    content = b"".join(Path(x).read_bytes() for x in sorted(files.values()))
    return hashlib.sha256(content).hexdigest(), [*files.keys() - {"__main__"}]


def _attention_of(module: ModuleType, dim: int, causal: bool) -> Callable:
    """The attention that module defines, tried on a few tokens."""
    names = [x for x in ("query_features", "key_features", "attention") if hasattr(module, x)]
    if names not in (["query_features", "key_features"], ["attention"]):
        needed = "query_features and key_features, or attention"
        raise ValueError(f"the file must define {needed}, got {', '.join(names) or 'neither'}")
    q, k, v = 2 * torch.randn(3, 2, 3, 6, dim, generator=torch.Generator().manual_seed(0))
    k[:, :, 3] = 0
    first, second, middle = np.s_[:1], np.s_[:, 1:2], np.s_[:, :, 2:5]
    if names == ["attention"]:
        found = attend = module.attention
    else:
        found = attend = with_features(module.query_features, module.key_features)
        for name, x in (("query_features", q), ("key_features", k)):
            features = partial(_unchanged, getattr(module, name), name)
            phi = torch.as_tensor(features(x))
            is_valid = phi.is_floating_point() and phi.shape[:-1] == x.shape[:-1]
            require(is_valid, f"{name}'s result", "floating-point (B, H, N, F)", phi)
            wrong = phi[~(phi.isfinite() & (phi >= 0))]
            require(not wrong.numel(), name, "finite and non-negative", wrong[:1])
            for part in (first, second, middle):
                same = torch.allclose(features(x[part]), phi[part], 1e-4, 1e-6)
                require(same, name, "features of each token by itself", "others for fewer tokens")
    if isinstance(found, type):  # made once per block, with the config
        require(issubclass(found, nn.Module), "attention", "a function or an nn.Module", found)
        attend = found(Config(num_heads=3, dim=3 * dim)).eval()
    run = partial(_unchanged, attend, "attention", causal=causal, return_state=True)
    if getattr(attend, "takes_input", False):
        plain, run = run, lambda q, *kv, **y: plain(q, *kv, x=q.transpose(1, 2).flatten(2), **y)
    result = run(q, k, v)
    is_pair = isinstance(result, tuple) and len(result) == 2
    require(is_pair, "attention's result", "output and state with return_state=True", type(result))
    out = result[0]
    require(out.shape == v.shape, "attention's output", f"{tuple(v.shape)}", out)
    require(out.isfinite().all(), "attention's output", "finite", out[~out.isfinite()][:1])
    is_trained = isinstance(attend, nn.Module) or not out.requires_grad
    require(is_trained, "parameters", "in an nn.Module called attention, to be trained", out)
    for texts, cut in ((2, 4), (1, 3)):
        whole, tokens = out[:texts], [x[:texts] for x in (q, k, v)]
        if not torch.allclose(run(*tokens)[0], whole, 1e-4, 1e-5):
            raise ValueError("attention depends on the other examples of a batch, or on chance")
        if causal:
            begin, state = run(*(x[:, :, :cut] for x in tokens))
            rest, _ = run(*(x[:, :, cut:] for x in tokens), state=state)
            if not torch.allclose(begin, whole[:, :, :cut], 1e-4, 1e-5):
                raise ValueError("attention sees the future: a later token changes earlier outputs")
            if not torch.allclose(rest, whole[:, :, cut:], 1e-3, 1e-4):
                raise ValueError("attention does not continue from its state")
    return found


def _unchanged(function: Callable, name: str, *tensors: Tensor, **options: Any) -> Any:
    """What function returns. It must not write to the tensors that it is given."""
    copies = [x.clone() for x in tensors]
    result = function(*copies, **options)
    require(all(map(torch.equal, copies, tensors)), name, "without writing to its arguments", "")
    return result
