"""Every picture of the project, in one style, with one line style per attention."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from nala_min.model import entropy
from nala_min.runcard import write_atomically

# Okabe and Ito's palette, safe for colour-blind readers.
BLACK, ORANGE, BLUE, GREEN = "#000000", "#d55e00", "#0072b2", "#009e73"
PURPLE, YELLOW, GREY = "#cc79a7", "#e69f00", "#666666"

STYLES = {
    "softmax": {"label": "softmax", "color": BLACK, "linestyle": "--"},
    "nala": {"label": "NaLa", "color": ORANGE, "linestyle": "-"},
    "split": {"label": "NaLa, sign split", "color": PURPLE, "linestyle": (0, (5, 1))},
    "elu": {"label": "linear, elu + 1", "color": BLUE, "linestyle": "-."},
    "relu": {"label": "linear, ReLU", "color": GREEN, "linestyle": ":"},
}
# The styles of a study's variants. In dot plots, all others are grey.
VARIANT_STYLES = {"softmax": STYLES["softmax"], "nala": STYLES["nala"]} | {
    "no query norm": {"color": YELLOW, "linestyle": "-"},
    "no cosine map, same state": {"color": YELLOW, "linestyle": ":"},
    **{f"{name}, same state": STYLES[name] for name in ("elu", "relu")},
}
DISPLAY_NAMES = {name: style["label"] for name, style in STYLES.items()} | {
    "focused": "FLatten", "polar": "PolaFormer", "magnitude-aware": "MALA", "hedgehog": "Hedgehog",
    "injective": "InLine", "delta": "DeltaNet", "nala-delta": "NaLa + DeltaNet",
    "gated-delta": "Gated DeltaNet", "nala-gated-delta": "NaLa + Gated DeltaNet",
    "no query norm": "NaLa, no query norm", "no cosine map": "NaLa, ReLU instead of cosines",
    "constant power": "NaLa, constant power", "tanh(norm/s)": "NaLa, tanh(norm/s)",
    "error of one": "squared error, one item", "error of many": "squared error, mean",
    **{f"lam {x}": f"NaLa, λ = {x}" for x in (1, 2, 4)},
    **{f"lam 1 of {what}": f"NaLa, λ = 1 for {what}" for what in ("queries", "keys")},
    **{f"tau {x}": f"NaLa, τ = {x}" for x in (0, 1)},
    **{f"alpha {x}": f"NaLa, α = {x}" for x in (1, 2, 5)},  # noqa: RUF001
}  # fmt: skip
RC_PARAMS = {
    "axes.axisbelow": True, "axes.grid": True, "grid.alpha": 0.3, "lines.linewidth": 2,
    "axes.prop_cycle": matplotlib.cycler(color=[ORANGE, BLUE, GREEN, PURPLE, YELLOW, BLACK]),
    "axes.spines.right": False, "axes.spines.top": False, "axes.titlesize": "medium",
    "figure.constrained_layout.use": True, "figure.titlesize": "medium", "image.cmap": "cividis",
    "legend.frameon": False, "savefig.dpi": 150,
}  # fmt: skip
_styled = matplotlib.style.context(["default", RC_PARAMS])  # whatever the user's own settings are


def display_name(variant: str) -> str:
    """Display name of a result or a variant, with its suffixes, such as ", same state"."""
    first, *rest = variant.split(", ")
    return ", ".join([DISPLAY_NAMES.get(first, first), *rest])


@_styled
def figure(rows=1, columns=1, *, width=6.4, height=3.6, **options: Any) -> tuple[Figure, Any]:
    """A figure of width x height inches, and its axes: one or an array, as from Figure.subplots."""
    fig = Figure(figsize=(width, height))
    return fig, fig.subplots(rows, columns, **options)


@_styled
def write(fig: Figure, path: Path | str) -> None:
    """Write fig as a PNG, completely or not at all."""
    write_atomically(path, lambda file: fig.savefig(file, format="png"))


def _band(axes: Any, x: Sequence[float], values: Any, alpha: float, **style: Any) -> None:
    """Draw the mean of values (runs, n) against x (n), in a band from lowest to highest."""
    axes.fill_between(x, np.min(values, 0), np.max(values, 0), color=style["color"], alpha=alpha)
    axes.plot(x, np.mean(values, axis=0), **style)


def _dots(axes: Any, rows: Iterable[Sequence[float]], colours: Iterable[str]) -> None:
    """For each row, from the top, draw a dot per value and a stroke at the mean."""
    for row, (values, colour) in enumerate(zip(rows, colours, strict=True)):
        axes.plot(values, [row] * len(values), "o", color=colour, alpha=0.6, markersize=5)
        axes.plot([np.mean(values)] * 2, [row - 0.35, row + 0.35], color=colour)
    axes.set_ylim(row + 0.6, -0.6)
    axes.locator_params(axis="x", nbins=5)


@_styled
def entropy_gap(norms: Sequence[float], entropies: dict[str, list[float]]) -> Figure:
    """Entropy and effective number of keys against the query's norm, a line per attention."""
    fig, axes = figure(height=3.9)
    for name, values in entropies.items():
        axes.plot(norms, np.exp(values), **STYLES[name])
    axes.set(xlabel="norm of the query", ylabel="effective number of keys", xscale="log")
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:.0f}")
    axes.set_title("Longer queries attend to fewer keys, except in plain linear attention")
    nats = axes.secondary_yaxis("right", functions=(np.log, np.exp))
    nats.set(ylabel="entropy (nats)", yticks=range(1, 5), yticklabels=range(1, 5))
    nats.tick_params(which="minor", right=False)
    axes.legend(loc="lower left")
    return fig


@_styled
def curve(history: list[dict], title: str) -> Figure:
    """The losses and accuracies in history against the step, in separate panels."""
    units = {"loss": "cross-entropy (nats)", "accuracy": "accuracy"}
    shown = [quantity for quantity in units if any(name.endswith(quantity) for name in history[0])]
    fig, panels = figure(len(shown), height=1.2 + 2.8 * len(shown), sharex=True, squeeze=False)
    fig.suptitle(title)
    steps = [point["step"] for point in history]
    for quantity, axes in zip(shown, panels[:, 0], strict=True):
        for name in (name for name in history[0] if name.endswith(quantity)):
            look = {"color": BLUE, "linestyle": "--"} if "train" in name else {"color": ORANGE}
            values = [point[name] for point in history]
            axes.plot(steps, values, marker="o", markersize=3, label=name.replace("_", " "), **look)
        axes.set(ylabel=units[quantity])
        axes.legend()
    panels[-1, 0].set(xlabel="step")
    return fig


@_styled
def attention_maps(images: Tensor, maps: dict[str, Tensor], trained_with: str) -> Figure:
    """Images (B, 3, height, width) uint8, one per row, with the patch in the middle framed. Beside
    each, its weights from measure.attention_maps, relative to uniform attention."""
    size = {"width": 1.9 * (1 + len(maps)) + 0.8, "height": 1.9 * len(images) + 0.9}
    fig, grid = figure(len(images), 1 + len(maps), squeeze=False, **size)
    fig.suptitle(f"Weights of the framed patch in the last block of a {trained_with} model")
    (height, width), (rows, columns) = images.shape[2:], next(iter(maps.values())).shape[1:3]
    r, s, extent = rows // 2, columns // 2, (0, width, height, 0)
    corner, sides = (s * width / columns, r * height / rows), (width / columns, height / rows)
    for i, (image, (first, *others)) in enumerate(zip(images, grid, strict=True)):
        first.imshow(image.movedim(0, -1).numpy(), extent=extent)
        for axes, weights in zip(others, maps.values(), strict=True):
            weights = weights[i, r, s]  # (rows, columns)
            relative = (weights * rows * columns).clamp_min(1e-9).numpy()  # 0 has no logarithm
            heatmap = axes.imshow(relative, "PuOr_r", LogNorm(1 / 16, 16), extent=extent)
            label = f"effectively {entropy(weights.flatten()).exp():.0f} of {rows * columns}"
            axes.set_xlabel(label, fontsize="small")
        for axes in (first, *others):
            colour = ORANGE if axes is first else BLACK
            axes.add_patch(Rectangle(corner, *sides, fill=False, edgecolor=colour, linewidth=1.5))
            axes.grid(False)
            axes.spines[:].set_visible(True)
            axes.set(xticks=[], yticks=[])
    for axes, title in zip(grid[0], ["image", *(STYLES[x]["label"] for x in maps)], strict=True):
        axes.set_title(title)
    bar = fig.colorbar(heatmap, ax=grid, extend="both", shrink=0.5, aspect=30)
    bar.set_ticks([1 / 16, 1 / 4, 1, 4, 16], labels=["1/16", "1/4", "1", "4", "16"])
    bar.set_label("weight ÷ that of even attention")
    return fig


@_styled
def attention_stats(nala_blocks: list[dict], softmax_blocks: list[dict], num_keys: int) -> Figure:
    """measure.attention_stats of a model with NaLa and of one with softmax, block by block:
    medians, with bars from the 5th to the 95th percentile. num_keys: keys per query."""
    fig, panels = figure(1, 3, width=9.6, height=3.5)
    limit = float(np.log(num_keys))
    uniform = f"uniform over {num_keys} keys: {limit:.2f}"
    quantities = {  # label, upper end of the axis, bounds
        "query_norm": ("norm of the query", None, {}),
        "power": ("power p, Eq. (7)", 5, {"lowest possible": 1.5, "highest possible": 4.5}),
        "entropy": ("entropy of the attention (nats)", 1.18 * limit, {uniform: limit}),
    }
    sides = (-0.12, STYLES["nala"], nala_blocks), (0.12, STYLES["softmax"], softmax_blocks)
    for axes, (name, (label, top, bounds)) in zip(panels, quantities.items(), strict=True):
        for offset, style, blocks in sides:
            if name in blocks[0]:  # softmax has no power
                low, _, median, _, high = np.array([block[name] for block in blocks]).T
                look = {"color": style["color"], "label": style["label"], "fmt": "o", "capsize": 4}
                x = np.arange(1, len(blocks) + 1) + offset
                axes.errorbar(x, median, yerr=[median - low, high - median], **look)
        axes.set(xlabel="block", xticks=range(1, len(nala_blocks) + 1), ylabel=label)
        axes.set(xlim=(0.5, len(nala_blocks) + 0.5), ylim=(0, top))
        axes.grid(False, axis="x")
        for text, bound in bounds.items():
            axes.axhline(bound, color=GREY, linestyle=":", linewidth=1.2)
            axes.annotate(text, (0.55, bound), (0, 4), textcoords="offset points", fontsize="small")
    panels[0].axhspan(0, 2, color=YELLOW, alpha=0.25, linewidth=0, zorder=0)
    panels[0].annotate("tanh is not flat here", (0.02, 0.05), xycoords="axes fraction")
    panels[1].legend(*panels[0].get_legend_handles_labels(), loc="center")
    return fig


@_styled
def speed(results: dict[str, Any]) -> Figure:
    """Time and memory of a forward and a backward pass against the number of tokens, and time per
    decoded token against the context. results: from a card of nala_min.lab.bench."""
    styles = {
        "softmax": STYLES["softmax"] | {"label": "softmax, fused"},
        "nala": STYLES["nala"],
        "compiled": STYLES["nala"] | {"label": "NaLa, compiled", "linestyle": (0, (3, 1, 1, 1))},
        "readable": {"label": "NaLa, as in model.py", "color": BLUE, "linestyle": "-."},
        "quadratic": {"label": "NaLa, quadratic (13c)", "color": PURPLE, "linestyle": ":"},
        "softmax_grown": {"label": "softmax, growing cache", "color": GREEN, "linestyle": ":"},
    }
    fig, (time, memory, decoding) = figure(1, 3, width=11.5, height=4.2)
    time.set(title="Time: softmax grows as N², NaLa as N", ylabel="forward + backward (ms)")
    memory.set(title="Memory: softmax and NaLa grow as N", ylabel="peak beyond q, k, v (MiB)")
    decoding.set(title="Decoding: NaLa's time is constant", ylabel="time per token (ms)")
    causal = [r for r in results["attention"] if r["causal"] and r["pass"] == "forward + backward"]
    for axes, rows, x, y, unit in (
        (time, causal, "length", "median", 1e3),
        (memory, causal, "length", "peak", 2**-20),
        (decoding, results["decode"], "context", "median", 1e3),
    ):
        for form, style in styles.items():
            points = [(row[x], unit * row[y]) for row in rows if row["form"] == form and row[y]]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", markersize=3, **style)
        axes.set_xscale("log", base=2)
        axes.set(yscale="log", xlabel="number of tokens" if x == "length" else "context length")
        ticks = sorted({row[x] for row in rows})[::2]
        axes.set_xticks(ticks, [f"{n:,}" if n < 2**10 else f"{n // 2**10}k" for n in ticks])
        axes.legend(loc="upper left", fontsize="x-small")
    if (crossover := results["crossover"]["causal, forward + backward"]) is not None:
        time.axvline(crossover, ymax=0.65, color=YELLOW, linewidth=1.5)  # below the legend
        note = f" NaLa is faster\n from {crossover:,} tokens"
        time.annotate(note, (crossover, 0.04), xycoords=("data", "axes fraction"))
    return fig


@_styled
def seeds(cards: dict[str, list[dict]], result: str, label: str) -> Figure:
    """Run cards by attention: their curves as in _band, and their final results as in _dots.
    result: the key to plot, in history and results; label: its name and unit."""
    fig, (left, right) = figure(1, 2, width=9.6, height=3.8)
    finals = [[run["results"][result] for run in runs] for runs in cards.values()]
    _dots(right, finals, [STYLES[name]["color"] for name in cards])
    for row, (name, runs) in enumerate(cards.items()):
        steps = [point["step"] for point in runs[0]["results"]["history"]]
        values = [[point[result] for point in run["results"]["history"]] for run in runs]
        _band(left, steps, values, 0.15, **STYLES[name])
        mean = np.mean(finals[row])
        right.annotate(f"{mean:.3f}", (mean, row - 0.38), ha="center", fontsize="small")
    left.set(xlabel="training step", ylabel=label)
    left.legend()
    right.set(xlabel=f"final {label}", ylim=(len(cards) - 0.4, -0.7))
    right.set_yticks(range(len(cards)), [STYLES[name]["label"] for name in cards])
    right.grid(False, axis="y")
    return fig


@_styled
def recall(rows: list[dict], pairs: Sequence[int]) -> Figure:
    """Accuracy against the number of pairs, for VARIANT_STYLES and a user's files: the mean over
    seeds, in a band from lowest to highest. rows: the runs of a card of nala_min.lab.compare."""
    fig, axes = figure()
    files = sorted({row["variant"] for row in rows if row["variant"].endswith(".py")})
    styles = VARIANT_STYLES | {file: {"color": GREY, "linestyle": "-."} for file in files}
    for name, style in styles.items():
        runs = [row for row in rows if row["variant"] == name]
        if runs:
            values = [[run[f"accuracy at {n} pairs"] for n in pairs] for run in runs]
            _band(axes, pairs, values, 0.12, **style | {"label": display_name(name)})
    axes.set_xscale("log", base=2)
    axes.set_xticks(pairs, [str(n) for n in pairs])
    axes.set(xlabel="number of key-value pairs in the text", ylabel="share of values recalled")
    axes.set(title="How much a state can recall", ylim=(0, 1.03))
    axes.legend(loc="lower left", fontsize="small")
    return fig


@_styled
def study(panels: dict[str, list[dict]], title: str = "") -> Figure:
    """One panel per result: for each variant, a dot per run and a stroke at the mean. panels: the
    runs of a card of nala_min.lab.compare, by name of the result."""
    names = list(dict.fromkeys(row["variant"] for rows in panels.values() for row in rows))
    colours = [VARIANT_STYLES.get(name, {"color": GREY})["color"] for name in names]
    size = {"width": 2.6 + 3.4 * len(panels), "height": 1.2 + 0.27 * len(names)}
    fig, grid = figure(1, len(panels), squeeze=False, sharey=True, **size)
    fig.suptitle(title)
    for axes, (result, rows) in zip(grid[0], panels.items(), strict=True):
        found = [[row[result] for row in rows if row["variant"] == name] for name in names]
        _dots(axes, found, colours)
        axes.set(xlabel=display_name(result))
    axes.set_yticks(range(len(names)), map(display_name, names))
    return fig
