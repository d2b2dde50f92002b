"""Checks the exercises in notebooks/exercises and says in one sentence what is wrong.

    from nala_min.course import checks
    checks.report(1)                # one line per exercise of lesson 1
    checks.hint("entropy")          # the first hint; call it again for the next
    checks.check(entropy)           # raises Wrong unless this function is right

The checker of an exercise is a function `check_<name>` in the file of its lesson, decorated with
@exercise(lesson, *hints). It takes the student's function, looks for known mistakes first (shape,
sign, mask) and compares numbers last. The right values come from model.py. Many mistakes are
recognised by the value that they produce:
assert_close(got, expected, what, {"What is wrong.": the value that this mistake produces}).
"""

from __future__ import annotations

import functools
import inspect
import math
import os
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from nala_min import model
from nala_min.course import marking
from nala_min.measure import Recorder

FOLDER = Path(__file__).resolve().parents[2] / "notebooks" / "exercises"
TOLERANCE = 1e-9  # relative and absolute; all numbers are float64


class Wrong(AssertionError):
    """What is wrong with a student's function, in one sentence."""


class NotDone(Wrong):
    """The function still raises NotImplementedError."""


@dataclass(frozen=True)
class Exercise:
    """One exercise: its lesson (a number, or the name of a file), its check and its hints."""

    lesson: int | str
    check: Callable[[Callable], None]
    hints: tuple[str, ...]


EXERCISES: dict[str, Exercise] = {}
BUGS = {  # the diagnoses that students choose from in find_the_bug.py
    "padding in the normaliser": "A masked key adds no value, but still counts in the normaliser.",
    "heads share a normaliser": "The normaliser sums over the heads as well.",
    "eps too large": "A constant in the denominator swallows the weights of small keys.",
    "own token unseen": "The causal mask also removes the diagonal.",
    "no mask within a chunk": "A token sees later tokens of its chunk.",
    "state read too late": "A chunk reads the state after adding itself to it.",
    "power as a factor": "The power multiplies the channels, so it cancels in the division.",
    "layer norm on the query": "The norm of the query is removed before it is measured.",
    "angles too wide": "Angles differ by more than pi/2, where the cosine is negative.",
}


def exercise(lesson: int | str, *hints: str) -> Callable:
    """Register the decorated checker as an exercise. Hints go from gentle to almost the answer."""

    def register(check: Callable) -> Callable:
        EXERCISES[check.__name__.removeprefix("check_")] = Exercise(lesson, check, hints)
        return check

    return register


# --- Functions for students and teachers ----------------------------------------------------------


def check(function: Callable) -> None:
    """Check a student's function against the exercise of the same name.

    It runs with PyTorch's default settings, whatever the caller's are. Raises NotDone, or Wrong
    with a sentence; ValueError if there is no exercise of that name.
    """
    __tracebackhide__ = True  # pytest shows the sentence, not the code of this file
    _get_exercise(function.__name__)
    _check(function, torch.float32)


def report(lesson: int | str, path: str | os.PathLike | None = None) -> None:
    """Print one line per exercise of a lesson, 1 to 7 or "find_the_bug".

    path: the student's file, which runs in a fresh process; None means the one in
    notebooks/exercises. The file's own output is printed first, after a bar. Raises ValueError for
    a lesson without exercises, but nothing for a student's mistake.
    """
    names = _names(lesson)
    if not names:
        raise ValueError(f"lesson must be 1 to 7 or 'find_the_bug': {lesson!r}")
    stem = f"lesson_{lesson}" if isinstance(lesson, int) else lesson
    verdicts, printed = marking.mark(path or FOLDER / f"{stem}.py", names)
    _print_escaped(printed, bar="  | ")
    for name, verdict in verdicts.items():
        _print_escaped(f"{name}: {verdict.splitlines()[0]}")


_hints_given: Counter[str] = Counter()


def hint(name: str) -> None:
    """Print the next hint of an exercise. Raises ValueError if there is no such exercise."""
    hints, given = _get_exercise(name).hints, _hints_given[name]
    if given == len(hints):
        print(f"There are no more hints for {name}.")
        return
    print(f"Hint {given + 1} of {len(hints)}: {hints[given]}")
    _hints_given[name] += 1


def add_tests(namespace: dict[str, Any]) -> None:
    """Add a pytest test, test_<name>, for each exercise of a lesson to the student's file.

    namespace: globals() of the file. The lesson is the one that most of its functions belong to.
    The file runs in a fresh process, once for all its tests. Raises ValueError if no function has
    the name of an exercise.
    """
    lessons = Counter(EXERCISES[name].lesson for name in namespace if name in EXERCISES)
    if not lessons:
        raise ValueError("at least one function in this file must be named like an exercise")
    (lesson, _), *_ = lessons.most_common(1)

    @functools.cache
    def mark() -> tuple[dict[str, str], str]:
        return marking.mark(path, _names(lesson))

    def make_test(name: str) -> Callable:
        def test() -> None:
            __tracebackhide__ = True
            if path is None:
                return check_name(namespace, name)
            verdicts, printed = mark()
            verdict = verdicts.get(name) or verdicts[os.path.basename(path)]
            if verdict != "right":
                _print_escaped(printed, bar="  | ")
                error = NotDone if verdict == "not done yet" else Wrong
                raise error(verdict.removeprefix("wrong - "))

        return test

    path = namespace.get("__file__")  # a notebook has none
    path = path and os.path.abspath(path)
    for name in _names(lesson):
        namespace[f"test_{name}"] = make_test(name)


def check_name(namespace: dict[str, Any], name: str, dtype: torch.dtype = torch.float32) -> None:
    """Check the function called name in a student's file, with dtype as the default dtype."""
    __tracebackhide__ = True
    if getattr(namespace.get(name), "__name__", "") != name:
        remedy = f" Write def {name}(...), not {name} = ..." if name in namespace else ""
        raise Wrong(f"There is no function {name} in this file.{remedy}")
    _check(namespace[name], dtype)


def _names(lesson):
    return [name for name, exercise in EXERCISES.items() if exercise.lesson == lesson]


def _get_exercise(name):
    if name not in EXERCISES:
        raise ValueError(f"the exercise must be one of {', '.join(EXERCISES)}: {name!r}")
    return EXERCISES[name]


def _check(function, dtype):
    """Check function with PyTorch's default settings and dtype, then restore the caller's."""
    __tracebackhide__ = True
    before, threads = torch.get_default_dtype(), torch.get_num_threads()
    quiet = warnings.catch_warnings(action="ignore")  # pytest can be configured to raise them
    torch.set_default_dtype(dtype)
    try:
        with (
            torch.device("cpu"),
            torch.inference_mode(False),  # also enables gradients
            torch.autocast("cpu", enabled=False),
            torch.random.fork_rng(devices=[]),
            quiet,
        ):
            torch.manual_seed(0)
            EXERCISES[function.__name__].check(function)
    except Wrong as error:
        raise error.with_traceback(None) from error.__cause__
    except Exception as error:  # such as a dictionary where a number is expected
        raise Wrong(f"Its result cannot be checked: {describe(error, '')}") from error
    finally:
        torch.set_default_dtype(before)
        torch.set_num_threads(threads)


def _print_escaped(text, bar=""):
    """Print lines; characters that the output cannot show are escaped."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    for line in text.splitlines():
        print(bar + line.encode(encoding, "backslashreplace").decode(encoding))


# --- Shared by the checkers of several lessons ----------------------------------------------------


def random_normal(*shape: int) -> Tensor:
    """Standard normal numbers; not contiguous, like heads after a transposition."""
    return torch.randn(*shape[:-2], shape[-1], shape[-2], dtype=torch.float64).mT


def features(*shape: int) -> Tensor:
    """Positive numbers, which ReLU leaves unchanged: phi(x) = x for feature_map="relu"."""
    return random_normal(*shape).abs() + 0.1


def describe(error: BaseException, file: str) -> str:
    """The error's type and message, and the line of the student's file that raised it."""
    lines = [x.lineno for x in traceback.extract_tb(error.__traceback__) if x.filename == file]
    if isinstance(error, SyntaxError) and error.filename == file and error.lineno:
        lines = [error.lineno]
    message = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}{f' in line {lines[-1]}' if lines else ''}: {message}"


def call(student: Callable, *arguments: Any) -> Any:
    """Call the student's function and return its result. Its errors become sentences."""
    before = [x.clone() if isinstance(x, Tensor) else x for x in arguments]
    try:
        result = student(*arguments)
    except (Exception, SystemExit) as error:
        if isinstance(error, NotImplementedError) and not error.args:  # PyTorch's have a message
            raise NotDone("not done yet") from None
        file = getattr(getattr(inspect.unwrap(student), "__code__", None), "co_filename", "")
        sentence = f"It raises {describe(error, file)}"
        student_trace = error.__traceback__.tb_next  # the frames below this one
        raise Wrong(sentence) from error.with_traceback(student_trace)
    for name, x, y in zip(inspect.signature(student).parameters, arguments, before, strict=False):
        if isinstance(x, Tensor) and not torch.equal(x, y):
            raise Wrong(f"It changes its argument {name} in place: the caller still needs it.")
    return result


def valid_tensor(
    x: Any,
    shape: tuple[int, ...],
    what: str,
    case: str = "",
    why: Callable[[Tensor], str] | None = None,
) -> Tensor:
    """Return x if it is a finite float64 tensor of that shape, otherwise raise Wrong. why(bad)
    returns a sentence with the reason; bad is True where x is not finite."""
    if x is None:
        raise Wrong(f"{what} is None: is a return missing?")
    if not isinstance(x, Tensor):
        raise Wrong(f"{what} has type {type(x).__name__}, expected a tensor.")
    if x.shape != shape:
        raise Wrong(f"{what} has shape {tuple(x.shape)}, expected {tuple(shape)}{case}.")
    if x.dtype != torch.float64:
        raise Wrong(f"{what} has dtype {x.dtype}, expected the arguments' dtype, torch.float64.")
    if (bad := ~x.isfinite()).any():
        kind, reason = "NaN" if x.isnan().any() else "infinite", why(bad) if why else ""
        raise Wrong(f"{what} is {kind} at index {where_largest(bad)}{case}. {reason}".rstrip())
    return x


def output(
    student: Callable,
    *arguments: Any,
    shape: tuple[int, ...],
    case: str = "",
    why: Callable[[Tensor], str] | None = None,
) -> Tensor:
    """The student's result, if it is a finite float64 tensor of that shape."""
    return valid_tensor(call(student, *arguments), shape, "The result", case, why)


def where_largest(x: Tensor) -> tuple[int, ...]:
    """Index of the largest entry of x."""
    return tuple(int(i) for i in torch.unravel_index(x.double().argmax(), x.shape))


def close(x: Tensor, y: Tensor, tolerance: float = TOLERANCE) -> bool:
    return torch.allclose(x, y, rtol=tolerance, atol=tolerance)


def assert_close(
    got: Tensor, expected: Tensor, what: str, mistakes: dict[str, Tensor] | None = None
) -> None:
    """Raise Wrong if got differs from expected. mistakes: {sentence: wrong value}. If got equals a
    wrong value, the error is its sentence; otherwise it describes the difference."""
    if close(got, expected):
        return
    for sentence, value in (mistakes or {}).items():
        if close(got, value):
            raise Wrong(sentence)
    factor = ((got * expected).sum() / expected.square().sum()).item()
    proportional = factor and got.ndim and close(got, factor * expected)
    if proportional and math.isclose(factor, -1):
        raise Wrong(f"{what} has the wrong sign everywhere.")
    tolerance = 1e-3 if proportional else 1e-4
    at, end = where_largest((got - expected).abs()), "."
    where = f" at index {at}" if at else ""
    if (got - expected).abs().max() < tolerance * expected.abs().max():
        end = ", nearly right: is it a difference quotient, is an eps added, is it float32?"
    elif proportional:
        raise Wrong(f"{what} is {factor:.4g} times the expected value everywhere.")
    raise Wrong(f"{what}{where} is {got[at]:.10g}, expected {expected[at]:.10g}{end}")


def gradients(function: Callable, *arguments: Any, case: str = "") -> dict[str, Tensor]:
    """{argument: gradient of the sum of squared outputs} for all tensors, if all are finite."""
    arguments = [x.clone().requires_grad_() if isinstance(x, Tensor) else x for x in arguments]
    named = zip(inspect.signature(function).parameters, arguments, strict=False)
    named = {name: x for name, x in named if isinstance(x, Tensor)}
    out, found = call(function, *arguments).square().sum(), [None] * len(named)
    if out.requires_grad:
        found = torch.autograd.grad(out, list(named.values()), allow_unused=True)
    found = dict(zip(named, found, strict=True))
    for name, gradient in found.items():
        if gradient is None:
            raise Wrong(f"No gradient reaches {name}: is something detached?")
        if not gradient.isfinite().all():
            raise Wrong(f"The gradient with respect to {name} is NaN or infinite{case}.")
    return found


def assert_gradients_close(
    student: Callable, reference: Callable, *arguments: Any, case: str = ""
) -> None:
    """Raise Wrong if the gradients of the two functions differ."""
    expected_gradients = gradients(reference, *arguments).values()
    got_gradients = gradients(student, *arguments, case=case)
    for (name, got), expected in zip(got_gradients.items(), expected_gradients, strict=True):
        assert_close(
            got, expected, f"The output is right, but the gradient with respect to {name}{case}"
        )


def one_hot_values(x: Tensor) -> Tensor:
    """Values (B, H, N, N) for which the output of an attention is its weights."""
    return torch.eye(x.shape[2], dtype=x.dtype).expand(*x.shape[:2], -1, -1)


def check_weights(weights: Tensor, visible: Tensor, case: str = "") -> None:
    """Weights (B, H, N, N) must be positive where visible, 0 elsewhere, and each row must sum to 1.
    visible: bool, broadcasts to the shape of weights."""
    visible = visible.expand_as(weights)
    if (weights < -TOLERANCE).any():
        at = where_largest(-weights)
        raise Wrong(
            f"Token {at[2]} gives token {at[3]} a negative weight, {weights[at]:.3g}{case}."
        )
    if (weights[~visible] > TOLERANCE).any():
        at = where_largest(weights * ~visible)
        why = "lies in its future" if at[3] > at[2] else "is padding"
        raise Wrong(f"Token {at[2]} gives weight to token {at[3]}, which {why}{case}.")
    if (weights[visible] < TOLERANCE).any():
        at = where_largest(visible & (weights < TOLERANCE))
        whom = "itself" if at[2] == at[3] else f"token {at[3]}, which it should see"
        raise Wrong(f"Token {at[2]} gives no weight to {whom}{case}.")
    sums = weights.sum(dim=-1)
    if not close(sums, torch.ones_like(sums)):
        at = where_largest((sums - 1).abs())
        end = ": is an eps added to the denominator?" if abs(sums[at] - 1) < 1e-3 else "."
        raise Wrong(f"The weights of token {at[2]} sum to {sums[at]:.9g}, not to 1{case}{end}")


def check_independence(run: Callable, out: Tensor, *tensors: Tensor) -> None:
    """In out = run(*tensors), neither examples of a batch nor heads may see one another."""
    for cut, what in ((slice(1), "Examples of a batch"), ((slice(None), slice(1)), "Heads")):
        alone = run(*(x[cut] for x in tensors), shape=out[cut].shape)
        if not close(alone, out[cut]):
            raise Wrong(f"{what} are mixed: the first gives a different output on its own.")


def check_linear(
    student: Callable,
    causal: bool,
    *rest: int,
    late: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> None:
    """Check that student(phi_q, phi_k, v, *rest) computes Eq. (5), in any form. late(phi_q, phi_k)
    returns the weights of a state that is read too late."""

    def run(phi_q, phi_k, v, shape, case=""):
        return output(student, phi_q, phi_k, v, *rest, shape=shape, case=case)

    def reference(phi_q, phi_k, v):
        options = {"causal": causal, "mode": "parallel", "feature_map": "relu"}
        return model.nala_attention(phi_q, phi_k, v, **options)

    phi_q, phi_k = features(2, 2, 3, 7, 4)
    v, shape = random_normal(2, 3, 7, 5), (2, 3, 7, 5)
    case = f" (7 tokens, chunk_size={rest[0]})" if rest else ""
    out = run(phi_q, phi_k, v, shape, case)
    check_independence(run, out, phi_q, phi_k, v)
    visible = torch.ones(7, 7, dtype=torch.bool)
    weights = run(phi_q, phi_k, one_hot_values(v), (2, 3, 7, 7))
    if late and close(weights, late(phi_q, phi_k)):
        raise Wrong(f"The state already holds the current chunk: read it first, then add{case}.")
    check_weights(weights, visible.tril() if causal else visible, case)
    assert_close(out, reference(phi_q, phi_k, v), f"The output{case}")
    if not close(run(phi_q / 1e6, phi_k / 1e6, v, shape), out):
        raise Wrong("Features a million times smaller change the output: an eps is too large.")
    case = " (all keys zero)"
    if run(phi_q, 0 * phi_k, v, shape, case).any():
        raise Wrong(f"The output is not 0{case}.")
    gradients(student, phi_q, 0 * phi_k, v, *rest, case=case)
    phi_q[:, :, 3], case = 0.0, " (the query of token 3 is zero)"
    assert_close(run(phi_q, phi_k, v, shape, case), reference(phi_q, phi_k, v), f"The output{case}")

    def attend(phi_q, phi_k, v):
        return student(phi_q, phi_k, v, *rest)

    assert_gradients_close(attend, reference, phi_q, phi_k, v, case=case)


def check_cost(student: Callable, *rest: int) -> None:
    """Check that student(phi_q, phi_k, v, *rest) has linear cost and no loop over single tokens."""
    size, tokens, costs, flops = 32, 1024, [], []
    for n in (tokens, 2 * tokens):
        phi_q, phi_k, v = features(3, 1, 1, n, size)
        with FlopCounterMode(display=False) as counter, Recorder() as recorder:
            call(student, phi_q, phi_k, v, *rest)
        costs.append(recorder)
        flops.append(counter.get_total_flops())  # counts matrix products only
    if costs[1].operations - costs[0].operations >= tokens:
        raise Wrong("It loops over single tokens in Python: its number of operations grows with N.")
    if costs[1].peak > 2.4 * costs[0].peak:
        raise Wrong("Its memory is quadratic: twice the tokens need far more than twice as much.")
    if costs[0].peak >= tokens * size * (size + 1) * 8:  # bytes
        raise Wrong("It holds F x M numbers for every token at once: sum with a matrix product.")
    if flops[1] > 2.4 * flops[0]:
        raise Wrong(
            "Its work is quadratic: twice the tokens take far more than twice the multiplications."
            " Add each key to the sum of phi_k^T [v 1] only once."
        )
