"""The exercises: loops, solutions and checkers are right, each typical mistake gets its sentence,
and no hand-in fools a checker or stops the marking."""

import os
import subprocess
import sys
from math import log, tanh

import pytest
import torch

from nala_min.course import checks
from nala_min.course.exercises import EXERCISES, HINTS, LESSONS

each_lesson = pytest.mark.parametrize("lesson", LESSONS)


def read(lesson, solved=False):
    """The source of the stubs of a lesson, or of its solutions."""
    folder = checks.FOLDER / "solutions" if solved else checks.FOLDER
    if not folder.exists():
        pytest.skip("no solutions: a teacher removed them")
    name = lesson if lesson == "find_the_bug" else f"lesson_{lesson}"
    return (folder / f"{name}.py").read_text(encoding="utf-8")


def load(source):
    """The namespace of a hand-in with this source."""
    namespace = {"__name__": "hand_in", "__file__": "mine.py"}
    exec(compile(source, "mine.py", "exec"), namespace)
    return namespace


def solution(name, old="", new=""):
    """The file with the solution of an exercise, with old replaced by new. old must occur exactly
    once: in the function or, failing that, in the file. If it is empty, new is the last line."""
    source = read(next(lesson for lesson in LESSONS if name in LESSONS[lesson]), solved=True)
    body = source[source.index(f"def {name}(") :].split("\n\n\n")[0]
    part = body if old in body else source
    old = old or (new and body[body.rindex("\n") + 1 :])
    assert not old or part.count(old) == 1, f"{part.count(old)} occurrences of {old!r} in {name}"
    return load(source.replace(part, part.replace(old, new)) if old else source)


def verdict_on(namespace, name):
    """ "right", or the sentence that says what is wrong."""
    try:
        checks.check_name(namespace, name)
    except checks.Wrong as error:
        return str(error)
    return "right"


# Worked by hand: (lesson, specification, arguments, result).
KEYS, VALUES, STATE = [[1.0, 0.0], [1.0, 3.0]], [[8.0], [4.0]], [[8.0, 1.0], [24.0, 3.0]]
LOOPS = [
    (1, "entropy", ([1.0, 1.0, 0.0, 2.0],), 1.5 * log(2)),
    (1, "softmax_weights", ([2.0, 0.0, 0.0, 0.0], [[log(3), 9, 9, 9], [0, 9, 9, 9]]), [0.75, 0.25]),
    (1, "entropy_slope", ([0.0, log(3)], 1.0), -3 / 16 * log(3) ** 2),
    (2, "linear_attention", ([1.0, 1.0], KEYS, VALUES), [4.8]),
    (2, "relative_change", ([3.0, 4.0], [3.0, 9.0]), 1.0),
    (2, "dropped_share", ([-1.0, 2.0, 1.0], [-2.0, -1.0, 4.0]), 0.25),
    (3, "query_magnitude", ([3.0, -4.0], 2.0, 0.5), [0.75 ** (1 + 2 * tanh(5)), 1.0]),
    (3, "power_slope", (0.0, 2.0), 2.0),
    (3, "nala_entropy", (9.0, [0.6, 0.8], [[2.0, 0.0], [0.0, 2 * 0.75**1.5]]), log(2)),
    (4, "cosine_product", ([2.0, 1.0], [9.0, 9.0], [3.0, 5.0], [9.0, -9.0], 20.0), 6.0),
    (4, "split_product", ([2.0, 1.0], [0.1, 0.9], [3.0, 5.0], [0.9, -0.1]), 6.0),
    (5, "causal_attention", (KEYS, KEYS, VALUES), [[8.0], [4 + 4 / 11]]),
    (5, "recurrent_step", (STATE, [1.0, 1.0], [0.0, 4.0], [4.0]), ([6.0], [[8, 1], [40, 7]])),
    (6, "interference", ([[1.0, 0.0], [1.0, 3.0], [0.0, 0.0]],), [1 / 2, 1 / 11, 0.0]),
    (7, "decay_step", (STATE, [1.0, 2.0], [4.0, 5.0], [0.5, 0.25]), [[8.0, 5.5], [14.0, 10.75]]),
    (7, "delta_step", ([[1.0], [3.0]], [0.6, 0.8], [2.0], 0.5), [[0.7], [2.6]]),
]


def flat(x):
    return [y for part in x for y in flat(part)] if isinstance(x, (list, tuple)) else [x]


def test_the_loops_are_right():
    for lesson, name, arguments, expected in LOOPS:
        result = load(read(lesson))[f"{name}_by_loops"](*arguments)
        assert flat(result) == pytest.approx(flat(expected), abs=1e-6), name


@each_lesson
def test_a_stub_is_refused_and_differs_from_its_solution_in_the_body_only(lesson):
    verdicts = [verdict_on(load(read(lesson)), name) for name in LESSONS[lesson]]
    if lesson == "find_the_bug":
        for symptom, verdict in zip(("padding", "future", "cancels"), verdicts, strict=True):
            assert symptom in verdict and "DIAGNOSES has no name" in verdict
        return
    assert set(verdicts) == {"not done yet"}
    lines = iter(read(lesson, solved=True).splitlines())
    stubs = read(lesson).replace("    raise NotImplementedError\n", "").splitlines()
    assert all(line in lines for line in stubs)  # in this order


# --- Mistakes -------------------------------------------------------------------------------------

DIVIDED = "numerator / denominator.masked_fill(denominator == 0, 1.0)"


def rows_of(table):
    """{exercise: [(old code or "" for the last line, new code, words of the verdict)]}."""
    exercises = {}
    for line in table.strip().splitlines():
        if not line.startswith(" "):
            rows = exercises[line] = []
            continue
        code, _, words = line.replace("$DIVIDED", DIVIDED).partition(" |")
        old, arrow, new = code.partition(" ->")
        rows.append((*((old.strip(), new.strip()) if arrow else ("", old)), words.strip()))
    return exercises


# How to change a solution, and the verdict on it: mistakes and some other right answers.
CHANGES = rows_of("""
entropy
    return (share * log).sum(dim=-1) | minus sign
    return -(share * share.log2()).sum(dim=-1) | in bits
    return -(share * log).sum(dim=-1, keepdim=True) | shape (2, 3, 1), expected (2, 3)
    return -(share * log).mean(dim=-1) | 0.2 times
    return -(share * log).float().sum(dim=-1) | dtype torch.float32
    -(share * log).sum(dim=-1) | is a return missing
    weights / torch.where(total > 0, total, 1.0) -> weights | divide by their sum
    weights / torch -> weights.div_(total) / torch | weights in place
    torch.where(total > 0, total, 1.0) -> (total + 1e-12) | 1e-20
    torch.where(total > 0, total, 1.0) -> total | NaN at index (1,)
    .masked_fill(share == 0, 1.0) -> | NaN at index (0,) (weights of 0)
    .masked_fill(share == 0, 1.0) -> .add(1e-9) | nearly right
    .masked_fill(share == 0, 1.0) -> .clamp_min(1e-300) | In float32
    .masked_fill(share == 0, 1.0) -> .clamp_min(torch.finfo(share.dtype).tiny) | right
softmax_weights
    / math.sqrt(q.shape[-1]) -> | not divided
    math.sqrt(q.shape[-1]) -> q.shape[-1] | divided by D
    return torch.softmax(scores, dim=-2) | softmax over the keys
    .masked_fill(future, -math.inf) -> .masked_fill(future, 0.0) | in its future (causal=True)
    .masked_fill(future, -math.inf) -> .masked_fill(future, -1e9) | below the mask
    .masked_fill(future, -math.inf) -> - math.inf * future | inf times 0
    .triu(1) -> .triu(0) | Token 0 sees no key
entropy_slope
    return c * variance | wrong sign
    return -c * c * variance | too many
    return -c * variance.sqrt() | standard deviation
    return -c * scores.var(dim=-1) | divided by N - 1
    return -c * scores.var(dim=-1, correction=0) | weighted by p.
    (p * scores).sum(dim=-1, -> scores.mean(dim=-1, | mean of the scores
    softmax(c * scores, -> softmax(scores, | c is missing in p
linear_attention
    return numerator | not to 1
    return numerator / (denominator + 1e-6) | is an eps added
    return numerator / (denominator + 1e-12) | a million times smaller
    return torch.where(denominator == 0, 0.0, numerator / denominator) | respect to phi_q is NaN
    phi_k.sum(dim=2)[ -> phi_k.sum(dim=2).sum(dim=1, keepdim=True)[ | Heads are mixed
    phi_k.sum(dim=2)[ -> phi_k.sum(dim=2).sum(dim=0, keepdim=True)[ | Examples of a batch are mixed
    phi_q @ sums -> phi_q @ phi_k.mT @ v | memory is quadratic
    phi_q @ sums -> 0 * [k.sum() for k in phi_k.unbind(2)][0] + phi_q @ sums | loops over single
    phi_k.mT @ v -> (phi_k[..., None] * v[..., None, :]).sum(dim=2) | F x M numbers
norm_microscope
    (factor * q, k, v) -> (factor * q, factor * k, v) | keys are changed
    (factor * q, k, v) -> (3.0 * q, k, v) | never called
    return torch.linalg.vector_norm(changed - out) / changed.norm() | the changed output
    return changed.norm() / out.norm() - 1 | difference of norms
    return ((changed - out).norm(dim=-1) / out.norm(dim=-1)).mean() | mean over tokens
    return ((changed - out).norm() / out.norm()).item() | right
dropped_share
    (torch.relu(-q) * torch.relu(-k)) -> ((q * k).abs() - q.relu() * k.relu()) | opposite signs
    return dropped / torch.relu(q * k).sum(dim=-1) | those that agree
    return dropped / (q * k).sum(dim=-1) | without absolute values
    return dropped / (total + 1e-12) | no eps and no clamp
query_magnitude
    return ratio * power | the norm cancels
    return ratio.pow(power) * q.sign() | magnitude is negative
    return torch.exp(power * ratio.log()) | gradient with respect to q is NaN
    return (ratio * norm).pow(power) / norm.pow(power) | Divide by the largest
    vector_norm(q, dim=-1, keepdim=True) -> vector_norm(q) | Queries are mixed
    torch.tanh(norm) -> torch.tanh(norm.detach()) | is the norm detached
    lam * (tau + torch.tanh(norm)) -> lam * (tau + norm) | tanh is missing
    lam * (tau + torch.tanh(norm)) -> tau + lam * torch.tanh(norm) | outside the brackets
    lam * (tau + torch.tanh(norm)) -> tau + torch.tanh(norm) | lam is missing
power_slope
    return lam * (0.5 + torch.tanh(norm)) | not its slope
    return lam * (1 - torch.tanh(norm)) | not squared
    return lam * (1 + torch.tanh(norm).square()) | subtract the square
    return lam * torch.tanh(norm).square() | subtract that
counterexample
    return direction.flip(0), keys | entropy falls
    return direction, 1 + 0 * keys | hardly changes
    return direction[:2] / direction[:2].norm(), keys[:, :2] | three or more
    return torch.tensor([0.8, 0.6, 0.0]), keys | Channel 2 of the direction is 0
    return direction, keys * torch.tensor([1.0, 1.0, 0.0]) | Channel 2 is 0 in all keys
    return keys, direction | wrong order
    return direction, keys * (torch.arange(8) > 0)[:, None] | key is zero
    return torch.tensor([0.7, 0.5, 0.5, 0.1]), keys[:, [0, 1, 2, 0]].double() | right
cosine_features
    (math.pi / 4) * torch -> torch | negative product
    (math.pi / 4) * torch -> 45 * torch | 45 degrees are pi/4
    torch.tanh(alpha * direction) -> alpha * direction | expected almost 0
    angle.sin() -> angle.cos() | norm of the features
sign_split
    (direction > 0) -> (direction >= 0) | direction 0
    < 0) -> > 0) | hold the positive
    magnitude * (direction < 0) -> 0 * magnitude | negative channels are lost
    return torch.cat([direction > 0, direction < 0], dim=-1).double() | The magnitude is missing
    return torch.cat([magnitude * direction, -magnitude * direction], -1).relu() | use only its sign
recurrent_step
    return $DIVIDED | two tensors
    return numerator, state | not divided
    return $DIVIDED, state.detach() | right, but the gradient with respect to state
    state = state + phi_k -> state = phi_k | forgets
    [v, torch.ones_like(v[..., :1])] -> [torch.ones_like(v[..., :1]), v] | first column
chunked_attention
    (q @ k.mT).tril() -> (q @ k.mT) | in its future
    q @ state + -> q @ (state + k.mT @ value) + | already holds
    state = state + k.mT @ value -> state = k.mT @ value | which it should see
interference
    return own / total | the others have the rest
    phi_k.square().sum -> phi_k.sum | sum of squares
    own = phi_k.square() -> own = phi_k.detach().square() | gradient with respect to phi_k
    (phi_k * phi_k.sum(dim=2, keepdim=True)) -> (phi_k @ phi_k.mT) | Its memory is quadratic
own_features
    return split | squared error of 0.7
    return x.repeat(1, 1, 1, 2).relu() | All features
    return torch.cat([x, -x], dim=-1) | feature is negative
    return split**4 * split.sum(dim=2, keepdim=True) | when it is alone
    return split.detach() ** 4 | No gradient reaches x
decay_step
    return decay[..., None] * (state + k[..., None] * v[..., None, :]) | also fades
    return (1 - decay[..., None]) * state + k[..., None] * v[..., None, :] | by 1 - decay
    return state + (decay * k)[..., None] * v[..., None, :] | key fades
    decay[..., None] * -> decay.mean(-1)[..., None, None] * | every feature
delta_step
    share[..., None] * (v - read) -> v - share[..., None] * read | but not v
    share[..., None] * (v - read) -> share[..., None] * v - read | but not what
    (v - read) -> v | removes nothing
attention_a
    "padding in the normaliser" -> "eps too large" | 'eps too large' is wrong
    "padding in the normaliser" -> "a cold" | 'a cold' is not in
    (x, dim=-1) -> (x, dim=-1, eps=1e-2) | (small keys)
    phi_k = phi_k * key_mask[:, None, :, None] -> | is padding
attention_b
    (phi_q @ phi_k.mT).tril() -> (phi_q @ phi_k.mT) | lies in its future
attention_c
    ratio**power -> ratio ** power.clamp_min(1.501) | (queries of norm 1e-4)
""")


@each_lesson
def test_a_solution_is_right_and_each_mistake_gets_its_sentence(lesson):
    for name in LESSONS[lesson]:
        assert checks.check(solution(name)[name]) is None
        for old, new, words in CHANGES[name]:
            verdict = verdict_on(solution(name, old, new), name)
            assert verdict == words if words == "right" else words in verdict, (name, new, verdict)


@each_lesson
def test_hard_coded_results_are_refused(lesson):
    """A function that gives one result for all arguments of the same shapes."""
    for name in LESSONS[lesson] if lesson != 3 else ("query_magnitude", "power_slope"):
        function, results = solution(name)[name], {}

        def student(*arguments, function=function, results=results):
            shapes = str([(x.shape, x.dtype) for x in arguments if isinstance(x, torch.Tensor)])
            if shapes not in results:
                results[shapes] = function(*arguments)
            return results[shapes]

        assert verdict_on({name: student}, name) != "right"


def test_every_exercise_has_mistakes_and_any_function_gets_a_sentence():
    names = [name for lesson in LESSONS.values() for name in lesson]
    assert names == list(EXERCISES) == list(HINTS) == list(CHANGES)
    for source, words in {
        "entropy = 3": "There is no function entropy",
        "def entropy(w):\n    return missing": "NameError in line 2: name 'missing'",
        "def entropy(w):\n    raise SystemExit": "SystemExit in line 2",
        "def entropy():\n    return 1": "It raises TypeError: entropy() takes 0",
        "def entropy(w):\n    raise NotImplementedError('Half')": "Error in line 2: Half",
        "def entropy(w):\n    return w.to_sparse().sum(-1)": "cannot be checked",
    }.items():
        assert words in verdict_on(load(source), "entropy")
    function = solution("entropy")["entropy"]  # a decorator may hide the names of its arguments
    assert verdict_on({"entropy": lambda *args: function(*args)}, "entropy") == "right"
    hidden = "entropy = (lambda f: lambda *x: f(*x))(entropy)\nchecks.check(entropy)"
    exec(hidden, {"entropy": function, "checks": checks})
    verdict = verdict_on({"entropy": lambda *args: function(*args).detach()}, "entropy")
    assert "No gradient reaches argument 1" in verdict
    broken = load(read("find_the_bug"))
    before = verdict_on(broken, "attention_a").partition(" DIAGNOSES")[0]
    for bug in ("padding in the normaliser", "own token unseen"):  # judged only after the fix
        broken["DIAGNOSES"]["attention_a"] = bug
        assert verdict_on(broken, "attention_a") == before


# --- What a student and a teacher call ------------------------------------------------------------


def test_hints_come_one_by_one_and_unknown_names_are_errors(capsys):
    for _ in range(4):
        checks.hint("power_slope")
    (first, second), last = HINTS["power_slope"], "There are no more hints for power_slope."
    lines = [f"Hint 1 of 2: {first}", f"Hint 2 of 2: {second}", last, last]
    assert capsys.readouterr().out.splitlines() == lines
    wrong = (checks.hint, "norm"), (checks.check, read), (checks.report, 8), (checks.add_tests, {})
    for function, argument in wrong:
        with pytest.raises(ValueError, match="must be"):
            function(argument)


def test_a_check_works_under_any_defaults_and_restores_them():
    leak = "torch.set_default_dtype(torch.float64), torch.set_grad_enabled(False), torch.rand(3)"
    numbers = torch.random.get_rng_state()
    assert "None" in verdict_on(load(f"import torch\ndef entropy(w):\n    {leak}"), "entropy")
    assert torch.get_default_dtype() == torch.float32
    with torch.inference_mode():
        assert verdict_on(solution("linear_attention"), "linear_attention") == "right"
        assert torch.is_inference_mode_enabled()
    assert torch.equal(torch.random.get_rng_state(), numbers)


def test_a_report_and_pytest_have_a_line_or_test_per_exercise(monkeypatch, capsys):
    """What the file prints comes first. Its lesson is the one most of its functions belong to."""
    names, calls = LESSONS[1], []
    verdicts = dict(zip(names, ["right", "not done yet", "wrong - No."], strict=True))
    marked = verdicts, "a print\nand b"
    monkeypatch.setattr(checks, "mark", lambda *file: calls.append(file) or marked)
    checks.report(1)
    lines = ["  | a print", "  | and b", *(f"{name}: {v}" for name, v in verdicts.items())]
    assert capsys.readouterr().out.splitlines() == lines
    checks.report("find_the_bug", "mine.py")
    bugs = ("attention_a", "attention_b", "attention_c")
    assert calls == [(checks.FOLDER / "lesson_1.py", names), ("mine.py", bugs)]
    file = dict.fromkeys(["decay_step", "entropy", "entropy_slope"]) | {"__file__": "mine.py"}
    checks.add_tests(file)
    assert [name for name in file if name.startswith("test_")] == [f"test_{x}" for x in names]
    file["test_entropy"]()
    for name, sentence in (("softmax_weights", "not done yet"), ("entropy_slope", "No.")):
        with pytest.raises(checks.Wrong) as error:
            file[f"test_{name}"]()
        assert str(error.value) == sentence and "a print" in capsys.readouterr().out


# --- A fresh process for each file ----------------------------------------------------------------


def mark(folder, source):
    """The verdicts on a file with this source, as lesson 1, and what it prints."""
    path = folder / "mine.py"
    path.write_text(source, encoding="utf-8")
    return checks.mark(path, LESSONS[1])


def test_a_file_that_cannot_be_read_and_a_process_that_cannot_start(tmp_path, monkeypatch):
    (tmp_path / "mine.txt").touch()
    for path in (tmp_path, tmp_path / "none.py", str(tmp_path / "mine.txt"), "\0.py"):
        verdicts, printed = checks.mark(path, ["entropy"])
        assert "There is no Python file" in verdicts[os.path.basename(path)] and printed == ""
    monkeypatch.setattr(checks, "CODE", "raise SystemExit('no torch')")  # not a student's mistake
    with pytest.raises(RuntimeError, match=r"mine\.py was not marked: .* no torch"):
        mark(tmp_path, "x = 1")


ODD = """\ufefffrom __future__ import annotations
import os, sys, torch, helper
print(os.getcwd() == os.path.dirname(__file__) == sys.path[0], sys.argv == [__file__])
torch.set_default_dtype(torch.float64)
"""


@pytest.mark.slow
def test_a_file_is_marked_as_python_runs_it(tmp_path, monkeypatch):
    """From its folder, with a byte order mark, a module next to it and a default dtype of its own.
    It calls report itself. pytest shows no more than a sentence."""
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    (tmp_path / "helper.py").touch()
    source = read(1, solved=True).replace("return -c * variance", "raise NotImplementedError")
    verdicts, printed = mark(tmp_path, f"{ODD}{source}\nchecks.report(1, __file__)\n")
    done = {"entropy": "right", "softmax_weights": "right"}
    assert verdicts == done | {"entropy_slope": "not done yet"}
    assert printed == "True True\n"
    command = [sys.executable, "-m", "pytest", tmp_path / "mine.py"]
    shown = subprocess.run(command, capture_output=True, text=True, cwd=checks.ROOT).stdout
    assert "1 failed, 2 passed" in shown and "Wrong: not done yet" in shown and printed in shown
    assert len(shown.splitlines()) < 50 and "raise " not in shown


@pytest.mark.slow
def test_a_file_that_hangs_ends_or_floods_costs_no_more_than_its_mark(tmp_path, monkeypatch):
    """What it prints is not mistaken for a verdict. 9**9**9 keeps Python's lock."""
    monkeypatch.setattr(checks, "TIME_LIMIT", 30)
    monkeypatch.setattr(checks, "PRINT_LIMIT", 1e6)
    source = read(1, solved=True).replace("share = weights", "9**9**9\n    share = weights")
    source = source.replace("scores = q @ k.mT", 'print("right"), __import__("os")._exit(0)')
    verdicts, printed = mark(tmp_path, source)
    assert printed == "right\n" and verdicts["entropy_slope"] == "right"
    assert "did not end within 30 s" in verdicts["entropy"]
    assert "exit code 0" in verdicts["softmax_weights"]
    for source, words in {
        "def entropy(weights:\n    pass": "SyntaxError in line 1",
        "import os\nos.abort()": "Python crashes",
        "while True: print(1000 * 'x')": "prints more than 1 MB",
    }.items():
        verdicts, printed = mark(tmp_path, source)
        assert words in verdicts.pop("mine.py") and not verdicts and len(printed) <= 10_000
