"""The closest relatives of NaLa, for comparison: each is an attention with the arguments of
GatedAttention.attend, so that `layer.attend = partial(focused, layer)` puts it into a block. They
are for training and for measuring: they keep no state, and so cannot write a token at a time.

All but one are linear attention, Eq. (5), with other features. ReLU leaves features that are not
negative as they are, so feature_map="relu" of nala_attention takes them.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nala_min.model import (
    GatedAttention,
    decompose,
    key_features,
    nala_attention,
    query_features,
    query_power,
)


def focused(layer: GatedAttention, q: Tensor, k: Tensor, v: Tensor, options: dict, state: None):
    """Focused linear attention (FLatten, arXiv 2308.00442): ReLU(x) to the power of 3 a channel,
    its norm kept. Its depthwise convolution is local(v) of Eq. (16)."""
    return _linear(layer, _focus(q), _focus(k), v)


def _focus(x: Tensor) -> Tensor:
    norm, direction = decompose(F.relu(x))  # (B, H, N, 1), (B, H, N, D)
    return norm * decompose(direction.pow(3))[1]  # (B, H, N, D)


def clipped(layer: GatedAttention, q: Tensor, k: Tensor, v: Tensor, options: dict, state: None):
    """NaLa without its cosine map: the same powers, Eqs. (7) and (8), of what ReLU leaves."""
    norm, direction = decompose(q)  # (B, H, N, 1), (B, H, N, D)
    power = query_power(norm, norm_scale=options["norm_scale"])  # (B, H, N, 1)
    return _linear(layer, _power(direction, power), _power(k, 3.0), v)


def _power(x: Tensor, power: Tensor | float) -> Tensor:
    """ReLU(x)^power, with a finite slope at 0."""
    kept = x > 0
    return torch.where(kept, x, 1.0).pow(power) * kept


def learn_polarity(layer: GatedAttention) -> None:
    """Give layer the exponents that polar learns: of each channel, from 1 to 4, at first 2.5."""
    size = layer.num_heads, 1, layer.out.in_features // layer.num_heads
    layer.exponent = nn.Parameter(torch.zeros(size))  # (H, 1, D)


def polar(layer: GatedAttention, q: Tensor, k: Tensor, v: Tensor, options: dict, state: None):
    """Polarity-aware linear attention (PolaFormer, arXiv 2501.15061): half of the value's channels
    by pairs of equal sign, the other half by pairs of opposite sign, with learned exponents. The
    gate of Eq. (16) is in the place of its learned signs of the two halves."""
    power = 1 + 3 * torch.sigmoid(layer.exponent)
    signs = [_power(x, power) for x in (q, -q, k, -k)]  # (B, H, N, D) each
    phi_q = torch.cat(signs[:2], dim=-1)  # (B, H, N, 2D)
    same, opposite = torch.cat(signs[2:], dim=-1), torch.cat(signs[:1:-1], dim=-1)
    first, second = v.chunk(2, dim=-1)  # (B, H, N, M / 2) each
    o = [_linear(layer, phi_q, *pair)[0] for pair in ((same, first), (opposite, second))]
    return torch.cat(o, dim=-1), None


def magnitude_aware(
    layer: GatedAttention, q: Tensor, k: Tensor, v: Tensor, options: dict, state: None
):
    """Magnitude-aware linear attention (MALA, arXiv 2507.00698): weights beta a_i - gamma with
    a_i = phi(q) phi(k_i), S their sum, beta = 1 + 1 / S, gamma = S / n over n visible keys. They
    sum to 1, may be negative, and get sharper as S grows with the query: the output is (1 + S)
    times Eq. (5) minus S times the mean value.

    phi is elu + 1; we divide a_i by n sqrt(D), so that S does not grow with n.
    """
    o = nala_attention(q, k, v, feature_map="elu", causal=layer.causal)  # (B, H, N, M)
    phi_q, phi_k = query_features(q, "elu"), key_features(k, "elu")  # (B, H, N, D) each
    mean = _running_mean if layer.causal else partial(torch.mean, dim=2, keepdim=True)
    s = (phi_q * mean(phi_k)).sum(dim=-1, keepdim=True) / math.sqrt(q.shape[-1])  # (B, H, N, 1)
    return (1 + s) * o - s * mean(v), None


def _running_mean(x: Tensor) -> Tensor:
    """Over each token and those before it, (B, H, N, ...)."""
    return x.cumsum(dim=2) / torch.arange(1, x.shape[2] + 1, device=x.device)[:, None]


def _linear(layer: GatedAttention, phi_q: Tensor, phi_k: Tensor, v: Tensor) -> tuple[Tensor, None]:
    return nala_attention(phi_q, phi_k, v, feature_map="relu", causal=layer.causal), None
