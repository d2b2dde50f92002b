"""Mutation testing: do the tests catch every small fault in nala_min/model.py?

`python tests/tools/mutate.py` makes mutants of model.py, copies with one change each, and runs the
tests on each. A mutant is caught if a test fails or takes too long. A mutant that passes all tests
shows behaviour that no test pins down, unless it is equivalent to model.py; EQUIVALENT gives the
reason. An interrupted run resumes from runs/mutation, unless the package or the tests have changed.

A mutant must be caught by what it does. Tests that read model.py's text, or results computed with
it, are therefore left out. Docstrings, annotations, error messages, matrix products and returned
values are not mutated.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import faulthandler
import hashlib
import json
import multiprocessing
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.machinery import SourceFileLoader
from importlib.util import spec_from_file_location
from itertools import chain, pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

ROOT = Path(__file__).parents[2]
MODEL = "nala_min/model.py"
TESTS = ["tests/test_arguments.py", "tests/test_model.py"]
TEST_TIMEOUT = 60  # seconds for one test, or for the import: several times the slowest
MEMORY_LIMIT = 4 * 2**30  # bytes: an endless loop can also allocate endlessly

# Replacements. An operator becomes another of the same precedence, or nearly the same.
OPERATORS = dict(["+-", "-+", "*/", "/*", "&|", "|&"])
OPERATORS |= {"//": "*", "%": "//", "**": "*", "<": "<=", "<=": "<", ">": ">=", ">=": ">"}
OPERATORS |= {"==": "!=", "!=": "==", "is": "is not", "is not": "is", "and": "or", "or": "and"}
OPERATORS |= {"in": "not in", "not in": "in"}
PAIRS = """tril triu  cos sin  clamp_min clamp_max  min max  amin amax  argmin argmax  sum mean
    all any  zeros ones  new_zeros new_ones  cumsum cumprod  exp exp2  log log2  tanh sigmoid
    train eval"""
FUNCTIONS = dict(zip(PAIRS.split()[::2], PAIRS.split()[1::2], strict=True))
FUNCTIONS |= {new: old for old, new in FUNCTIONS.items()}

# Mutants that behave like model.py: {key, as printed for a survivor: reason}.
EQUIVALENT: dict[str, str] = {
    "decompose: `1.0` -> `2.0`": "0 divided by any number is 0",
    "linear_attention: `64` -> `65`": "chunks of any size give the same numbers",
    "recurrent: `True` -> `False`": "the three have as many tokens: check_form refuses others",
    **dict.fromkeys(
        (
            "linear_attention: `k.masked_fill(masked, 0.0), v.masked_fill(masked, 0.0)`"
            " -> `k.masked_fill(masked, 1.0), v.masked_fill(masked, 0.0)`",
            "linear_attention: `v.masked_fill(masked, 0.0)` -> `v.masked_fill(masked, 1.0)`",
            "softmax_attention: `0.0` -> `1.0`",
        ),
        "any finite number will do: a masked token has weight 0",
    ),
}


class Mutant(NamedTuple):
    key: str  # "function: `old` -> `new`"
    line: int
    text: str  # the whole file


class Edit(NamedTuple):
    """Replace the bytes from start to end by new."""

    start: int
    end: int
    new: str


class Source:
    """A module's text, its syntax tree, and every edit that makes a mutant."""

    def __init__(self, text: str) -> None:
        self.bytes = text.encode("utf-8")  # ast counts columns in bytes
        self.tree = ast.parse(text)
        self.lines = [0]  # the byte offset of each line
        for line in self.bytes.splitlines(keepends=True):
            self.lines.append(self.lines[-1] + len(line))
        imports = [x for x in ast.walk(self.tree) if isinstance(x, ast.Import | ast.ImportFrom)]
        self.modules = {alias.asname or alias.name for x in imports for alias in x.names}

    def start(self, node: ast.AST) -> int:
        return self.lines[node.lineno - 1] + node.col_offset

    def end(self, node: ast.AST) -> int:
        return self.lines[node.end_lineno - 1] + node.end_col_offset

    def text(self, start: int, end: int) -> str:
        return self.bytes[start:end].decode("utf-8")

    def replace(self, node: ast.AST, new: str | ast.AST) -> Edit:
        new = new if isinstance(new, str) else self.text(self.start(new), self.end(new))
        return Edit(self.start(node), self.end(node), new)

    def walk(self, *nodes: ast.AST) -> Iterator[tuple[ast.AST, ...]]:
        """Yield every node that has an effect, as the chain of nodes from the module to it."""
        yield nodes
        match nodes[-1]:
            case ast.Raise() | ast.JoinedStr() | ast.Assign(targets=[ast.Name(id="must_be")]):
                return
            case ast.Call(func=ast.Name(id="require"), args=[condition, name, *_]):  # and a message
                yield from chain(self.walk(*nodes, condition), self.walk(*nodes, name))
                return
        for field, value in ast.iter_fields(nodes[-1]):
            children = value if isinstance(value, list) else [value]
            if children and isinstance(children[-1], ast.Raise):
                children = children[-1:]  # the statements before it build its message
            for child in children:
                is_docstring = isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
                acts = field not in ("annotation", "returns") and not is_docstring
                if isinstance(child, ast.AST) and acts:
                    yield from self.walk(*nodes, child)

    def edits(self, node: ast.AST, above: tuple[ast.AST, ...]) -> Iterator[Edit]:
        """Yield the changes to node. above: the nodes that contain it."""
        match node:
            case ast.BinOp(left=left, right=right) | ast.AugAssign(target=left, value=right):
                yield from self.operator(left, right)
            case ast.BoolOp(values=operands):
                for left, right in pairwise(operands):
                    yield from self.operator(left, right)
            case ast.Compare(left=first, comparators=others):
                for left, right in pairwise([first, *others]):
                    yield from self.operator(left, right)
            case ast.UnaryOp(operand=operand):
                yield self.replace(node, operand)
            case ast.Constant(value=bool(value)):
                yield self.replace(node, str(not value))
            case ast.Constant(value=int(value)):
                yield self.replace(node, str(value + 1))
            case ast.Constant(value=float(value)):
                yield self.replace(node, str(2 * value or 1.0))
            case ast.Constant(value=str(value)):
                yield self.replace(node, json.dumps("XX" + value, ensure_ascii=False))
            case ast.Call():
                yield from self.call(node, is_statement=isinstance(above[-1], ast.Expr))
            case ast.If(test=test) | ast.IfExp(test=test) | ast.While(test=test):
                yield from self.negation(test)
            case ast.comprehension(ifs=tests):
                yield from chain.from_iterable(map(self.negation, tests))
            case ast.FunctionDef(decorator_list=names) | ast.ClassDef(decorator_list=names):
                yield from (Edit(self.start(name) - 1, self.end(name), "") for name in names)
        if isinstance(node, ast.stmt) and self.is_deletable(node, above):
            yield self.replace(node, "pass")

    def operator(self, left: ast.AST, right: ast.AST) -> Iterator[Edit]:
        """Change the operator between two operands, which may be in brackets."""
        start = self.end(left)
        between = re.sub(
            r"#.*", lambda x: " " * len(x[0].encode()), self.text(start, self.start(right))
        )
        match = re.search(r"is not|not in|[a-z]+|[^\s\w()]+", between)
        old = match[0] if match[0] in OPERATORS else match[0].removesuffix("=")  # + of +=
        if old in OPERATORS:
            start += match.start()
            yield Edit(start, start + len(old), OPERATORS[old])

    def negation(self, test: ast.AST) -> Iterator[Edit]:
        """Negate a condition, unless changing its operator does the same."""
        exact = ast.Eq | ast.NotEq | ast.Is | ast.IsNot | ast.In | ast.NotIn
        match test:
            case ast.UnaryOp(op=ast.Not()):
                return
            case ast.Compare(ops=[op]) if isinstance(op, exact):
                return
        yield self.replace(test, f"(not ({self.text(self.start(test), self.end(test))}))")

    def call(self, node: ast.Call, is_statement: bool) -> Iterator[Edit]:
        """Call another function, or none, or drop a keyword."""
        function, arguments = node.func, [*node.args, *node.keywords]
        name = getattr(function, "attr", getattr(function, "id", ""))
        if name in FUNCTIONS:
            yield Edit(self.end(function) - len(name), self.end(function), FUNCTIONS[name])
        owner = getattr(function, "value", None)
        root = owner
        while isinstance(root, ast.Attribute):
            root = root.value
        is_method = owner is not None and getattr(root, "id", None) not in self.modules
        if is_method and getattr(owner, "id", "") != "self" and not is_statement:
            yield self.replace(node, owner)  # x.method(...) -> x
        elif len(arguments) == len(node.args) == 1 and name.islower() and not is_statement:
            yield self.replace(node, node.args[0])  # function(x) -> x
        for before, keyword in pairwise([None, *arguments]):
            value = getattr(getattr(keyword, "value", None), "value", None)
            # A bool is flipped elsewhere, which has the same effect.
            if isinstance(keyword, ast.keyword) and not isinstance(value, bool):
                start = self.end(before) if before else self.start(keyword)
                end = (
                    self.start(arguments[1]) if arguments[1:] and not before else self.end(keyword)
                )
                yield Edit(start, end, "")

    def is_deletable(self, node: ast.stmt, above: tuple[ast.AST, ...]) -> bool:
        """Whether node can be deleted without leaving a name undefined."""
        functions = [x for x in above if isinstance(x, ast.FunctionDef)]
        if not functions or not isinstance(node, ast.Raise | ast.Expr | ast.Assign | ast.AugAssign):
            return False
        seen = {x.arg for x in ast.walk(functions[-1]) if isinstance(x, ast.arg)}
        names = [x for x in ast.walk(functions[-1]) if isinstance(x, ast.Name)]
        seen |= {x.id for x in names if self.start(x) < self.start(node)}
        assigned = [
            x for x in ast.walk(node) if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store)
        ]
        return {x.id for x in assigned} <= seen

    def still_parses(self, outermost: ast.stmt, edit: Edit) -> bool:
        """Whether the edited statement still parses. Parsing the whole module is far slower."""
        first = min(x.lineno for x in [outermost, *getattr(outermost, "decorator_list", [])])
        before = self.text(self.lines[first - 1], edit.start)
        try:
            ast.parse(before + edit.new + self.text(edit.end, self.end(outermost)))
        except SyntaxError:
            return False
        return True

    def key(self, nodes: tuple[ast.AST, ...], edit: Edit) -> str:
        """Describe edit by the smallest piece of code around it that is unique in its function."""
        scopes = [x for x in nodes if isinstance(x, ast.FunctionDef | ast.ClassDef)]
        scope = self.text(self.start(scopes[-1]), self.end(scopes[-1])) if scopes else ""
        start, end = edit.start, edit.end
        for node in reversed(nodes):
            if isinstance(node, ast.stmt) and hasattr(node, "body"):
                break  # it would be too long
            has_place = isinstance(node, ast.expr | ast.keyword | ast.stmt)
            if has_place and self.start(node) <= edit.start and edit.end <= self.end(node):
                start, end = self.start(node), self.end(node)
                if scope.count(self.text(start, end)) == 1:
                    break
        where = ".".join(x.name for x in scopes) or "module"
        new = self.text(start, edit.start) + edit.new + self.text(edit.end, end)
        return " ".join(f"{where}: `{self.text(start, end)}` -> `{new}`".split())


def make_mutants(text: str) -> list[Mutant]:
    """Every mutant of a module's text, in line order."""
    source, mutants, times = Source(text), {}, Counter()
    for nodes in source.walk(source.tree):
        for edit in source.edits(nodes[-1], nodes[:-1]):
            mutated = source.text(0, edit.start) + edit.new + source.text(edit.end, None)
            if mutated not in mutants and source.still_parses(nodes[1], edit):
                key = source.key(nodes, edit)
                times[key] += 1
                key += f" ({times[key]})" if times[key] > 1 else ""
                mutants[mutated] = Mutant(key, source.text(0, edit.start).count("\n") + 1, mutated)
    return sorted(mutants.values(), key=lambda mutant: mutant.line)


# --- Running the tests ----------------------------------------------------------------------------


class MutantLoader(SourceFileLoader):
    """Imports nala_min.model from another text, as if the file contained it."""

    def __init__(self, text: str) -> None:
        super().__init__("nala_min.model", str(ROOT / MODEL))
        self.text = text

    def get_code(self, fullname):
        return compile(self.text, self.path, "exec", dont_inherit=True)

    def find_spec(self, fullname, path=None, target=None):
        same = fullname == self.name
        return spec_from_file_location(fullname, self.path, loader=self) if same else None


class OrderPlugin:
    """A pytest plugin. Tests that caught other mutants come first, then one case of each test, then
    all others. The name of the last test started goes to last_test."""

    def __init__(self, first: list[str], last_test) -> None:
        self.rank, self.last_test = {test: i for i, test in enumerate(first)}, last_test

    def pytest_collection_modifyitems(self, items: list) -> None:
        one_of_each = {item.function: item for item in reversed(items)}.values()
        ranks = {item.nodeid: len(self.rank) for item in one_of_each} | self.rank
        items.sort(key=lambda item: ranks.get(item.nodeid, len(ranks)))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.last_test.value = nodeid.encode()


def run_tests(text: str, first: list[str], last_test) -> None:
    """Run pytest with text as model.py. Called in its own process."""
    import resource

    import pytest

    os.chdir(ROOT)
    output = os.open(os.devnull, os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_LIMIT, MEMORY_LIMIT))
    sys.meta_path.insert(0, MutantLoader(text))
    faulthandler.dump_traceback_later(TEST_TIMEOUT, exit=True)  # until the first test starts
    options = f"-x -q --tb=no -p no:cacheprovider -o faulthandler_timeout={TEST_TIMEOUT}"
    options += " -o faulthandler_exit_on_timeout=true"
    sys.exit(pytest.main([*options.split(), *TESTS], plugins=[OrderPlugin(first, last_test)]))


CONTEXT = multiprocessing.get_context("forkserver")  # imports torch only once
CONTEXT.set_forkserver_preload(["torch", "pytest", "numpy"])


def test_that_catches(mutant: Mutant, first: list[str]) -> str | None:
    """The test that fails for mutant. first: tests that caught others, the latest first."""
    last_test = CONTEXT.Array("c", 500)
    last_test.value = b"import"
    process = CONTEXT.Process(target=run_tests, args=(mutant.text, [*first], last_test))
    process.start()
    process.join()
    if not process.exitcode:
        return None
    caught = last_test.value.decode()
    first[:] = [caught, *(test for test in first if test != caught)]
    return caught


def fingerprint(text: str) -> str:
    """A hash of what a result depends on: the module, the rest of the package, and the tests."""
    digest = hashlib.sha256(text.encode("utf-8"))
    for path in [*sorted(ROOT.glob("nala_min/**/*.py")), *(ROOT / name for name in TESTS)]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def diff(old: str, new: str) -> str:
    """The lines that differ, as in a unified diff."""
    lines = difflib.unified_diff(old.splitlines(), new.splitlines(), lineterm="", n=0)
    return "\n".join(line for line in lines if not line.startswith(("---", "+++", "@@")))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--every", type=int, default=1, metavar="K", help="only every K-th mutant")
    parser.add_argument("--only", default="", metavar="TEXT", help="mutants with TEXT in their key")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="parallel processes")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write a run card")
    flags = parser.parse_args()
    start = time.perf_counter()
    os.environ["OMP_NUM_THREADS"] = "1"  # the jobs share the cores

    text = (ROOT / MODEL).read_text(encoding="utf-8")
    mutants = make_mutants(text)
    if unknown := EQUIVALENT.keys() - {mutant.key for mutant in mutants}:
        sys.exit("EQUIVALENT lists mutants that no longer exist:\n" + "\n".join(sorted(unknown)))
    selected = [mutant for mutant in mutants[:: flags.every] if flags.only in mutant.key]
    log = ROOT / "runs" / "mutation" / f"{fingerprint(text)}.jsonl"
    log.parent.mkdir(parents=True, exist_ok=True)
    known = (
        dict(map(json.loads, log.read_text(encoding="utf-8").splitlines())) if log.exists() else {}
    )
    if caught := test_that_catches(Mutant("original", 0, text), []):
        sys.exit(f"The tests fail for the original model.py: {caught}")

    todo = [x for x in selected if x.key not in known and x.key not in EQUIVALENT]
    with ThreadPoolExecutor(flags.jobs) as pool, open(log, "a", encoding="utf-8") as file:
        results = pool.map(partial(test_that_catches, first=[]), todo)
        for mutant, caught in tqdm(zip(todo, results, strict=True), total=len(todo), unit="mutant"):
            known[mutant.key] = caught
            print(json.dumps([mutant.key, caught]), file=file, flush=True)

    equivalent = {x.key: EQUIVALENT[x.key] for x in selected if x.key in EQUIVALENT}
    tested = [x for x in selected if x.key not in equivalent]
    survivors = [x for x in tested if known[x.key] is None]
    for x in survivors:
        print(f"\n{MODEL}:{x.line}  {x.key}\n{diff(text, x.text)}")
    caught = len(tested) - len(survivors)
    print(f"\n{len(selected)} mutants: {caught} caught, {len(equivalent)} equivalent,", end=" ")
    print(
        f"{len(survivors)} survivors; {caught / max(len(tested), 1):.1%} of the others were caught"
    )
    if flags.out is not None:
        sys.path.insert(0, str(ROOT))
        from nala_min import runcard

        data_info = {"name": MODEL, "sha256": hashlib.sha256(text.encode("utf-8")).hexdigest()}
        config = {"every": flags.every, "only": flags.only, "tests": TESTS}
        results = {"mutants": len(selected), "caught": caught, "equivalent": equivalent}
        results["survivors"] = [x.key for x in survivors]
        seconds = time.perf_counter() - start
        card = runcard.run_card(config, data_info, torch.device("cpu"), seconds, results)
        card["command"] = card["command"].replace("mutate.py", "tests/tools/mutate.py")
        runcard.write_json(flags.out, card)


if __name__ == "__main__":
    main()
