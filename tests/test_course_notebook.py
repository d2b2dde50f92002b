"""The notebooks' shared functions, in nala_min/course/notebook.py."""

import base64
import inspect
import io
import math

import ipywidgets
import matplotlib
import pytest
import torch
from PIL import Image

from nala_min import NaLaLM, entropy, plots
from nala_min.course import notebook


@pytest.fixture
def displayed(monkeypatch):
    """The arguments of each call of display."""
    calls = []
    monkeypatch.setattr(notebook, "display", lambda *args, **options: calls.append((args, options)))
    return calls


def test_begin_fixes_random_numbers_style_and_decimals():
    with matplotlib.rc_context():
        notebook.begin(3)
        drawn = torch.rand(2)
        assert matplotlib.rcParams["axes.grid"] is True
        shown = repr(torch.tensor([math.pi, 1e-4]))
        assert shown.replace(" ", "") == "tensor([3.142,0.000])"  # torch 2.7 pads with spaces
        torch.manual_seed(3)
        assert torch.equal(drawn, torch.rand(2))
    torch.set_printoptions(profile="default")


def test_show_gives_a_picture_and_its_text(displayed):
    figure, axes = plots.figure(width=5, height=2)
    axes.plot([0, 1], [0, 1])
    notebook.show(figure, "A line that rises.")
    ((picture,), options), ((details,), _) = displayed
    png = base64.b64decode(picture["image/png"])
    assert png.startswith(b"\x89PNG") and options["raw"]
    assert picture["text/plain"] == details["text/plain"] == "A line that rises."
    assert options["metadata"] == {"image/png": {"alt": "A line that rises.", "width": 480}}
    assert details["text/markdown"].startswith("<details><summary>")
    assert "A line that rises." in details["text/markdown"]


@pytest.mark.parametrize("has_a_map", [True, False])
def test_a_picture_is_sharp_readable_on_a_dark_page_and_small(displayed, has_a_map):
    """After begin(), which every notebook calls; its background is white whatever the style. A map
    keeps all its colours; lines need few."""
    with matplotlib.rc_context():
        notebook.begin()
        matplotlib.rcParams.update({"savefig.facecolor": "none", "savefig.transparent": False})
        figure, axes = plots.figure(width=5, height=2)
        if has_a_map:
            axes.imshow([[0.0, 1.0]])
        notebook.show(figure, "A map, or nothing.")
    torch.set_printoptions(profile="default")
    (picture,), options = displayed[0]
    image = Image.open(io.BytesIO(base64.b64decode(picture["image/png"])))
    assert image.width >= 1.4 * options["metadata"]["image/png"]["width"]
    assert image.convert("RGBA").getpixel((0, 0)) == (255, 255, 255, 255)
    assert (image.mode == "P") != has_a_map


def test_source_is_the_code_as_it_runs_and_may_be_folded(displayed):
    notebook.source(entropy, plots.write, NaLaLM.generate)
    notebook.source(entropy, fold="The code of entropy")
    ((shown,), _), ((folded,), _) = displayed
    assert "\n\n```python\n" in shown["text/markdown"] and "\n```\n\n" in shown["text/markdown"]
    code = inspect.getsource(entropy).rstrip()
    for text in shown.values():
        assert code in text and inspect.getsource(plots.write).rstrip() in text
        assert "\ndef generate(self, tokens" in text  # dedented
    begin, _, end = folded["text/markdown"].partition(code)
    assert begin.startswith("<details><summary>The code of entropy</summary>\n\n")
    assert end.endswith("\n\n</details>") and folded["text/plain"] == code


def test_slider_draws_at_its_start_and_at_a_new_value(displayed):
    drawn = []

    def draw(norm):
        drawn.append(norm)
        figure, axes = plots.figure()
        axes.set_title(f"{norm}")
        return figure

    notebook.slider(draw, 0, 10, 4)
    assert drawn == [4]
    ((data,), options) = displayed[-1]
    assert "slider" in data["text/plain"] and options["raw"]
    assert any(kind.endswith("widget-view+json") for kind in data)
    widgets = ipywidgets.widgets.widget._instances.values()
    (knob,) = [w for w in widgets if hasattr(w, "step")]
    (picture,) = [w for w in widgets if isinstance(w, ipywidgets.Image)]
    assert (knob.min, knob.max, knob.description) == (0, 10, "norm")
    # With an Output, nbclient writes to the kernel while reading from it, and sometimes hangs.
    assert not any(isinstance(w, ipywidgets.Output) for w in widgets)
    assert knob.step == pytest.approx(0.1)
    first = picture.value
    knob.value = 7.5
    assert drawn == [4, 7.5]
    assert first[:4] == picture.value[:4] == b"\x89PNG" and first != picture.value
