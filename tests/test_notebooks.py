"""The notebooks have the parts of a lesson and show what their code shows, by shared functions."""

import base64
import inspect
import io
import math
import re
import subprocess
import sys

import ipywidgets
import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from nala_min import NaLaLM, entropy, plots
from nala_min.course import notebook
from notebooks import FOLDER, LIVE, NOTEBOOKS, ROOT, read, slide_type

# Cells whose outputs may differ from the committed ones: they measure times, train, or depend on
# exercises or weights that may be missing.
VARIES = dict.fromkeys(range(1, 8), "check") | {
    5: "check time-live",
    6: "check live-recall live-sharpness",
    8: "loss-counts live-train live-picture live-samples-code maps decode-cost-picture",
    9: "cost-picture live-train live-picture maps-picture",
}
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[-+]?\d+)?")
notebooks = pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])


def data_of(cell):
    """What a code cell shows, by MIME type, one dictionary for each output."""
    return [output.get("data", {"text/plain": output.get("text")}) for output in cell.outputs]


def text_of(cell):
    """The text that a code cell shows, including the alt texts of its pictures."""
    return "\n".join(x.get("text/markdown") or x["text/plain"] for x in data_of(cell))


def pictures(cell):
    """A code cell's pictures, as means of blocks of 16 x 16 pixels. In the notebooks, no two are
    closer than 0.03."""
    pngs = [base64.b64decode(x["image/png"]) for x in data_of(cell) if "image/png" in x]
    images = [Image.open(io.BytesIO(png)).convert("RGB") for png in pngs]
    return [np.asarray(image.reduce(16)) / 255 for image in images]


def assert_close(new, old):
    """Numbers may be 2 % or one unit of their last digit apart: machines round differently. If old
    is rounding noise, below 1e-5, new may be up to 1e-4 away."""
    mantissa, _, exponent = old.partition("e")
    unit = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
    limit = 1e-4 if abs(float(old)) < 1e-5 else 1.01 * unit
    assert float(new) == pytest.approx(float(old), rel=0.02, abs=limit)


@pytest.mark.slow
@notebooks
def test_a_notebook_shows_what_is_committed(path, notebook_runs):
    """The same words, numbers within 2 % and similar pictures. Tagged cells may vary, but must show
    something. If the committed outputs are outdated, run python tests/tools/notebooks.py."""
    for old, new in zip(read(path).cells, notebook_runs[path].result().cells, strict=True):
        if old.cell_type == "markdown":
            continue
        assert not any(output.get("name") == "stderr" for output in new.outputs), old.id
        then, now = (text_of(cell).strip().replace(",", "") for cell in (old, new))
        assert (then or not now) and len(pictures(old)) == len(pictures(new)), old.id
        if "varies" in old.metadata.get("tags", ()):
            continue
        assert NUMBER.sub("#", now) == NUMBER.sub("#", then), old.id
        for pair in zip(NUMBER.findall(now), NUMBER.findall(then), strict=True):
            assert_close(*pair)
        for picture, other in zip(pictures(new), pictures(old), strict=True):
            assert np.abs(picture - other).mean() < 0.02, old.id


@notebooks
def test_a_notebook_has_the_parts_of_a_lesson(path):
    cells, lesson = read(path).cells, int(path.name[:2])
    source = "\n".join(cell.source for cell in cells)
    assert source.startswith(f"# {lesson}. ") and (lesson > 7 or f"report({lesson})" in source)
    parts = ["you will", "\\tag{", "## Read next", "## Exercises"]
    parts += ["notebook.source(", "\nassert ", "notebook.show("]
    assert [part for part in parts if part not in source] == []
    assert [x.metadata["slideshow"]["slide_type"] for x in cells] == [slide_type(x) for x in cells]
    varies = {cell.id for cell in cells if "varies" in cell.metadata.get("tags", ())}
    assert varies == set(VARIES[lesson].split())


@notebooks
def test_a_notebook_is_committed_as_it_ran_and_renders_anywhere(path):
    """From one run without errors or warnings; no widgets, which need a kernel; a description for
    every picture."""
    cells = [cell for cell in read(path).cells if cell.cell_type == "code"]
    outputs = [output for cell in cells for output in cell.outputs]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not any(x.output_type == "error" or x.get("name") == "stderr" for x in outputs)
    assert not any(LIVE in x.get("data", {}) for x in outputs)
    texts = [x.metadata["image/png"]["alt"] for x in outputs if "image/png" in x.get("data", {})]
    assert len(texts) >= 2 and min(map(len, texts)) > 60


def test_the_first_cell_finds_the_project(tmp_path):
    """From the root, from notebooks/, and beside a clone that a hosted notebook has fetched."""
    (setup,) = {read(path).cells[1].source for path in NOTEBOOKS}  # the same in all
    assert "\n# !git clone -q ADDRESS nala_min_repository\n" in setup
    clone = tmp_path / "nala_min_repository"
    (clone / "nala_min").mkdir(parents=True)
    (clone / "nala_min" / "__init__.py").touch()
    code = f"{setup}\nfrom importlib.util import find_spec\nprint(find_spec('nala_min').origin)"
    for folder, home in {ROOT: ROOT, FOLDER: ROOT, tmp_path: clone}.items():
        command = [sys.executable, "-IS", "-c", code]
        found = subprocess.run(command, cwd=folder, capture_output=True, text=True).stdout.strip()
        assert (folder / found).samefile(home / "nala_min" / "__init__.py")


# --- What the lessons share -----------------------------------------------------------------------


@pytest.fixture
def displayed(monkeypatch):
    """What the functions show, with its options, in the style that every notebook begins with."""
    calls = []
    monkeypatch.setattr(notebook, "display", lambda data, **options: calls.append((data, options)))
    with matplotlib.rc_context():
        notebook.begin(3)
        yield calls
    torch.set_printoptions(profile="default")


def test_a_notebook_begins_with_a_seed_a_style_and_three_decimals(displayed):
    assert torch.initial_seed() == 3 and matplotlib.rcParams["axes.grid"] is True
    shown = repr(torch.tensor([math.pi, 1e-4]))
    assert shown.replace(" ", "") == "tensor([3.142,0.000])"  # torch 2.7 pads with spaces


@pytest.mark.parametrize("has_a_map", [True, False])
def test_show_gives_a_picture_and_its_description(displayed, has_a_map):
    """Sharp, and white on a dark page. A map keeps all its colours; lines need few."""
    matplotlib.rcParams["savefig.facecolor"] = "none"
    figure, axes = plots.figure(width=5, height=2)
    if has_a_map:
        axes.imshow([[0.0, 1.0]])
    notebook.show(figure, "Two squares.")
    (picture, options), (details, _) = displayed
    assert options["metadata"] == {"image/png": {"alt": "Two squares.", "width": 480}}
    assert picture["text/plain"] == details["text/plain"] == "Two squares."
    assert re.fullmatch(r"<details>.+\n\nTwo squares\.\n\n</details>", details["text/markdown"])
    image = Image.open(io.BytesIO(base64.b64decode(picture["image/png"])))
    assert image.width >= 1.4 * 480 and image.mode == ("RGBA" if has_a_map else "P")
    assert image.convert("RGBA").getpixel((0, 0)) == (255, 255, 255, 255)


def test_source_is_the_code_as_it_runs_and_may_be_folded(displayed):
    notebook.source(entropy, NaLaLM.generate)
    notebook.source(entropy, fold="The code of entropy")
    (shown, _), (folded, options) = displayed
    code = inspect.getsource(entropy).rstrip()
    for text in shown.values():
        assert f"{code}\n\n\n@torch.no_grad()\ndef generate(self, tokens" in text  # dedented
    begin, _, end = folded["text/markdown"].partition(f"\n\n```python\n{code}\n```\n\n")
    assert begin.startswith("<details><summary>The code of entropy</summary>\n\n")
    assert end.endswith("\n\n</details>") and folded["text/plain"] == code and options["raw"]


def test_a_slider_draws_at_its_start_and_at_a_new_value(displayed):
    drawn = []

    def draw(norm):
        drawn.append(norm)
        return plots.figure(width=5 + norm, height=2)[0]

    notebook.slider(draw, 0, 10, 4)
    (data, options), widgets = displayed[-1], ipywidgets.widgets.widget._instances.values()
    assert "slider" in data["text/plain"] and LIVE in data and options["raw"]
    (knob,) = [w for w in widgets if isinstance(w, ipywidgets.FloatSlider)]
    (picture,) = [w for w in widgets if isinstance(w, ipywidgets.Image)]
    assert (knob.min, knob.max, knob.step, knob.description) == (0, 10, 0.1, "norm")
    # With an Output, nbclient writes to the kernel while reading from it, and sometimes hangs.
    assert picture.width == "864" and not any(isinstance(w, ipywidgets.Output) for w in widgets)
    first, knob.value = picture.value, 7.5
    assert drawn == [4, 7.5] and first != picture.value
