"""The checkers of lesson 3: putting the norm back."""

from __future__ import annotations

import torch
from torch import Tensor

from nala_min import model
from nala_min.course.checks import (
    TOLERANCE,
    Wrong,
    assert_close,
    call,
    close,
    exercise,
    gradients,
    output,
    random_normal,
    where_largest,
)


@exercise(
    3,
    "The direction is q / |q|, but (12) divides by its largest channel: what happens to |q|?",
    "The exponent is one number per query, (..., 1): take the norm with keepdim=True.",
    "A zero query gives 0/0: replace its largest channel by 1. torch.pow does the rest.",
)
def check_query_magnitude(student):
    def run(q, lam=3.0, tau=0.5, case="", why=""):
        return output(student, q, lam, tau, shape=q.shape, case=case, why=lambda _: why)

    def reference(q, lam=3.0, tau=0.5):
        norm, direction = model.decompose(q)
        return model.query_magnitude(direction, model.query_power(norm, lam, tau))

    def detached(q, lam, tau):  # without the gradient of the largest channel, which (5) cancels
        norm, direction = model.decompose(q)
        size = direction.abs()
        ratio = size / size.detach().amax(dim=-1, keepdim=True)
        return ratio.pow(model.query_power(norm, lam, tau))

    q = random_normal(2, 5, 4)
    why = "A negative number to a fractional power is NaN: take the absolute value."
    got, shorter = run(q, why=why), run(q / 4)
    if (got < 0).any():
        raise Wrong("A magnitude is negative: take the absolute value of the direction.")
    largest, of_shorter = (x.amax(dim=-1, keepdim=True) for x in (got, shorter))
    if close(shorter / of_shorter, got / largest, 1e-3):
        raise Wrong("A query with a quarter of the norm has the same magnitude: the norm cancels.")
    if not close(largest, torch.ones_like(largest)):
        raise Wrong(
            "The largest channel of every query must be 1, Eq. (12): scale each query separately."
        )
    if not close(run(q[:1]), got[:1]):
        raise Wrong("Queries are mixed: each has its own norm and its own largest channel.")
    norm, direction = model.decompose(q)
    powers = {
        "The tanh is missing from the power.": 3 * (0.5 + norm),
        "tau is outside the brackets: the power is lam * (tau + tanh).": 0.5 + 3 * norm.tanh(),
        "tau is missing from the power.": 3 * norm.tanh(),
        "lam is missing from the power.": 0.5 + norm.tanh(),
    }
    mistakes = {text: model.query_magnitude(direction, power) for text, power in powers.items()}
    assert_close(got, reference(q), "The magnitude", mistakes)
    for name, value in (("lam", 2.0), ("tau", 0.8)):
        other = {name: value}
        fixed = {f"{name} has a fixed value: use the argument.": got}
        assert_close(
            run(q, **other), reference(q, **other), f"The magnitude ({name}={value})", fixed
        )
    functions, rest = (student, reference, detached), got < 1 - TOLERANCE
    found, wanted, without = (gradients(f, q, 3.0, 0.5)["q"] for f in functions)
    if not close(found, without):  # the largest channel's gradient depends on detaching it
        what = "The magnitude is right, but the gradient (is the norm detached?)"
        assert_close(found * rest, wanted * rest, what)
    assert_close(run(q * 1e-9), reference(q * 1e-9), "The magnitude of a query of norm 1e-9")
    many = 1 + random_normal(5, 16) / 10
    why = "Divide by the largest channel before the power, Eq. (12)."
    largest = run(many, 500.0, case=" (lam=500)", why=why).amax(dim=-1)
    if not close(largest, torch.ones_like(largest)):
        raise Wrong(f"The largest channel is not 1 (lam=500): the power underflows. {why}")
    q, case = q / 1e3, " (a query or a channel is zero)"
    q[0, 0], q[0, 1, 2] = 0.0, 0.0
    assert_close(run(q, case=case), reference(q), f"The magnitude{case}")
    gradients(student, q, 3.0, 0.5, case=case)


@exercise(
    3,
    "What is the derivative of tanh? And the derivative of tau?",
    "The derivative of tanh(x) is 1 - tanh(x)^2; tau is a constant.",
)
def check_power_slope(student):
    for lam in (2.5, 0.8):
        norm = torch.linspace(0, 30, 50).double()[:, None].requires_grad_()
        power = model.query_power(norm, lam)
        (expected,) = torch.autograd.grad(power.sum(), norm)
        norm, tanh = norm.detach(), norm.detach().tanh()
        mistakes = {
            "It is the power itself, not its slope.": power.detach(),
            "The factor lam is missing: in (7) it also multiplies tanh.": expected / lam,
            "The tanh is not squared.": lam * (1 - tanh),
            "It grows with the norm: subtract the square of tanh from 1.": lam * (1 + tanh**2),
            "It is lam * tanh^2: subtract that from lam.": lam * tanh**2,
        }
        got = output(student, norm, lam, shape=(50, 1), case=" (norms from 0 on)")
        assert_close(got, expected, f"The slope (lam={lam})", mistakes)


@exercise(
    3,
    "As the norm grows, the direction's largest channel wins. What if all keys agree in it?",
    "Make all keys equal in one channel, and let one key stand out in each of the others.",
    "Make that channel the largest of the direction, but keep some of each of the others.",
)
def check_counterexample(student):
    result = call(student)
    if not isinstance(result, (tuple, list)) or len(result) != 2:
        raise Wrong("It must return two tensors: the direction (D,) and the keys (N, D).")
    if not all(isinstance(x, Tensor) and x.is_floating_point() for x in result):
        raise Wrong("Direction and keys must be floating-point tensors.")
    direction, keys = (x.detach().double() for x in result)
    if direction.ndim == 2 and keys.ndim == 1:
        raise Wrong("The two are in the wrong order: return the direction first, then the keys.")
    if direction.ndim != 1 or keys.ndim != 2 or keys.shape[1] != len(direction):
        shapes = f"{tuple(direction.shape)} and {tuple(keys.shape)}"
        raise Wrong(f"The shapes are {shapes}, expected (D,) and (N, D).")
    if not direction.isfinite().all() or not keys.isfinite().all():
        raise Wrong("Direction and keys must be finite.")
    if abs(direction.norm() - 1) > 1e-6:
        raise Wrong(f"The direction has norm {direction.norm():.4g}, expected 1.")
    if len(direction) < 3:
        raise Wrong("The notebook's example has two channels: find one with three or more.")
    if (sizes := direction.abs()).min() < 0.1 - 1e-6:
        at = sizes.argmin()
        end = "it must be at least 0.1 or at most -0.1."
        raise Wrong(f"Channel {at} of the direction is {direction[at]:.3g}: {end}")
    if not keys.any(dim=-1).all():
        raise Wrong("A key is zero: it has no direction and no weight.")
    if not (used := keys.any(dim=0)).all():
        raise Wrong(f"Channel {where_largest(~used)[0]} is 0 in all keys: it does not count.")
    if len(keys) < 2:
        raise Wrong("With fewer than two keys, the entropy is 0 for any norm.")
    q = torch.stack([0.1 * direction, 3 * direction])[:, None, None].expand(-1, -1, len(keys), -1)
    weights = model.attention_weights(q, keys.expand_as(q))[:, 0, 0]  # (2, N)
    low, high = model.entropy(weights).tolist()
    if high < low + 0.01:
        verb = "falls" if high < low - 0.01 else "hardly changes"
        raise Wrong(f"The entropy {verb}: {low:.3f} for norm 0.1, {high:.3f} for norm 3.")
