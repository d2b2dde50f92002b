"""Find the bug: three causal norm-aware attentions that have each been broken in one place.

Bugs like these were published. For each attention (i) look at its symptom, which the marking below
or `checks.report("find_the_bug")` tells you, (ii) write the name of the bug into DIAGNOSES
(`print(checks.BUGS)` shows the names), and (iii) fix the function: only then are you told
whether the name is right. From the repository root:

    python -m pytest path/to/find_the_bug.py

All three take q, k: (B, H, N, D), v: (B, H, N, M) and key_mask: (B, N) bool, True for a real token
and False for padding, and return (B, H, N, M): Eqs. (2), (7) to (10), (12), and a form of (5).
Padding fills up the shorter texts of a batch to the length of the longest. No query may notice a
padded key: outputs are as if that key and its value were not there.
"""

import math

import torch
import torch.nn.functional as F

from nala_min.course import checks

DIAGNOSES = {"attention_a": "", "attention_b": "", "attention_c": ""}


def attention_a(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_mask: torch.Tensor
) -> torch.Tensor:
    """The quadratic form, Eq. (13c)."""

    def features(x, magnitude):
        direction = F.normalize(x, dim=-1)  # (B, H, N, D)
        angle = math.pi / 4 * torch.tanh(20 * direction)  # (B, H, N, D)
        return torch.cat([magnitude * angle.cos(), magnitude * angle.sin()], dim=-1)

    power = 3 * (0.5 + torch.tanh(q.norm(dim=-1, keepdim=True)))  # (B, H, N, 1)
    ratio = q.abs() / q.abs().amax(dim=-1, keepdim=True).clamp_min(1e-30)
    phi_q = features(q, ratio**power)  # (B, H, N, 2D)
    phi_k = features(k, k.abs() ** 3)  # (B, H, N, 2D)
    v = v * key_mask[:, None, :, None]  # (B, H, N, M)
    weights = (phi_q @ phi_k.mT).tril()  # (B, H, N, N)
    mass = weights.sum(dim=-1, keepdim=True)  # (B, H, N, 1)
    return weights @ v / mass.masked_fill(mass == 0, 1.0)


def attention_b(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_mask: torch.Tensor
) -> torch.Tensor:
    """The chunked form, Eq. (15), with chunks of 4 tokens."""

    def features(x, magnitude):
        angle = math.pi / 4 * (torch.tanh(20 * F.normalize(x, dim=-1)) + 1)
        return torch.cat([magnitude * angle.cos(), magnitude * angle.sin()], dim=-1)

    power = 3 * (0.5 + torch.tanh(q.norm(dim=-1, keepdim=True)))
    ratio = q.abs() / q.abs().amax(dim=-1, keepdim=True).clamp_min(1e-30)
    phi_q, phi_k = features(q, ratio**power), features(k, k.abs() ** 3)
    phi_k = phi_k.masked_fill(~key_mask[:, None, :, None], 0.0)
    values = F.pad(v, (0, 1), value=1.0)  # (B, H, N, M + 1)
    num_tokens = q.shape[2]
    phi_q, phi_k, values = (
        F.pad(x, (0, 0, 0, -num_tokens % 4)).unflatten(2, (-1, 4)) for x in (phi_q, phi_k, values)
    )  # (B, H, T, 4, ...)
    sums = phi_k.mT @ values  # (B, H, T, 2D, M + 1)
    states = sums.cumsum(dim=2)  # (B, H, T, 2D, M + 1)
    total = phi_q @ states + (phi_q @ phi_k.mT).tril() @ values  # (B, H, T, 4, M + 1)
    total = total.flatten(2, 3)[:, :, :num_tokens]  # (B, H, N, M + 1)
    mass = total[..., -1:]
    return total[..., :-1] / mass.masked_fill(mass == 0, 1.0)


def attention_c(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_mask: torch.Tensor
) -> torch.Tensor:
    """The recurrent form, Eq. (14)."""

    def features(x, magnitude):
        angle = math.pi / 4 * torch.tanh(20 * F.normalize(x, dim=-1))
        return torch.cat([magnitude * angle.cos(), magnitude * angle.sin()], dim=-1)

    power = 3 * (0.5 + torch.tanh(q.norm(dim=-1, keepdim=True)))  # (B, H, N, 1)
    ratio = q.abs() / q.abs().amax(dim=-1, keepdim=True).clamp_min(1e-30)  # (B, H, N, D)
    phi_q = features(q, power * ratio)  # (B, H, N, 2D)
    phi_k = features(k, k.abs() ** 3) * key_mask[:, None, :, None]
    values = F.pad(v, (0, 1), value=1.0)  # (B, H, N, M + 1)
    state, rows = 0.0, []
    for t in range(q.shape[2]):
        state = state + phi_k[:, :, t, :, None] * values[:, :, t, None, :]  # (B, H, 2D, M + 1)
        total = (phi_q[:, :, t, None, :] @ state).squeeze(-2)  # (B, H, M + 1)
        mass = total[..., -1:]
        rows.append(total[..., :-1] / mass.masked_fill(mass == 0, 1.0))
    return torch.stack(rows, dim=2)


checks.add_tests(globals())
