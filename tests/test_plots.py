"""What the pictures of nala_min/plots.py show, with names and numbers that are visible on white."""

from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.text import Text
from PIL import Image

from nala_min import plots, runcard
from nala_min.lab.studies import STUDIES
from nala_min.plots import BLACK, BLUE, GREEN, ORANGE, PURPLE

DARK = {"axes.facecolor": "black", "figure.facecolor": "black", "text.color": "white"}
DARK |= {"axes.labelcolor": "white", "xtick.color": "white", "savefig.dpi": 20}


@pytest.fixture(autouse=True)
def settings():
    """A user's own settings, which the pictures neither follow nor change."""
    with matplotlib.rc_context(DARK):
        before = dict(matplotlib.rcParams)
        yield
        assert dict(matplotlib.rcParams) == before


def axes_of(figure):
    """The figure's axes. Its labels and lines are visible on white and do not overlap."""
    assert figure.get_layout_engine() is not None
    assert {to_rgb(x.get_facecolor()) for x in (figure, *figure.axes)} == {(1, 1, 1)}
    colours = [x.get_color() for x in figure.findobj(Text) if x.get_text()]
    assert max(max(to_rgb(colour)) for colour in colours) < 0.5
    assert all(min(to_rgb(line.get_color())) < 0.5 for axes in figure.axes for line in axes.lines)
    return figure.axes


def texts(artists):
    return [text.get_text() for text in artists]


def card(name):
    return runcard.read_json(runcard.RESULTS / f"{name}.json")


def maps():
    """Attention maps of two images of noise."""
    random = torch.Generator().manual_seed(1)
    images = torch.randint(256, (2, 3, 8, 12), generator=random, dtype=torch.uint8)
    return images, {x: torch.rand(2, 2, 3, 2, 3, generator=random) / 3 for x in ("nala", "relu")}


def runs(name):
    return [card(f"shakespeare_cpu_{name}_seed{seed}") for seed in (1, 2, 3)]


STATS = "shakespeare_cpu_nala_seed1", "shakespeare_cpu_softmax_seed1"
DRAWN = {  # pictures of the results page, and others in pictures/, from the cards
    "entropy_gap": lambda: plots.entropy_gap(**card("entropy_gap")["results"]),
    "speed_cpu_float32": lambda: plots.speed(card("speed_cpu_float32")["results"]),
    **{f"compare_{x}": lambda x=x: STUDIES[x].task.draw(card(f"compare_{x}")["results"]["runs"])
       for x in ("recall", "sharpness")},
    "curve": lambda: plots.curve(card("cifar_cpu_default")["results"]["history"], "CIFAR-10"),
    "stats": lambda: plots.attention_stats(
        *(card(x)["results"]["attention_stats"] for x in STATS), num_keys=128),
    "seeds": lambda: plots.seeds({x: runs(x) for x in ("nala", "elu")}, "validation_loss", "loss"),
    "maps": lambda: plots.attention_maps(*maps(), "NaLa"),
}  # fmt: skip
PICTURES = Path(__file__).parent / "pictures"


VERSION = "3.11.2"  # of matplotlib, which drew the committed pictures


def committed(name):
    page = runcard.RESULTS / f"{name}.png"
    return page if page.exists() else PICTURES / f"{name}.png"


@pytest.mark.parametrize("name", DRAWN)
def test_a_picture_shows_its_card(name, tmp_path):
    """Those in pictures/ are a third as large. Other versions of matplotlib draw other letters."""
    plots.write(DRAWN[name](), tmp_path / "new.png")
    new, path = Image.open(tmp_path / "new.png"), committed(name)
    if not path.exists():
        new.convert("RGB").reduce(3).save(path)
        pytest.fail(f"{path} was missing: look at the new one, and commit it")
    old = Image.open(path)
    size, limit = (1, 1e-4) if matplotlib.__version__ == VERSION else (16, 0.02)
    small = new.convert("RGB").reduce(new.width // old.width)
    blocks = [np.asarray(x.convert("RGB").reduce(size)) / 255 for x in (small, old)]
    assert np.abs(blocks[0] - blocks[1]).mean() < limit


def test_attentions_have_names_and_differ_in_colour_and_dashes():
    styles = plots.STYLES.values()
    assert [style["color"] for style in styles] == [BLACK, ORANGE, PURPLE, BLUE, GREEN]
    assert len({style["linestyle"] for style in styles}) == 5
    for name, shown in {
        "split": "NaLa, sign split", "relu": "linear, ReLU", "lam 4": "NaLa, λ = 4",
        "elu, same state": "linear, elu + 1, same state", "lam 1 of keys": "NaLa, λ = 1 for keys",
        "focused": "FLatten", "injective": "InLine", "mine.py": "mine.py",
    }.items():  # fmt: skip
        assert plots.display_name(name) == shown


def test_attention_maps_frame_the_query_and_show_its_weights():
    """Images of 6 x 9 pixels have 3 x 5 patches. The query is patch (1, 2): 3.6 pixels from the
    left and 2 from the top."""
    images = torch.randint(256, (2, 3, 6, 9), dtype=torch.uint8)
    maps = torch.rand(2, 3, 5, 3, 5)
    maps[:, 1, 2] = torch.tensor([[[0, 0, 0, 0, 0], [2, 2, 2, 2, 0], [0, 0, 0, 0, 0]]]) / 8
    *panels, bar = axes_of(plots.attention_maps(images, {"nala": maps}, "NaLa"))
    assert [axes.get_title() for axes in panels] == ["image", "NaLa", "", ""]
    for axes in panels:
        (frame,) = axes.patches
        box = (*frame.get_xy(), frame.get_width(), frame.get_height())
        assert box == pytest.approx((3.6, 2.0, 1.8, 2.0))
        assert axes.images[0].get_extent() == [0, 9, 6, 0] and not len(axes.get_xticks())
    for i in range(2):
        picture, shown = (axes.images[0] for axes in panels[2 * i : 2 * i + 2])
        assert (picture.get_array() == images[i].movedim(0, -1).numpy()).all()
        assert shown.get_array().data == pytest.approx(15 * maps[i, 1, 2].numpy(), abs=1e-8)
        assert shown.get_clim() == (1 / 16, 16)  # the middle is 1: uniform attention
        assert panels[2 * i + 1].get_xlabel() == "effectively 4 of 15"
    assert texts(bar.get_yticklabels()) == ["1/16", "1/4", "1", "4", "16"]
