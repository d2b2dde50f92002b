"""Checks the exercises of notebooks/exercises, and says in a sentence what is wrong.

    from nala_min import checks
    checks.report(1)                # every exercise of lesson 1, a line each
    checks.hint("entropy")          # the first hint; call it again for the next
    checks.check(entropy)           # raises Wrong as long as this function is not right

An exercise is one function below, `check_<name>`, marked @exercise(lesson, *hints). It is given the
student's function, goes from mistakes with a name (shape, sign, mask) to those without (a number
that differs), and asks model.py what is right. Many a mistake is known by the value that it makes:
_agree(got, expected, what, {"What is wrong.": the value that it makes}).
"""

from __future__ import annotations

import inspect
import math
import traceback
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from nala_min import model
from nala_min.measure import Recorder

FOLDER = Path(__file__).resolve().parents[1] / "notebooks" / "exercises"
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


def exercise(lesson: int | str, *hints: str) -> Callable:
    """Make an exercise of the function below; hints go from gentle to almost telling."""

    def register(check: Callable) -> Callable:
        EXERCISES[check.__name__.removeprefix("check_")] = Exercise(lesson, check, hints)
        return check

    return register


# --- What students and teachers call --------------------------------------------------------------


def check(function: Callable) -> None:
    """Check the function that solves the exercise of its own name.

    Raises NotDone, or Wrong with a sentence; ValueError if there is no exercise of that name.
    """
    __tracebackhide__ = True  # pytest shows the sentence, and no code of this file
    exercise = _find(function.__name__)
    quiet = warnings.catch_warnings(action="ignore")  # pytest may be told to raise them
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), quiet:
        torch.manual_seed(0)
        try:
            exercise.check(function)
        except Wrong as error:
            raise error.with_traceback(None) from error.__cause__
        except Exception as error:  # such as from a dictionary where a number was expected
            raise Wrong(f"What it returns cannot be checked: {_describe(error, '')}") from error


def report(lesson: int | str, path: str | Path | None = None) -> None:
    """Print a line for each exercise of a lesson, 1 to 5 or "find_the_bug".

    path: the student's file, which is read anew each time; None is the one in notebooks/exercises.
    Raises ValueError for a lesson without exercises, and nothing for a mistake of the student's.
    """
    names = [name for name, exercise in EXERCISES.items() if exercise.lesson == lesson]
    if not names:
        raise ValueError(f"lesson={lesson!r} has no exercises")
    stem = f"lesson_{lesson}" if isinstance(lesson, int) else lesson
    path = Path(path or FOLDER / f"{stem}.py")
    namespace = {"__name__": path.stem, "__file__": str(path)}
    try:
        source = path.read_text(encoding="utf-8")
        exec(compile(source, path, "exec", dont_inherit=True), namespace)
    except (Exception, SystemExit) as error:
        print(f"{path.name}: wrong - {_describe(error, str(path))}")
        return
    for name in names:
        try:
            _check_name(namespace, name)
            print(f"{name}: right")
        except NotDone as error:
            print(f"{name}: {error}")
        except Wrong as error:
            print(f"{name}: wrong - {error}")


_hints_given: Counter[str] = Counter()


def hint(name: str) -> None:
    """Print the next hint of an exercise. Raises ValueError if there is no such exercise."""
    hints, given = _find(name).hints, _hints_given[name]
    if given == len(hints):
        print(f"There are no more hints for {name}.")
        return
    print(f"Hint {given + 1} of {len(hints)}: {hints[given]}")
    _hints_given[name] += 1


def add_tests(namespace: dict[str, Any]) -> None:
    """Add test_<name> for each exercise of a lesson to the student's file, for pytest to run.

    namespace: globals() of the file. Its lesson is the one that most of its functions belong to.
    Raises ValueError if none belongs to any.
    """
    lessons = Counter(EXERCISES[name].lesson for name in namespace if name in EXERCISES)
    if not lessons:
        raise ValueError("this file has no function that bears the name of an exercise")
    (lesson, _), *_ = lessons.most_common(1)

    def make_test(name: str) -> Callable:
        def test() -> None:
            __tracebackhide__ = True
            _check_name(namespace, name)

        return test

    for name, exercise in EXERCISES.items():
        if exercise.lesson == lesson:
            namespace[f"test_{name}"] = make_test(name)


def _find(name):
    if name not in EXERCISES:
        raise ValueError(f"{name!r} is no exercise: {', '.join(EXERCISES)}")
    return EXERCISES[name]


def _check_name(namespace, name):
    __tracebackhide__ = True
    if getattr(namespace.get(name), "__name__", "") != name:
        raise Wrong(f"There is no function {name} in this file.")
    check(namespace[name])


# --- Tools of the checks --------------------------------------------------------------------------


def _draw(*shape):
    """Standard normal numbers; not contiguous, as heads are after a transposition."""
    return torch.randn(*shape[:-2], shape[-1], shape[-2], dtype=torch.float64).mT


def _features(*shape):
    """Positive numbers, which ReLU returns as they are: phi(x) = x for feature_map="relu"."""
    return _draw(*shape).abs() + 0.1


def _describe(error, file):
    """The error's type and message, and the line of the student's file where it arose."""
    lines = [x.lineno for x in traceback.extract_tb(error.__traceback__) if x.filename == file]
    if isinstance(error, SyntaxError):
        lines = [error.lineno]
    message = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}{f' in line {lines[-1]}' if lines else ''}: {message}"


def _call(student, *arguments):
    """What the student's function returns. Its errors become sentences."""
    before = [x.clone() if isinstance(x, Tensor) else x for x in arguments]
    try:
        result = student(*arguments)
    except (Exception, SystemExit) as error:
        if isinstance(error, NotImplementedError) and not error.args:  # torch's have a message
            raise NotDone("not done yet") from None
        file = getattr(getattr(inspect.unwrap(student), "__code__", None), "co_filename", "")
        sentence = f"It stops with {_describe(error, file)}"
        theirs = error.__traceback__.tb_next  # the frames below this one
        raise Wrong(sentence) from error.with_traceback(theirs)
    for name, x, y in zip(inspect.signature(student).parameters, arguments, before, strict=False):
        if isinstance(x, Tensor) and not torch.equal(x, y):
            raise Wrong(f"It changes its argument {name} in place: the caller still needs it.")
    return result


def _tensor(x, shape, what, case="", why=None):
    """x, if it is a finite float64 tensor of that shape. why(bad), with bad true where it is not
    finite, is a sentence that tells the reason."""
    if x is None:
        raise Wrong(f"{what} is None: is a return missing?")
    if not isinstance(x, Tensor):
        raise Wrong(f"{what} is of type {type(x).__name__}, expected a tensor.")
    if x.shape != shape:
        raise Wrong(f"{what} has shape {tuple(x.shape)}, expected {tuple(shape)}{case}.")
    if x.dtype != torch.float64:
        raise Wrong(f"{what} has dtype {x.dtype}, expected that of the arguments, torch.float64.")
    if (bad := ~x.isfinite()).any():
        kind, reason = "NaN" if x.isnan().any() else "infinite", why(bad) if why else ""
        raise Wrong(f"{what} is {kind} at index {_largest(bad)}{case}. {reason}".rstrip())
    return x


def _run(student, *arguments, shape, case="", why=None):
    """What the student's function returns, if it is a finite float64 tensor of that shape."""
    return _tensor(_call(student, *arguments), shape, "The result", case, why)


def _largest(x):
    """Where x, a tensor, is largest."""
    return tuple(int(i) for i in torch.unravel_index(x.double().argmax(), x.shape))


def _close(x, y, tolerance=TOLERANCE):
    return torch.allclose(x, y, rtol=tolerance, atol=tolerance)


def _agree(got, expected, what, mistakes=None):
    """Raise Wrong if numbers differ: with the sentence of mistakes, {sentence: wrong value}, whose
    value was got; else with what can be said about the numbers."""
    if _close(got, expected):
        return
    for sentence, value in (mistakes or {}).items():
        if _close(got, value):
            raise Wrong(sentence)
    factor = ((got * expected).sum() / expected.square().sum()).item()
    alike = factor and got.ndim and _close(got, factor * expected)
    if alike and math.isclose(factor, -1):
        raise Wrong(f"{what} has the wrong sign everywhere.")
    near = 1e-3 if alike else 1e-4
    at, end = _largest((got - expected).abs()), "."
    where = f" at index {at}" if at else ""
    if (got - expected).abs().max() < near * expected.abs().max():
        end = ", nearly right: is it a difference quotient, is an eps added, is it float32?"
    elif alike:
        raise Wrong(f"{what} is {factor:.4g} times as large as it should be, everywhere.")
    raise Wrong(f"{what}{where} is {got[at]:.10g}, expected {expected[at]:.10g}{end}")


def _gradients(function, *arguments, case=""):
    """{argument: gradient of the squared output} for all tensors, if these are finite."""
    arguments = [x.clone().requires_grad_() if isinstance(x, Tensor) else x for x in arguments]
    named = zip(inspect.signature(function).parameters, arguments, strict=False)
    named = {name: x for name, x in named if isinstance(x, Tensor)}
    out, found = _call(function, *arguments).square().sum(), [None] * len(named)
    if out.requires_grad:
        found = torch.autograd.grad(out, list(named.values()), allow_unused=True)
    found = dict(zip(named, found, strict=True))
    for name, gradient in found.items():
        if gradient is None:
            raise Wrong(f"No gradient reaches {name}: is something detached?")
        if not gradient.isfinite().all():
            raise Wrong(f"The gradient with respect to {name} is NaN or infinite{case}.")
    return found


def _agree_gradients(student, reference, *arguments, case=""):
    """Raise Wrong if the gradients of the two functions differ."""
    wanted = _gradients(reference, *arguments).values()
    found = _gradients(student, *arguments, case=case)
    for (name, got), expected in zip(found.items(), wanted, strict=True):
        _agree(got, expected, f"The output is right, but the gradient with respect to {name}{case}")


def _one_hot(x):
    """Values (B, H, N, N) for which an attention's output is its weights."""
    return torch.eye(x.shape[2], dtype=x.dtype).expand(*x.shape[:2], -1, -1)


def _check_weights(weights, visible, case=""):
    """weights: (B, H, N, N); visible: bool, which broadcasts to that: where weights are positive.
    Elsewhere they are 0, and a row sums to 1."""
    visible = visible.expand_as(weights)
    if (weights < -TOLERANCE).any():
        at = _largest(-weights)
        raise Wrong(
            f"Token {at[2]} gives token {at[3]} a negative weight, {weights[at]:.3g}{case}."
        )
    if (weights[~visible] > TOLERANCE).any():
        at = _largest(weights * ~visible)
        why = "lies in its future" if at[3] > at[2] else "is padding"
        raise Wrong(f"Token {at[2]} gives weight to token {at[3]}, which {why}{case}.")
    if (weights[visible] < TOLERANCE).any():
        at = _largest(visible & (weights < TOLERANCE))
        whom = "itself" if at[2] == at[3] else f"token {at[3]}, which it should see"
        raise Wrong(f"Token {at[2]} gives no weight to {whom}{case}.")
    sums = weights.sum(dim=-1)
    if not _close(sums, torch.ones_like(sums)):
        at = _largest((sums - 1).abs())
        end = ": is an eps added to the denominator?" if abs(sums[at] - 1) < 1e-3 else "."
        raise Wrong(f"The weights of token {at[2]} sum to {sums[at]:.9g}, not to 1{case}{end}")


def _check_apart(run, out, *tensors):
    """In out = run(*tensors), examples of a batch and heads must not see one another."""
    for cut, what in ((slice(1), "Examples of a batch"), ((slice(None), slice(1)), "Heads")):
        alone = run(*(x[cut] for x in tensors), shape=out[cut].shape)
        if not _close(alone, out[cut]):
            raise Wrong(f"{what} are mixed: the first has another output when it is alone.")


def _check_linear(student, causal, *rest, late=None):
    """What (5) demands of student(phi_q, phi_k, v, *rest), in whichever form. late(phi_q, phi_k)
    gives the weights of a state that is read too late."""

    def run(phi_q, phi_k, v, shape, case=""):
        return _run(student, phi_q, phi_k, v, *rest, shape=shape, case=case)

    def reference(phi_q, phi_k, v):
        options = {"causal": causal, "mode": "parallel", "feature_map": "relu"}
        return model.nala_attention(phi_q, phi_k, v, **options)

    phi_q, phi_k = _features(2, 2, 3, 7, 4)
    v, shape = _draw(2, 3, 7, 5), (2, 3, 7, 5)
    case = f" (7 tokens, chunk_size={rest[0]})" if rest else ""
    out = run(phi_q, phi_k, v, shape, case)
    _check_apart(run, out, phi_q, phi_k, v)
    visible = torch.ones(7, 7, dtype=torch.bool)
    weights = run(phi_q, phi_k, _one_hot(v), (2, 3, 7, 7))
    if late and _close(weights, late(phi_q, phi_k)):
        raise Wrong(f"The state already holds its own chunk: read it first, then add{case}.")
    _check_weights(weights, visible.tril() if causal else visible, case)
    _agree(out, reference(phi_q, phi_k, v), f"The output{case}")
    if not _close(run(phi_q / 1e6, phi_k / 1e6, v, shape), out):
        raise Wrong("Features a million times smaller change the output: an eps is not small then.")
    case = " (all keys zero)"
    if run(phi_q, 0 * phi_k, v, shape, case).any():
        raise Wrong(f"The output is not 0{case}.")
    _gradients(student, phi_q, 0 * phi_k, v, *rest, case=case)
    phi_q[:, :, 3], case = 0.0, " (the query of token 3 is zero)"
    _agree(run(phi_q, phi_k, v, shape, case), reference(phi_q, phi_k, v), f"The output{case}")

    def attend(phi_q, phi_k, v):
        return student(phi_q, phi_k, v, *rest)

    _agree_gradients(attend, reference, phi_q, phi_k, v, case=case)


def _check_cost(student, *rest):
    """What student(phi_q, phi_k, v, *rest) costs for N and for 2N tokens."""
    size, tokens, costs, works = 32, 1024, [], []
    for n in (tokens, 2 * tokens):
        phi_q, phi_k, v = _features(3, 1, 1, n, size)
        with FlopCounterMode(display=False) as counter, Recorder() as recorder:
            _call(student, phi_q, phi_k, v, *rest)
        costs.append(recorder)
        works.append(counter.get_total_flops())  # of products of matrices only
    if costs[1].operations - costs[0].operations >= tokens:
        raise Wrong("It loops over single tokens in Python: its operations grow with N.")
    if costs[1].peak > 2.4 * costs[0].peak:
        raise Wrong("Its memory is quadratic: twice the tokens take far more than twice as much.")
    if costs[0].peak >= tokens * size * (size + 1) * 8:  # bytes
        raise Wrong("It holds F x M numbers for every token at once: sum over tokens by a product.")
    if works[1] > 2.4 * works[0]:
        raise Wrong(
            "Its work is quadratic: twice the tokens take far more than twice the multiplications."
            " Sum phi_k^T [v 1] over every key once only."
        )


# --- Lesson 1: softmax and the query norm ---------------------------------------------------------


@exercise(
    1,
    "What does (3) ask of weights that do not sum to 1, and of a weight that is 0?",
    "Divide by the sum over the last axis; then sum -share * log(share) over that axis.",
    "0 * log(0) is NaN in floating point: clamp the share, within the logarithm only, at 1e-300.",
)
def check_entropy(student):
    weights = _features(2, 3, 5)
    shares = weights / weights.sum(dim=-1, keepdim=True)
    got, expected = _run(student, shares, shape=(2, 3)), model.entropy(shares)
    if (got < 0).any():
        raise Wrong("An entropy is negative: Eq. (3) begins with a minus sign.")
    in_bits = expected / math.log(2)
    _agree(got, expected, "The entropy", {"It is in bits: take the natural logarithm.": in_bits})
    if not _close(_run(student, weights, shape=(2, 3)), got):
        raise Wrong("Weights that do not sum to 1 give another entropy: divide by their sum first.")
    for scale in (1e-20, 1e6):
        if not _close(_run(student, scale * weights, shape=(2, 3)), got):
            raise Wrong(f"Weights times {scale:g} have another entropy: no eps, no clamped sum.")
    zeros, case = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 0.0]]).double(), " (weights of 0)"
    got = _run(student, zeros, shape=(2,), case=case)
    _agree(got, model.entropy(zeros), f"The entropy{case}")
    _gradients(student, zeros, case=case)


@exercise(
    1,
    "Scores first: one matrix product gives q_t . k_i for every pair, (B, H, N, N).",
    "Divide by the square root of D. Which axis of the scores runs over keys?",
    "If causal, put -inf into the scores above the diagonal before the softmax, not 0 after it.",
    "exp overflows: mask with -inf first, then subtract each row's largest score, or call softmax.",
)
def check_softmax_weights(student):
    def reference(q, k, causal=False):
        return model.attention_weights(q, k, feature_map="softmax", causal=causal)

    def why(bad):
        if scale > 1:
            return "exp overflows: subtract each row's largest score first, or call softmax."
        if bad[..., 1:, :].any():
            return "inf times 0 is NaN: use masked_fill." if causal else ""
        return "Token 0 sees no key, not even itself: mask strictly above the diagonal."

    for size, tokens in ((3, 7), (5, 4)):
        q, k = _draw(2, 2, 3, tokens, size)
        shape, visible = (2, 3, tokens, tokens), torch.ones(tokens, tokens, dtype=torch.bool)
        root, by_n = math.sqrt(size), reference(q * math.sqrt(size / tokens), k)
        mistakes = {
            "The scores are not divided by the square root of D.": reference(q * root, k),
            "The scores are divided by D, not by its square root.": reference(q / root, k),
            "The scores are divided by the square root of N, not of D.": by_n,
            "Queries and keys have changed places.": reference(k, q),
        }
        for causal in (False, True):
            for scale, large in ((1, ""), (1e4, ", large scores"), (1e10, ", huge scores")):
                case, seen = f" (causal={causal}{large})", visible.tril() if causal else visible
                weights = _run(student, scale * q, k, causal, shape=shape, case=case, why=why)
                columns = weights.sum(dim=-2)
                if scale == 1 and _close(columns, torch.ones_like(columns)):
                    raise Wrong("The weights of a key sum to 1: take the softmax over the keys.")
                if scale == 1:  # otherwise a visible weight may be 0
                    _check_weights(weights, seen, case)
                elif (weights * ~seen).any():
                    raise Wrong(f"A score falls below the mask{case}: hide the future with -inf.")
                expected = reference(scale * q, k, causal)
                _agree(weights, expected, f"The weight (D={size}){case}", mistakes)


@exercise(
    1,
    "Eq. (4) is the closed form: what are p, the mean of s under p, and the variance under p?",
    "p = softmax(c * scores). Var_p(s) weighs each (s_i - mean)^2 by p_i, and so does the mean.",
)
def check_entropy_slope(student):
    def slope(p, mean):
        return -c * (p * (s - mean).square()).sum(dim=-1)

    s = _draw(2, 3, 5)
    for c in (0.7, 1.6):
        variable = torch.full((2, 3, 1), c, dtype=torch.float64, requires_grad=True)
        p = torch.softmax(variable * s, dim=-1)
        expected = torch.autograd.grad(model.entropy(p).sum(), variable)[0][..., 0]
        p, other = p.detach(), torch.softmax(s, dim=-1)
        mean = (other * s).sum(dim=-1, keepdim=True)
        mistakes = {
            "The factor c is missing.": expected / c,
            "The factor c comes in once too often.": c * expected,
            "It takes the variance of c * scores, not of the scores.": c**2 * expected,
            "It takes the standard deviation, not the variance.": -c * (-expected / c).sqrt(),
            "The mean is not subtracted from the scores before they are squared.": slope(p, 0),
            "The mean of the scores is not weighted by p.": slope(p, s.mean(dim=-1, keepdim=True)),
            "The variance is not weighted by p.": -c * s.var(dim=-1, correction=0),
            "The variance is not weighted by p, but divided by N - 1.": -c * s.var(dim=-1),
            "c is missing in p = softmax(c * scores).": slope(other, mean),
        }
        _agree(_run(student, s, c, shape=(2, 3)), expected, f"The slope (c={c})", mistakes)


# --- Lesson 2: the missing norm -------------------------------------------------------------------


@exercise(
    2,
    "In (5) the query does not depend on i: what may be summed over the keys before it comes in?",
    "Keys meet values first: phi_k^T v is (B, H, F, M). The normaliser needs the sum of phi_k.",
    "A row without mass: replace the 0 in the denominator before you divide, not after.",
)
def check_linear_attention(student):
    _check_linear(student, False)
    _check_cost(student)


@exercise(
    2,
    "Call the attention twice. What differs between the two calls, and what must not?",
    "torch.linalg.vector_norm of a whole tensor is one number; divide by that of the first output.",
)
def check_norm_microscope(student):
    def attention(q, k, v):
        calls.append((q, k, v))
        return inner(q, k, v)

    (q, k), v = _draw(2, 2, 3, 5, 4), _draw(2, 3, 5, 4)
    for inner, ratio in ((model.softmax_attention, 3.0), (model.nala_attention, 0.5)):
        calls, case = [], f" (factor={ratio:g}, {inner.__name__})"
        got = _call(student, attention, q, k, v, ratio)
        if not isinstance(got, (int, float)):
            got = _tensor(got, (), "The result")
        for i, (what, x) in enumerate((("keys", k), ("values", v)), start=1):
            if not all(_close(call[i], x) for call in calls):
                raise Wrong(f"The {what} are changed, too: rescale the queries only.")
        for factor in (1.0, ratio):
            if not any(_close(call[0], factor * q) for call in calls):
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
            "It is the mean over tokens: take norms of the whole output.": ratios.mean(),
            "It sums absolute values: take the root of the sum of squares.": sums[0] / sums[1],
        }
        got = torch.as_tensor(got, dtype=torch.float64)
        _agree(got, expected, f"The relative change{case}", mistakes)


@exercise(
    2,
    "When does relu(q_j) * relu(k_j) vanish although q_j * k_j is positive?",
    "relu(-q) * relu(-k) is |q_j k_j| where both are negative, and 0 elsewhere.",
)
def check_dropped_share(student):
    q, k = _draw(2, 3, 5, 6)
    halves = model.sign_split(q.abs(), q) * model.sign_split(k.abs(), k)
    positive, negative = halves.unflatten(-1, (2, 6)).sum(dim=-1).unbind(dim=-1)  # (3, 5), (3, 5)
    total, both = (q * k).abs().sum(dim=-1), (q < 0) & (k < 0)
    agreeing = positive + negative
    mistakes = {
        "It is the share that ReLU keeps: both channels positive.": positive / total,
        "It counts channels of opposite signs, too: they do not agree.": 1 - positive / total,
        "Divide by the sum of all |q_j k_j|, not of those that agree.": negative / agreeing,
        "It counts channels: weigh each by |q_j k_j|.": both.double().mean(dim=-1),
        "It is not divided by the sum of all |q_j k_j|.": negative,
        "It divides by a sum without absolute values.": negative / (q * k).sum(dim=-1),
    }
    _agree(_run(student, q, k, shape=(3, 5)), negative / total, "The share", mistakes)
    if not _close(_run(student, q / 1e6, k / 1e6, shape=(3, 5)), negative / total):
        raise Wrong("Queries and keys a million times smaller change the share: no eps, no clamp.")
    for case, pair in ((" (zero query)", (0 * q, k)), (" (zero key)", (q, 0 * k))):
        got = _run(student, *pair, shape=(3, 5), case=case)
        _agree(got, 0 * got, f"The share{case}")


# --- Lesson 3: putting the norm back --------------------------------------------------------------


@exercise(
    3,
    "The direction is q / |q|, but (12) divides by its largest channel: what becomes of |q|?",
    "The exponent is one number a query, (..., 1): keepdim=True when you take the norm.",
    "A zero query is 0/0: replace its largest channel by 1. torch.pow does the rest.",
)
def check_query_magnitude(student):
    def run(q, lam=3.0, tau=0.5, case="", why=""):
        return _run(student, q, lam, tau, shape=q.shape, case=case, why=lambda _: why)

    def reference(q, lam=3.0, tau=0.5):
        norm, direction = model.decompose(q)
        return model.query_magnitude(direction, model.query_power(norm, lam, tau))

    def exact(q, lam, tau):  # with the gradient of the largest channel, which model.py leaves out
        norm, size = torch.linalg.vector_norm(q, dim=-1, keepdim=True), q.abs()
        power = model.query_power(norm, lam, tau)
        return (size / size.amax(dim=-1, keepdim=True)).pow(power)

    q = _draw(2, 5, 4)
    why = "A negative number to a broken power is NaN: take the absolute value."
    got, shorter = run(q, why=why), run(q / 4)
    if (got < 0).any():
        raise Wrong("A magnitude is negative: take the absolute value of the direction.")
    largest, of_shorter = (x.amax(dim=-1, keepdim=True) for x in (got, shorter))
    if _close(shorter / of_shorter, got / largest, 1e-3):
        raise Wrong("A query of a quarter of the norm has the same magnitude: the norm cancels.")
    if not _close(largest, torch.ones_like(largest)):
        raise Wrong("The largest channel of every query must be 1: Eq. (12), for each by itself.")
    if not _close(run(q[:1]), got[:1]):
        raise Wrong("Queries are mixed: each has its own norm and its own largest channel.")
    norm, direction = model.decompose(q)
    powers = {
        "The tanh is missing in the power.": 3 * (0.5 + norm),
        "tau is outside of the brackets: the power is lam * (tau + tanh).": 0.5 + 3 * norm.tanh(),
        "tau is missing in the power.": 3 * norm.tanh(),
        "lam is missing in the power.": 0.5 + norm.tanh(),
    }
    mistakes = {text: model.query_magnitude(direction, power) for text, power in powers.items()}
    _agree(got, reference(q), "The magnitude", mistakes)
    for name, value in (("lam", 2.0), ("tau", 0.8)):
        other = {name: value}
        fixed = {f"{name} has a fixed value: use the argument.": got}
        _agree(run(q, **other), reference(q, **other), f"The magnitude ({name}={value})", fixed)
    functions, rest = (student, reference, exact), got < 1 - TOLERANCE
    found, published, wanted = (_gradients(f, q, 3.0, 0.5)["q"] for f in functions)
    if not _close(found, published):  # the largest channel's depends on whether it is detached
        what = "The magnitude is right, but the gradient (is the norm detached?)"
        _agree(found * rest, wanted * rest, what)
    _agree(run(q * 1e-9), reference(q * 1e-9), "The magnitude of a query of norm 1e-9")
    many, why = 1 + _draw(5, 16) / 10, "Divide by the largest channel before the power, Eq. (12)."
    largest = run(many, 500.0, case=" (lam=500)", why=why).amax(dim=-1)
    if not _close(largest, torch.ones_like(largest)):
        raise Wrong(f"The largest channel is not 1 (lam=500): the power underflows. {why}")
    q, case = q / 1e3, " (a query or a channel is zero)"
    q[0, 0], q[0, 1, 2] = 0.0, 0.0
    _agree(run(q, case=case), reference(q), f"The magnitude{case}")
    _gradients(student, q, 3.0, 0.5, case=case)


@exercise(
    3,
    "What is the derivative of tanh? And what that of tau?",
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
            "The factor lam is missing: in (7) it multiplies tanh, too.": expected / lam,
            "The tanh is not squared.": lam * (1 - tanh),
            "It grows with the norm: subtract the square of tanh from 1.": lam * (1 + tanh**2),
            "It is lam * tanh^2: subtract that from lam.": lam * tanh**2,
        }
        got = _run(student, norm, lam, shape=(50, 1), case=" (norms from 0 on)")
        _agree(got, expected, f"The slope (lam={lam})", mistakes)


@exercise(
    3,
    "A growing norm lets the direction's largest channel win. What if all keys agree in that one?",
    "Let all keys be the same in one channel, and one key stick out in each of the others.",
    "The direction needs more of that one channel than of the others, but some of each.",
)
def check_counterexample(student):
    result = _call(student)
    if not isinstance(result, (tuple, list)) or len(result) != 2:
        raise Wrong("It must return two tensors: the direction (D,) and the keys (N, D).")
    if not all(isinstance(x, Tensor) and x.is_floating_point() for x in result):
        raise Wrong("Direction and keys must be tensors of floating-point numbers.")
    direction, keys = (x.detach().double() for x in result)
    if direction.ndim == 2 and keys.ndim == 1:
        raise Wrong("The two are in the other order: first the direction, then the keys.")
    if direction.ndim != 1 or keys.ndim != 2 or keys.shape[1] != len(direction):
        shapes = f"{tuple(direction.shape)} and {tuple(keys.shape)}"
        raise Wrong(f"The shapes are {shapes}, expected (D,) and (N, D).")
    if not direction.isfinite().all() or not keys.isfinite().all():
        raise Wrong("Direction and keys must be finite.")
    if abs(direction.norm() - 1) > 1e-6:
        raise Wrong(f"The direction has norm {direction.norm():.4g}, expected 1.")
    if len(direction) < 3:
        raise Wrong("Two channels are the notebook's example: find one with three or more.")
    if (sizes := direction.abs()).min() < 0.1 - 1e-6:
        at = sizes.argmin()
        end = "it must be at least 0.1 or at most -0.1, to count."
        raise Wrong(f"Channel {at} of the direction is {direction[at]:.3g}: {end}")
    if not keys.any(dim=-1).all():
        raise Wrong("A key is zero: it has no direction, and no weight.")
    if not (used := keys.any(dim=0)).all():
        raise Wrong(f"Channel {_largest(~used)[0]} is 0 in all keys: it does not count.")
    if len(keys) < 2:
        raise Wrong("With fewer than two keys the entropy is 0, whatever the norm is.")
    q = torch.stack([0.1 * direction, 3 * direction])[:, None, None].expand(-1, -1, len(keys), -1)
    weights = model.attention_weights(q, keys.expand_as(q))[:, 0, 0]  # (2, N)
    low, high = model.entropy(weights).tolist()
    if high < low + 0.01:
        verb = "falls" if high < low - 0.01 else "hardly moves"
        raise Wrong(f"The entropy {verb}: {low:.3f} for norm 0.1, {high:.3f} for norm 3.")


# --- Lesson 4: cosines for non-negativity ---------------------------------------------------------


def _name_map(student, mistakes, *alpha):
    """Raise Wrong with the sentence of mistakes, {sentence: wrong map}, whose map student's is, but
    for the order of the features or a turn of all: norms and inner products tell."""
    magnitude, direction = _features(2, 6, 4), model.decompose(_draw(2, 6, 4))[1]
    pairs = list(zip(magnitude, direction, strict=True))
    phi = torch.cat([_run(student, *pair, *alpha, shape=(6, 8)) for pair in pairs])
    for sentence, wrong in mistakes.items():
        other = torch.cat([wrong(*pair) for pair in pairs])
        if _close(phi @ phi.mT, other @ other.mT):
            raise Wrong(sentence)


def _check_map(student, reference, *alpha):
    """What both maps must do; of their features only norms and inner products count."""
    one, case = torch.ones(1, 1).double(), f" (alpha={alpha[0]:g})" if alpha else ""
    magnitude, direction = _features(2, 6, 4), model.decompose(_draw(2, 6, 4))[1]
    pairs = zip(magnitude, direction, strict=True)  # two calls: query and key know no other
    phi_q, phi_k = (_run(student, *pair, *alpha, shape=(6, 8)) for pair in pairs)
    if not _close(torch.stack([phi_q, phi_k]).norm(dim=-1), magnitude.norm(dim=-1)):
        raise Wrong(f"The norm of the features is not that of the magnitude{case}.")
    plus, minus = (_run(student, one, sign * one, *alpha, shape=(1, 2)) for sign in (1, -1))
    product = (plus * minus).sum().item()
    if product < -TOLERANCE:
        raise Wrong(f"Opposite signs have the negative product {product:.3g}{case}.")
    if product > 0.01:
        raise Wrong(f"Opposite signs have the product {product:.3g}, expected almost 0{case}.")
    right_q, right_k = reference(magnitude, direction, *alpha)
    _agree(phi_q @ phi_k.mT, right_q @ right_k.mT, f"The inner product of query and key{case}")


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
    few, many = (_run(student, one, one / 9, alpha, shape=(1, 2)) for alpha in (4.0, 20.0))
    mistakes = {
        "It is the sign split (11), not (9): there the size of a channel counts.": model.sign_split,
        "The angle runs to 45 radians: 45 degrees are pi/4.": in_radians,
        "The magnitude is in the angle, too: that is of the direction alone.": (
            lambda a, d: model.cosine_map(a, a * d)
        ),
    }
    _name_map(student, mistakes, 20.0)
    if _close(few, many):
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
        "The magnitude is missing: it holds 1 for a channel, not its magnitude.": (
            lambda a, d: halves(a / a, d > 0, d < 0)
        ),
        "It splits the direction: split the magnitude, by the direction's sign.": (
            lambda a, d: halves(a / a, d.relu(), (-d).relu())
        ),
        "The size of the direction comes in, too: only its sign counts.": (
            lambda a, d: halves(a, d.relu(), (-d).relu())
        ),
        "It is the cosine map (9), not (11): no angle, only signs.": model.cosine_map,
    }
    _name_map(student, mistakes)
    _check_map(student, model.sign_split)
    one = torch.ones(1, 1).double()
    if _run(student, one, 0 * one, shape=(1, 2)).any():
        raise Wrong("A channel of direction 0 has no sign: it belongs to neither half.")


# --- Lesson 5: from quadratic to linear -----------------------------------------------------------


@exercise(
    5,
    "Which comes first in (14): is the new token added to the state, or is the state read?",
    "[v 1] has M + 1 channels; the outer product of phi_k with it is what the state grows by.",
    "One product phi_q S gives M + 1 numbers: the last is the normaliser of the others.",
)
def check_recurrent_step(student):
    def reference(state, *token):
        options = {"causal": True, "feature_map": "relu", "state": state, "return_state": True}
        out, state = model.nala_attention(*(x[:, :, None] for x in token), **options)
        return out[:, :, 0], state

    def run(state, *token, case):
        result = _call(student, state, *token)
        if not isinstance(result, (tuple, list)) or len(result) != 2:
            raise Wrong("It must return two tensors, the output and the new state.")
        if isinstance(result[0], Tensor) and result[0].shape == state.shape:
            raise Wrong("The two are in the other order: first the output, then the state.")
        out = _tensor(result[0], (2, 3, 6), "The output", case)
        return out, _tensor(result[1], (2, 3, 5, 7), "The state", case)

    (phi_q, phi_k), v = _features(2, 2, 3, 4, 5), _draw(2, 3, 4, 6)
    state = torch.zeros(2, 3, 5, 7).double()
    for t in range(4):
        q, k, value = (x[:, :, t] for x in (phi_q, phi_k, v))
        case = f" (token {t}, which sees itself)"
        out, after = run(state, q, k, value, case=case)
        expected_out, expected = reference(state, q, k, value)
        stale, counted = (torch.cat([expected[..., :-1], state[..., -1:] + x], -1) for x in (0, 1))
        mistakes = {
            "The state forgets the earlier tokens.": expected - state,
            "The new token is not added to the state.": state,
            "The normaliser, the last column of the state, does not grow.": stale,
            "The normaliser is in the first column of the state.": expected.roll(1, dims=-1),
            "The normaliser counts tokens: it grows by phi_k, not by 1.": counted,
        }
        _agree(after, expected, f"The state{case}", mistakes)
        unseen, _ = reference(state, q, 0 * k, value)
        numerator = torch.einsum("bhf,bhfm->bhm", q, expected[..., :-1])
        mistakes = {
            "The token does not see itself: add it before the state is read.": unseen,
            "The output is not divided by the normaliser.": numerator,
        }
        _agree(out, expected_out, f"The output{case}", mistakes)
        state = expected
    q, case = q.clone(), " (a query is zero)"
    q[0, 0] = 0.0
    out, _ = run(state, q, k, value, case=case)
    _agree(out, reference(state, q, k, value)[0], f"The output{case}")

    def joined(step):
        def function(state, phi_q, phi_k, v):
            return torch.cat([x.flatten() for x in step(state, phi_q, phi_k, v)])

        return function

    _agree_gradients(joined(student), joined(reference), state, q, k, value, case=case)
    q = phi_q[:, :, -1]
    out, _ = run(0 * state, q / 1e6, k / 1e6, value, case=" (small features)")
    if not _close(out, value):
        raise Wrong("Features a million times smaller change the output: an eps is not small then.")
    out, _ = run(0 * state, q, 0 * k, value, case=" (all keys zero)")
    _agree(out, 0 * out, "The output (all keys zero)")


@exercise(
    5,
    "A chunk needs the sum of phi_k^T [v 1] over the chunks before it, and a tril of its own.",
    "Carry that sum from chunk to chunk: read it (inter), then add the chunk to it.",
    "The last chunk may be shorter, which slicing does by itself. Divide once, at the end.",
)
def check_chunked_attention(student):
    for chunk_size in (3, 1, 7, 9):

        def late(phi_q, phi_k, chunk_size=chunk_size):
            chunk = torch.arange(7) // chunk_size
            before, own = chunk[:, None] >= chunk, (chunk[:, None] == chunk).tril()
            weights = phi_q @ phi_k.mT * (before.double() + own)
            return weights / weights.sum(dim=-1, keepdim=True)

        _check_linear(student, True, chunk_size, late=late)
    _check_cost(student, 64)


# --- Find the bug ---------------------------------------------------------------------------------

DISEASES = {
    "padding in the normaliser": "A masked key adds no value, but still counts in what divides.",
    "heads share a normaliser": "The sum that divides runs over the heads as well.",
    "eps too large": "A constant in the denominator swallows the weights of small keys.",
    "own token unseen": "The causal mask removes the diagonal, too.",
    "no mask within a chunk": "Within its chunk a token sees those after it.",
    "state read too late": "A chunk reads the state to which it has already been added.",
    "power as a factor": "The power multiplies the channels, and cancels in the division.",
    "layer norm on the query": "The norm of the query is taken away before it is measured.",
    "angles too wide": "Angles differ by more than pi/2, where the cosine is negative.",
}
# zlib.crc32 of "<function>: <disease>", so that this file does not tell the answers.
ANSWERS = (1037124925, 2408625119, 2049225717)


def _check_patient(student):
    """The symptom of a broken attention; if it has none, whether its name in DIAGNOSES is right."""
    name, remark = student.__name__, ""
    namespace = getattr(inspect.unwrap(student), "__globals__", {})
    diagnosis = namespace.get("DIAGNOSES", {}).get(name)
    if not diagnosis:
        remark = f" DIAGNOSES has no name for the bug in {name} yet: print(checks.DISEASES)."
    elif diagnosis not in DISEASES:
        remark = f" The diagnosis {diagnosis!r} is not in checks.DISEASES: {', '.join(DISEASES)}."
    try:
        _check_symptoms(student)
    except Wrong as symptom:  # whether the diagnosis is right is told to those who mend it
        raise Wrong(f"{symptom}{remark}") from symptom.__cause__
    if zlib.crc32(f"{name}: {diagnosis}".encode()) not in ANSWERS:
        remark = remark or f" The diagnosis {diagnosis!r} is wrong."
        raise Wrong(f"It is mended, but its bug is not named.{remark}")


def _check_symptoms(student):
    """What a causal norm-aware attention with a mask for padding must do."""

    def run(q, k, v, shape, mask=None, case=""):
        mask = all_real[: len(q)] if mask is None else mask
        return _run(student, q, k, v, mask, shape=shape, case=case)

    def reference(q, k, mask=None):
        return model.attention_weights(q, k, causal=True, key_mask=mask)

    (q, k), v, shape = _draw(2, 2, 3, 11, 4), _draw(2, 3, 11, 5), (2, 3, 11, 5)
    one_hot, square = _one_hot(q), (2, 3, 11, 11)
    all_real, causal = torch.ones(2, 11).bool(), torch.ones(11, 11).bool().tril()
    some_real = all_real.clone()
    some_real[0, [2, -2, -1]] = some_real[1, [1, 5, -1]] = False
    out = run(q, k, v, shape)
    _check_apart(run, out, q, k, v)
    weights = run(q, k, one_hot, square)
    _check_weights(weights, causal)
    case = " (some keys are padding)"
    padded = run(q, k, one_hot, square, some_real, case)
    _check_weights(padded, causal & some_real[:, None, None], case)
    if _close(run(q / 8, k, one_hot, square), weights, 1e-3):
        raise Wrong("A query of an eighth of the norm has the same weights: the norm cancels.")
    _check_weights(run(q, k / 1e3, one_hot, square), causal, " (small keys)")
    _agree(weights, reference(q, k), "The weight")
    _agree(padded, reference(q, k, some_real), f"The weight{case}")
    _agree(out, reference(q, k) @ v, "The output")
    case = " (queries of norm 1e-4)"
    _agree(run(q / 1e4, k, one_hot, square), reference(q / 1e4, k), f"The weight{case}")
    out = run(0 * q, k, v, shape, case=" (zero queries)")
    _agree(out, 0 * out, "The output (zero queries)")

    def attend(q, k, v):
        return student(q, k, v, some_real)

    _gradients(attend, q, k, v)


for name, *hints in (
    (
        "attention_a",
        "Which tokens have the symptom, and which do not? What do they see?",
        "Follow key_mask to the end: where do the masked keys still count?",
    ),
    (
        "attention_b",
        "Which tokens have the symptom? Are the two that it names in one chunk?",
        "Write down which chunks states[:, :, c] is the sum of, for c = 0. Which should it be?",
    ),
    (
        "attention_c",
        "What does (5) make of a positive factor that all features of a query share?",
        "Compare the magnitude with Eq. (7): what is the base there, and what the exponent?",
    ),
):
    EXERCISES[name] = Exercise("find_the_bug", _check_patient, tuple(hints))
