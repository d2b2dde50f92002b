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
# Cells whose outputs may differ from the committed ones: they measure times, train, or depend on
# exercises or weights that may be missing.
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


def text_of(cell):
    """The text that a code cell shows, including the alt texts of its pictures."""
    texts = []
    for output in cell.outputs:
        data = output.get("data", {})
        text = output.get("text") or data.get("text/markdown") or data.get("text/plain")
        texts.append("".join(text))
    return "\n".join(texts)


def warnings_of(notebook):
    """The IDs of cells that show an error or write to stderr, as warnings do."""
    return [
        cell.id
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.output_type == "error" or output.get("name") == "stderr"
    ]


def numbers(text):
    """The numbers in text, each with the unit of its last digit."""
    pairs = []
    for number in NUMBER.findall(text):
        mantissa, _, exponent = number.replace(",", "").partition("e")
        unit = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
        pairs.append((float(number.replace(",", "")), unit))
    return pairs


def close(new, old, unit):
    """Whether new is within 2 % or one unit in the last digit of old: machines round differently.
    If old is rounding noise, below 1e-5, new may be up to 1e-4 away."""
    return new == pytest.approx(old, rel=0.02, abs=1e-4 if abs(old) < 1e-5 else 1.01 * unit)


def pictures(cell):
    """A code cell's pictures, each (rows, columns, 4), from 0 to 1."""
    pngs = [output.get("data", {}).get("image/png") for output in cell.outputs]
    return [imread(io.BytesIO(base64.b64decode(png))) for png in pngs if png]


def distance(picture, other):
    """Mean difference between two pictures of one size, averaged in blocks of 16 x 16 pixels. No
    two pictures in the notebooks are closer than 0.03."""
    difference = picture - other
    rows, columns = (size // 16 for size in difference.shape[:2])
    blocks = difference[: 16 * rows, : 16 * columns].reshape(rows, 16, columns, 16, -1)
    return np.abs(blocks[..., :3].mean(axis=(1, 3))).mean()


def compare(old, new):
    """Assert that a code cell shows the same words, numbers and pictures as before."""
    assert NUMBER.sub("#", text_of(new)) == NUMBER.sub("#", text_of(old)), old.id
    for (now, _), (before, unit) in zip(numbers(text_of(new)), numbers(text_of(old)), strict=True):
        assert close(now, before, unit), old.id
    for now, before in zip(pictures(new), pictures(old), strict=True):
        assert now.shape == before.shape and distance(now, before) < 0.02, old.id


@pytest.mark.slow
@notebooks
def test_a_notebook_shows_what_is_committed(path, notebook_runs):
    """The same words, numbers within 2 % and similar pictures. Tagged cells may vary, but must show
    something. If the committed outputs are outdated, run python tests/tools/notebooks.py."""
    committed, now = read(path), notebook_runs[path].result()
    assert warnings_of(now) == []
    for old, new in zip(committed.cells, now.cells, strict=True):
        if old.cell_type == "code" and "varies" in old.metadata.get("tags", ()):
            assert text_of(old).strip() or not text_of(new).strip(), old.id
            assert len(pictures(old)) == len(pictures(new)), old.id
        elif old.cell_type == "code":
            compare(old, new)


def test_only_these_cells_may_vary():
    tagged = {
        (path.name[:2], cell.id)
        for path in NOTEBOOKS
        for cell in read(path).cells
        if "varies" in cell.metadata.get("tags", ())
    }
    assert tagged == VARIES


def code_cell(text, level=1.0):
    """A cell with text output and a picture whose right third has this grey level."""
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
def test_rounding_is_accepted(old, new):
    compare(code_cell(old), code_cell(new, level=0.97))


def test_another_picture_is_noticed():
    with pytest.raises(AssertionError):
        compare(code_cell("1"), code_cell("1", level=0.8))


@notebooks
def test_the_committed_outputs_are_from_one_run_without_errors(path):
    notebook = read(path)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert warnings_of(notebook) == []


@notebooks
def test_a_notebook_renders_anywhere(path):
    """No widgets, which need a kernel; only the kernel's metadata; alt text for every picture."""
    notebook = read(path)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    count = 0
    for output in (output for cell in notebook.cells for output in cell.get("outputs", [])):
        data = output.get("data", {})
        assert LIVE not in data
        if "image/png" in data:
            count += 1
            text = output.metadata["image/png"]["alt"]
            assert len(text) > 60 and text == data["text/plain"]
    assert count >= 2


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
    """Every cell has its slide type. Without code, the deck keeps all pictures, no set-up slide."""
    cells = read(path).cells
    assert [c.metadata["slideshow"]["slide_type"] for c in cells] == [slide_type(c) for c in cells]
    if path != NOTEBOOKS[0]:  # one deck is enough
        return
    deck, _ = SlidesExporter(exclude_input=True).from_filename(str(path))
    assert "hosted notebook" not in deck
    assert deck.count("<section>") >= sum(cell.source.startswith("#") for cell in cells) > 3
    count = sum("image/png" in o.get("data", {}) for c in cells for o in c.get("outputs", []))
    assert deck.count("<img") == count


def test_notebooks_have_the_same_setup_cell():
    """The cell makes nala_min importable."""
    assert len({read(path).cells[1].source for path in NOTEBOOKS}) == 1


def execute(source, folder):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources=resources).execute()
    return notebook.cells[0]


def test_a_notebook_finds_the_project_from_its_root():
    """The committed outputs are from its own folder."""
    cell = execute(f"{setup_cell()}\nimport nala_min; print(nala_min.__file__)", ROOT)
    assert cell.outputs[-1].text.strip().endswith("__init__.py")


def test_a_hosted_notebook_fetches_the_project(tmp_path):
    """As its first cell says: remove the # and fill in the address."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("this copy is not a clone, or git is missing: nothing to fetch")
    source = setup_cell().replace("# !git", "!git").replace("ADDRESS", f'"{ROOT.as_uri()}"')
    cell = execute(
        f"{source}\nfrom nala_min import runcard as r; print(r.RESULTS.exists(), r.__file__)",
        tmp_path,
    )
    assert cell.outputs[-1].text.startswith(f"True {tmp_path}")


def setup_cell():
    cell = read(NOTEBOOKS[0]).cells[1]
    assert cell.id == "setup"
    return cell.source


def test_a_lesson_does_not_import_pyplot():
    """Without pyplot, no picture is drawn twice or left open."""
    code = "import sys, nala_min.course.notebook; print('matplotlib.pyplot' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"
