"""The checker of find_the_bug.py."""

from __future__ import annotations

import inspect
import zlib

import torch

from nala_min import model
from nala_min.course.checks import (
    BUGS,
    EXERCISES,
    Exercise,
    Wrong,
    assert_close,
    check_independence,
    check_weights,
    close,
    gradients,
    one_hot_values,
    output,
    random_normal,
)

# zlib.crc32 of "<function>: <bug>", so this file does not show the answers.
ANSWERS = (1037124925, 2408625119, 2049225717)


def _check_broken_attention(student):
    """Report the symptom of a broken attention; if it has none, check its name in DIAGNOSES."""
    name, remark = student.__name__, ""
    namespace = getattr(inspect.unwrap(student), "__globals__", {})
    diagnosis = namespace.get("DIAGNOSES", {}).get(name)
    if not diagnosis:
        remark = f" DIAGNOSES has no name for the bug in {name} yet: print(checks.BUGS)."
    elif diagnosis not in BUGS:
        remark = f" The diagnosis {diagnosis!r} is not in checks.BUGS: {', '.join(BUGS)}."
    try:
        _check_symptoms(student)
    except Wrong as symptom:  # the diagnosis is judged only after the fix
        raise Wrong(f"{symptom}{remark}") from symptom.__cause__
    if zlib.crc32(f"{name}: {diagnosis}".encode()) not in ANSWERS:
        remark = remark or f" The diagnosis {diagnosis!r} is wrong."
        raise Wrong(f"It is fixed, but its bug is not named.{remark}")


def _check_symptoms(student):
    """Check what a causal norm-aware attention with a mask for padding must do."""

    def run(q, k, v, shape, mask=None, case=""):
        mask = all_real[: len(q)] if mask is None else mask
        return output(student, q, k, v, mask, shape=shape, case=case)

    def reference(q, k, mask=None):
        return model.attention_weights(q, k, causal=True, key_mask=mask)

    (q, k), v, shape = random_normal(2, 2, 3, 11, 4), random_normal(2, 3, 11, 5), (2, 3, 11, 5)
    one_hot, square = one_hot_values(q), (2, 3, 11, 11)
    all_real, causal = torch.ones(2, 11).bool(), torch.ones(11, 11).bool().tril()
    some_real = all_real.clone()
    some_real[0, [2, -2, -1]] = some_real[1, [1, 5, -1]] = False
    out = run(q, k, v, shape)
    check_independence(run, out, q, k, v)
    weights = run(q, k, one_hot, square)
    check_weights(weights, causal)
    case = " (some keys are padding)"
    padded = run(q, k, one_hot, square, some_real, case)
    check_weights(padded, causal & some_real[:, None, None], case)
    if close(run(q / 8, k, one_hot, square), weights, 1e-3):
        raise Wrong("A query with an eighth of the norm has the same weights: the norm cancels.")
    check_weights(run(q, k / 1e3, one_hot, square), causal, " (small keys)")
    assert_close(weights, reference(q, k), "The weight")
    assert_close(padded, reference(q, k, some_real), f"The weight{case}")
    assert_close(out, reference(q, k) @ v, "The output")
    case = " (queries of norm 1e-4)"
    assert_close(run(q / 1e4, k, one_hot, square), reference(q / 1e4, k), f"The weight{case}")
    out = run(0 * q, k, v, shape, case=" (zero queries)")
    assert_close(out, 0 * out, "The output (zero queries)")

    def attend(q, k, v):
        return student(q, k, v, some_real)

    gradients(attend, q, k, v)


for name, *hints in (
    (
        "attention_a",
        "Which tokens show the symptom, and which do not? What do they see?",
        "Follow key_mask to the end: where do the masked keys still count?",
    ),
    (
        "attention_b",
        "Which tokens show the symptom? Are the two in the message in the same chunk?",
        "Write down which chunks states[:, :, c] sums, for c = 0. Which should it sum?",
    ),
    (
        "attention_c",
        "What happens in (5) to a positive factor that all features of a query share?",
        "Compare the magnitude with Eq. (7): which part is the base, and which is the exponent?",
    ),
):
    EXERCISES[name] = Exercise("find_the_bug", _check_broken_attention, tuple(hints))
