"""Exercises of lesson 3: putting the norm back, Eqs. (7), (8) and (12).

Each `..._by_loops` is a specification: correct, slow, for one row of plain numbers. Write the
function below it for tensors, without a loop; `counterexample` has no loop to replace: find
numbers for it. Mark the file from the repository root with

    python -m pytest path/to/lesson_3.py
"""

import math

import torch

from nala_min.course import checks


def query_magnitude_by_loops(query: list[float], lam: float, tau: float) -> list[float]:
    """Eqs. (7) and (12) for one query: |d_j|^p, with |d_j| divided by the largest of them first."""
    square = 0.0
    for q_j in query:
        square += q_j**2
    norm = math.sqrt(square)
    if norm == 0:
        return [0.0] * len(query)
    sizes, magnitude = [abs(q_j) / norm for q_j in query], []
    for size in sizes:
        magnitude.append((size / max(sizes)) ** (lam * (tau + math.tanh(norm))))
    return magnitude


def query_magnitude(q: torch.Tensor, lam: float, tau: float) -> torch.Tensor:
    """Magnitude of raw queries, Eqs. (7) and (12): the largest channel of every query is 1.

    q: (..., D). Returns (..., D), in [0, 1]; 0 for a zero query. Gradients are finite, also where a
    query or a channel of it is 0, if lam * tau is at least 1: a power below 1 is vertical at 0.
    """
    norm = torch.linalg.vector_norm(q, dim=-1, keepdim=True)  # (..., 1)
    power = lam * (tau + torch.tanh(norm))  # (..., 1)
    largest = q.abs().amax(dim=-1, keepdim=True)  # (..., 1)
    # |d| over its largest channel is |q| over its own: the norm stands in the exponent only.
    ratio = q.abs() / largest.masked_fill(largest == 0, 1.0)  # (..., D)
    return ratio.pow(power)


def power_slope_by_loops(norm: float, lam: float, tau: float = 0.5, step: float = 1e-5) -> float:
    """How fast the power p of Eq. (7) grows with the norm of the query: a difference quotient,
    right to a few digits only."""
    powers = []
    for shifted in (norm - step, norm + step):
        powers.append(lam * (tau + math.tanh(shifted)))
    return (powers[1] - powers[0]) / (2 * step)


def power_slope(norm: torch.Tensor, lam: float) -> torch.Tensor:
    """The slope of the power, Eq. (7), exactly: dp / d norm in closed form.

    norm: (..., 1), non-negative. Returns (..., 1). Draw it: where does a query's norm still count?
    """
    return lam * (1 - torch.tanh(norm).square())


def nala_entropy_by_loops(norm: float, direction: list[float], keys: list[list[float]]) -> float:
    """The entropy (3) of the NaLa weights of one query, norm * direction, over some keys."""
    power, weights = 3.0 * (0.5 + math.tanh(norm)), []
    for key in keys:
        key_norm = math.sqrt(sum(k_j**2 for k_j in key))
        weight = 0.0
        for d_j, k_j in zip(direction, key, strict=True):
            query_angle = math.pi / 4 * math.tanh(20.0 * d_j)
            key_angle = math.pi / 4 * math.tanh(20.0 * k_j / key_norm)
            weight += abs(d_j) ** power * abs(k_j) ** 3 * math.cos(query_angle - key_angle)
        weights.append(weight)
    entropy = 0.0
    for weight in weights:
        if weight > 0:
            entropy -= weight / sum(weights) * math.log(weight / sum(weights))
    return entropy


def counterexample() -> tuple[torch.Tensor, torch.Tensor]:
    """A query direction and keys for which more norm means MORE entropy.

    For softmax that cannot be, by Eq. (4). For NaLa it can: find a case in which the entropy, that
    of nala_entropy_by_loops, rises by at least 0.01 from norm 0.1 to norm 3. Returns direction
    (D,), of norm 1, and keys (N, D), none of them zero; you choose N and D. The notebook has an
    example with two channels: find one with three or more. Every channel must count: |direction| is
    at least 0.1 there, and some key is not 0 there.
    """
    # As the norm grows, the power favours channel 0, in which all keys are the same; at a small
    # norm the others have their say, in each of which one key sticks out.
    direction = torch.tensor([6.0, 3.0, 2.0]) / 7
    keys = torch.tensor([[1.0, 0.1, 0.1]] * 6 + [[1.0, 4.0, 0.1], [1.0, 0.1, 4.0]])
    return direction, keys


checks.add_tests(globals())
