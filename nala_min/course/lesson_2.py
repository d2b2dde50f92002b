"""The checkers of lesson 2: the missing norm."""

from __future__ import annotations

import torch

from nala_min import model
from nala_min.course.checks import (
    Wrong,
    assert_close,
    call,
    check_cost,
    check_linear,
    close,
    exercise,
    output,
    random_normal,
    valid_tensor,
)


@exercise(
    2,
    "In (5), the query does not depend on i: what can be summed over the keys without it?",
    "Keys meet values first: phi_k^T v is (B, H, F, M). The normaliser needs the sum of phi_k.",
    "For a row without mass, replace the 0 in the denominator before you divide, not after.",
)
def check_linear_attention(student):
    check_linear(student, False)
    check_cost(student)


@exercise(
    2,
    "Call the attention twice. What differs between the two calls, and what must not?",
    "torch.linalg.vector_norm of a whole tensor is one number; divide by that of the first output.",
)
def check_norm_microscope(student):
    def attention(q, k, v):
        calls.append((q, k, v))
        return inner(q, k, v)

    (q, k), v = random_normal(2, 2, 3, 5, 4), random_normal(2, 3, 5, 4)
    for inner, ratio in ((model.softmax_attention, 3.0), (model.nala_attention, 0.5)):
        calls, case = [], f" (factor={ratio:g}, {inner.__name__})"
        got = call(student, attention, q, k, v, ratio)
        if not isinstance(got, (int, float)):
            got = valid_tensor(got, (), "The result")
        for i, (what, x) in enumerate((("keys", k), ("values", v)), start=1):
            if not all(close(given[i], x) for given in calls):
                raise Wrong(f"The {what} are changed: rescale only the queries.")
        for factor in (1.0, ratio):
            if not any(close(given[0], factor * q) for given in calls):
                raise Wrong(f"The attention is never called with {factor:g} * q{case}.")
        out, changed = (inner(factor * q, k, v) for factor in (1.0, ratio))
        change, norm = changed - out, torch.linalg.vector_norm
        expected, growth = norm(change) / norm(out), norm(changed) / norm(out) - 1
        ratios = norm(change, dim=-1) / norm(out, dim=-1)
        sums = change.abs().sum(), out.abs().sum()
        mistakes = {
            "The change is not divided by the norm of the output.": norm(change),
            "It is divided by the norm of the changed output.": norm(change) / norm(changed),
            "It is the square of the relative change.": expected**2,
            "Take the norm of the difference, not the difference of norms.": growth,
            "It is a mean over tokens: take norms of the whole output.": ratios.mean(),
            "It sums absolute values: take the root of the sum of squares.": sums[0] / sums[1],
        }
        got = torch.as_tensor(got, dtype=torch.float64)
        assert_close(got, expected, f"The relative change{case}", mistakes)


@exercise(
    2,
    "When does relu(q_j) * relu(k_j) vanish although q_j * k_j is positive?",
    "relu(-q) * relu(-k) is |q_j k_j| where both are negative, and 0 elsewhere.",
)
def check_dropped_share(student):
    q, k = random_normal(2, 3, 5, 6)
    halves = model.sign_split(q.abs(), q) * model.sign_split(k.abs(), k)
    positive, negative = halves.unflatten(-1, (2, 6)).sum(dim=-1).unbind(dim=-1)  # (3, 5), (3, 5)
    total, both = (q * k).abs().sum(dim=-1), (q < 0) & (k < 0)
    agreeing = positive + negative
    mistakes = {
        "It is the share that ReLU keeps: both channels positive.": positive / total,
        "It includes channels of opposite signs: they do not agree.": 1 - positive / total,
        "Divide by the sum of all |q_j k_j|, not of those that agree.": negative / agreeing,
        "It counts channels: weight each by |q_j k_j|.": both.double().mean(dim=-1),
        "It is not divided by the sum of all |q_j k_j|.": negative,
        "It divides by a sum without absolute values.": negative / (q * k).sum(dim=-1),
    }
    assert_close(output(student, q, k, shape=(3, 5)), negative / total, "The share", mistakes)
    if not close(output(student, q / 1e6, k / 1e6, shape=(3, 5)), negative / total):
        raise Wrong(
            "Queries and keys a million times smaller change the share: use no eps and no clamp."
        )
    for case, pair in ((" (zero query)", (0 * q, k)), (" (zero key)", (q, 0 * k))):
        got = output(student, *pair, shape=(3, 5), case=case)
        assert_close(got, 0 * got, f"The share{case}")
