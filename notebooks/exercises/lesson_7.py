"""Exercises of lesson 7: the wider family, Eq. (14) with a state that forgets or corrects itself.

Each `..._by_loops` is a specification: correct, slow, for one head and plain numbers. Write the
function below it for tensors. Mark the file from the repository root with

    python -m pytest path/to/lesson_7.py
"""

import torch

from nala_min.course import checks


def decay_step_by_loops(
    state: list[list[float]], k: list[float], v: list[float], decay: list[float]
) -> list[list[float]]:
    """The state (F x M) after one token of gated linear attention."""
    after = []
    for f in range(len(k)):
        row = []
        for m in range(len(v)):
            row.append(decay[f] * state[f][m] + k[f] * v[m])
        after.append(row)
    return after


def decay_step(
    state: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decay: torch.Tensor
) -> torch.Tensor:
    """One token of gated linear attention: the past fades, then the token is written.

    state: (B, H, F, M), k: (B, H, F), v: (B, H, M), decay: (B, H, F), from 0 to 1, a number for
    each feature. Returns the new state (B, H, F, M); the old one stays as it is.
    """
    raise NotImplementedError


def delta_step_by_loops(
    state: list[list[float]], k: list[float], v: list[float], share: float
) -> list[list[float]]:
    """The state (F x M) after one token of DeltaNet: what the key reads now moves towards v."""
    read = []
    for m in range(len(v)):
        total = 0.0
        for f in range(len(k)):
            total += k[f] * state[f][m]
        read.append(total)
    after = []
    for f in range(len(k)):
        row = []
        for m in range(len(v)):
            row.append(state[f][m] + share * k[f] * (v[m] - read[m]))
        after.append(row)
    return after


def delta_step(
    state: torch.Tensor, k: torch.Tensor, v: torch.Tensor, share: torch.Tensor
) -> torch.Tensor:
    """One token of DeltaNet: the delta rule, which replaces what a key reads instead of adding to
    it.

    state: (B, H, F, M), k: (B, H, F), of length 1, v: (B, H, M), share: (B, H), from 0 to 1: with
    1, the key reads v afterwards. Returns the new state (B, H, F, M); the old one stays as it is.
    """
    raise NotImplementedError


checks.add_tests(globals())
