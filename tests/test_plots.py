"""What the pictures of nala_min/plots.py show, with names and numbers that are visible on white."""

import math

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.text import Text

from nala_min import plots
from nala_min.plots import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, YELLOW

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


def lines(axes):
    """The points of each line with a label."""
    found = {line.get_label(): np.transpose(line.get_data()).tolist() for line in axes.lines}
    return {label: points for label, points in found.items() if not label.startswith("_")}


def looks(axes):
    return [(line.get_color(), line.get_linestyle()) for line in axes.lines]


def dots(axes):
    """Each row of dots: colour, numbers, row and mean, where a stroke of its colour stands."""
    pairs = list(zip(axes.lines[::2], axes.lines[1::2], strict=True))
    assert all(stroke.get_color() == x.get_color() for x, stroke in pairs)
    data = [(x, *x.get_data(), stroke.get_xdata()) for x, stroke in pairs]
    return [(x.get_color(), list(values), rows[0], mean[0]) for x, values, rows, mean in data]


def texts(artists):
    return [text.get_text() for text in artists]


def test_a_picture_is_written_with_the_project_s_settings(tmp_path):
    plots.write(plots.entropy_gap([0.1, 1.0], {"softmax": [1.0, 2.0]}), tmp_path / "gap.png")
    assert [path.name for path in tmp_path.iterdir()] == ["gap.png"]
    pixels = matplotlib.image.imread(tmp_path / "gap.png")
    assert pixels.shape == (585, 960, 4) and pixels[0, 0].tolist() == [1, 1, 1, 1]


def test_attentions_have_names_and_differ_in_colour_and_dashes():
    styles = plots.STYLES.values()
    assert [style["color"] for style in styles] == [BLACK, ORANGE, PURPLE, BLUE, GREEN]
    assert len({style["linestyle"] for style in styles}) == 5
    shown = [plots.display_name(name) for name in ("split", "relu", "lam 2")]
    assert shown == ["NaLa, sign split", "linear, ReLU", "NaLa, λ = 2"]
    assert plots.display_name("elu, same state") == "linear, elu + 1, same state"
    assert plots.display_name("lam 4") == "NaLa, λ = 4"
    assert plots.display_name("lam 1 of keys") == "NaLa, λ = 1 for keys"
    assert plots.display_name("mine.py") == "mine.py"
    names = "focused polar magnitude-aware hedgehog injective delta"
    shown = "FLatten PolaFormer MALA Hedgehog InLine DeltaNet"
    assert [plots.display_name(name) for name in names.split()] == shown.split()


def test_entropy_gap_shows_the_effective_number_of_keys():
    figure = plots.entropy_gap([0.1, 1.0], {"softmax": [1.0, 2.0], "nala": [2.0, 1.0]})
    figure.draw_without_rendering()  # the second axis follows the first
    (axes,) = axes_of(figure)
    low, high = pytest.approx(math.e), pytest.approx(math.e**2)
    assert lines(axes) == {"softmax": [[0.1, low], [1, high]], "NaLa": [[0.1, high], [1, low]]}
    assert looks(axes) == [(BLACK, "--"), (ORANGE, "-")]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    (nats,) = axes.child_axes
    assert nats.get_ylim() == pytest.approx([math.log(x) for x in axes.get_ylim()])


def test_curve_has_a_panel_for_losses_and_one_for_accuracies():
    first = {"step": 1, "test_accuracy": 0.2, "train_loss": 3.0, "test_loss": 4.0}
    last = {"step": 9, "test_accuracy": 0.5, "train_loss": 1.0, "test_loss": 2.0}
    losses, accuracies = axes_of(plots.curve([first, last], "Märchen"))
    assert losses.figure.get_suptitle() == "Märchen"
    assert lines(losses) == {"train loss": [[1, 3], [9, 1]], "test loss": [[1, 4], [9, 2]]}
    assert lines(accuracies) == {"test accuracy": [[1, 0.2], [9, 0.5]]}
    assert looks(losses) == [(BLUE, "--"), (ORANGE, "-")]
    assert losses.get_ylabel() == "cross-entropy (nats)" and accuracies.get_ylabel() == "accuracy"


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


def test_attention_stats_show_medians_the_middle_90_percent_and_limits():
    """tanh varies for norms up to 2. Powers lie between 1.5 and 4.5, entropies below log 64."""
    nala = {"query_norm": [1, 2, 3, 4, 6], "power": [2, 2, 3, 4, 4], "entropy": [0, 1, 2, 3, 4]}
    softmax = {"query_norm": [2, 3, 4, 5, 9], "entropy": [1, 1, 1, 1, 1]}
    norm, power, entropies = axes_of(plots.attention_stats([nala] * 2, [softmax] * 2, 64))
    found = []
    for bar in (*norm.containers, *power.containers, *entropies.containers):
        dot, _, (bars,) = bar
        assert [round(x) for x in dot.get_xdata()] == [1, 2] == list(bar[0].axes.get_xticks())
        found.append((dot.get_color(), dot.get_ydata()[0], *bars.get_segments()[1][:, 1]))
    nala, softmax = [(ORANGE, 3, 1, 6), (BLACK, 4, 2, 9)], [(ORANGE, 2, 0, 4), (BLACK, 1, 1, 1)]
    assert found == [*nala, (ORANGE, 3, 2, 4), *softmax]
    assert texts(power.get_legend().get_texts()) == ["NaLa", "softmax"]
    assert norm.get_xlabel() == "block"
    dotted = [line.get_ydata()[0] for line in power.lines if line.get_linestyle() == ":"]
    assert dotted == [1.5, 4.5] == [text.xy[1] for text in power.texts]
    assert texts(entropies.texts) == ["uniform over 64 keys: 4.16"]
    box = norm.patches[0].get_window_extent().transformed(norm.transData.inverted())
    assert (box.y0, box.y1) == (pytest.approx(0, abs=1e-9), pytest.approx(2))


def test_speed_shows_causal_training_in_ms_and_mib_and_decoding():
    def timed(form, length, median, peak, which="forward + backward", causal=True):
        row = {"form": form, "length": length, "median": median, "peak": peak}
        return row | {"causal": causal, "pass": which}

    rows = [timed(form, 64, 0.002, 2**20) for form in ("softmax", "nala", "compiled", "readable")]
    rows += [timed("nala", 512, 0.004, 2**21), timed("quadratic", 2048, 0.008, None)]
    rows += [timed("nala", 9, 9.0, 9, which="forward"), timed("nala", 9, 9.0, 9, causal=False)]
    results = {"attention": rows, "crossover": {"causal, forward + backward": 1024}}
    results["decode"] = [{"form": "softmax_grown", "context": 128, "median": 0.007}]
    time, memory, decoding = axes_of(plots.speed(results))
    others = "softmax, fused", "NaLa, compiled", "NaLa, as in model.py"
    expected = {name: [[64, 2]] for name in others} | {"NaLa": [[64, 2], [512, 4]]}
    assert lines(time) == expected | {"NaLa, quadratic (13c)": [[2048, 8]]}
    assert lines(memory) == {name: [[64, 1]] for name in others} | {"NaLa": [[64, 1], [512, 2]]}
    assert lines(decoding) == {"softmax, growing cache": [[128, 7]]}
    assert texts(time.get_xticklabels()) == ["64", "2k"]
    assert time.texts[0].xy[0] == 1024 and "1,024" in time.texts[0].get_text()
    assert "(MiB)" in memory.get_ylabel() and "(ms)" in time.get_ylabel()


def test_seeds_show_every_run_and_the_mean_of_each_attention():
    def card(*losses):
        history = [{"step": 10 * i, "loss": loss} for i, loss in enumerate(losses, start=1)]
        return {"results": {"history": history, "loss": losses[-1] + 0.5}}

    cards = {"nala": [card(3.0, 1.0), card(5.0, 2.0)], "softmax": [card(2.0, 1.5)]}
    left, right = axes_of(plots.seeds(cards, "loss", "loss (nats)"))
    assert lines(left) == {"NaLa": [[10, 4], [20, 1.5]], "softmax": [[10, 2], [20, 1.5]]}
    assert looks(left) == [(ORANGE, "-"), (BLACK, "--")]
    band = left.collections[0].get_datalim(left.transData)  # from lowest to highest
    assert (band.y0, band.y1) == (1, 5)
    assert dots(right) == [(ORANGE, [1.5, 2.5], 0, 2), (BLACK, [2], 1, 2)]
    assert texts(right.texts) == ["2.000", "2.000"] and right.texts[0].xy[0] == 2
    assert texts(right.get_yticklabels()) == ["NaLa", "softmax"] and right.yaxis_inverted()
    assert left.get_ylabel() == "loss (nats)" and right.get_xlabel() == "final loss (nats)"


def test_recall_and_studies_show_the_runs_of_each_variant():
    """Each in its colour, and others in grey, such as a user's own file."""
    runs = [("nala", 1.0, 0.5), ("nala", 0.5, 0.25), ("no query norm", 0.5, 0.5), ("me.py", 0, 1)]
    keys = ["variant", "accuracy at 4 pairs", "accuracy at 8 pairs"]
    rows = [dict(zip(keys, run, strict=True)) for run in runs]
    (axes,) = axes_of(plots.recall(rows, [4, 8]))
    means = {"NaLa": [[4, 0.75], [8, 0.375]], "NaLa, no query norm": [[4, 0.5], [8, 0.5]]}
    assert lines(axes) == means | {"me.py": [[4, 0], [8, 1]]}
    assert looks(axes) == [(ORANGE, "-"), (YELLOW, "-"), (GREY, "-.")]
    assert texts(axes.get_xticklabels()) == ["4", "8"] and axes.get_xscale() == "log"
    (axes,) = axes_of(plots.study({keys[2]: rows}, "A title"))
    nala = (ORANGE, [0.5, 0.25], 0, 0.375)
    assert dots(axes) == [nala, (YELLOW, [0.5], 1, 0.5), (GREY, [1], 2, 1)]
    assert texts(axes.get_yticklabels()) == ["NaLa", "NaLa, no query norm", "me.py"]
    assert axes.yaxis_inverted() and axes.get_xlabel() == keys[2]
    assert axes.figure.get_suptitle() == "A title"
