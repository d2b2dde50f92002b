"""The notebooks: each runs from top to bottom in a fresh kernel and shows what is committed."""

import re
import shutil
import subprocess
import sys

import nbformat
import pytest
from nbclient import NotebookClient

from notebooks import FOLDER, LIVE, NOTEBOOKS, ROOT, read, run

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")
names = [path.stem for path in NOTEBOOKS]
notebooks = pytest.mark.parametrize("path", NOTEBOOKS, ids=names)


def shown(cell):
    """The texts that a code cell shows, and the alternative texts of its pictures."""
    texts = []
    for output in cell.outputs:
        data = output.get("data", {})
        text = output.get("text") or data.get("text/markdown") or data.get("text/plain")
        texts.append("".join(text))
    return "\n".join(texts)


def warnings_of(notebook):
    """The cells that show an error, or write to the standard error: a warning."""
    return [
        cell.id
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.output_type == "error" or output.get("name") == "stderr"
    ]


def numbers(text):
    return [float(number.replace(",", "")) for number in NUMBER.findall(text)]


@pytest.fixture(scope="module", autouse=True)
def one_thread_a_kernel():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # the cores may be busy
        yield


@notebooks
def test_a_notebook_shows_what_is_committed(path):
    """The same texts, numbers to 2 %, but for the cells that are tagged: they vary. If it is the
    committed outputs that are old: python tests/notebooks.py."""
    committed, fresh = read(path), run(path, FOLDER)
    assert warnings_of(fresh) == []
    for old, new in zip(committed.cells, fresh.cells, strict=True):
        if old.cell_type == "code" and "varies" not in old.metadata.get("tags", ()):
            assert NUMBER.sub("#", shown(new)) == NUMBER.sub("#", shown(old)), old.id
            assert numbers(shown(new)) == pytest.approx(numbers(shown(old)), rel=0.02, abs=2e-3)


@notebooks
def test_the_committed_outputs_are_of_one_run_without_errors(path):
    notebook = read(path)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert warnings_of(notebook) == []


@notebooks
def test_a_notebook_renders_anywhere(path):
    """No widget without its kernel, no metadata but the kernel's name, a text for every picture."""
    notebook = read(path)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    pictures = 0
    for output in (output for cell in notebook.cells for output in cell.get("outputs", [])):
        data = output.get("data", {})
        assert LIVE not in data
        if "image/png" in data:
            pictures += 1
            text = output.metadata["image/png"]["alt"]
            assert len(text) > 60 and text == data["text/plain"]
    assert pictures >= 2


@notebooks
def test_a_notebook_has_the_parts_of_a_lesson(path):
    notebook = read(path)
    markdown = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    assert markdown.startswith(f"# {int(path.name[:2])}. ")
    for part in ("you will", "\\tag{", "## Where the paper, the released code", "## Exercises"):
        assert part in markdown, part
    for part in ("lesson.source(", "assert ", "lesson.show("):
        assert part in code, part
    if path.name < "06":
        assert f"checks.report({int(path.name[:2])})" in code


def test_notebooks_begin_alike():
    """The cell that finds nala_min is the same everywhere."""
    assert len({read(path).cells[1].source for path in NOTEBOOKS}) == 1


def execute(source, folder):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources=resources).execute()
    return notebook.cells[0]


@pytest.mark.parametrize("folder", [ROOT, FOLDER], ids=["root", "notebooks"])
def test_a_notebook_finds_the_project(folder):
    found = execute(f"{setup_cell()}\nimport nala_min; print(nala_min.__file__)", folder)
    assert found.outputs[-1].text.strip().endswith("__init__.py")


def test_a_hosted_notebook_fetches_the_project(tmp_path):
    """As its first cell says: the # removed and an address put in."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("this copy is not a clone, or git is missing: nothing to fetch")
    source = setup_cell().replace("# !git", "!git").replace("ADDRESS", f'"{ROOT.as_uri()}"')
    found = execute(
        f"{source}\nfrom nala_min import runcard as r; print(r.RESULTS.exists(), r.__file__)",
        tmp_path,
    )
    assert found.outputs[-1].text.startswith(f"True {tmp_path}")


def setup_cell():
    cell = read(NOTEBOOKS[0]).cells[1]
    assert cell.id == "setup"
    return cell.source


def test_a_lesson_leaves_no_window_system_and_no_pyplot_behind():
    """Pictures are made without pyplot: nothing is drawn twice, nothing is left open."""
    code = "import sys, nala_min.lesson; print('matplotlib.pyplot' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"
