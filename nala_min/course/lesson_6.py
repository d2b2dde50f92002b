"""The checkers of lesson 6: what a state can hold."""

from __future__ import annotations

import torch

from nala_min.course.checks import (
    Wrong,
    assert_close,
    assert_gradients_close,
    check_cost,
    check_independence,
    close,
    exercise,
    features,
    gradients,
    output,
    random_normal,
)


def _reference(phi_k):
    weights = phi_k @ phi_k.mT  # (B, H, N, N)
    total = weights.sum(dim=-1)
    own = weights.diagonal(dim1=-2, dim2=-1) / torch.where(total > 0, total, 1.0)
    return torch.where(total > 0, 1 - own, 0.0)


@exercise(
    6,
    "With the query phi_i, key i gets the weight phi_i . phi_i. What do all keys get together?",
    "Together they get the sum of phi_i . phi_j over j: phi_i . z, where z is the sum of phi_j.",
)
def check_interference(student):
    def run(phi_k, shape, case=""):
        return output(student, phi_k, shape=shape, case=case)

    phi_k = features(2, 3, 7, 4)
    shape, expected = (2, 3, 7), _reference(phi_k)
    out = run(phi_k, shape)
    check_independence(run, out, phi_k)
    z = phi_k.sum(dim=2, keepdim=True)
    over_heads = phi_k.sum(dim=(1, 2), keepdim=True)
    own, total = phi_k.square().sum(dim=-1), (phi_k * z).sum(dim=-1)
    mistakes = {
        "It is the share of the key itself: the others have the rest.": own / total,
        "It is not a share: divide by the total weight.": total - own,
        "It divides by the key's own weight: divide by the total weight.": (total - own) / own,
        "z also sums over the heads.": 1 - own / (phi_k * over_heads).sum(dim=-1),
        "The key's own weight is phi_i . phi_i, a sum of squares.": 1 - phi_k.sum(-1) / total,
    }
    assert_close(out, expected, "The share", mistakes)
    apart = torch.eye(4, dtype=torch.float64)[None, None]
    assert_close(
        run(apart, (1, 1, 4), " (orthogonal keys)"), torch.zeros(1, 1, 4).double(), "The share"
    )
    phi_k[:, :, 2], case = 0.0, " (a key without features)"
    assert_close(run(phi_k, shape, case), _reference(phi_k), f"The share{case}")
    assert_gradients_close(student, _reference, phi_k, case=case)
    check_cost(lambda phi_q, phi_k, v: student(phi_k))


@exercise(
    6,
    "The product of two keys is small only if no feature is large in both.",
    "Keep positive and negative channels apart, as the sign split does: that gives 2D features.",
    "Now make a key's largest channels count most. What did the power do in (7) and (8)?",
)
def check_own_features(student):
    x = random_normal(2, 3, 7, 5)
    phi = output(student, x, shape=(2, 3, 7, 10))
    if (phi < 0).any():
        raise Wrong(f"A feature is negative, {phi.min().item():.3g}, so weights can be negative.")
    if not (phi.sum(dim=-1) > 0).all():
        raise Wrong("All features of some x are 0: such a key cannot be stored.")
    alone = output(student, x[:1, :1, 3:4], shape=(1, 1, 1, 10))
    if not close(alone, phi[:1, :1, 3:4]):
        raise Wrong("A token has different features when it is alone: it must not see the others.")
    gradients(student, x)
    k, v = random_normal(200, 1, 16, 16), random_normal(200, 1, 16, 16)
    phi = output(student, k, shape=(200, 1, 16, 32))
    weights = phi @ phi.mT
    read = weights @ v / weights.sum(dim=-1, keepdim=True)
    error = (read - v).square().mean().item()
    if not error < 0.6:
        raise Wrong(f"16 pairs are read with a squared error of {error:.2f}: it must be below 0.6.")
