"""Exercises of lesson 5: from quadratic to linear, Eqs. (13) to (15).

Each `..._by_loops` is a specification: correct, slow, for one head and plain numbers. Write the
function below it for tensors. Mark the file from the repository root with

    python -m pytest path/to/lesson_5.py
"""

import torch

from nala_min.course import checks


def recurrent_step_by_loops(
    state: list[list[float]], phi_q: list[float], phi_k: list[float], v: list[float]
) -> tuple[list[float], list[list[float]]]:
    """Eq. (14) for one token of one head: its output (M) and the new state (F x (M + 1)).

    Channel M of the state counts the mass, as if every value ended in a 1.
    """
    after = []
    for f in range(len(phi_k)):
        row = []
        for m in range(len(v)):
            row.append(state[f][m] + phi_k[f] * v[m])
        row.append(state[f][len(v)] + phi_k[f])
        after.append(row)
    mass = 0.0
    for f in range(len(phi_q)):
        mass += phi_q[f] * after[f][len(v)]
    out = []
    for m in range(len(v)):
        total = 0.0
        for f in range(len(phi_q)):
            total += phi_q[f] * after[f][m]
        out.append(total / mass if mass > 0 else 0.0)
    return out, after


def recurrent_step(
    state: torch.Tensor, phi_q: torch.Tensor, phi_k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token of causal linear attention in its recurrent form, Eq. (14).

    state: (B, H, F, M + 1), the sums so far: S, with z as the last column. phi_q, phi_k:
    (B, H, F), v: (B, H, M), of the new token, which sees itself. Returns the output (B, H, M), 0
    where the query has no mass, and the new state (B, H, F, M + 1); the old one stays as it is.
    Gradients are finite, and reach all four.
    """
    raise NotImplementedError


def causal_attention_by_loops(
    phi_q: list[list[float]], phi_k: list[list[float]], v: list[list[float]]
) -> list[list[float]]:
    """Eq. (13c) for one head: token t is the weighted mean of the values 0 ... t."""
    out = []
    for t in range(len(v)):
        sums, mass = [0.0] * len(v[0]), 0.0
        for i in range(t + 1):
            weight = 0.0
            for q_f, k_f in zip(phi_q[t], phi_k[i], strict=True):
                weight += q_f * k_f
            mass += weight
            for m in range(len(sums)):
                sums[m] += weight * v[i][m]
        out.append([total / mass if mass > 0 else 0.0 for total in sums])
    return out


def chunked_attention(
    phi_q: torch.Tensor, phi_k: torch.Tensor, v: torch.Tensor, chunk_size: int
) -> torch.Tensor:
    """Causal linear attention in its chunked form, Eq. (15): any N, any chunk_size.

    phi_q, phi_k: (B, H, N, F), non-negative, v: (B, H, N, M). Returns (B, H, N, M). Keep the
    inputs' dtype. A loop over chunks is fine, one over tokens is not. Work and memory grow like N:
    a chunk meets those before it only in their sum; no N x N numbers, and no F x M numbers for each
    token. Where a token has no mass, the output is 0, and gradients are finite.
    """
    raise NotImplementedError


checks.add_tests(globals())
