"""Exercises of lesson 1: softmax and the query norm, Eqs. (1) to (4).

Each `..._by_loops` is a specification: correct, slow, for one row of plain numbers. Write the
function below it for tensors, without a loop. Mark the file from the repository root with

    python -m pytest path/to/lesson_1.py
"""

import math

import torch

from nala_min.course import checks


def entropy_by_loops(weights: list[float]) -> float:
    """Eq. (3) for one row of weights, which need not sum to 1."""
    total = 0.0
    for weight in weights:
        total += weight
    result = 0.0
    for weight in weights:
        if weight > 0:
            result += weight / total * math.log(total / weight)
    return result


def entropy(weights: torch.Tensor) -> torch.Tensor:
    """Positive sequence entropy, Eq. (3), in nats.

    weights: (..., N), non-negative; they need not sum to 1. Returns (...); 0 for a row of zeros.
    Gradients are finite, also where a weight is 0.
    """
    total = weights.sum(dim=-1, keepdim=True)  # (..., 1)
    share = weights / torch.where(total > 0, total, 1.0)  # (..., N), 0 for a row of zeros
    log = share.masked_fill(share == 0, 1.0).log()  # finite where a share is 0, and so is its slope
    return -(share * log).sum(dim=-1)


def softmax_weights_by_loops(query: list[float], keys: list[list[float]]) -> list[float]:
    """Eq. (1) for one query and the keys that it sees: a weight for each key."""
    exponentials = []
    for key in keys:
        score = 0.0
        for q_j, k_j in zip(query, key, strict=True):
            score += q_j * k_j
        exponentials.append(math.exp(score / math.sqrt(len(query))))
    weights = []
    for exponential in exponentials:
        weights.append(exponential / sum(exponentials))
    return weights


def softmax_weights(q: torch.Tensor, k: torch.Tensor, causal: bool) -> torch.Tensor:
    """The weights of softmax attention, Eq. (1), for scores of any size.

    q, k: (B, H, N, D). causal: query t sees the keys 0 ... t only. Returns (B, H, N, N): a row
    per query, a column per key.
    """
    scores = q @ k.mT / math.sqrt(q.shape[-1])  # (B, H, N, N)
    if causal:  # before the softmax, so that what is hidden does not count in the sum either
        future = torch.ones_like(scores, dtype=torch.bool).triu(1)
        scores = scores.masked_fill(future, -math.inf)
    return torch.softmax(scores, dim=-1)  # over keys; subtracts the largest score by itself


def entropy_slope_by_loops(scores: list[float], c: float, step: float = 1e-5) -> float:
    """Eq. (4), the left side: how fast the entropy of softmax(c * scores) changes with c.

    A difference quotient, right to a few digits only.
    """
    entropies = []
    for shifted in (c - step, c + step):
        weights = softmax_weights_by_loops([shifted], [[score] for score in scores])
        entropies.append(entropy_by_loops(weights))
    return (entropies[1] - entropies[0]) / (2 * step)


def entropy_slope(scores: torch.Tensor, c: float) -> torch.Tensor:
    """Eq. (4), the right side, exactly: dPSE/dc in closed form, for weights softmax(c * scores).

    scores: (..., N), the s_i of one query; c: a positive number. Returns (...).
    """
    p = torch.softmax(c * scores, dim=-1)  # (..., N)
    mean = (p * scores).sum(dim=-1, keepdim=True)  # (..., 1), under p: sharp weights see few keys
    variance = (p * (scores - mean).square()).sum(dim=-1)  # (...)
    return -c * variance


checks.add_tests(globals())
