"""Exercises of lesson 6: what a state can hold, Eqs. (5) and (14).

`..._by_loops` is a specification: correct, slow, for plain numbers. Write the functions for
tensors. Mark the file from the repository root with

    python -m pytest path/to/lesson_6.py
"""

import torch

from nala_min.course import checks


def interference_by_loops(phi_k: list[list[float]]) -> list[float]:
    """For the features of some keys, each asked for by its own: the share of its answer that comes
    from the other keys."""
    shares = []
    for asked in phi_k:
        total, own = 0.0, 0.0
        for stored in phi_k:
            for a, b in zip(asked, stored, strict=True):
                total += a * b
        for a in asked:
            own += a * a
        shares.append(1 - own / total if total > 0 else 0.0)
    return shares


def interference(phi_k: torch.Tensor) -> torch.Tensor:
    """The share of each key's answer that comes from other keys: 0 if the state keeps it apart.

    phi_k: (B, H, N, F), non-negative features of N stored keys. Returns (B, H, N); 0 for a key
    without features. Work and memory grow like N: z of (14), a sum over the keys, tells enough.
    Gradients are finite.
    """
    raise NotImplementedError


def own_features(x: torch.Tensor) -> torch.Tensor:
    """Features of your own for linear attention, for queries and keys alike.

    x: (..., D). Returns (..., 2D), non-negative and finite, each token's from that token alone and
    not all 0. They must keep keys apart: 16 random pairs with D = 16 are read with a mean squared
    error below 0.6. (The sign split of lesson 4 has 0.75 with a = |x|, NaLa's features have 0.49,
    and knowing nothing costs about 1.) Gradients are finite.
    """
    raise NotImplementedError


checks.add_tests(globals())
