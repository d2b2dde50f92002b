"""Exercises of lesson 4: cosines for non-negativity, Eqs. (9) to (11).

Each `..._by_loops` is a specification: correct, slow, for one row of plain numbers. Here it gives
the inner product of two feature vectors; find the vectors. Any with these inner products and the
right norm pass. Mark the file from the repository root with

    python -m pytest path/to/lesson_4.py
"""

import math

import torch

from nala_min.course import checks


def cosine_product_by_loops(
    a_q: list[float], d_q: list[float], a_k: list[float], d_k: list[float], alpha: float
) -> float:
    """Eq. (10): the inner product of a query's and a key's features, from the magnitudes a and the
    directions d of both."""
    product = 0.0
    for j in range(len(a_q)):
        query_angle = math.pi / 4 * math.tanh(alpha * d_q[j])
        key_angle = math.pi / 4 * math.tanh(alpha * d_k[j])
        product += a_q[j] * a_k[j] * math.cos(query_angle - key_angle)
    return product


def cosine_features(magnitude: torch.Tensor, direction: torch.Tensor, alpha: float) -> torch.Tensor:
    """Features of a query or of a key whose inner products are those of Eq. (10).

    magnitude: (..., D), non-negative; direction: (..., D). Returns (..., 2D), of the same norm as
    magnitude.
    """
    raise NotImplementedError


def split_product_by_loops(
    a_q: list[float], d_q: list[float], a_k: list[float], d_k: list[float]
) -> float:
    """Eq. (11), the limit of large alpha: a channel passes if the two signs agree."""
    product = 0.0
    for j in range(len(a_q)):
        if d_q[j] * d_k[j] > 0:
            product += a_q[j] * a_k[j]
    return product


def sign_split(magnitude: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """Features of a query or of a key whose inner products are those of Eq. (11).

    magnitude: (..., D), non-negative; direction: (..., D). Returns (..., 2D), of the same norm as
    magnitude where no channel of direction is 0; a channel that is 0 has no sign and passes
    nothing.
    """
    raise NotImplementedError


checks.add_tests(globals())
