"""The notebooks: each runs from top to bottom in a fresh kernel and shows what is committed."""

import base64
import io
import re
import shutil
import subprocess
import sys

import nbformat
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.patches import Rectangle
from nbclient import NotebookClient
from nbconvert import SlidesExporter

from notebooks import LIVE, NOTEBOOKS, ROOT, read, slide_type

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")
# Cells that need not show what is committed: they take times, train, or use exercises or weights
# that may be there or not.
VARIES = {
    *((f"0{lesson}", "check") for lesson in range(1, 8)),
    ("05", "time-live"),
    *(("06", name) for name in ("live-recall", "live-sharpness")),
    *(("08", name) for name in ("loss-counts", "live-train", "live-picture", "live-samples-code")),
    *(("08", name) for name in ("maps", "decode-cost-picture")),
    *(("09", name) for name in ("cost-picture", "live-train", "live-picture", "maps-picture")),
}
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
    """The numbers in text, each with one unit of its last digit."""
    found = []
    for number in NUMBER.findall(text):
        mantissa, _, exponent = number.replace(",", "").partition("e")
        unit = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
        found.append((float(number.replace(",", "")), unit))
    return found


def alike(new, old, unit):
    """To 2 % or one unit of the last digit, as another machine rounds; but rounding noise, below
    1e-5, is like any number below 1e-4."""
    return new == pytest.approx(old, rel=0.02, abs=1e-4 if abs(old) < 1e-5 else 1.01 * unit)


def pictures(cell):
    """The pictures that a code cell shows, (rows, columns, 4), from 0 to 1."""
    found = [output.get("data", {}).get("image/png") for output in cell.outputs]
    return [imread(io.BytesIO(base64.b64decode(png))) for png in found if png]


def distance(picture, other):
    """How far apart two pictures of one size are on average, in blocks of 16 x 16 pixels. Of those
    in the notebooks no two are closer than 0.03."""
    apart = picture - other
    rows, columns = (size // 16 for size in apart.shape[:2])
    blocks = apart[: 16 * rows, : 16 * columns].reshape(rows, 16, columns, 16, -1)
    return np.abs(blocks[..., :3].mean(axis=(1, 3))).mean()


def compare(old, new):
    """Whether a code cell shows the same as before: words, numbers and pictures."""
    assert NUMBER.sub("#", shown(new)) == NUMBER.sub("#", shown(old)), old.id
    for (now, _), (before, unit) in zip(numbers(shown(new)), numbers(shown(old)), strict=True):
        assert alike(now, before, unit), old.id
    for now, before in zip(pictures(new), pictures(old), strict=True):
        assert now.shape == before.shape and distance(now, before) < 0.02, old.id


@notebooks
def test_a_notebook_shows_what_is_committed(path, fresh):
    """The same texts, numbers to 2 %, pictures of the same look, but for the cells that are tagged:
    they vary, yet show something. If it is the committed outputs that are old: python
    tests/tools/notebooks.py."""
    committed, now = read(path), fresh[path].result()
    assert warnings_of(now) == []
    for old, new in zip(committed.cells, now.cells, strict=True):
        if old.cell_type == "code" and "varies" in old.metadata.get("tags", ()):
            assert shown(old).strip() or not shown(new).strip(), old.id
            assert len(pictures(old)) == len(pictures(new)), old.id
        elif old.cell_type == "code":
            compare(old, new)


def test_the_cells_that_may_vary_are_few():
    tagged = {
        (path.name[:2], cell.id)
        for path in NOTEBOOKS
        for cell in read(path).cells
        if "varies" in cell.metadata.get("tags", ())
    }
    assert tagged == VARIES


def code_cell(text, level=1.0):
    """A cell that shows text, and a picture whose right third has this level of grey."""
    figure = Figure(figsize=(4.8, 3.2))
    third = Rectangle((2 / 3, 0), 1 / 3, 1, color=str(level), transform=figure.transFigure)
    figure.add_artist(third)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=100)
    data = {"image/png": base64.b64encode(png.getvalue()).decode(), "text/plain": text}
    return nbformat.v4.new_code_cell(outputs=[nbformat.v4.new_output("display_data", data)])


@pytest.mark.parametrize(
    ("old", "new"), [("0.0001", "0.0019"), ("0.012", "0.014"), ("3e-12", "0.0002"), ("two", "too")]
)
def test_another_text_or_number_is_noticed(old, new):
    with pytest.raises(AssertionError):
        compare(code_cell(old), code_cell(new))


@pytest.mark.parametrize(
    ("old", "new"), [("0.012", "0.013"), ("3e-12", "0e+00"), ("-1e-08", "2e-5"), ("1,234", "1,235")]
)
def test_rounding_is_not(old, new):
    compare(code_cell(old), code_cell(new, level=0.97))


def test_another_picture_is_noticed():
    with pytest.raises(AssertionError):
        compare(code_cell("1"), code_cell("1", level=0.8))


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
    found = 0
    for output in (output for cell in notebook.cells for output in cell.get("outputs", [])):
        data = output.get("data", {})
        assert LIVE not in data
        if "image/png" in data:
            found += 1
            text = output.metadata["image/png"]["alt"]
            assert len(text) > 60 and text == data["text/plain"]
    assert found >= 2


@notebooks
def test_a_notebook_has_the_parts_of_a_lesson(path):
    notebook = read(path)
    markdown = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    assert markdown.startswith(f"# {int(path.name[:2])}. ")
    for part in ("you will", "\\tag{", "## Read next", "## Exercises"):
        assert part in markdown, part
    for part in ("notebook.source(", "assert ", "notebook.show("):
        assert part in code, part
    if path.name < "08":
        assert f"checks.report({int(path.name[:2])})" in code


@notebooks
def test_a_notebook_is_a_deck_of_slides(path):
    """Every cell is marked. Without code, every picture is there, and no slide is only set-up."""
    cells = read(path).cells
    assert [c.metadata["slideshow"]["slide_type"] for c in cells] == [slide_type(c) for c in cells]
    if path != NOTEBOOKS[0]:  # one deck will do
        return
    deck, _ = SlidesExporter(exclude_input=True).from_filename(str(path))
    assert "hosted notebook" not in deck
    assert deck.count("<section>") >= sum(cell.source.startswith("#") for cell in cells) > 3
    shown = sum("image/png" in o.get("data", {}) for c in cells for o in c.get("outputs", []))
    assert deck.count("<img") == shown


def test_notebooks_begin_alike():
    """The cell that finds nala_min is the same everywhere."""
    assert len({read(path).cells[1].source for path in NOTEBOOKS}) == 1


def execute(source, folder):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources=resources).execute()
    return notebook.cells[0]


def test_a_notebook_finds_the_project_from_its_root():
    """Not only from its own folder, where the committed outputs come from."""
    found = execute(f"{setup_cell()}\nimport nala_min; print(nala_min.__file__)", ROOT)
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
    code = "import sys, nala_min.course.notebook; print('matplotlib.pyplot' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"
