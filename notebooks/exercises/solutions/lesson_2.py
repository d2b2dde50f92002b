"""Exercises of lesson 2: the missing norm, Eqs. (5) and (6).

Each `..._by_loops` is a specification: correct, slow, for one row of plain numbers. Write the
function below it for tensors, without a loop. Mark the file from the repository root with

    python -m pytest path/to/lesson_2.py
"""

import math
from collections.abc import Callable

import torch

from nala_min.course import checks


def linear_attention_by_loops(
    phi_q: list[float], phi_k: list[list[float]], v: list[list[float]]
) -> list[float]:
    """Eq. (5) for one query: the mean of the values, weighted by the products of features."""
    weights = []
    for features in phi_k:
        weight = 0.0
        for q_f, k_f in zip(phi_q, features, strict=True):
            weight += q_f * k_f
        weights.append(weight)
    out = []
    for m in range(len(v[0])):
        mean = 0.0
        for weight, value in zip(weights, v, strict=True):
            if weight > 0:
                mean += weight / sum(weights) * value[m]
        out.append(mean)
    return out


def linear_attention(phi_q: torch.Tensor, phi_k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Linear attention between non-negative features, Eq. (5); every token sees every other.

    phi_q, phi_k: (B, H, N, F), v: (B, H, N, M). Returns (B, H, N, M). Work and memory grow like N:
    no N x N numbers, and no F x M numbers for each token. Where all weights of a query are 0, the
    output is 0, and gradients are finite. Features may be as small as 1e-6.
    """
    sums = phi_k.mT @ v  # (B, H, F, M): keys meet values first, so N x N never exists
    numerator = phi_q @ sums  # (B, H, N, M)
    mass = phi_k.sum(dim=2)[..., None]  # (B, H, F, 1)
    denominator = phi_q @ mass  # (B, H, N, 1)
    # Replaced before the division: a 0/0 that is thrown away afterwards still has a NaN gradient.
    return numerator / denominator.masked_fill(denominator == 0, 1.0)


def relative_change_by_loops(out: list[float], changed: list[float]) -> float:
    """How far an output, one row of numbers, has moved, in units of its own norm."""
    distance = size = 0.0
    for before, after in zip(out, changed, strict=True):
        distance += (after - before) ** 2
        size += before**2
    return math.sqrt(distance) / math.sqrt(size)


def norm_microscope(
    attention: Callable, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, factor: float
) -> torch.Tensor:
    """What attention(q, k, v) does with the norm of its queries: the relative change of its whole
    output when every query becomes factor times as long, and nothing else changes. See Eq. (6).

    attention: a function of q, k, v that returns (B, H, N, M). Returns a number, or a tensor ().
    """
    out = attention(q, k, v)
    changed = attention(factor * q, k, v)
    return torch.linalg.vector_norm(changed - out) / torch.linalg.vector_norm(out)


def dropped_share_by_loops(query: list[float], key: list[float]) -> float:
    """Of all |q_j k_j|, the share in channels where both are negative.

    Such channels agree, and raise q . k, but ReLU makes them 0. If the total is 0, so is the share.
    """
    total = dropped = 0.0
    for q_j, k_j in zip(query, key, strict=True):
        total += abs(q_j * k_j)
        if q_j < 0 and k_j < 0:
            dropped += q_j * k_j
    return dropped / total if total > 0 else 0.0


def dropped_share(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """The share of sum_j |q_j k_j| that ReLU drops although the signs agree; 0 if that sum is 0.

    q, k: (..., D), one key per query. Returns (...).
    """
    dropped = (torch.relu(-q) * torch.relu(-k)).sum(dim=-1)  # both negative, or 0
    total = (q * k).abs().sum(dim=-1)
    return dropped / total.masked_fill(total == 0, 1.0)


checks.add_tests(globals())
