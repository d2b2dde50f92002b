"""The contents of the figures that nala_min/plots.py draws."""

import io
import math

import matplotlib
import pytest
import torch
from matplotlib.image import imread

from nala_min import Config, NaLaViT, entropy, measure, plots

LOSSES = {"train_loss": [3.0, 2.0, 1.5], "validation_loss": [4.0, 3.0, 2.75]}
ACCURACY = {"test_accuracy": [0.25, 0.5, 0.625]}


def small_vit(**options):
    sizes = {"num_classes": 7, "num_layers": 2, "num_heads": 2, "dim": 32, "patch_size": 2}
    return NaLaViT(Config(**sizes | options))


def noise(count=2, height=6, width=9):
    """Random images, (count, 3, height, width) uint8."""
    return torch.randint(256, (count, 3, height, width), dtype=torch.uint8)


def test_a_picture_is_written_as_a_complete_png(tmp_path):
    plots.write(plots.entropy_gap([0.1, 1.0], {"softmax": [1.0, 2.0]}), tmp_path / "gap.png")
    png = (tmp_path / "gap.png").read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n") and b"IEND" in png[-12:]
    assert list(tmp_path.iterdir()) == [tmp_path / "gap.png"]
    assert imread(tmp_path / "gap.png").shape[:2] == (585, 960)  # 3.9 x 6.4 inches, 150 dpi


def test_a_picture_depends_on_the_project_s_settings_alone(tmp_path):
    """Not on the user's, which stay as they are."""

    def drawn():
        before = dict(matplotlib.rcParams)
        plots.write(plots.entropy_gap([0.1, 1.0], {"softmax": [1.0, 2.0]}), tmp_path / "gap.png")
        assert dict(matplotlib.rcParams) == before
        return (tmp_path / "gap.png").read_bytes()

    expected = drawn()
    theirs = {"font.size": 30, "axes.facecolor": "black", "savefig.dpi": 20, "lines.linewidth": 9}
    theirs |= {"text.usetex": True, "savefig.facecolor": "red", "savefig.bbox": "tight"}
    with matplotlib.rc_context(theirs):
        assert drawn() == expected


def test_the_styles_differ_without_colour():
    assert set(plots.STYLES) == {"nala", "split", "elu", "relu", "softmax"}
    assert len({style["linestyle"] for style in plots.STYLES.values()}) == len(plots.STYLES)
    assert len({style["color"] for style in plots.STYLES.values()}) == len(plots.STYLES)


def test_entropy_gap_has_a_line_per_feature_map():
    values = {name: [1.0 + i, 2.0] for i, name in enumerate(plots.STYLES)}
    figure = plots.entropy_gap([0.1, 1.0], values)
    figure.draw_without_rendering()  # the second axis follows the first
    axes = figure.axes[0]
    drawn = {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}
    assert list(drawn) == [plots.STYLES[name]["label"] for name in values]
    for keys, entropies in zip(drawn.values(), values.values(), strict=True):
        assert keys == pytest.approx([math.exp(x) for x in entropies])  # effective number of keys
    colours = [line.get_color() for line in axes.get_lines()]
    assert colours == [look["color"] for look in plots.STYLES.values()]
    assert all(list(line.get_xdata()) == [0.1, 1.0] for line in axes.get_lines())
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert "norm" in axes.get_xlabel() and "keys" in axes.get_ylabel()
    (nats,) = axes.child_axes
    low, high = axes.get_ylim()
    assert nats.get_ylim() == pytest.approx((math.log(low), math.log(high)))


@pytest.mark.parametrize(
    ("numbers", "panels"),
    [
        (LOSSES, {"cross-entropy (nats)": ["train loss", "validation loss"]}),
        (
            {"train_loss": LOSSES["train_loss"]} | ACCURACY,
            {"cross-entropy (nats)": ["train loss"], "accuracy": ["test accuracy"]},
        ),
        (
            ACCURACY | LOSSES,
            {
                "cross-entropy (nats)": ["train loss", "validation loss"],
                "accuracy": ["test accuracy"],
            },
        ),
    ],
    ids=["losses", "a loss and an accuracy", "in another order"],
)
def test_curve_has_separate_panels_for_losses_and_accuracies(numbers, panels):
    steps = [1, 10, 15]
    history = [
        {"step": step} | {name: values[i] for name, values in numbers.items()}
        for i, step in enumerate(steps)
    ]
    figure = plots.curve(history, "Märchen, nala")
    assert figure.get_suptitle() == "Märchen, nala"
    drawn = {
        axes.get_ylabel(): [line.get_label() for line in axes.get_lines()] for axes in figure.axes
    }
    assert drawn == panels
    for line in (line for axes in figure.axes for line in axes.get_lines()):
        assert list(line.get_xdata()) == steps
        assert list(line.get_ydata()) == numbers[line.get_label().replace(" ", "_")]
        look = (plots.BLUE, "--") if line.get_label() == "train loss" else (plots.ORANGE, "-")
        assert (line.get_color(), line.get_linestyle()) == look
    assert figure.axes[-1].get_xlabel() == "step"


def test_attention_maps_frames_the_query_and_shows_its_weights():
    """Images of 6 x 9 pixels have 3 x 5 patches. The query is patch (1, 2): 3.6 pixels from the
    left and 2 from the top."""
    model, images = small_vit(), noise(2)
    maps = measure.attention_maps(model, images)
    figure = plots.attention_maps(images, maps, "nala")
    assert "nala" in figure.get_suptitle()
    panels = [axes for axes in figure.axes if axes.images]
    assert len(panels) == 2 * (1 + len(maps))
    for axes in panels:
        (frame,) = axes.patches
        assert frame.get_xy() == pytest.approx((3.6, 2.0))
        assert (frame.get_width(), frame.get_height()) == pytest.approx((1.8, 2.0))
        assert axes.images[0].get_extent() == [0, 9, 6, 0]
    titles = [axes.get_title() for axes in panels[:4]]
    assert titles == ["image", *(plots.STYLES[name]["label"] for name in maps)]
    for i in range(2):
        picture, *shown = panels[4 * i : 4 * i + 4]
        assert (picture.images[0].get_array() == images[i].movedim(0, -1).numpy()).all()
        for axes, weights in zip(shown, maps.values(), strict=True):
            times = axes.images[0].get_array().data
            assert times == pytest.approx(15 * weights[i, 1, 2].numpy())
            assert axes.images[0].get_clim() == (1 / 16, 16)  # the middle is 1: uniform attention
            patches = entropy(weights[i, 1, 2].flatten()).exp().item()
            assert axes.get_xlabel() == f"effectively {patches:.0f} of 15"


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 11), (32, 32)])
def test_attention_maps_of_any_grid(height, width):
    images = noise(1, height, width)
    maps = measure.attention_maps(small_vit(num_layers=1), images)
    plots.attention_maps(images, maps, "hybrid").savefig(io.BytesIO())


def test_attention_stats_draws_medians_and_the_middle_90_percent():
    nala = {"query_norm": [1.0, 2.0, 3.0, 4.0, 5.0], "entropy": [0.0, 1.0, 2.0, 3.0, 4.0]}
    nala = nala | {"power": [2.0, 2.5, 3.0, 3.5, 4.0]}
    softmax = {"query_norm": [2.0, 3.0, 4.0, 5.0, 9.0], "entropy": [1.0, 1.0, 1.0, 1.0, 1.0]}
    figure = plots.attention_stats([nala, nala], [softmax, softmax], num_keys=64)
    norm, power, entropies = figure.axes
    labels = [axes.get_ylabel().split()[0] for axes in figure.axes]
    assert labels == ["norm", "power", "entropy"]
    for axes, looks in ((norm, ["nala", "softmax"]), (power, ["nala"])):
        for bar, look in zip(axes.containers, looks, strict=True):
            style = {"label": bar.get_label(), "color": bar[0].get_color()}
            assert style.items() <= plots.STYLES[look].items()
    assert [len(axes.containers) for axes in figure.axes] == [2, 1, 2]  # softmax has no power
    middle, _, (bars,) = norm.containers[1]
    assert list(middle.get_ydata()) == [4.0, 4.0]
    assert [list(bar[:, 1]) for bar in bars.get_segments()] == [[2.0, 9.0]] * 2
    assert list(power.containers[0][0].get_ydata()) == [3.0, 3.0]
    assert list(entropies.containers[0][0].get_ydata()) == [2.0, 2.0]
    (legend,) = (axes.get_legend() for axes in figure.axes if axes.get_legend())
    assert [text.get_text() for text in legend.get_texts()] == ["NaLa", "softmax"]


def test_attention_stats_draws_limits_and_the_range_where_tanh_varies():
    """tanh varies for norms up to 2. Powers lie between 1.5 and 4.5, entropies below log(64)."""
    row = {"query_norm": [1.0] * 5, "power": [2.0] * 5, "entropy": [0.5] * 5}
    norm, power, axes = plots.attention_stats([row], [row], num_keys=64).axes
    (line,) = (line for line in axes.get_lines() if line.get_linestyle() == ":")
    assert list(line.get_ydata()) == [pytest.approx(4.159, abs=1e-3)] * 2
    assert any("uniform over 64 keys: 4.16" in text.get_text() for text in axes.texts)
    limits = [list(line.get_ydata()) for line in power.get_lines() if line.get_linestyle() == ":"]
    assert limits == [[1.5, 1.5], [4.5, 4.5]]
    assert [text.xy[1] for text in power.texts] == [1.5, 4.5]
    assert [text.get_text().split()[0] for text in power.texts] == ["lowest", "highest"]
    (shaded,) = norm.patches
    box = shaded.get_window_extent().transformed(norm.transData.inverted())
    assert (box.y0, box.y1) == (pytest.approx(0, abs=1e-9), pytest.approx(2))


def test_seeds_draws_every_run_and_the_mean_of_each_attention():
    def card(*losses):
        history = [{"step": 10 * i, "loss": loss} for i, loss in enumerate(losses, start=1)]
        return {"results": {"history": history, "loss": losses[-1] + 0.5}}

    runs = {"nala": [card(3.0, 1.0), card(5.0, 2.0)], "softmax": [card(2.0, 1.5)]}
    left, right = plots.seeds(runs, "loss", "loss (nats)").axes
    assert left.get_ylabel() == "loss (nats)" and "loss (nats)" in right.get_xlabel()
    curves = {line.get_label(): list(line.get_ydata()) for line in left.get_lines()}
    assert curves == {"NaLa": [4.0, 1.5], "softmax": [2.0, 1.5]}
    assert all(list(line.get_xdata()) == [10, 20] for line in left.get_lines())
    band = left.collections[0].get_datalim(left.transData)
    assert (band.y0, band.y1) == (1.0, 5.0)
    dots = [(list(x.get_xdata()), list(x.get_ydata())) for x in right.get_lines()[::2]]
    assert dots == [([1.5, 2.5], [0, 0]), ([2.0], [1])]
    assert [list(line.get_xdata()) for line in right.get_lines()[1::2]] == [[2.0] * 2] * 2
    assert [text.get_text() for text in right.texts] == ["2.000", "2.000"]
    labels = [text.get_text() for text in right.get_yticklabels()]
    assert labels == ["NaLa", "softmax"]
    assert right.yaxis_inverted()  # the first on top
    looks = [plots.STYLES[name] for name in runs]
    colours = [look["color"] for look in looks]
    assert [line.get_color() for line in left.get_lines()] == colours
    assert [line.get_linestyle() for line in left.get_lines()] == [x["linestyle"] for x in looks]
    for lines in (right.get_lines()[::2], right.get_lines()[1::2]):
        assert [line.get_color() for line in lines] == colours
