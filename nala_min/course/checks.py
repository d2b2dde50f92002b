"""Checks the exercises in notebooks/exercises and says in one sentence what is wrong.

    from nala_min.course import checks
    checks.report(1)                # one line per exercise of lesson 1
    checks.hint("entropy")          # the first hint; call it again for the next
    checks.check(entropy)           # raises Wrong unless this function is right

A file is marked in a fresh process, so no mark depends on what ran before it.
"""

import faulthandler
import functools
import importlib.util
import inspect
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from nala_min.course.diagnose import NotDone, Wrong, describe
from nala_min.course.exercises import BUGS, EXERCISES, HINTS, LESSONS, check_exercise, known

__all__ = ["BUGS", "NotDone", "Wrong", "add_tests", "check", "hint", "mark", "report"]

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "notebooks" / "exercises"
TIME_LIMIT = 60  # seconds for the import of a file, and for each of its exercises
PRINT_LIMIT = 10_000_000  # bytes that a file may print; the first 10,000 are shown
CODE = "import sys; from nala_min.course import checks; checks._run_steps(*sys.argv[1:])"

_hints_given: Counter[str] = Counter()
_is_marking = False  # True in the fresh process, where a file may call checks.report


def check(function: Callable) -> None:
    """Check a student's function against the exercise of the same name, in this process. Raises
    NotDone, or Wrong with a sentence; ValueError if there is no exercise of that name."""
    __tracebackhide__ = True  # pytest shows the sentence, not the code of this file
    caller = inspect.currentframe().f_back.f_globals  # a decorator may hide the function's name
    names = [name for name, x in caller.items() if x is function and name in EXERCISES]
    name = (names or [getattr(function, "__name__", type(function).__name__)])[0]
    check_name(getattr(inspect.unwrap(function), "__globals__", caller) | {name: function}, name)


def report(lesson: int | str, path: str | os.PathLike | None = None) -> None:
    """Print one line per exercise of a lesson, 1 to 7 or "find_the_bug".

    path: the student's file; None means the one in notebooks/exercises. What the file prints comes
    first, after a bar. Raises ValueError for a lesson without exercises.
    """
    if lesson not in LESSONS:
        raise ValueError(f"lesson must be 1 to 7 or 'find_the_bug': {lesson!r}")
    file = f"lesson_{lesson}.py" if isinstance(lesson, int) else f"{lesson}.py"
    verdicts, printed = mark(path or FOLDER / file, LESSONS[lesson])
    for line in printed.splitlines():
        print(f"  | {line}")
    for name, verdict in verdicts.items():
        print(f"{name}: {verdict}")


def hint(name: str) -> None:
    """Print the next hint of an exercise. Raises ValueError if there is no such exercise."""
    hints, given = HINTS[known(name)], _hints_given[name]
    if given == len(hints):
        print(f"There are no more hints for {name}.")
        return
    print(f"Hint {given + 1} of {len(hints)}: {hints[given]}")
    _hints_given[name] += 1


def add_tests(namespace: dict[str, object]) -> None:
    """Add a pytest test, test_<name>, for each exercise of a lesson to the student's file.

    namespace: globals() of the file, which runs once for all its tests. The lesson is the one that
    most of its functions belong to. Raises ValueError if no function is named like an exercise.
    """
    if not EXERCISES.keys() & namespace.keys():
        raise ValueError("at least one function in this file must be named like an exercise")
    names = max(LESSONS.values(), key=lambda names: len(namespace.keys() & names))
    mark_once = functools.cache(lambda: mark(namespace["__file__"], names))

    def make_test(name: str) -> Callable:
        def test() -> None:
            __tracebackhide__ = True
            verdicts, printed = mark_once()
            verdict = verdicts.get(name) or next(iter(verdicts.values()))  # the import failed
            if verdict != "right":
                print(printed)
                raise Wrong(verdict.removeprefix("wrong - "))

        return test

    namespace.update({f"test_{name}": make_test(name) for name in names})


def check_name(namespace: dict[str, object], name: str, dtype: torch.dtype = torch.float32) -> None:
    """Check the function called name in a student's file, with dtype as the default dtype. The
    caller's settings and random numbers are restored."""
    __tracebackhide__ = True
    known(name)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.inference_mode(False), torch.random.fork_rng(devices=[]):  # with gradients
            torch.default_generator.manual_seed(0)  # not those of GPUs, which are not restored
            check_exercise(namespace, name)
    except Wrong as error:
        raise error.with_traceback(None) from error.__cause__
    except Exception as error:  # such as a dictionary where a number is expected
        raise Wrong(f"Its result cannot be checked: {describe(error, '')}") from error
    finally:
        torch.set_default_dtype(before)


def mark(path: str | os.PathLike, names: Collection[str]) -> tuple[dict[str, str], str]:
    """Check the named exercises in a file. No mistake in the file raises an error.

    Returns a verdict for each exercise, "right", "not done yet" or "wrong - ...", and what the file
    printed. A file that cannot be imported has a verdict under its own name. An exercise that
    crashes Python, or does not end, loses only its own mark: another process checks the rest.
    """
    path = os.path.abspath(os.path.expanduser(path))
    file, verdicts, printed = os.path.basename(path), {}, ""
    if not os.path.isfile(path) or not file.endswith(".py"):
        return {file: f"wrong - There is no Python file {path}: give the path of one."}, ""
    while not _is_marking and (rest := [name for name in names if name not in verdicts]):
        found, text = _run_process(path, [file, *rest])
        imported = found.pop(file)
        verdicts |= found
        printed += text
        if imported != "right":
            return verdicts | {file: imported}, printed
    return verdicts, printed


def _run_process(path, steps):
    """Run steps, the import of a file and its exercises, in a fresh process. Returns the verdicts
    on those that it reached, and what the file printed."""
    with tempfile.TemporaryDirectory(prefix="nala_min_", ignore_cleanup_errors=True) as folder:
        printed, verdicts, timeout = (Path(folder, x) for x in ("printed", "verdicts", "timeout"))
        command = [sys.executable, "-Bu", "-Xutf8", "-c", CODE, folder, path, str(TIME_LIMIT)]
        options = {"cwd": ROOT, "stdin": subprocess.DEVNULL, "start_new_session": True}
        options["env"] = os.environ | {"PYTHONHASHSEED": "0"}
        with printed.open("wb") as stdout:
            process = subprocess.Popen(command + steps, stdout=stdout, stderr=stdout, **options)
        with process:
            try:
                while process.poll() is None and printed.stat().st_size < PRINT_LIMIT:
                    time.sleep(0.02)
            finally:  # also after Ctrl-C
                process.kill()
                with suppress(OSError, AttributeError):  # and what it has started, unless Windows
                    os.killpg(process.pid, signal.SIGKILL)
        text = printed.read_bytes()[:10_000].decode(errors="replace")
        if not verdicts.exists():  # not the student's fault
            raise RuntimeError(f"{path} was not marked: its process did not start. {text[-500:]}")
        found = verdicts.read_text(encoding="utf-8").splitlines()
        if timeout.stat().st_size:
            failure = f"It did not end within {TIME_LIMIT} s: is there an endless loop?"
        elif printed.stat().st_size >= PRINT_LIMIT:
            failure = f"It prints more than {PRINT_LIMIT / 1e6:g} MB: is there an endless loop?"
        elif 0 <= (code := process.returncode) < 256:
            failure = f"It ends Python with exit code {code}: remove the call that does so."
        else:
            failure = "Python crashes: does it recurse endlessly, or fill the memory?"
    if len(found) < len(steps) and found[:1] in ([], ["right"]):
        found.append(f"wrong - {failure}")
    return dict(zip(steps, found, strict=False)), text


def _run_steps(folder, path, time_limit, file, *names):
    """Run in the fresh process: each step adds a line with its verdict to folder/verdicts."""
    global _is_marking
    _is_marking = True
    sys.argv, sys.path[0] = [path], os.path.dirname(path)
    sys.path.append(str(ROOT))
    os.chdir(sys.path[0])
    spec = importlib.util.spec_from_file_location("hand_in", path)
    module = sys.modules["hand_in"] = importlib.util.module_from_spec(spec)
    torch.set_num_threads(1)
    timeout = open(os.path.join(folder, "timeout"), "w", encoding="utf-8")
    verdicts = open(os.path.join(folder, "verdicts"), "w", encoding="utf-8", buffering=1)
    for step in (file, *names):
        # At the time limit, this writes to the file timeout and ends the process.
        faulthandler.dump_traceback_later(float(time_limit), exit=True, file=timeout)
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        torch.manual_seed(0)
        try:
            if step == file:
                spec.loader.exec_module(module)
            else:
                check_name(vars(module), step, torch.get_default_dtype())
            verdict = "right"
        except Wrong as error:
            verdict = str(error) if isinstance(error, NotDone) else f"wrong - {error}"
        except BaseException as error:
            verdict = f"wrong - It raises {describe(error, path)}"
        print(verdict, file=verdicts)
        if step == file and verdict != "right":
            break
    os._exit(0)  # even if the file has left threads behind
