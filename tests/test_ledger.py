"""The ledger in notebooks/README.md: every equation has a row, every reference in it exists, and no
function, cell or test of an equation is missing from it."""

import ast
import inspect
import re
from pathlib import Path

import pytest

from nala_min import model, relatives
from notebooks import FOLDER, NOTEBOOKS, read

TEXT = (FOLDER / "README.md").read_text(encoding="utf-8")
EQUATIONS = [*map(str, range(1, 13)), "13", "13c", "14", "15", "16", "17"]
CODE = re.compile(r"`(\w+)`")


def ledger():
    """The row of each equation by number: functions, cells and tests."""
    for number, row in re.findall(r"^\| \((\w+)\) \| (.+) \|$", TEXT, re.MULTILINE):
        _, functions, cells, tests = row.split(" | ")
        links = re.findall(r"\[(\d\d), `([\w-]+)`\]\((.+?)#cell-id=(.+?)\)", cells)
        yield number, (functions, links, CODE.findall(tests))


def docstrings():
    """The name and docstring of every test function."""
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        for x in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(x, ast.FunctionDef) and x.name.startswith("test_"):
                yield x.name, ast.get_docstring(x) or ""


ROWS, TESTS = dict(ledger()), dict(docstrings())


def test_every_equation_has_one_row():
    assert list(ROWS) == EQUATIONS and TEXT.count("\n| (") == len(EQUATIONS)


@pytest.mark.parametrize("number", EQUATIONS)
def test_its_code_and_tests_name_the_equation(number):
    functions, _, tests = ROWS[number]
    assert CODE.findall(functions) and tests
    for name in CODE.findall(functions):
        if functions.startswith("a theorem"):
            assert name in ("softmax_attention", "nala_attention")
        else:
            function = getattr(model, name, None) or getattr(relatives, name)
            assert f"({number})" in inspect.getsource(function), name
    for name in tests:
        assert f"({number})" in TESTS[name], name


@pytest.mark.parametrize("number", EQUATIONS[:-1])  # the last is explained in the ledger
def test_its_cells_show_the_equation(number):
    assert ROWS[number][1]
    for prefix, name, file, cell_id in ROWS[number][1]:
        assert file.startswith(prefix) and name == cell_id == f"eq-{number}"
        (cell,) = [cell for cell in read(FOLDER / file).cells if cell.id == cell_id]
        assert cell.cell_type == "markdown" and f"({number})" in cell.source
        (formula,) = [x for x in cell.source.split("$$")[1::2] if f"\\tag{{{number}}}" in x]
        assert len(formula.replace(f"\\tag{{{number}}}", "").strip()) > 15


def test_no_function_of_an_equation_is_missing():
    """Those whose docstring names an equation in its first paragraph."""
    count = 0
    for name, member in vars(model).items():
        if getattr(member, "__module__", "") == model.__name__:
            text = (inspect.getdoc(member) or "").partition("\n\n")[0]
            for number in re.findall(r"Eq\. \((\w+)\)", text):
                assert name in CODE.findall(ROWS[number][0]), (name, number)
                count += 1
    assert count > 15


def test_no_test_of_an_equation_is_missing():
    """Those whose docstring starts with equation numbers."""
    count = 0
    for name, text in TESTS.items():
        start = re.match(r"(\(\w+\)(, )?)+", text)
        for number in re.findall(r"\((\w+)\)", start[0]) if start else ():
            assert name in ROWS[number][2], (name, number)
            count += 1
    assert count >= len(EQUATIONS)


def test_no_cell_of_an_equation_is_missing():
    cells = {(path.name, cell.id) for path in NOTEBOOKS for cell in read(path).cells}
    shown = {(file, cell) for file, cell in cells if re.fullmatch(r"eq-\d+c?", cell)}
    assert shown == {(file, cell) for _, links, _ in ROWS.values() for _, _, file, cell in links}


def test_every_link_works():
    links = re.findall(r"\]\((?!http|#)([^)]+)\)", TEXT)
    assert len(links) > 30
    for file, _, anchor in (link.partition("#") for link in links):
        assert (FOLDER / file).exists(), file
        cell = anchor.removeprefix("cell-id=")
        assert cell == anchor or cell in {x.id for x in read(FOLDER / file).cells}, anchor
