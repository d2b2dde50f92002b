"""Mutation testing: do the tests notice small faults in the package and in the scripts?

`python tests/tools/mutate.py` makes mutants, copies of a file with one small change each, and runs
the fast tests of that file's room on each. A mutant is caught if a test fails or takes too long.
One that passes all tests shows behaviour that no test pins down, unless it is equivalent to the
original: equivalent.json gives the reason. `--out notebooks/results/mutation.json` updates the run
card for the rooms that were tried.

A mutant must be caught by what it does: tests that read the package's text are left out.
Docstrings, annotations, messages and help texts (strings with a space) are not mutated.
"""

from __future__ import annotations

import argparse
import ast
import copy
import faulthandler
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from queue import Queue
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

ROOT = Path(__file__).parents[2]
TEST_TIMEOUT = 120  # seconds for one test: many times the slowest
MEMORY_LIMIT = 6 * 2**30  # bytes: an endless loop can also allocate endlessly

# Replacements, in both directions: operators, and functions of PyTorch and Python.
SWAPS = {ast.Add: ast.Sub, ast.Mult: ast.Div, ast.BitAnd: ast.BitOr, ast.And: ast.Or}
SWAPS |= {ast.Eq: ast.NotEq, ast.Is: ast.IsNot, ast.In: ast.NotIn, ast.Lt: ast.LtE, ast.Gt: ast.GtE}
SWAPS |= {new: old for old, new in SWAPS.items()}
SWAPS |= {ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult}
PAIRS = """tril triu  cos sin  clamp_min clamp_max  min max  amin amax  argmin argmax  sum mean
    all any  zeros ones  new_zeros new_ones  cumsum cumprod  exp exp2  log log2  tanh sigmoid
    train eval""".split()
FUNCTIONS = dict(zip(PAIRS[::2], PAIRS[1::2], strict=True))
FUNCTIONS |= {new: old for old, new in FUNCTIONS.items()}

# {files of a room: (the nearest tests, how many mutants)}. The mutants are chosen at random.
ROOMS = {
    "model.py": ("1_equations 2_forms 3_safety 4_models arguments", 150),
    "fast.py": ("fast 2_forms 3_safety", 60),
    "relatives.py": ("6_relatives", 60),
    "train.py": ("train checkpoint flags scripts 6_relatives", 60),
    "flags.py, runcard.py, distributed.py": ("flags runcard distributed train scripts", 60),
    "data.py, synthetic.py": ("data synthetic", 60),
    "measure.py, plots.py": ("measure plots", 60),
    "lab/": ("compare bench results", 60),
    "course/": ("exercises notebooks", 60),
    "train_cifar.py": ("scripts results 6_relatives", 60),
    "train_shakespeare.py": ("scripts results 6_relatives", 60),
}

# Mutants that behave like the original: {key, as printed for a survivor: reason}.
EQUIVALENT = json.loads((Path(__file__).parent / "equivalent.json").read_text(encoding="utf-8"))


class Mutant(NamedTuple):
    file: str
    line: int
    text: str  # of the file
    key: str  # "file function: `old` -> `new`"


# --- Mutants --------------------------------------------------------------------------------------


def nodes_of(node: ast.AST, above: tuple[ast.AST, ...] = ()) -> Iterator[tuple[ast.AST, tuple]]:
    """Yield each node that acts, and the nodes that contain it."""
    yield node, above
    for field, value in ast.iter_fields(node):
        children = value if isinstance(value, list) else [value]
        match node:
            case ast.JoinedStr() | ast.Raise() | ast.Expr(value=ast.Constant()):  # a message
                return
            case ast.Call(func=ast.Name(id="require")) if field == "args":
                children = children[:2]  # the others are a message
        if field not in ("annotation", "returns"):
            for child in (x for x in children if isinstance(x, ast.AST)):
                yield from nodes_of(child, (*above, node))


def edits(node: ast.AST, above: tuple[ast.AST, ...]) -> Iterator[tuple[ast.AST, str]]:
    """Yield the changes to node: the node replaced, and its new text."""

    def changed(**fields: object) -> str:
        new = copy.copy(node)
        vars(new).update(fields)
        return ast.unparse(new)

    match node:
        case ast.Expr(value=ast.Constant()):  # a docstring
            return
        case ast.BinOp(op=op) | ast.AugAssign(op=op) | ast.BoolOp(op=op) if type(op) in SWAPS:
            yield node, changed(op=SWAPS[type(op)]())
        case ast.Compare(ops=ops):
            for i, op in enumerate(ops):
                if type(op) in SWAPS:
                    yield node, changed(ops=[*ops[:i], SWAPS[type(op)](), *ops[i + 1 :]])
        case ast.UnaryOp(operand=operand):
            yield node, ast.unparse(operand)
        case ast.Constant(value=bool(value)):
            yield node, str(not value)
        case ast.Constant(value=int(value)):
            yield node, str(value + 1)
        case ast.Constant(value=float(value)):
            yield node, str(2 * value or 1.0)
        case ast.Constant(value=str(value)) if value and " " not in value:
            yield node, repr("XX" + value)
        case ast.If(test=test) | ast.IfExp(test=test) | ast.While(test=test):
            if not isinstance(test, ast.UnaryOp | ast.Compare):  # else changed by itself
                yield test, f"not ({ast.unparse(test)})"
        case ast.Call(func=function, args=args, keywords=keywords):
            name = getattr(function, "attr", getattr(function, "id", ""))
            if name in FUNCTIONS:
                text = ast.unparse(function)
                yield function, text[: len(text) - len(name)] + FUNCTIONS[name]
            if len(args) == 1 and not keywords and not isinstance(above[-1], ast.Expr):
                yield node, ast.unparse(args[0])  # function(x) -> x
            for i, keyword in enumerate(keywords):  # a bool is flipped, which has the same effect
                if not isinstance(getattr(keyword.value, "value", None), bool):
                    yield node, changed(keywords=keywords[:i] + keywords[i + 1 :])
        case ast.FunctionDef(decorator_list=names):
            yield from ((name, "lambda x: x") for name in names)
        case ast.Raise() | ast.Expr() | ast.AugAssign():
            yield node, "pass"
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield node, "pass"


def make_mutants(file: str, text: str) -> list[Mutant]:
    """Every mutant of a file, in line order."""
    data, mutants, times = text.encode("utf-8"), {}, Counter()
    starts = [0, *accumulate(map(len, data.splitlines(keepends=True)))]
    for node, above in nodes_of(ast.parse(text)):
        for old, new in edits(node, above):
            start = starts[old.lineno - 1] + old.col_offset
            end = starts[old.end_lineno - 1] + old.end_col_offset
            new_text = f"({new})" if isinstance(old, ast.expr) else new
            mutated = (data[:start] + new_text.encode("utf-8") + data[end:]).decode("utf-8")
            try:
                ast.parse(mutated)
            except SyntaxError:
                continue
            where = ".".join(x.name for x in above if hasattr(x, "decorator_list")) or "module"
            key = " ".join(f"{file} {where}: `{ast.unparse(old)}` -> `{new}`".split())
            times[key] += 1
            key += f" ({times[key]})" if times[key] > 1 else ""
            mutants.setdefault(mutated, Mutant(file, old.lineno, mutated, key))
    return sorted(mutants.values(), key=lambda mutant: mutant.line)


# --- Running the tests ----------------------------------------------------------------------------


class Plugin:
    """For pytest: the tests of first come first, and last_test is the name of the last started."""

    def __init__(self, first: list[str], last_test) -> None:
        self.first, self.last_test = first, last_test

    def pytest_collection_modifyitems(self, items: list) -> None:
        items.sort(key=lambda x: [*self.first, x.nodeid].index(x.nodeid))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.last_test.value = nodeid.encode()[:499]


def run_tests(folder: str, tests: list[str], first: list[str], last_test) -> None:
    """Run pytest in folder. Called in its own process."""
    import resource

    import pytest

    os.setsid()
    os.chdir(folder)
    for output in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_LIMIT, MEMORY_LIMIT))
    sys.dont_write_bytecode = True  # a stale copy might be imported
    sys.path[:] = [x for x in sys.path if x not in (str(ROOT), str(Path(__file__).parent))]
    faulthandler.dump_traceback_later(TEST_TIMEOUT, exit=True)  # until the first test starts
    options = f"-x -q --tb=no -p no:cacheprovider -o faulthandler_timeout={TEST_TIMEOUT}"
    options += " -o faulthandler_exit_on_timeout=true"
    sys.exit(pytest.main([*options.split(), *tests], plugins=[Plugin(first, last_test)]))


CONTEXT = multiprocessing.get_context("forkserver")  # imports torch only once
CONTEXT.set_forkserver_preload(["torch", "pytest", "numpy", "matplotlib.pyplot"])


def test_that_catches(folder: Path, tests: list[str], first: list[str]) -> str | None:
    """The test that fails in folder. first: tests that caught others, the latest first."""
    last_test = CONTEXT.Array("c", 500)
    last_test.value = b"import"
    process = CONTEXT.Process(target=run_tests, args=(str(folder), tests, [*first], last_test))
    process.start()
    process.join()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # what the tests left behind
    if not process.exitcode:
        return None
    caught = last_test.value.decode(errors="replace")
    first[:] = [caught, *(test for test in first if test != caught)]
    return caught


def try_room(name: str, flags: argparse.Namespace, folders: Queue[Path]) -> dict[str, Any]:
    """Try mutants of the files of a room. Returns the room's part of the card."""
    tests, count = ROOMS[name]
    tests = [f"tests/test_{each}.py" for each in tests.split()]
    patterns = [x + "*.py" * x.endswith("/") for x in name.split(", ")]
    files = sorted(x for y in patterns for base in (ROOT, ROOT / "nala_min") for x in base.glob(y))
    texts = {str(x.relative_to(ROOT)): x.read_text(encoding="utf-8") for x in files}
    mutants = [x for file, text in texts.items() for x in make_mutants(file, text)]
    chosen = random.Random(flags.seed).sample(mutants, min(flags.count or count, len(mutants)))
    first: list[str] = []

    def caught_by(mutant):
        folder = folders.get()
        (folder / mutant.file).write_text(mutant.text, encoding="utf-8")
        try:
            return test_that_catches(folder, tests, first)
        finally:
            (folder / mutant.file).write_text(texts[mutant.file], encoding="utf-8")
            folders.put(folder)

    file = min(texts)
    if caught := caught_by(Mutant(file, 0, texts[file], "the original")):
        sys.exit(f"{name}: the tests fail without a mutant: {caught}")
    tried = [x for x in chosen if x.key not in EQUIVALENT]
    with ThreadPoolExecutor(flags.jobs) as pool:
        found = [*tqdm(pool.map(caught_by, tried), total=len(tried), unit="mutant", desc=name)]
    survivors = [x for x, caught in zip(tried, found, strict=True) if caught is None]
    for x in survivors:
        print(f"{x.file}:{x.line} survived: {x.key}")
    numbers = {"all": len(mutants), "mutants": len(tried), "caught": len(tried) - len(survivors)}
    print(f"{name}: {numbers}")
    equivalent = {x.key: EQUIVALENT[x.key] for x in chosen if x.key in EQUIVALENT}
    return numbers | {"equivalent": equivalent, "survivors": [x.key for x in survivors]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("rooms", nargs="*", default=[*ROOMS], help=f"of {', '.join(ROOMS)}")
    parser.add_argument("--count", type=int, metavar="N", help="mutants per room")
    parser.add_argument("--seed", type=int, default=1, help="of the choice")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="parallel processes")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write, or update, a run card")
    flags = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from nala_min import runcard  # not above: the children must import their own copy

    os.chdir(ROOT)
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    start, folders = time.perf_counter(), Queue()
    with tempfile.TemporaryDirectory() as temporary:
        for i in range(flags.jobs):
            others = shutil.ignore_patterns(".*", "__pycache__", "runs", "*.egg-info")
            folders.put(shutil.copytree(ROOT, Path(temporary, str(i)), ignore=others))
        updates = flags.out and flags.out.exists()
        rooms = runcard.read_json(flags.out)["results"]["rooms"] if updates else {}
        for name in flags.rooms:
            rooms[name] = try_room(name, flags, folders)
            if flags.out:
                config, seconds = {"seed": flags.seed}, time.perf_counter() - start
                results = {"rooms": {x: rooms[x] for x in ROOMS if x in rooms}}
                card = runcard.run_card(config, {}, torch.device("cpu"), seconds, results)
                card["command"] = card["command"].replace("mutate.py", "tests/tools/mutate.py")
                runcard.write_json(flags.out, card)


if __name__ == "__main__":
    main()
