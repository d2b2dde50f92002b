"""What the checkers share: they call a function, compare its result and say what is wrong."""

import inspect
import math
import traceback
from collections.abc import Callable

import torch
from torch import Tensor

TOLERANCE = 1e-9  # relative and absolute; all numbers that are compared are float64


class Wrong(AssertionError):
    """What is wrong with a student's function, in one sentence."""


class NotDone(Wrong):
    """The function still raises NotImplementedError."""


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


def call(student: Callable, *arguments: object) -> object:
    """Call the student's function and return its result. Its errors become sentences."""
    before = [x.clone() if isinstance(x, Tensor) else x for x in arguments]
    try:
        result = student(*arguments)
    except (Exception, SystemExit) as error:
        if isinstance(error, NotImplementedError) and not error.args:  # PyTorch's have a message
            raise NotDone("not done yet") from None
        file = getattr(getattr(inspect.unwrap(student), "__code__", None), "co_filename", "")
        raise Wrong(f"It raises {describe(error, file)}") from error
    for name, x, y in zip(_names(student, arguments), arguments, before, strict=True):
        if isinstance(x, Tensor) and not torch.equal(x, y):
            raise Wrong(f"It changes {name} in place: the caller still needs it.")
    return result


def _names(function, arguments):
    """The names of the arguments, or their numbers: a wrapper may take *args or be compiled."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    names = code.co_varnames[: code.co_argcount] if code else ()
    if len(names) < len(arguments):
        names = [f"argument {i}" for i in range(1, len(arguments) + 1)]
    return names[: len(arguments)]


def valid_tensor(x: object, shape: tuple[int, ...], what: str, case="", why=None) -> Tensor:
    """Return x if it is a finite float64 tensor of that shape. why(~x.isfinite()): the reason."""
    if not isinstance(x, Tensor):
        end = ": is a return missing?" if x is None else "."
        raise Wrong(f"{what} has type {type(x).__name__}, expected a tensor{end}")
    if x.shape != shape:
        raise Wrong(f"{what} has shape {tuple(x.shape)}, expected {tuple(shape)}{case}.")
    if x.dtype != torch.float64:
        raise Wrong(f"{what} has dtype {x.dtype}, expected the arguments' dtype, torch.float64.")
    if (bad := ~x.isfinite()).any():
        kind, reason = "NaN" if x.isnan().any() else "infinite", why(bad) if why else ""
        raise Wrong(f"{what} is {kind} at index {where_largest(bad)}{case}. {reason}".rstrip())
    return x


def output(student: Callable, *arguments, shape: tuple[int, ...], case="", why=None) -> Tensor:
    """The student's result, if it is a finite float64 tensor of that shape. In float32, which the
    lessons use, it must be finite as well."""
    out = valid_tensor(call(student, *arguments), shape, "The result", case, why)
    is_double = [isinstance(x, Tensor) and x.dtype == torch.float64 for x in arguments]
    single = [x.float() if double else x for x, double in zip(arguments, is_double, strict=True)]
    if not call(student, *single).isfinite().all():
        end = "a constant such as 1e-300 is 0 there, torch.finfo(x.dtype).tiny is not."
        raise Wrong(f"In float32, the result is not finite{case}: {end}")
    return out


def where_largest(x: Tensor) -> tuple[int, ...]:
    """Index of the largest entry of x."""
    return tuple(int(i) for i in torch.unravel_index(x.double().argmax(), x.shape))


def close(x: Tensor, y: Tensor, tolerance: float = TOLERANCE) -> bool:
    return torch.allclose(x, y, rtol=tolerance, atol=tolerance)


def assert_close(got: Tensor, expected: Tensor, what: str, mistakes=None) -> None:
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


def gradients(function: Callable, *arguments: object, case: str = "") -> dict[str, Tensor]:
    """{argument: gradient of the sum of squared outputs} for all tensors, if all are finite."""
    arguments = [x.clone().requires_grad_() if isinstance(x, Tensor) else x for x in arguments]
    named = zip(_names(function, arguments), arguments, strict=True)
    named = {name: x for name, x in named if isinstance(x, Tensor)}
    out = call(function, *arguments)
    total = sum(x.square().sum() for x in (out if isinstance(out, (tuple, list)) else [out]))
    found = [None] * len(named)
    if total.requires_grad:
        found = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    for name, gradient in zip(named, found, strict=True):
        if gradient is None:
            raise Wrong(f"No gradient reaches {name}: is something detached?")
        if not gradient.isfinite().all():
            raise Wrong(f"The gradient with respect to {name} is NaN or infinite{case}.")
    return dict(zip(named, found, strict=True))


def assert_gradients_close(student: Callable, reference: Callable, *arguments, case="") -> None:
    """Raise Wrong if the gradients of the two functions differ."""
    expected = gradients(reference, *arguments).values()
    found = gradients(student, *arguments, case=case)
    for (name, got), right in zip(found.items(), expected, strict=True):
        what = f"The output is right, but the gradient with respect to {name}{case}"
        assert_close(got, right, what)


def check_weights(weights: Tensor, visible: Tensor, case: str = "") -> None:
    """Weights (B, H, N, N) must be positive where visible, 0 elsewhere, and each row must sum to 1.
    visible: bool, broadcasts to the shape of weights."""
    visible = visible.expand_as(weights)
    if (weights < -TOLERANCE).any():
        at = where_largest(-weights)
        raise Wrong(f"Token {at[2]} gives token {at[3]} negative weight, {weights[at]:.3g}{case}.")
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


def check_independence(student: Callable, out: Tensor, *tensors: Tensor) -> None:
    """In out = student(*tensors), neither examples of a batch nor heads may see one another."""
    for cut, what in ((slice(1), "Examples of a batch"), ((slice(None), slice(1)), "Heads")):
        alone = output(student, *(x[cut] for x in tensors), shape=out[cut].shape)
        if not close(alone, out[cut]):
            raise Wrong(f"{what} are mixed: the first gives a different output on its own.")
