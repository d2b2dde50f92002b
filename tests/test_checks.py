"""The exercises in notebooks/exercises and their checkers: every stub is refused, every solution is
accepted, and every plausible mistake is refused with a message that names it."""

import math
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from mutants import load_model

import nala_min.model as model
from nala_min.course import checks, marking

LESSONS = (*range(1, 8), "find_the_bug")
SOLUTIONS = checks.FOLDER / "solutions"
solved = pytest.mark.skipif(not SOLUTIONS.exists(), reason="no solutions: a teacher removed them")


def path_of(lesson, folder=checks.FOLDER):
    return folder / (f"{lesson}.py" if lesson == "find_the_bug" else f"lesson_{lesson}.py")


def load(path, source=None):
    """The namespace of an exercise file, or of its changed source."""
    return load_model(source or path.read_text(encoding="utf-8"), str(path)).__dict__


def solution(name, old="", new=""):
    """The solution of one exercise, with old replaced by new. old must occur exactly once: in the
    function or, failing that, in the file."""
    path = path_of(checks.EXERCISES[name].lesson, SOLUTIONS)
    source = path.read_text(encoding="utf-8")
    body = source[source.index(f"def {name}(") :].split("\n\n\n")[0]
    part = body if old in body else source
    assert not old or part.count(old) == 1, f"{part.count(old)} occurrences of {old!r} in {name}"
    return load(path, source.replace(part, part.replace(old, new) if old else part))[name]


def message_of(function):
    """The check's message; None if the function is right."""
    try:
        checks.check(function)
    except checks.Wrong as error:
        return str(error)


# --- Stubs, specifications, solutions -------------------------------------------------------------


@pytest.mark.parametrize("name", checks.EXERCISES)
def test_stub_is_refused(name):
    lesson = checks.EXERCISES[name].lesson
    function = load(path_of(lesson))[name]
    if lesson == "find_the_bug":
        assert "DIAGNOSES has no name" in message_of(function)
    else:
        with pytest.raises(checks.NotDone, match=r"^not done yet$"):
            checks.check(function)


@solved
@pytest.mark.parametrize("name", checks.EXERCISES)
def test_solution_is_accepted(name):
    assert message_of(solution(name)) is None


@solved
@pytest.mark.parametrize("lesson", range(1, 8))
def test_solution_differs_from_the_stub_in_bodies_only(lesson):
    """Names, docstrings and specifications are the same in both files."""
    stubs = path_of(lesson).read_text(encoding="utf-8").splitlines()
    lines = iter(path_of(lesson, SOLUTIONS).read_text(encoding="utf-8").splitlines())
    assert all(line in lines for line in stubs if line.strip() != "raise NotImplementedError")


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def same(x, expected):
    torch.testing.assert_close(
        torch.as_tensor(x, dtype=torch.float64), expected, rtol=1e-10, atol=1e-10
    )


def test_loops_of_lesson_1():
    file = load(path_of(1))
    weights = torch.tensor([0.3, 0.0, 1.5, 0.2], dtype=torch.float64)
    same(file["entropy_by_loops"](weights.tolist()), model.entropy(weights))
    q, k = draw(2, 1, 1, 5, 3)
    rows = model.attention_weights(q, k, feature_map="softmax", causal=True)[0, 0]
    for t in range(5):
        loops = file["softmax_weights_by_loops"](q[0, 0, t].tolist(), k[0, 0, : t + 1].tolist())
        same(loops, rows[t, : t + 1])
    c, scores = torch.tensor(0.7, dtype=torch.float64, requires_grad=True), draw(6)
    model.entropy(torch.softmax(c * scores, dim=-1)).backward()
    assert math.isclose(
        file["entropy_slope_by_loops"](scores.tolist(), 0.7), c.grad.item(), rel_tol=1e-6
    )


def test_loops_of_lesson_2():
    file = load(path_of(2))
    phi_q, phi_k = draw(2, 1, 1, 4, 3).abs()
    v = draw(1, 1, 4, 2)
    phi_q[0, 0, 1] = 0.0
    out = model.nala_attention(phi_q, phi_k, v, feature_map="relu")[0, 0]
    keys, values = phi_k[0, 0].tolist(), v[0, 0].tolist()
    for t in range(4):
        loops = file["linear_attention_by_loops"](phi_q[0, 0, t].tolist(), keys, values)
        same(loops, out[t])
    x, y = draw(2, 7)
    loops = file["relative_change_by_loops"](x.tolist(), y.tolist())
    same(loops, (y - x).norm() / x.norm())
    dropped = (model.sign_split(x.abs(), x) * model.sign_split(y.abs(), y))[7:]
    loops = file["dropped_share_by_loops"](x.tolist(), y.tolist())
    same(loops, dropped.sum() / (x * y).abs().sum())
    assert file["dropped_share_by_loops"]([0.0], [1.0]) == 0


def test_loops_of_lesson_3():
    file = load(path_of(3))
    for q in (draw(4), draw(4) / 100, 0 * draw(4)):
        norm, direction = model.decompose(q)
        expected = model.query_magnitude(direction, model.query_power(norm, 2.0, 0.7))
        same(file["query_magnitude_by_loops"](q.tolist(), 2.0, 0.7), expected)
    norm = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    model.query_power(norm, 2.0).backward()
    loops = file["power_slope_by_loops"](0.8, 2.0)
    assert math.isclose(loops, norm.grad.item(), rel_tol=1e-6)
    direction, keys = model.decompose(draw(3))[1], draw(5, 3)
    q = (1.3 * direction).expand(1, 1, 5, 3)
    weights = model.attention_weights(q, keys[None, None])[0, 0, 0]
    loops = file["nala_entropy_by_loops"](1.3, direction.tolist(), keys.tolist())
    same(loops, model.entropy(weights))


def test_loops_of_lesson_4():
    file = load(path_of(4))
    magnitudes, directions = draw(2, 5).abs(), draw(2, 5)
    rows = [x[i].tolist() for i in (0, 1) for x in (magnitudes, directions)]
    for name, features, alpha in (
        ("cosine", model.cosine_map, [3.0]),
        ("split", model.sign_split, []),
    ):
        expected = torch.linalg.vecdot(*features(magnitudes, directions, *alpha))
        same(file[f"{name}_product_by_loops"](*rows, *alpha), expected)


def test_loops_of_lesson_5():
    file = load(path_of(5))
    phi_q, phi_k = draw(2, 1, 1, 6, 3).abs()
    v = draw(1, 1, 6, 2)
    phi_k[0, 0, 0] = 0.0
    options = {"feature_map": "relu", "causal": True}
    out, last = model.nala_attention(phi_q, phi_k, v, return_state=True, **options)
    lists = [x[0, 0].tolist() for x in (phi_q, phi_k, v)]
    same(file["causal_attention_by_loops"](*lists), out[0, 0])
    state = [[0.0] * 3 for _ in range(3)]
    for t in range(6):
        row, state = file["recurrent_step_by_loops"](state, *(x[t] for x in lists))
        same(row, out[0, 0, t])
    same(state, last[0, 0])


def test_loops_of_lesson_6():
    file = load(path_of(6))
    phi = draw(1, 1, 6, 4).relu()
    phi[0, 0, 2] = 0.0
    weights = model.attention_weights(phi, phi, feature_map="relu")[0, 0]
    shares = (1 - weights.diagonal()) * (phi[0, 0].sum(dim=-1) > 0)
    same(file["interference_by_loops"](phi[0, 0].tolist()), shares)


def test_loops_of_lesson_7():
    """Against closed forms: scores that decay with distance, and least squares for orthogonal keys.
    Writing a key twice with a share of 1/2 leaves a quarter of its old value."""
    file = load(path_of(7))
    k, v, decay = draw(5, 3), draw(5, 2), torch.rand(5, 3, dtype=torch.float64)
    state = [[0.0] * 2 for _ in range(3)]
    for t in range(5):
        state = file["decay_step_by_loops"](state, *(x[t].tolist() for x in (k, v, decay)))
    faded = torch.stack([k[i] * decay[i + 1 :].prod(dim=0) for i in range(5)])
    same(state, faded.mT @ v)
    keys = torch.linalg.qr(draw(3, 3))[0]
    state = draw(3, 2)
    before, actual = keys @ state, state.tolist()
    for key, share, value in ((0, 1.0, v[0]), (1, 0.5, v[1]), (1, 0.5, v[1])):
        args = keys[key].tolist(), value.tolist(), share
        actual = file["delta_step_by_loops"](actual, *args)
    read = keys @ torch.tensor(actual, dtype=torch.float64)
    same(read, torch.stack([v[0], 0.25 * before[1] + 0.75 * v[1], before[2]]))


# --- Mistakes -------------------------------------------------------------------------------------

DIVIDED = "numerator / denominator.masked_fill(denominator == 0, 1.0)"

# exercise: {mistake: (old code of the solution, new code, part of the message)}
MISTAKES = {
    "entropy": {
        "sign": ("return -(share", "return (share", "minus sign"),
        "weights not normalised": (
            "weights / torch.where(total > 0, total, 1.0)",
            "weights",
            "divide by their sum",
        ),
        "in bits": ("(share * log).sum(dim=-1)", "(share * share.log2()).sum(dim=-1)", "in bits"),
        "0 log 0": (".clamp_min(1e-300)", "", "NaN at index (0,) (weights of 0)"),
        "0 log 0 thrown away": (
            "(share * log)",
            "torch.xlogy(share, share)",
            "gradient with respect to weights is NaN or infinite (weights of 0)",
        ),
        "a row of zeros": (
            "torch.where(total > 0, total, 1.0)",
            "total",
            "NaN at index (1,) (weights of 0)",
        ),
        "axis kept": (
            "log).sum(dim=-1)",
            "log).sum(dim=-1, keepdim=True)",
            "shape (2, 3, 1), expected (2, 3)",
        ),
        "sum over the wrong axis": (
            "log).sum(dim=-1)",
            "log).sum(dim=0)",
            "shape (3, 5), expected (2, 3)",
        ),
        "mean for sum": ("log).sum(dim=-1)", "log).mean(dim=-1)", "0.2 times"),
        "eps within the logarithm": (
            "share.clamp_min(1e-300).log()",
            "(share + 1e-6).log()",
            "is an eps added",
        ),
        "small eps within the logarithm": (
            "share.clamp_min(1e-300).log()",
            "(share + 1e-9).log()",
            "nearly right: is it a difference quotient, is an eps added",
        ),
        "eps in the sum": (
            "torch.where(total > 0, total, 1.0)",
            "(total + 1e-12)",
            "Weights times 1e-20 change the entropy",
        ),
        "clamped sum": (
            "torch.where(total > 0, total, 1.0)",
            "total.clamp(1e-300, 1e4)",
            "Weights times 1e+06 change the entropy",
        ),
        "float32": ("(share * log)", "(share * log).float()", "dtype torch.float32"),
        "rounded": ("(share * log)", "(share * log).float().double()", "is it float32"),
        "in place": (
            "weights / torch.where(total > 0, total, 1.0)",
            "weights.div_(torch.where(total > 0, total, 1.0))",
            "argument weights in place",
        ),
        "no return": ("    return -(share", "    -(share", "is a return missing"),
        "a number": ("log).sum(dim=-1)", "log).sum().item()", "type float, expected a tensor"),
        "misspelt": ("log).sum", "torch.lgo(share)).sum", "AttributeError in line 37"),
    },
    "softmax_weights": {
        "no square root of D": (" / math.sqrt(q.shape[-1])", "", "not divided by the square root"),
        "divided by D": ("math.sqrt(q.shape[-1])", "q.shape[-1]", "divided by D"),
        "softmax over queries": (
            "softmax(scores, dim=-1)",
            "softmax(scores, dim=-2)",
            "softmax over the keys",
        ),
        "softmax over everything": (
            "torch.softmax(scores, dim=-1)",
            "torch.softmax(scores.flatten(2), dim=-1).view_as(scores)",
            "not to 1 (causal=False)",
        ),
        "queries and keys swapped": ("q @ k.mT", "k @ q.mT", "swapped"),
        "future scores are 0": (
            "masked_fill(future, -math.inf)",
            "masked_fill(future, 0.0)",
            "future (causal=True)",
        ),
        "mask after the softmax": (
            "scores = scores.masked_fill(future, -math.inf)",
            "return torch.softmax(scores, dim=-1).masked_fill(future, 0.0)",
            "not to 1 (causal=True)",
        ),
        "upper triangle for lower": (".triu(1)", ".tril(-1)", "lies in its future (causal=True)"),
        "own token hidden": (
            ".triu(1)",
            ".triu(0)",
            "(causal=True). Token 0 sees no key, not even itself: mask strictly above the diagonal",
        ),
        "always causal": (
            "    if causal:",
            "    if True:",
            "no weight to token 1, which it should see (causal=False)",
        ),
        "never causal": ("    if causal:", "    if False:", "lies in its future (causal=True)"),
        "overflow": (
            "torch.softmax(scores, dim=-1)",
            "scores.exp() / scores.exp().sum(-1, keepdim=True)",
            "(causal=False, large scores). exp overflows: subtract each row's largest score first",
        ),
        "a number for D": ("math.sqrt(q.shape[-1])", "2", "(D=3) (causal=False)"),
        "the root of N": ("math.sqrt(q.shape[-1])", "math.sqrt(q.shape[2])", "root of N, not of D"),
        "the root of N - 1": (
            "math.sqrt(q.shape[-1])",
            "math.sqrt(q.shape[2] - 1)",
            "The weight (D=3)",
        ),
        "inf times 0": (
            "scores.masked_fill(future, -math.inf)",
            "scores - math.inf * future",
            "inf times 0 is NaN: use masked_fill",
        ),
        "a large number for inf": (
            "scores.masked_fill(future, -math.inf)",
            "scores.masked_fill(future, -1e9)",
            "falls below the mask (causal=True, huge scores): hide the future with -inf",
        ),
    },
    "entropy_slope": {
        "sign": ("return -c * variance", "return c * variance", "wrong sign"),
        "no c": ("return -c * variance", "return -variance", "factor c is missing"),
        "c squared": ("return -c * variance", "return -c * c * variance", "one factor c too many"),
        "standard deviation": (
            "return -c * variance",
            "return -c * variance.sqrt()",
            "standard deviation",
        ),
        "moment about 0": ("(scores - mean)", "scores", "mean is not subtracted"),
        "plain mean": (
            "(p * scores).sum(dim=-1, keepdim=True)",
            "scores.mean(dim=-1, keepdim=True)",
            "mean of the scores is not weighted",
        ),
        "plain variance": (
            "return -c * variance",
            "return -c * scores.var(dim=-1)",
            "divided by N - 1",
        ),
        "plain variance over N": (
            "return -c * variance",
            "return -c * scores.var(dim=-1, correction=0)",
            "variance is not weighted by p.",
        ),
        "c not within p": ("softmax(c * scores,", "softmax(scores,", "c is missing in p"),
        "c fixed": ("softmax(c * scores, ", "softmax(0.7 * scores, ", "(c=1.6)"),
        "variance of c times the scores": (
            "return -c * variance",
            "return -c * c * c * variance",
            "variance of c * scores, not of the scores",
        ),
        "difference quotient": (
            "return -c * variance",
            "e = [entropy(torch.softmax(x * scores, dim=-1)) for x in (c - 1e-4, c + 1e-4)]\n"
            "    return (e[1] - e[0]) / 2e-4",
            "difference quotient",
        ),
    },
    "linear_attention": {
        "not divided": (f"return {DIVIDED}", "return numerator", "not to 1"),
        "multiplied": (f"return {DIVIDED}", "return numerator * denominator", "not to 1"),
        "eps": (f"return {DIVIDED}", "return numerator / (denominator + 1e-6)", "is an eps added"),
        "small eps": (
            f"return {DIVIDED}",
            "return numerator / (denominator + 1e-12)",
            "a million times smaller",
        ),
        "heads share a normaliser": (
            "phi_k.sum(dim=2)[",
            "phi_k.sum(dim=2).sum(dim=1, keepdim=True)[",
            "Heads are mixed",
        ),
        "a batch shares a normaliser": (
            "phi_k.sum(dim=2)[",
            "phi_k.sum(dim=2).sum(dim=0, keepdim=True)[",
            "Examples of a batch are mixed",
        ),
        "quadratic": ("phi_q @ sums", "phi_q @ phi_k.mT @ v", "memory is quadratic"),
        "quadratic in blocks": (
            "phi_q @ sums",
            "torch.cat([x @ phi_k.mT @ v for x in phi_q.split(64, dim=2)], dim=2)",
            "work is quadratic",
        ),
        "outer products": (
            "phi_k.mT @ v  #",
            "(phi_k[..., None] * v[..., None, :]).sum(dim=2)  #",
            "F x M numbers for every token",
        ),
        "loop over tokens": (
            "phi_k.mT @ v  #",
            "sum(phi_k[:, :, i, :, None] * v[:, :, i, None] for i in range(v.shape[2]))  #",
            "loops over single tokens",
        ),
        "0/0": (
            f"return {DIVIDED}",
            "return numerator / denominator",
            "NaN at index (0, 0, 0, 0) (all keys zero)",
        ),
        "zero keys only": (
            f"return {DIVIDED}",
            "if not denominator.any():\n        return 0 * (numerator + denominator)\n"
            "    return (numerator / denominator).nan_to_num()",
            "is NaN or infinite (the query of token 3 is zero)",
        ),
        "a zero query": (
            f"return {DIVIDED}",
            "if not denominator.any():\n        return 0 * (numerator + denominator)\n"
            "    return numerator / denominator",
            "NaN at index (0, 0, 3, 0) (the query of token 3 is zero)",
        ),
        "the value where there is no mass": (
            f"return {DIVIDED}",
            f"return torch.where(denominator == 0, v, {DIVIDED})",
            "output is not 0 (all keys zero)",
        ),
        "0/0 thrown away": (
            f"return {DIVIDED}",
            "return torch.where(denominator == 0, 0.0, numerator / denominator)",
            "respect to phi_q is NaN",
        ),
        "detached normaliser": (
            "mass = phi_k.sum",
            "mass = phi_k.detach().sum",
            "output is right, but the gradient with respect to phi_k",
        ),
        "detached query": (
            "numerator = phi_q",
            "phi_q = phi_q.detach()\n    numerator = phi_q",
            "No gradient reaches phi_q",
        ),
        "causal": (
            "numerator = phi_q @ sums",
            "weights = (phi_q @ phi_k.mT).tril()\n"
            "    return weights @ v / weights.sum(-1, keepdim=True)",
            "no weight to token",
        ),
    },
    "norm_microscope": {
        "keys as well": ("(factor * q, k, v)", "(factor * q, factor * k, v)", "keys are changed"),
        "values as well": (
            "(factor * q, k, v)",
            "(factor * q, k, factor * v)",
            "values are changed",
        ),
        "keys instead": ("(factor * q, k, v)", "(q, factor * k, v)", "keys are changed"),
        "something else": ("return torch", "return 0.1 + torch", "softmax_attention) is 0."),
        "another attention": (
            "return torch",
            "from nala_min.model import softmax_attention as soft\n"
            "    out, changed = soft(q, k, v), soft(factor * q, k, v)\n    return torch",
            "(factor=0.5, nala_attention)",
        ),
        "factor fixed": ("(factor * q, k, v)", "(3.0 * q, k, v)", "never called with 0.5 * q"),
        "added": ("(factor * q, k, v)", "(factor + q, k, v)", "never called with 3 * q"),
        "in place": ("(factor * q, k, v)", "(q.mul_(factor), k, v)", "q in place"),
        "not divided": (" / torch.linalg.vector_norm(out)", "", "not divided by the norm"),
        "divided by the other": (
            "vector_norm(out)",
            "vector_norm(changed)",
            "norm of the changed output",
        ),
        "difference of norms": (
            "vector_norm(changed - out) /",
            "vector_norm(changed) / torch.linalg.vector_norm(out) - 1 or",
            "not the difference of norms",
        ),
        "squared": (
            "return torch.linalg.vector_norm(changed - out) / torch.linalg.vector_norm(out)",
            "return ((changed - out).square().sum() / out.square().sum())",
            "square of the relative change",
        ),
        "token by token": (
            "vector_norm(changed - out) / torch.linalg.vector_norm(out)",
            "vector_norm(changed - out, dim=-1) / torch.linalg.vector_norm(out, dim=-1)",
            "shape (2, 3, 5), expected ()",
        ),
        "mean of ratios": (
            "return torch.linalg.vector_norm(changed - out) / torch.linalg.vector_norm(out)",
            "return ((changed - out).norm(dim=-1) / out.norm(dim=-1)).mean()",
            "mean over tokens",
        ),
        "absolute values": (
            "return torch.linalg.vector_norm(changed - out) / torch.linalg.vector_norm(out)",
            "return (changed - out).abs().sum() / out.abs().sum()",
            "It sums absolute values",
        ),
    },
    "dropped_share": {
        "what ReLU keeps": (
            "torch.relu(-q) * torch.relu(-k)",
            "torch.relu(q) * torch.relu(k)",
            "share that ReLU keeps",
        ),
        "opposite signs as well": (
            "(torch.relu(-q) * torch.relu(-k))",
            "((q * k).abs() - torch.relu(q) * torch.relu(k))",
            "includes channels of opposite signs",
        ),
        "share of what agrees": (
            "total = (q * k).abs()",
            "total = torch.relu(q * k)",
            "not of those that agree",
        ),
        "counted": (
            "dropped = (torch.relu(-q) * torch.relu(-k)).sum(dim=-1)",
            "return ((q < 0) & (k < 0)).double().mean(dim=-1)",
            "It counts channels",
        ),
        "not divided": (
            "return dropped / total.masked_fill(total == 0, 1.0)",
            "return dropped",
            "not divided",
        ),
        "no absolute value": ("(q * k).abs()", "(q * k)", "without absolute values"),
        "0/0": ("total.masked_fill(total == 0, 1.0)", "total", "NaN at index (0, 0) (zero query)"),
        "zero queries only": (
            "total.masked_fill(total == 0, 1.0)",
            "total.masked_fill(q.sum(dim=-1) == 0, 1.0)",
            "(zero key)",
        ),
        "eps": ("total.masked_fill(total == 0, 1.0)", "(total + 1e-12)", "no eps and no clamp"),
    },
    "query_magnitude": {
        "power as a factor": ("ratio.pow(power)", "ratio * power", "the norm cancels"),
        "fixed power": ("ratio.pow(power)", "ratio.pow(lam)", "the norm cancels"),
        "layer norm": (
            "vector_norm(q,",
            "vector_norm(torch.nn.functional.layer_norm(q, q.shape[-1:]),",
            "the norm cancels",
        ),
        "not scaled": (
            "ratio.pow(power)",
            "(q.abs() / norm.masked_fill(norm == 0, 1.0)).pow(power)",
            "largest channel of every query must be 1",
        ),
        "one scale for all": (
            "largest = q.abs().amax(dim=-1, keepdim=True)",
            "largest = q.abs().amax()",
            "largest channel of every query must be 1",
        ),
        "one norm for all": (
            "vector_norm(q, dim=-1, keepdim=True)",
            "vector_norm(q)",
            "Queries are mixed",
        ),
        "signs kept": (
            "return ratio.pow(power)",
            "return ratio.pow(power) * q.sign()",
            "negative: take the absolute value",
        ),
        "a negative base": (
            "ratio = q.abs()",
            "ratio = q",
            "A negative number to a fractional power is NaN: take the absolute value",
        ),
        "detached norm": ("torch.tanh(norm)", "torch.tanh(norm.detach())", "is the norm detached"),
        "divided after the power": (
            "return ratio.pow(power)",
            "magnitude = (q.abs() / norm.masked_fill(norm == 0, 1.0)).pow(power)\n"
            "    top = magnitude.amax(dim=-1, keepdim=True)\n"
            "    return magnitude / top.masked_fill(top == 0, 1.0)",
            "underflows. Divide by the largest channel before the power, Eq. (12)",
        ),
        "0/0 after the power": (
            "return ratio.pow(power)",
            "magnitude = (q.abs() / norm).pow(power)\n"
            "    return magnitude / magnitude.amax(dim=-1, keepdim=True)",
            "(lam=500). Divide by the largest channel before the power, Eq. (12)",
        ),
        "clamped": (
            "largest.masked_fill(largest == 0, 1.0)",
            "largest.clamp_min(1e-6)",
            "query of norm 1e-9",
        ),
        "no tanh": ("torch.tanh(norm)", "norm", "tanh is missing"),
        "tau outside": (
            "lam * (tau + torch.tanh(norm))",
            "tau + lam * torch.tanh(norm)",
            "outside the brackets",
        ),
        "no tau": ("lam * (tau + torch.tanh(norm))", "lam * torch.tanh(norm)", "tau is missing"),
        "no lam": ("lam * (tau + torch.tanh(norm))", "tau + torch.tanh(norm)", "lam is missing"),
        "tau fixed": (
            "lam * (tau + torch.tanh(norm))",
            "lam * (0.5 + torch.tanh(norm))",
            "tau has a fixed value",
        ),
        "lam fixed": (
            "lam * (tau + torch.tanh(norm))",
            "3.0 * (tau + torch.tanh(norm))",
            "lam has a fixed value",
        ),
        "0/0": (
            "largest.masked_fill(largest == 0, 1.0)",
            "largest",
            "NaN at index (0, 0, 0) (a query or a channel is zero)",
        ),
        "logarithm of 0": (
            "ratio.pow(power)",
            "torch.exp(power * ratio.log())",
            "gradient with respect to q is NaN",
        ),
        "square root of 0": (
            "torch.linalg.vector_norm(q, dim=-1, keepdim=True)",
            "q.square().sum(dim=-1, keepdim=True).sqrt()",
            "gradient with respect to q is NaN",
        ),
    },
    "power_slope": {
        "the power itself": (
            "lam * (1 - torch.tanh(norm).square())",
            "lam * (0.5 + torch.tanh(norm))",
            "not its slope",
        ),
        "no lam": ("lam * (1 -", "(1 -", "lam is missing: in (7) it also multiplies tanh"),
        "not squared": (".square()", "", "not squared"),
        "added": ("(1 - torch.tanh", "(1 + torch.tanh", "subtract the square"),
        "the square alone": (
            "(1 - torch.tanh(norm).square())",
            "torch.tanh(norm).square()",
            "subtract that",
        ),
        "sign": ("return lam *", "return -lam *", "wrong sign"),
        "lam fixed": ("return lam *", "return 2.5 *", "(lam=0.8) is 3.125 times"),
        "0/0": (
            "return lam * (1 -",
            "return norm / norm * lam * (1 -",
            "NaN at index (0, 0) (norms from 0 on)",
        ),
        "difference quotient": (
            "return lam * (1 - torch.tanh(norm).square())",
            "return lam * (torch.tanh(norm + 1e-5) - torch.tanh(norm)) / 1e-5",
            "difference quotient",
        ),
    },
    "counterexample": {
        "not a direction": (" / 7\n", "\n", "norm 7, expected 1"),
        "entropy falls": ("[6.0, 3.0, 2.0]", "[2.0, 3.0, 6.0]", "entropy falls"),
        "keys all the same": ("keys = torch", "keys = 1 + 0 * torch", "hardly changes"),
        "the notebook's": (
            "return direction, keys",
            "return torch.tensor([0.8, 0.6]), torch.tensor([[1.0, 0.1]] * 7 + [[1.0, 3.0]])",
            "The notebook's example has two channels: find one with three or more.",
        ),
        "the notebook's and a 0": (
            "[6.0, 3.0, 2.0]) / 7",
            "[0.8, 0.6, 0.0])",
            "Channel 2 of the direction is 0: it must be at least 0.1",
        ),
        "the notebook's and next to nothing": (
            "[6.0, 3.0, 2.0]) / 7",
            "[0.8, 0.6, -1e-12])",
            "Channel 2 of the direction is -1e-12: it must be at least 0.1 or at most -0.1",
        ),
        "the notebook's and keys of 0": (
            "return direction, keys",
            "return direction, keys * torch.tensor([1.0, 1.0, 0.0])",
            "Channel 2 is 0 in all keys",
        ),
        "other order": ("return direction, keys", "return keys, direction", "wrong order"),
        "direction for each key": (
            "return direction, keys",
            "return direction.expand(8, 3), keys",
            "expected (D,) and (N, D)",
        ),
        "keys only": ("return direction, keys", "return keys", "two tensors"),
        "lists": (
            "return direction, keys",
            "return direction.tolist(), keys.tolist()",
            "must be floating-point tensors",
        ),
        "a zero key": ("[1.0, 4.0, 0.1]", "[0.0, 0.0, 0.0]", "A key is zero"),
        "one key": ("return direction, keys", "return direction, keys[:1]", "fewer than two keys"),
        "not finite": ("[1.0, 4.0, 0.1]", "[1.0, math.nan, 0.1]", "finite"),
    },
    "cosine_features": {
        "no pi/4": ("(math.pi / 4) * torch", "torch", "negative product"),
        "pi/2": ("(math.pi / 4) * torch", "(math.pi / 2) * torch", "negative product"),
        "no tanh": ("torch.tanh(alpha * direction)", "alpha * direction", "expected almost 0"),
        "cosines only": (
            "torch.cat([magnitude * angle.cos(), magnitude * angle.sin()], dim=-1)",
            "magnitude * angle.cos()",
            "has shape (1, 1), expected (1, 2)",
        ),
        "cosine twice": ("angle.sin()", "angle.cos()", "norm of the features"),
        "a half without magnitude": (
            "magnitude * angle.sin()",
            "angle.sin()",
            "norm of the features",
        ),
        "halves stacked": ("dim=-1)", "dim=0)", "has shape (2, 1), expected (1, 2)"),
        "alpha ignored": ("alpha * direction", "direction", "alpha makes no difference"),
        "alpha fixed": ("alpha * direction", "20 * direction", "alpha makes no difference"),
        "angle of the magnitude": ("alpha * direction", "alpha * magnitude", "expected almost 0"),
        "magnitude inside": (
            "alpha * direction",
            "alpha * magnitude * direction",
            "The magnitude is also in the angle",
        ),
        "degrees": ("(math.pi / 4) * torch", "45 * torch", "45 degrees are pi/4"),
        "sign split": (
            "return torch.cat([magnitude * angle.cos(), magnitude * angle.sin()], dim=-1)",
            "return torch.cat([magnitude * (direction > 0), magnitude * (direction < 0)], dim=-1)",
            "It is the sign split (11), not (9)",
        ),
        "another offset in each call": (
            "alpha * direction)",
            "alpha * direction) + magnitude.sum()",
            "inner product of query and key",
        ),
        "angle of alpha times the sign": (
            "alpha * direction",
            "alpha * direction.sign()",
            "It is the sign split (11), not (9): in (9), a channel's size counts",
        ),
    },
    "sign_split": {
        "0 counts as positive": ("(direction > 0)", "(direction >= 0)", "direction 0"),
        "the same half twice": ("< 0)", "> 0)", "Both halves hold the positive channels"),
        "the other half twice": ("> 0)", "< 0)", "Both halves hold the negative channels"),
        "no magnitude": (
            "[magnitude * (direction > 0), magnitude * (direction < 0)]",
            "[(direction > 0).double(), (direction < 0).double()]",
            "The magnitude is missing",
        ),
        "ReLU of the direction": (
            "[magnitude * (direction > 0), magnitude * (direction < 0)]",
            "[torch.relu(direction), torch.relu(-direction)]",
            "It splits the direction",
        ),
        "magnitude times ReLU of the direction": (
            "[magnitude * (direction > 0), magnitude * (direction < 0)]",
            "[magnitude * torch.relu(direction), magnitude * torch.relu(-direction)]",
            "use only its sign",
        ),
        "ReLU of the direction in one half": (
            "(direction > 0)",
            "torch.relu(direction)",
            "norm of the features",
        ),
        "cosine map": (
            "return torch.cat(",
            "angle = math.pi / 4 * torch.tanh(20 * direction)\n"
            "    return torch.cat([magnitude * angle.cos(), magnitude * angle.sin()], dim=-1)\n"
            "    return torch.cat(",
            "It is the cosine map (9), not (11)",
        ),
        "another order in each call": (
            "direction < 0)], dim=-1)",
            "direction < 0)], dim=-1).roll(int(1e6 * magnitude.sum()), dims=-1)",
            "inner product of query and key",
        ),
        "one half only": (
            "magnitude * (direction < 0)",
            "0 * magnitude",
            "The negative channels are lost",
        ),
        "the other half only": (
            "magnitude * (direction > 0)",
            "0 * magnitude",
            "The positive channels are lost",
        ),
        "a sign for a half": (
            "[magnitude * (direction > 0), magnitude * (direction < 0)]",
            "[magnitude * direction.sign(), 0 * magnitude]",
            "negative product",
        ),
        "no split": (
            "[magnitude * (direction > 0), magnitude * (direction < 0)]",
            "[magnitude, 0 * magnitude]",
            "expected almost 0",
        ),
    },
    "recurrent_step": {
        "reads before it writes": (
            "total = (phi_q[..., None, :] @ state)",
            "total = (phi_q[..., None, :] @ (state - phi_k[..., :, None] * value[..., None, :]))",
            "does not see itself",
        ),
        "writes nothing": (
            "return numerator /",
            "state = state - phi_k[..., :, None] * value[..., None, :]\n    return numerator /",
            "new token is not added to the state",
        ),
        "forgets": ("state = state + ", "state = ", "forgets the earlier tokens"),
        "in place": ("state = state + ", "state += ", "state in place"),
        "other order": (f"return {DIVIDED}, state", f"return state, {DIVIDED}", "wrong order"),
        "no state": (f"return {DIVIDED}, state", f"return {DIVIDED}", "two tensors"),
        "not divided": (f"return {DIVIDED}", "return numerator", "not divided"),
        "normaliser first": (
            "torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)",
            "torch.cat([torch.ones_like(v[..., :1]), v], dim=-1)",
            "first column",
        ),
        "normaliser does not grow": ("torch.ones_like", "torch.zeros_like", "does not grow"),
        "normaliser counts tokens": (
            "state = state + phi_k[..., :, None] * value[..., None, :]",
            "new = phi_k[..., :, None] * v[..., None, :]\n"
            "    state = state + torch.cat([new, torch.ones_like(new[..., :1])], dim=-1)",
            "The normaliser counts tokens: it must grow by phi_k",
        ),
        "no normaliser": (
            "torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)",
            "v",
            "RuntimeError in line",
        ),
        "transposed": (
            "phi_k[..., :, None] * value[..., None, :]",
            "phi_k[..., None, :] * value[..., :, None]",
            "RuntimeError in line",
        ),
        "eps": (
            f"return {DIVIDED}",
            "return numerator / (denominator + 1e-10)",
            "a million times smaller",
        ),
        "0/0": (
            f"return {DIVIDED}",
            "return numerator / denominator",
            "NaN at index (0, 0, 0) (a query is zero)",
        ),
        "0/0 thrown away": (
            f"return {DIVIDED}",
            "return (numerator / denominator).nan_to_num()",
            "is NaN or infinite (a query is zero)",
        ),
        "detached state": (
            f"return {DIVIDED}, state",
            f"return {DIVIDED}, state.detach()",
            "output is right, but the gradient with respect to state",
        ),
        "detached results": (
            f"return {DIVIDED}, state",
            f"return ({DIVIDED}).detach(), state.detach()",
            "No gradient reaches state",
        ),
    },
    "chunked_attention": {
        "own chunk's future": (
            "(q @ k.mT).tril()",
            "(q @ k.mT)",
            "lies in its future (7 tokens, chunk_size=3)",
        ),
        "own token unseen": ("(q @ k.mT).tril()", "(q @ k.mT).tril(-1)", "no weight to itself"),
        "state read too late": (
            "totals.append(q @ state + within)\n        state = state + k.mT @ value",
            "state = state + k.mT @ value\n        totals.append(q @ state + within)",
            "already holds the current chunk: read it first, then add (7 tokens, chunk_size=3)",
        ),
        "no state": (
            "totals.append(q @ state + within)\n        state = state + k.mT @ value",
            "done = sum(x.shape[2] for x in totals)\n"
            "        end = done + q.shape[2]\n"
            "        weights = (q @ phi_k[:, :, :end].mT).tril(done)\n"
            "        totals.append(weights @ values[:, :, :end])",
            "work is quadratic",
        ),
        "a new state for every chunk": (
            "state = state + k.mT @ value",
            "done = sum(x.shape[2] for x in totals)\n"
            "        state = phi_k[:, :, :done].mT @ values[:, :, :done]",
            "work is quadratic",
        ),
        "state of another dtype": (
            "torch.zeros_like(phi_k[:, :, 0, :, None] * values[:, :, 0, None])",
            "torch.zeros(*phi_k.shape[:2], phi_k.shape[3], values.shape[3])",
            "It raises RuntimeError in line",
        ),
        "only the last chunk": (
            "state = state + k.mT @ value",
            "state = k.mT @ value",
            "which it should see",
        ),
        "only its own chunk": ("q @ state + within", "within", "no weight to token"),
        "rows are lost": (
            "total = torch.cat(totals, dim=2)",
            "total = torch.cat([x for x in totals if x.shape[2] == chunk_size], dim=2)",
            "has shape (2, 3, 6, 5), expected (2, 3, 7, 5) (7 tokens, chunk_size=3)",
        ),
        "not divided": (f"return {DIVIDED}", "return numerator", "not to 1"),
        "heads share a normaliser": (
            "total[..., -1:]",
            "total[..., -1:].sum(dim=1, keepdim=True)",
            "Heads are mixed",
        ),
        "one chunk": (
            "x.split(chunk_size, dim=2)",
            "x.split(x.shape[2], dim=2)",
            "memory is quadratic",
        ),
        "one token": (
            "x.split(chunk_size, dim=2)",
            "x.split(1, dim=2)",
            "loops over single tokens",
        ),
        "a state for every token": (
            "    # The sum of phi(k)^T",
            "    states = (phi_k[..., None] * values[..., None, :]).cumsum(dim=2)\n"
            "    total = (phi_q[..., None, :] @ states).squeeze(-2)\n"
            "    return total[..., :-1] / total[..., -1:].masked_fill(total[..., -1:] == 0, 1.0)\n"
            "    # The sum of phi(k)^T",
            "F x M numbers for every token",
        ),
        "no gradient from chunk to chunk": (
            "q @ state + within",
            "q @ state.detach() + within",
            "gradient with respect to phi_k",
        ),
        "eps": (
            f"return {DIVIDED}",
            "return numerator / (denominator + 1e-12)",
            "a million times smaller",
        ),
        "0/0": (f"return {DIVIDED}", "return numerator / denominator", "(all keys zero)"),
        "a zero query": (
            f"return {DIVIDED}",
            "if not denominator.any():\n        return 0 * (numerator + denominator)\n"
            "    return (numerator / denominator).nan_to_num()",
            "is NaN or infinite (the query of token 3 is zero)",
        ),
    },
    "interference": {
        "own share": ("total > 0, 1 - own /", "total > 0, own /", "the others have the rest"),
        "not divided": (
            "1 - own / torch.where(total > 0, total, 1.0)",
            "total - own",
            "It is not a share",
        ),
        "own left out": (
            "1 - own / torch.where(total > 0, total, 1.0)",
            "(total - own) / own",
            "divides by the key's own weight",
        ),
        "heads mixed": (
            "phi_k.sum(dim=2, keepdim=True)",
            "phi_k.sum(dim=(1, 2), keepdim=True)",
            "Heads are mixed",
        ),
        "examples mixed": (
            "phi_k.sum(dim=2, keepdim=True)",
            "phi_k.sum(dim=(0, 2), keepdim=True)",
            "Examples of a batch are mixed",
        ),
        "no squares": ("phi_k.square().sum", "phi_k.sum", "phi_i . phi_i, a sum of squares"),
        "a key without features": (
            "return torch.where(total > 0, 1 - own / torch.where(total > 0, total, 1.0), 0.0)",
            "return 1 - own / total",
            "NaN at index (0, 0, 2) (a key without features)",
        ),
        "all of nothing": (
            "total, 1.0), 0.0)",
            "total, 1.0), 1.0)",
            "The share (a key without features)",
        ),
        "N x N weights": (
            "(phi_k * phi_k.sum(dim=2, keepdim=True)).sum(dim=-1)",
            "(phi_k @ phi_k.mT).sum(dim=-1)",
            "Its memory is quadratic",
        ),
        "detached": (
            "own = phi_k.square()",
            "own = phi_k.detach().square()",
            "gradient with respect to phi_k",
        ),
    },
    "own_features": {
        "a sign split": ("split**4", "split", "squared error of 0.7"),
        "one half only": ("[x, -x]", "[x]", "shape (2, 3, 7, 5), expected (2, 3, 7, 10)"),
        "both halves alike": ("[x, -x]", "[x, x]", "All features of some x are 0"),
        "negative": (".relu()  #", "  #", "squared error"),
        "odd power": ("split**4", "torch.cat([x, -x], dim=-1) ** 3", "A feature is negative"),
        "tokens seen": (
            "split**4",
            "split**4 * split.sum(dim=2, keepdim=True)",
            "when it is alone",
        ),
        "too large": ("split**4", "(split * 1e60) ** 6", "The result is infinite"),
        "no gradient": ("split**4", "split.detach() ** 4", "No gradient reaches x"),
    },
    "decay_step": {
        "no decay": ("decay[..., None] * state", "state", "The past does not fade"),
        "token fades": (
            "decay[..., None] * state + k[..., :, None] * v[..., None, :]",
            "decay[..., None] * (state + k[..., :, None] * v[..., None, :])",
            "The new token also fades",
        ),
        "not written": (" + k[..., :, None] * v[..., None, :]", "", "is not written"),
        "forgotten": ("decay[..., None] * state + ", "", "The past is forgotten"),
        "the other way": (
            "decay[..., None] *",
            "(1 - decay[..., None]) *",
            "multiplied by 1 - decay",
        ),
        "the key fades": (
            "decay[..., None] * state + k",
            "state + (decay * k)",
            "The key fades, not the past",
        ),
        "one for all": (
            "decay[..., None] *",
            "decay.mean(-1)[..., None, None] *",
            "the same decay for every feature",
        ),
        "one axis short": ("decay[..., None] *", "decay *", "It raises RuntimeError"),
        "outer product transposed": (
            "k[..., :, None] * v[..., None, :]",
            "v[..., :, None] * k[..., None, :]",
            "It raises RuntimeError",
        ),
        "in place": (
            "return decay[..., None] * state +",
            "return state.mul_(decay[..., None]) +",
            "argument state in place",
        ),
    },
    "delta_step": {
        "a sum": ("share[..., None] * (v - read)", "v", "It only adds, like linear attention"),
        "a share of v": ("(v - read)", "v", "removes nothing"),
        "no share": ("share[..., None] * (v - read)", "v - read", "share is missing"),
        "share erases only": (
            "share[..., None] * (v - read)",
            "v - share[..., None] * read",
            "share multiplies what is removed, but not v",
        ),
        "share writes only": (
            "share[..., None] * (v - read)",
            "share[..., None] * v - read",
            "share multiplies v, but not what is removed",
        ),
        "erased only": ("(v - read)", "-read", "but writes nothing"),
        "the other way": ("(v - read)", "(read - v)", "moves away from v"),
        "read detached": ("(v - read)", "(v - read.detach())", "gradient with respect to state"),
        "in place": (
            "return state + k[..., :, None] * change[..., None, :]",
            "return state.add_(k[..., :, None] * change[..., None, :])",
            "argument state in place",
        ),
    },
    "attention_a": {
        "wrong diagnosis": (
            '"padding in the normaliser"',
            '"eps too large"',
            "'eps too large' is wrong",
        ),
        "unknown diagnosis": (
            '"padding in the normaliser"',
            '"a cold"',
            "'a cold' is not in checks.BUGS: padding in the normaliser, heads share",
        ),
        "no diagnosis": (
            '"padding in the normaliser"',
            '""',
            "It is fixed, but its bug is not named."
            " DIAGNOSES has no name for the bug in attention_a yet: print(checks.BUGS).",
        ),
        "one mask for all examples": (
            "key_mask[:, None, :, None]  #",
            "key_mask[:1, None, :, None]  #",
            "(some keys are padding)",
        ),
        "long queries only": (
            "direction = F.normalize(x, dim=-1)",
            "direction = F.normalize(x, dim=-1, eps=1e-2)",
            "(queries of norm 1e-4)",
        ),
        "detached queries": (
            "phi_q = features(q, ratio**power)",
            "phi_q = features(q, ratio**power).detach()",
            "No gradient reaches q",
        ),
        "no gradients": (
            "def attention_a(",
            "@torch.no_grad()\ndef attention_a(",
            "No gradient reaches q",
        ),
        "padding in both sums": (
            "    phi_k = phi_k * key_mask[:, None, :, None]",
            "    ",
            "which is padding (some keys are padding)",
        ),
        "eps": (
            "return weights @ v / mass.masked_fill(mass == 0, 1.0)",
            "return weights @ v / (mass + 1e-7)",
            "not to 1",
        ),
        "heads share a normaliser": (
            "mass = weights.sum(dim=-1, keepdim=True)",
            "mass = weights.sum(dim=(1, 3), keepdim=True)",
            "Heads are mixed",
        ),
        "angles too wide": (
            "angle = math.pi / 4 * torch.tanh(20 * direction)",
            "angle = torch.tanh(20 * direction)",
            "negative weight",
        ),
    },
    "attention_b": {
        "wrong diagnosis": (
            '"state read too late"',
            '"no mask within a chunk"',
            "'no mask within a chunk' is wrong",
        ),
        "no mask within a chunk": (
            "(phi_q @ phi_k.mT).tril()",
            "(phi_q @ phi_k.mT)",
            "lies in its future",
        ),
        "own token unseen": (
            "(phi_q @ phi_k.mT).tril()",
            "(phi_q @ phi_k.mT).tril(-1)",
            "no weight to itself",
        ),
        "no state": ("sums.cumsum(dim=2) - sums", "0 * sums", "no weight to token"),
        "zero query": (
            ".amax(dim=-1, keepdim=True).clamp_min(1e-30)\n    phi_q, phi_k",
            ".amax(dim=-1, keepdim=True)\n    phi_q, phi_k",
            "NaN at index (0, 0, 0, 0) (zero queries)",
        ),
    },
    "attention_c": {
        "wrong diagnosis": (
            '"power as a factor"',
            '"layer norm on the query"',
            "'layer norm on the query' is wrong",
        ),
        "layer norm": (
            "torch.tanh(q.norm(",
            "torch.tanh(F.layer_norm(q, q.shape[-1:]).norm(",
            "the norm cancels",
        ),
        "another power": (
            "ratio**power)  # an",
            "ratio ** (power + 1))  # an",
            "The weight at index",
        ),
        "reads before it writes": (
            "[:, :, t, None, :] @ state)",
            "[:, :, t, None, :] @ (state - phi_k[:, :, t, :, None] * values[:, :, t, None, :]))",
            "no weight to itself",
        ),
    },
}


@solved
@pytest.mark.parametrize(
    ("name", "mistake"), [(name, mistake) for name in MISTAKES for mistake in MISTAKES[name]]
)
def test_mistake_is_named(name, mistake):
    old, new, expected = MISTAKES[name][mistake]
    message = message_of(solution(name, old, new))
    assert message is not None and expected in message, message


def test_every_exercise_has_mistakes_and_hints():
    assert MISTAKES.keys() == checks.EXERCISES.keys()
    assert min(len(mistakes) for mistakes in MISTAKES.values()) >= 4
    assert min(len(exercise.hints) for exercise in checks.EXERCISES.values()) >= 2


# --- Other correct answers ------------------------------------------------------------------------

HALVES = "torch.cat([magnitude * angle.cos(), magnitude * angle.sin()], dim=-1)"

# (exercise, difference): (old code of the solution, new code)
ALTERNATIVES = {
    ("entropy", "masked logarithm"): (
        ".clamp_min(1e-300).log()",
        ".masked_fill(share == 0, 1.0).log()",
    ),
    ("softmax_weights", "einsum"): ("q @ k.mT", 'torch.einsum("bhnd,bhmd->bhnm", q, k)'),
    ("softmax_weights", "largest score subtracted"): (
        "return torch.softmax(scores, dim=-1)",
        "powers = (scores - scores.amax(dim=-1, keepdim=True)).exp()\n"
        "    return powers / powers.sum(dim=-1, keepdim=True)",
    ),
    ("entropy_slope", "second moment less the square of the mean"): (
        "(p * (scores - mean).square()).sum(dim=-1)",
        "(p * scores.square()).sum(dim=-1) - mean.squeeze(-1).square()",
    ),
    ("linear_attention", "values with a 1"): (
        "    sums = phi_k.mT @ v",
        "    v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)\n"
        "    total = phi_q @ (phi_k.mT @ v)\n"
        "    return total[..., :-1] / total[..., -1:].masked_fill(total[..., -1:] == 0, math.inf)\n"
        "    sums = phi_k.mT @ v",
    ),
    ("linear_attention", "divided by infinity, as in model.py"): (
        "masked_fill(denominator == 0, 1.0)",
        "masked_fill(denominator == 0, torch.inf)",
    ),
    ("linear_attention", "clamped"): (DIVIDED, "numerator / denominator.clamp_min(1e-300)"),
    ("norm_microscope", "a number"): ("vector_norm(out)", "vector_norm(out).item()"),
    ("norm_microscope", "a warning"): (
        "torch.linalg.vector_norm(changed - out) / torch.linalg.vector_norm(out)",
        "torch.tensor(torch.linalg.vector_norm(changed - out) / torch.linalg.vector_norm(out))",
    ),
    ("norm_microscope", "the other way round"): ("changed - out", "out - changed"),
    ("dropped_share", "clamp"): (
        "torch.relu(-q) * torch.relu(-k)",
        "q.clamp(max=0) * k.clamp(max=0)",
    ),
    ("query_magnitude", "scale detached, from the direction"): (
        "ratio = q.abs() / largest",
        "ratio = (q / norm.masked_fill(norm == 0, 1.0)).abs()\n"
        "    largest = ratio.detach().amax(dim=-1, keepdim=True)\n"
        "    ratio = ratio / largest",
    ),
    ("query_magnitude", "scale detached, without the norm"): (
        "largest = q.abs()",
        "largest = q.detach().abs()",
    ),
    ("power_slope", "hyperbolic cosine"): (
        "* (1 - torch.tanh(norm).square())",
        "/ torch.cosh(norm).square()",
    ),
    ("counterexample", "other sizes, double precision"): (
        "return direction, keys",
        "keys = torch.cat([keys, keys[:, :1]], dim=1).double()\n"
        "    return torch.tensor([0.7, 0.5, 0.5, 0.1]).double(), keys",
    ),
    ("counterexample", "a negative channel"): (
        "return direction, keys",
        "return direction * torch.tensor([1, -1, 1]), keys * torch.tensor([1, -1, 1])",
    ),
    ("counterexample", "a list"): ("return direction, keys", "return [direction, keys]"),
    ("cosine_features", "turned by pi/4, as in model.py"): (
        "angle = (math.pi / 4)",
        "angle = math.pi / 4 + (math.pi / 4)",
    ),
    ("cosine_features", "sine first"): (
        HALVES,
        "torch.cat([magnitude * angle.sin(), magnitude * angle.cos()], dim=-1)",
    ),
    ("cosine_features", "sine and cosine in turns"): (
        HALVES,
        "(magnitude[..., None] * torch.stack([angle.cos(), angle.sin()], dim=-1)).flatten(-2)",
    ),
    ("sign_split", "negative half first"): (
        "[magnitude * (direction > 0), magnitude * (direction < 0)]",
        "[magnitude * (direction < 0), magnitude * (direction > 0)]",
    ),
    ("recurrent_step", "einsum"): (
        "phi_k[..., :, None] * value[..., None, :]",
        'torch.einsum("bhf,bhm->bhfm", phi_k, value)',
    ),
    ("recurrent_step", "a list"): (f"return {DIVIDED}, state", f"return [{DIVIDED}, state]"),
    ("chunked_attention", "slices"): (
        "    # The sum of phi(k)^T",
        "    state, total = 0.0, torch.zeros_like(values)\n"
        "    for t in range(0, v.shape[2], chunk_size):\n"
        "        q, k, value = (x[:, :, t : t + chunk_size] for x in (phi_q, phi_k, values))\n"
        "        new = torch.einsum('bhts,bhsm->bhtm', (q @ k.mT).tril(), value)\n"
        "        new = new + (q @ state if t else 0.0)\n"
        "        total = torch.cat([total[:, :, :t], new, total[:, :, t + q.shape[2] :]], dim=2)\n"
        "        state = state + torch.einsum('bhtf,bhtm->bhfm', k, value)\n"
        "    return total[..., :-1] / total[..., -1:].masked_fill(total[..., -1:] == 0, 1.0)\n"
        "    # The sum of phi(k)^T",
    ),
    ("chunked_attention", "sums of chunks by a triangle of ones"): (
        "    # The sum of phi(k)^T",
        "    chunks = zip(*(x.split(chunk_size, 2) for x in (phi_k, values)), strict=True)\n"
        "    sums = torch.stack([k.mT @ value for k, value in chunks], dim=2)\n"
        "    before = torch.ones(sums.shape[2], sums.shape[2], dtype=v.dtype).tril(-1)\n"
        "    states = (before @ sums.flatten(3)).view_as(sums).unbind(dim=2)\n"
        "    parts = zip(*(x.split(chunk_size, 2) for x in (phi_q, phi_k, values)), states)\n"
        "    total = torch.cat([q @ s + (q @ k.mT).tril() @ x for q, k, x, s in parts], dim=2)\n"
        "    return total[..., :-1] / total[..., -1:].masked_fill(total[..., -1:] == 0, 1.0)\n"
        "    # The sum of phi(k)^T",
    ),
    ("chunked_attention", "all chunks at once"): (
        "    # The sum of phi(k)^T",
        "    num_tokens, pad = v.shape[2], torch.nn.functional.pad\n"
        "    padding = (0, 0, 0, -num_tokens % chunk_size)\n"
        "    q, k, value = (\n"
        "        pad(x, padding).unflatten(2, (-1, chunk_size)) for x in (phi_q, phi_k, values)\n"
        "    )\n"
        "    sums = k.mT @ value\n"
        "    total = q @ (sums.cumsum(dim=2) - sums) + (q @ k.mT).tril() @ value\n"
        "    total = total.flatten(2, 3)[:, :, :num_tokens]\n"
        "    return total[..., :-1] / total[..., -1:].masked_fill(total[..., -1:] == 0, 1.0)\n"
        "    # The sum of phi(k)^T",
    ),
}


@solved
@pytest.mark.parametrize(("name", "difference"), ALTERNATIVES)
def test_other_correct_answers_are_accepted(name, difference):
    assert message_of(solution(name, *ALTERNATIVES[name, difference])) is None


# --- Printed messages -----------------------------------------------------------------------------


@solved
@pytest.mark.parametrize("name", ("attention_a", "attention_b", "attention_c"))
def test_a_diagnosis_is_checked_only_after_the_repair(name):
    broken = load(path_of("find_the_bug"))
    symptoms = set()
    for bug in checks.BUGS:
        broken["DIAGNOSES"][name] = bug
        symptoms.add(message_of(broken[name]))
    assert len(symptoms) == 1 and "diagnosis" not in symptoms.pop()


SOURCES = {
    "x = 1": "There is no function entropy in this file.",
    "entropy = 3": "There is no function entropy in this file. Write def entropy(...), not",
    "entropy = lambda w: w": "There is no function entropy in this file. Write def entropy(...)",
    "def entropy(w):\n    return missing": "It raises NameError in line 2: ",
    "def entropy(w):\n    raise SystemExit": "It raises SystemExit in line 2",
    "def entropy():\n    return 1": "It raises TypeError: entropy() takes 0",
    "def entropy(w):\n    raise NotImplementedError('for Half')": (
        "It raises NotImplementedError in line 2: for Half"
    ),
    "def entropy(w):\n    return w.to_sparse().sum(-1)": "Its result cannot be checked: ",
    "def entropy(w):\n    return entropy(w)": "It raises RecursionError",
}


@pytest.mark.parametrize("source", SOURCES)
def test_any_function_gets_a_message(source):
    with pytest.raises(checks.Wrong) as wrong:
        checks.check_name(load("mine.py", source), "entropy")
    assert str(wrong.value).startswith(SOURCES[source])


def test_unknown_names_are_errors():
    with pytest.raises(ValueError, match="lesson must be 1 to 7 or 'find_the_bug': 8"):
        checks.report(8)
    for call in (lambda: checks.hint("norm"), lambda: checks.check(path_of)):
        with pytest.raises(ValueError, match="the exercise must be one of entropy, "):
            call()
    with pytest.raises(ValueError, match="must be named like an exercise"):
        checks.add_tests({"x": 1})


def test_hints_come_one_by_one(capsys):
    hints = checks.EXERCISES["entropy"].hints
    for _ in range(len(hints) + 1):
        checks.hint("entropy")
    lines = capsys.readouterr().out.splitlines()
    expected = [f"Hint {i} of {len(hints)}: {text}" for i, text in enumerate(hints, start=1)]
    assert lines == [*expected, "There are no more hints for entropy."]


def test_check_leaves_the_random_numbers_alone():
    before = torch.random.get_rng_state()
    message_of(load(path_of(2))["linear_attention"])
    assert torch.equal(torch.random.get_rng_state(), before)


@solved
def test_check_works_under_any_defaults_and_restores_them():
    product = "return (direction[None] @ torch.eye(3))[0], keys"
    correct = solution("counterexample", "return direction, keys", product)
    wrong = load("mine.py", "import torch\ndef entropy(w):\n    return torch.zeros(w.shape[:-1])")
    before = torch.get_default_dtype(), torch.get_num_threads()
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        with torch.inference_mode(), torch.autocast("cpu"):
            assert message_of(correct) is None
            assert "dtype torch.float32" in message_of(wrong["entropy"])
            assert torch.is_inference_mode_enabled() and torch.is_autocast_enabled("cpu")
        assert torch.get_default_dtype() == torch.float64
        assert torch.get_default_device().type == "meta"
        with torch.no_grad():
            assert message_of(solution("linear_attention")) is None
            assert not torch.is_grad_enabled()
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(before[0])
    leak = (
        "import torch\ndef entropy(w):\n    torch.set_default_dtype(torch.float64)\n"
        "    torch.set_grad_enabled(False)\n    torch.set_num_threads(3)"
    )
    assert "None" in message_of(load("mine.py", leak)["entropy"])
    assert (torch.get_default_dtype(), torch.get_num_threads()) == before
    assert torch.is_grad_enabled()


# --- A fresh process for each file ----------------------------------------------------------------

SAMPLE = [  # the first and the last lesson: marking treats all lessons alike
    path_of(lesson, folder)
    for folder in (checks.FOLDER, SOLUTIONS)
    if folder.exists()
    for lesson in (LESSONS[0], LESSONS[-1])
]
posix = pytest.mark.skipif(os.name != "posix", reason="signals are different on Windows")


def lesson_of(path):
    return path.stem if path.stem == "find_the_bug" else int(path.stem[-1])


def names_of(lesson):
    return [name for name, exercise in checks.EXERCISES.items() if exercise.lesson == lesson]


def mark_all(paths):
    """The result of marking.mark for each file, two files at a time."""
    with ThreadPoolExecutor(2) as pool:
        results = pool.map(lambda path: marking.mark(path, names_of(lesson_of(path))), paths)
        return dict(zip(paths, results, strict=True))


def write(path, source):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(source.encode() if isinstance(source, str) else source)
    return path


def report(path, capsys):
    checks.report(1, path)
    return capsys.readouterr().out.splitlines()


@pytest.fixture(scope="module")
def marked():
    return mark_all(SAMPLE)


@pytest.mark.parametrize("path", SAMPLE, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_all_ways_of_marking_agree(path, marked, monkeypatch, capsys):
    """checks.report, the tests for pytest, and checks.check in this process."""
    monkeypatch.setattr(marking, "mark", lambda path, names: marked[Path(path)])
    lesson, lines, tests = lesson_of(path), [], []
    namespace = load(path) | {"__file__": str(path)}
    checks.add_tests(namespace)

    def line(name, test):
        try:
            test()
            return f"{name}: right"
        except checks.NotDone as error:
            return f"{name}: {error}"
        except checks.Wrong as error:
            return f"{name}: wrong - {error}"

    for name in names_of(lesson):
        lines.append(line(name, lambda name=name: checks.check(namespace[name])))
        tests.append(line(name, namespace[f"test_{name}"]))
    checks.report(lesson, path)
    assert capsys.readouterr().out.splitlines() == lines == tests
    if path.parent == SOLUTIONS:
        assert all(line.endswith(": right") for line in lines)
    elif lesson != "find_the_bug":
        assert all(line.endswith(": not done yet") for line in lines)
    else:
        symptoms = ("padding", "in its future", "the norm cancels")
        for line, symptom in zip(lines, symptoms, strict=True):
            assert symptom in line and not any(name in line for name in checks.BUGS)


def test_report_takes_the_file_of_the_exercises_by_default(monkeypatch, capsys):
    paths = []
    monkeypatch.setattr(marking, "mark", lambda path, names: paths.append(path) or ({}, ""))
    checks.report(3)
    checks.report("find_the_bug")
    assert paths == [path_of(3), path_of("find_the_bug")]


LEAKS = """
import os, random, sys
import numpy, torch
torch.set_default_dtype(torch.float64)
torch.set_grad_enabled(False)
torch.set_num_threads(3)
random.seed(5), numpy.random.seed(5), torch.manual_seed(5)
os.environ["LEAK"] = "1"
sys.modules["leak"] = sys
sys.path.insert(0, os.getcwd())
os.chdir("..")
"""
STATE = """
import os, random, sys
import numpy, torch
from pathlib import Path
print(torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads())
print(Path.cwd() == Path(__file__).parent == Path(sys.path[0]), "leak" in sys.modules, __name__)
print([x for x in os.environ if x.startswith(("PYTHON", "PYTEST", "LEAK"))])
print(random.random(), numpy.random.rand(), torch.rand(()).item())
"""


@solved
def test_no_file_changes_the_mark_of_the_next(tmp_path, monkeypatch, capsys):
    """alice's file changes the default dtype and uses it; bob's only uses it."""
    monkeypatch.setitem(marking.ENVIRONMENT, "OMP_NUM_THREADS", "2")
    source = path_of(1, SOLUTIONS).read_text(encoding="utf-8")
    old = "return -(share * log).sum(dim=-1)"
    single = source.replace(old, f"{old}.to(torch.get_default_dtype())")
    assert single != source
    alice = write(tmp_path / "alice" / "lesson_1.py", LEAKS + single)
    bob = write(tmp_path / "bob" / "lesson_1.py", STATE + single)
    expected = [f"{name}: right" for name in names_of(1)]
    assert report(alice, capsys) == expected
    lines = report(bob, capsys)
    assert lines[:3] == [
        "  | torch.float32 True 1",
        "  | True False lesson_1",
        "  | ['PYTHONHASHSEED']",
    ]
    torch.manual_seed(0)
    numbers = [float(x) for x in lines[3].split()[1:]]
    assert numbers == [random.Random(0).random(), 0.5488135039273248, torch.rand(()).item()]
    assert lines[4].startswith("entropy: wrong - The result has dtype torch.float32, expected")
    assert lines[5:] == expected[1:]


ODD = """\ufefffrom __future__ import annotations
from dataclasses import dataclass
from helper import answer
@dataclass
class Point:
    x: float = answer
"""


@solved
def test_pytest_and_report_import_a_file_as_python_does(tmp_path, capsys, monkeypatch):
    """With a byte order mark, a module next to it and a dataclass, which looks up its module."""
    source = ODD + path_of(1, SOLUTIONS).read_text(encoding="utf-8")
    write(tmp_path / "helper.py", "answer = 42.0")
    path = write(tmp_path / "Lösung 1 (2).py", source)
    assert report(path, capsys) == [f"{name}: right" for name in names_of(1)]
    assert {each.name for each in tmp_path.iterdir()} == {"helper.py", path.name}
    bob = 'print("bob was here")\n' + path_of(1).read_text(encoding="utf-8")
    files = [
        write(tmp_path / "alice.py", source),
        write(tmp_path / "bob.py", bob),
        write(tmp_path / "find_the_bug.py", path_of("find_the_bug").read_bytes()),
    ]
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)  # it would change the output
    result = run("-m", "pytest", *map(str, files))
    assert result.returncode == 1 and "6 failed, 3 passed" in result.stdout
    assert result.stdout.count("FAILED") == result.stdout.count("::") == 6
    assert result.stdout.count("bob.py::") == 3 and "bob was here" in result.stdout
    assert result.stdout.count("E   nala_min.course.checks.NotDone: not done yet") == 3
    assert "E   nala_min.course.checks.Wrong: A query with an eighth of the norm" in result.stdout
    assert len(result.stdout.splitlines()) < 80 and "raise " not in result.stdout


@solved
def test_a_check_that_hangs_or_exits_costs_one_mark(tmp_path, monkeypatch, capsys):
    """report does not mistake the file's output for verdicts."""
    monkeypatch.setattr(marking, "TIME_LIMIT", 2)
    source = path_of(1, SOLUTIONS).read_text(encoding="utf-8")
    source = source.replace("share = weights / torch", "while True: pass\n    share = torch", 1)
    source = source.replace("scores = q @ k.mT", 'print("entropy: right"), os._exit(0)', 1)
    source = f"import os\n{source}\nchecks.report(1, __file__)\n"
    path = write(tmp_path / "mine.py", source)
    assert report(path, capsys) == [
        "  | entropy: right",
        "entropy: wrong - It did not end within 2 s: is there an endless loop?",
        "softmax_weights: wrong - It ends Python with exit code 0: remove the call that does so.",
        "entropy_slope: right",
    ]


FILES = {
    "def entropy(weights:\n    pass": "It raises SyntaxError in line 1: ",
    "import torch\n\n1 / 0": "It raises ZeroDivisionError in line 3: division by zero",
    "raise SystemExit(0)": "It raises SystemExit in line 1: 0",
    "raise KeyboardInterrupt": "It raises KeyboardInterrupt in line 1: ",
    "x = 'é'".encode("latin-1"): "It raises SyntaxError",
    "import os\nos._exit(0)": "It ends Python with exit code 0",
    "while True: pass": "It did not end within 2 s",
    "while True: print(1000 * 'x')": "It prints more than 1 MB",
}


def test_a_file_that_cannot_be_imported_has_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(marking, "TIME_LIMIT", 2)
    monkeypatch.setattr(marking, "PRINT_LIMIT", 1)
    sources = dict(enumerate(FILES))
    paths = [write(tmp_path / str(i) / "lesson_1.py", sources[i]) for i in sources]
    for (verdicts, printed), message in zip(mark_all(paths).values(), FILES.values(), strict=True):
        assert verdicts.keys() == {"lesson_1.py"} and len(printed) <= 10_000
        assert verdicts["lesson_1.py"].startswith(f"wrong - {message}")
        assert "\n" not in verdicts["lesson_1.py"]


CRASH = """
import os, torch
def help(x):
    return torch.zeros(2)[x]
def softmax_weights(q, k, causal):
    return help(5)
def entropy(w):
    os.kill(os.getpid(), 9)
"""


@posix
def test_a_crash_has_its_signal_and_an_error_its_traceback(tmp_path, monkeypatch, capsys):
    """The traceback is for pytest: report prints one line."""
    path = write(tmp_path / "torch.py", CRASH)
    verdicts, _ = marking.mark(path, ["softmax_weights", "entropy"])
    assert verdicts.keys() == {"softmax_weights", "entropy"}
    assert verdicts["entropy"].startswith("wrong - Python crashes (SIGKILL): ")
    message, *trace = verdicts["softmax_weights"].splitlines()
    assert message.startswith("wrong - It raises IndexError in line 4: index 5 is out of")
    assert any("line 6, in softmax_weights" in line for line in trace)
    monkeypatch.setattr(marking, "mark", lambda path, names: (verdicts, ""))
    assert [line.split(":")[0] for line in report(path, capsys)] == ["softmax_weights", "entropy"]


def test_a_path_without_a_python_file_has_one_line(tmp_path, capsys):
    write(tmp_path / "mine.txt", "x = 1")
    for path in (tmp_path, tmp_path / "none.py", str(tmp_path / "mine.txt"), "\0.py"):
        (line,) = report(path, capsys)
        assert ": wrong - There is no Python file " in line and "path of a .py file" in line


def test_a_process_that_does_not_start_is_not_the_student_s_mistake(tmp_path, monkeypatch):
    monkeypatch.setattr(marking, "CODE", "raise SystemExit('no torch')")
    with pytest.raises(RuntimeError, match=r"mine\.py was not marked: .* no torch"):
        marking.mark(write(tmp_path / "mine.py", "x = 1"), ["entropy"])


def test_in_a_notebook_the_tests_run_in_its_process():
    namespace = {"entropy": lambda weights: weights}
    checks.add_tests(namespace)
    with pytest.raises(checks.Wrong, match=r"Write def entropy"):
        namespace["test_entropy"]()


BEAT = """
import time
while True:
    time.sleep(0.05)
    with open("beat", "ab") as file:
        file.write(b"x")
"""


@posix
def test_no_process_outlives_its_caller(tmp_path):
    """Ctrl-C also ends the processes that the file started; killing the caller ends marking."""
    child = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {BEAT!r}])\n"
    sources = {signal.SIGINT: f"{child}while True: pass", signal.SIGKILL: BEAT}
    callers, beats = [], []
    for sig, source in sources.items():
        path = write(tmp_path / sig.name / "mine.py", source)
        code = f"from nala_min.course import checks; checks.report(1, {str(path)!r})"
        options = {"cwd": checks.FOLDER.parents[1], "stderr": subprocess.DEVNULL}
        callers.append(subprocess.Popen([sys.executable, "-c", code], **options))
        beats.append(path.with_name("beat"))
    for caller, beat, sig in zip(callers, beats, sources, strict=True):
        deadline = time.monotonic() + 60
        while not beat.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        caller.send_signal(sig)
        assert caller.wait(timeout=5) == -sig
    time.sleep(1)
    sizes = [beat.stat().st_size for beat in beats]
    time.sleep(1)
    assert sizes == [beat.stat().st_size for beat in beats]


def run(*arguments):
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=checks.FOLDER.parents[1]
    )


def test_checks_need_neither_pytest_nor_jupyter():
    code = "import sys; from nala_min.course import checks; print(checks and sorted(sys.modules))"
    result = run("-O", "-c", code)
    assert result.returncode == 0
    assert not {"'pytest'", "'IPython'", "'ipykernel'"} & set(
        result.stdout.strip("[]\n").split(", ")
    )
