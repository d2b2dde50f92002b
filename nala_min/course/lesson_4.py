"""The checkers of lesson 4: cosines for non-negativity."""

from __future__ import annotations

import torch

from nala_min import model
from nala_min.course.checks import (
    TOLERANCE,
    Wrong,
    assert_close,
    close,
    exercise,
    features,
    output,
    random_normal,
)


def _name_map(student, mistakes, *alpha):
    """Raise Wrong if student's map is one of mistakes, {sentence: wrong map}. Maps are compared by
    norms and inner products, so the order of the features or a rotation does not matter."""
    magnitude, direction = features(2, 6, 4), model.decompose(random_normal(2, 6, 4))[1]
    pairs = list(zip(magnitude, direction, strict=True))
    phi = torch.cat([output(student, *pair, *alpha, shape=(6, 8)) for pair in pairs])
    for sentence, wrong in mistakes.items():
        other = torch.cat([wrong(*pair) for pair in pairs])
        if close(phi @ phi.mT, other @ other.mT):
            raise Wrong(sentence)


def _check_map(student, reference, *alpha):
    """Check what both maps must do. Only norms and inner products of their features count."""
    one, case = torch.ones(1, 1).double(), f" (alpha={alpha[0]:g})" if alpha else ""
    magnitude, direction = features(2, 6, 4), model.decompose(random_normal(2, 6, 4))[1]
    pairs = zip(magnitude, direction, strict=True)  # a call each: a query must not see its key
    phi_q, phi_k = (output(student, *pair, *alpha, shape=(6, 8)) for pair in pairs)
    if not close(torch.stack([phi_q, phi_k]).norm(dim=-1), magnitude.norm(dim=-1)):
        raise Wrong(f"The norm of the features differs from that of the magnitude{case}.")
    plus, minus = (output(student, one, sign * one, *alpha, shape=(1, 2)) for sign in (1, -1))
    product = (plus * minus).sum().item()
    if product < -TOLERANCE:
        raise Wrong(f"Opposite signs give a negative product, {product:.3g}{case}.")
    if product > 0.01:
        raise Wrong(f"Opposite signs give the product {product:.3g}, expected almost 0{case}.")
    right_q, right_k = reference(magnitude, direction, *alpha)
    assert_close(
        phi_q @ phi_k.mT, right_q @ right_k.mT, f"The inner product of query and key{case}"
    )


@exercise(
    4,
    "cos(x - y) = cos(x) cos(y) + sin(x) sin(y): which two numbers must a channel keep?",
    "The angle is (pi/4) tanh(alpha * direction), and the magnitude is a factor of both halves.",
)
def check_cosine_features(student):
    def in_radians(a, d):
        angle = 45 * torch.tanh(20 * d)
        return torch.cat([a * angle.cos(), a * angle.sin()], dim=-1)

    one = torch.ones(1, 1).double()
    few, many = (output(student, one, one / 9, alpha, shape=(1, 2)) for alpha in (4.0, 20.0))
    mistakes = {
        "It is the sign split (11), not (9): in (9), a channel's size counts.": model.sign_split,
        "The angle goes up to 45 radians: 45 degrees are pi/4.": in_radians,
        "The magnitude is also in the angle: use only the direction there.": (
            lambda a, d: model.cosine_map(a, a * d)
        ),
    }
    _name_map(student, mistakes, 20.0)
    if close(few, many):
        raise Wrong("alpha makes no difference: the angle must depend on it.")
    _check_map(student, model.cosine_map, 20.0)
    _check_map(student, model.cosine_map, 4.0)


@exercise(
    4,
    "Two halves: which channels of the magnitude go into the first, which into the second?",
    "A comparison gives a mask, and a magnitude times a mask is the magnitude or 0.",
)
def check_sign_split(student):
    def halves(a, plus, minus):
        return torch.cat([a * plus, a * minus], dim=-1)

    mistakes = {
        "Both halves hold the positive channels.": lambda a, d: halves(a, d > 0, d > 0),
        "Both halves hold the negative channels.": lambda a, d: halves(a, d < 0, d < 0),
        "The negative channels are lost.": lambda a, d: halves(a, d > 0, 0),
        "The positive channels are lost.": lambda a, d: halves(a, d < 0, 0),
        "The magnitude is missing: each channel holds 1 instead.": (
            lambda a, d: halves(a / a, d > 0, d < 0)
        ),
        "It splits the direction: split the magnitude by the direction's sign.": (
            lambda a, d: halves(a / a, d.relu(), (-d).relu())
        ),
        "It also uses the size of the direction: use only its sign.": (
            lambda a, d: halves(a, d.relu(), (-d).relu())
        ),
        "It is the cosine map (9), not (11): use no angle, only signs.": model.cosine_map,
    }
    _name_map(student, mistakes)
    _check_map(student, model.sign_split)
    one = torch.ones(1, 1).double()
    if output(student, one, 0 * one, shape=(1, 2)).any():
        raise Wrong("A channel of direction 0 has no sign: it belongs to neither half.")
