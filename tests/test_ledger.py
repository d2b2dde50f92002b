"""The ledger in notebooks/README.md: every equation has a row, and every reference in it exists."""

import inspect
import re

import pytest
import test_model
import test_rotary

from nala_min import model, relatives
from notebooks import FOLDER, NOTEBOOKS, read

TEXT = (FOLDER / "README.md").read_text(encoding="utf-8")
EQUATIONS = [*map(str, range(1, 13)), "13", "13c", "14", "15", "16", "17"]
CODE = re.compile(r"`(\w+)`")


def ledger():
    """The row of each equation by number: functions, cells and tests."""
    rows = {}
    for number, row in re.findall(r"^\| \((\w+)\) \| (.+) \|$", TEXT, re.MULTILINE):
        _, functions, cells, tests = row.split(" | ")
        links = re.findall(r"\[(\d\d), `([\w-]+)`\]\((.+?)#cell-id=(.+?)\)", cells)
        rows[number] = (functions, links, CODE.findall(tests))
    return rows


def named(name, *modules):
    """What is called name in the first of modules that has it."""
    return next(getattr(x, name) for x in modules if hasattr(x, name))


ROWS = ledger()
rows = pytest.mark.parametrize("number", EQUATIONS)


def test_every_equation_has_one_row():
    assert list(ROWS) == EQUATIONS
    assert len(re.findall(r"^\| \(", TEXT, re.MULTILINE)) == len(EQUATIONS)


@rows
def test_its_code_names_the_equation(number):
    functions = ROWS[number][0]
    assert CODE.findall(functions)
    for name in CODE.findall(functions):
        if functions.startswith("a theorem"):
            assert name in ("softmax_attention", "nala_attention"), name
        else:
            assert f"({number})" in inspect.getsource(named(name, model, relatives)), name


@pytest.mark.parametrize("number", EQUATIONS[:-1])  # the last is explained in the ledger
def test_its_cells_show_the_equation(number):
    assert ROWS[number][1]
    for prefix, name, file, cell_id in ROWS[number][1]:
        assert file.startswith(prefix) and name == cell_id == f"eq-{number}"
        (cell,) = [cell for cell in read(FOLDER / file).cells if cell.id == cell_id]
        assert cell.cell_type == "markdown"
        assert f"({number})" in cell.source
        (formula,) = [x for x in cell.source.split("$$")[1::2] if f"\\tag{{{number}}}" in x]
        assert len(formula.replace(f"\\tag{{{number}}}", "").strip()) > 15


@rows
def test_its_tests_name_the_equation(number):
    tests = ROWS[number][2]
    assert tests
    for name in tests:
        assert f"({number})" in inspect.getdoc(named(name, test_model, test_rotary)), name


def first_paragraph(member):
    return (inspect.getdoc(member) or "").partition("\n\n")[0]


def test_no_function_of_an_equation_is_missing():
    """Those whose docstring names an equation in its first paragraph."""
    count = 0
    for name, member in vars(model).items():
        if inspect.isfunction(member) or inspect.isclass(member):
            for number in re.findall(r"Eq\. \((\w+)\)", first_paragraph(member)):
                if member.__module__ == model.__name__:
                    count += 1
                    assert name in CODE.findall(ROWS[number][0]), (name, number)
    assert count > 15


def test_no_cell_of_an_equation_is_missing():
    shown = {
        (path.name, cell.id)
        for path in NOTEBOOKS
        for cell in read(path).cells
        if re.fullmatch(r"eq-\d+c?", cell.id)
    }
    linked = {(file, cell_id) for _, links, _ in ROWS.values() for _, _, file, cell_id in links}
    assert shown == linked


@pytest.mark.parametrize("path", NOTEBOOKS[:5], ids=[path.stem for path in NOTEBOOKS[:5]])
def test_the_table_of_lessons_names_its_equations(path):
    """By numbers or ranges: (7), (8), (12) or (13) to (15)."""
    (row,) = re.findall(rf"^\| \[.+\]\({path.name}\) \| (.+) \|$", TEXT, re.MULTILINE)
    named = set()
    for first, last in re.findall(r"\((\d+c?)\)(?: to \((\d+c?)\))?", row):
        low, high = EQUATIONS.index(first), EQUATIONS.index(last or first)
        named |= set(EQUATIONS[low : high + 1])
    shown = {cell.id for cell in read(path).cells if re.fullmatch(r"eq-\d+c?", cell.id)}
    assert {f"eq-{number}" for number in named} == shown


def test_no_test_of_an_equation_is_missing():
    """Those whose docstring starts with equation numbers."""
    count = 0
    for name, test in {**vars(test_model), **vars(test_rotary)}.items():
        if name.startswith("test_"):
            numbers = re.match(r"(\(\w+\)(, )?)+", inspect.getdoc(test) or "")
            for number in re.findall(r"\((\w+)\)", numbers[0]) if numbers else []:
                count += 1
                assert name in ROWS[number][2], (name, number)
    assert count >= len(EQUATIONS)


def test_every_link_works():
    links = re.findall(r"\]\((?!http)([^)]+)\)", TEXT)
    assert len(links) > 30
    headings = re.findall(r"^## (.+)$", TEXT, re.MULTILINE)
    anchors = {"#" + re.sub(r"[^\w -]", "", x).replace(" ", "-").lower() for x in headings}
    for link in links:
        if link.startswith("#"):
            assert link in anchors
            continue
        file, _, cell_id = link.partition("#cell-id=")
        assert (FOLDER / file).exists(), link
        if cell_id:
            assert cell_id in {cell.id for cell in read(FOLDER / file).cells}, link
