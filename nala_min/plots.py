"""Every picture of the project, in one style, with one line style per attention."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if os.path.expanduser("~") == "~":  # no home directory: matplotlib asks for another one
    os.environ.setdefault("MPLCONFIGDIR", os.path.join(tempfile.gettempdir(), "nala_min"))

import matplotlib.style
import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from nala_min.model import entropy
from nala_min.runcard import write_atomically

Rows = list[dict[str, Any]]

# Okabe and Ito's palette, safe for colour-blind readers.
BLACK, ORANGE, BLUE, GREEN = "#000000", "#d55e00", "#0072b2", "#009e73"
PURPLE, YELLOW, GREY = "#cc79a7", "#e69f00", "#666666"

# The line style of each attention in every plot, by the name of its feature map.
STYLES = {
    "softmax": {"label": "softmax", "color": BLACK, "linestyle": "--"},
    "cosine": {"label": "NaLa", "color": ORANGE, "linestyle": "-"},
    "split": {"label": "NaLa, sign split", "color": PURPLE, "linestyle": (0, (5, 1))},
    "elu": {"label": "linear, elu + 1", "color": BLUE, "linestyle": "-."},
    "relu": {"label": "linear, ReLU", "color": GREEN, "linestyle": ":"},
}
RC_PARAMS = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.prop_cycle": matplotlib.cycler(color=[ORANGE, BLUE, GREEN, PURPLE, YELLOW, BLACK]),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": "medium",
    "figure.constrained_layout.use": True,
    "figure.titlesize": "medium",
    "grid.alpha": 0.3,
    "image.cmap": "cividis",
    "legend.frameon": False,
    "lines.linewidth": 2,
    "savefig.dpi": 150,
}
_styled = matplotlib.style.context(["default", RC_PARAMS])  # whatever the user's own settings are


@_styled
def figure(
    rows: int = 1, columns: int = 1, *, width: float = 6.4, height: float = 3.6, **options: Any
) -> tuple[Figure, Any]:
    """A figure of width x height inches, without pyplot's global state, and its axes: one or an
    array. options: as for matplotlib's Figure.subplots."""
    fig = Figure(figsize=(width, height))
    return fig, fig.subplots(rows, columns, **options)


@_styled
def write(fig: Figure, path: Path | str) -> None:
    """Write fig as a PNG, completely or not at all."""
    write_atomically(path, lambda file: fig.savefig(file, format="png"))


@_styled
def entropy_gap(norms: Sequence[float], entropies: dict[str, list[float]]) -> Figure:
    """Entropy and effective number of keys against the query's norm, a line per feature map."""
    fig, axes = figure(height=3.9)
    for name, values in entropies.items():
        axes.plot(norms, np.exp(values), **STYLES[name])
    axes.set(xlabel="norm of the query", ylabel="effective number of keys", xscale="log")
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:.0f}")
    axes.set_title("Longer queries attend to fewer keys, except in plain linear attention")
    nats = axes.secondary_yaxis("right", functions=(np.log, np.exp))
    nats.set_yticks(range(1, 5), range(1, 5))
    nats.tick_params(which="minor", right=False)
    nats.set_ylabel("entropy (nats)")
    axes.legend(loc="lower left")
    return fig


@_styled
def curve(history: list[dict[str, float]], title: str) -> Figure:
    """The losses and accuracies in history against the step, in separate panels."""
    units = {"loss": "cross-entropy (nats)", "accuracy": "accuracy"}
    shown = [quantity for quantity in units if any(name.endswith(quantity) for name in history[0])]
    fig, panels = figure(len(shown), height=1.2 + 2.8 * len(shown), sharex=True, squeeze=False)
    fig.suptitle(title)
    steps = [point["step"] for point in history]
    for quantity, axes in zip(shown, panels[:, 0], strict=True):
        for name in (name for name in history[0] if name.endswith(quantity)):
            colour, style = (BLUE, "--") if name.startswith("train") else (ORANGE, "-")
            options = {"color": colour, "marker": "o", "markersize": 3}
            values = [point[name] for point in history]
            axes.plot(steps, values, style, label=name.replace("_", " "), **options)
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
    fig.suptitle(
        f"What the framed patch attends to, in the last block of a {trained_with} model:\n"
        "the same queries and keys under each kernel"
    )
    (height, width), (rows, columns) = images.shape[2:], next(iter(maps.values())).shape[1:3]
    r, s, extent = rows // 2, columns // 2, (0, width, height, 0)
    for i, (image, (first, *others)) in enumerate(zip(images, grid, strict=True)):
        first.imshow(image.movedim(0, -1).numpy(), extent=extent)
        for axes, weights in zip(others, maps.values(), strict=True):
            weights = weights[i, r, s]  # (rows, columns)
            relative = (weights * rows * columns).clamp_min(1e-9).numpy()  # 0 has no logarithm
            options = {"cmap": "PuOr_r", "norm": LogNorm(1 / 16, 16)}
            heatmap = axes.imshow(relative, extent=extent, **options)
            label = f"effectively {entropy(weights.flatten()).exp():.0f} of {rows * columns}"
            axes.set_xlabel(label, fontsize="small")
        for axes in (first, *others):
            patch = (s * width / columns, r * height / rows), width / columns, height / rows
            colour = ORANGE if axes is first else BLACK
            axes.add_patch(Rectangle(*patch, fill=False, edgecolor=colour, linewidth=1.5))
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
def confusion(counts: Tensor, classes: Sequence[str], title: str) -> Figure:
    """The confusion matrix counts, (Y, Y), in per cent of each true class."""
    counts = counts.double()  # a quotient of integers would have the default dtype
    shares = 100 * counts / counts.sum(dim=1, keepdim=True).clamp_min(1)
    fig, axes = figure(height=5.8)
    axes.grid(False)
    axes.imshow(shares.numpy(), vmin=0, vmax=100)
    for i, row in enumerate(shares.tolist()):
        for j, share in enumerate(row):
            colour = "#000000" if share > 50 else "#ffffff"
            axes.text(j, i, f"{share:.0f}", ha="center", va="center", color=colour, fontsize=8)
    axes.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
    axes.set_yticks(range(len(classes)), classes)
    axes.set(xlabel="predicted", ylabel="true class (each row in per cent)", title=title)
    return fig


@_styled
def attention_stats(nala_blocks: Rows, softmax_blocks: Rows, num_keys: int) -> Figure:
    """measure.attention_stats of a model with NaLa and of one with softmax, block by block:
    medians, with bars from the 5th to the 95th percentile. num_keys: keys per query."""
    fig, panels = figure(1, 3, width=9.6, height=3.5)
    sides = (-0.12, "cosine", nala_blocks), (0.12, "softmax", softmax_blocks)
    for axes, name in zip(panels, ("query_norm", "power", "entropy"), strict=True):
        for offset, look, blocks in sides:
            if name in blocks[0]:  # softmax has no power
                low, _, median, _, high = np.array([block[name] for block in blocks]).T
                bars = {"yerr": [median - low, high - median], "fmt": "o", "capsize": 4}
                style = {"color": STYLES[look]["color"], "label": STYLES[look]["label"]}
                axes.errorbar(np.arange(1, len(blocks) + 1) + offset, median, **bars, **style)
        axes.set(xlabel="block", xticks=range(1, len(nala_blocks) + 1))
        axes.set_xlim(0.5, len(nala_blocks) + 0.5)
        axes.set_ylim(bottom=0)
        axes.grid(False, axis="x")
    norm, power, nats = panels
    norm.set_ylabel("norm of the query")
    norm.axhspan(0, 2, color=YELLOW, alpha=0.25, linewidth=0, zorder=0)
    norm.annotate("tanh is not flat here", (0.02, 0.05), xycoords="axes fraction")
    power.set(ylabel="power p, Eq. (7)", ylim=(1.2, 5.0))
    power.legend(*norm.get_legend_handles_labels(), loc="center")  # this spot is empty
    highest = float(np.log(num_keys))
    nats.set_ylabel("entropy of the attention (nats)")
    nats.set_ylim(top=1.18 * highest)

    def bound(axes, height, text):
        axes.axhline(height, color="#888888", linestyle=":", linewidth=1.2, zorder=1)
        above = {"xytext": (0, 4), "textcoords": "offset points", "fontsize": "small"}
        box = {"color": "white", "pad": 0.5}
        axes.annotate(text, (0.55, height), **above, bbox=box, zorder=1.5)

    bound(power, 1.5, "lowest possible")
    bound(power, 4.5, "highest possible")
    bound(nats, highest, f"uniform over {num_keys} keys: {highest:.2f}")
    return fig


@_styled
def speed(results: dict[str, Any]) -> Figure:
    """Time and memory of a forward and a backward pass against the number of tokens, and time per
    decoded token against the context. results: from a card of nala_min.lab.bench."""
    styles = {
        "softmax": STYLES["softmax"] | {"label": "softmax, fused"},
        "nala": STYLES["cosine"],
        "compiled": STYLES["cosine"] | {"label": "NaLa, compiled", "linestyle": (0, (3, 1, 1, 1))},
        "readable": {"label": "NaLa, as in model.py", "color": BLUE, "linestyle": "-."},
        "quadratic": {"label": "NaLa, quadratic (13c)", "color": PURPLE, "linestyle": ":"},
        "softmax_grown": {"label": "softmax, growing cache", "color": GREEN, "linestyle": ":"},
    }

    def draw(axes, rows, x, y, unit):
        for form, style in styles.items():
            found = [row for row in rows if row["form"] == form and row[y] is not None]
            if found:
                points = [row[x] for row in found], [unit * row[y] for row in found]
                axes.plot(*points, marker="o", markersize=3, **style)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        ticks = sorted({row[x] for row in rows})[::2]
        axes.set_xticks(ticks, [f"{n:,}" if n < 2**10 else f"{n // 2**10}k" for n in ticks])
        axes.legend(loc="upper left", fontsize="x-small")

    fig, (time, memory, decoding) = figure(1, 3, width=11.5, height=4.2)
    causal = [r for r in results["attention"] if r["causal"] and r["pass"] == "forward + backward"]
    draw(time, causal, "length", "median", 1e3)
    time.set(title="Time: softmax grows as N², NaLa as N", ylabel="forward + backward (ms)")
    draw(memory, causal, "length", "peak", 2**-20)
    memory.set(
        title="Memory: softmax and NaLa grow as N", ylabel="peak memory beyond q, k, v (MiB)"
    )
    draw(decoding, results["decode"], "context", "median", 1e3)
    decoding.set(title="Decoding: NaLa's time is constant", ylabel="time per token (ms)")
    for axes in (time, memory):
        axes.set_xlabel("number of tokens")
    decoding.set_xlabel("context length (tokens)")
    if (crossover := results["crossover"]["causal, forward + backward"]) is not None:
        time.axvline(crossover, ymax=0.65, color=YELLOW, linewidth=1.5)  # below the legend
        note = f" NaLa is faster\n from {crossover:,} tokens"
        time.annotate(note, (crossover, 0.04), xycoords=("data", "axes fraction"))
    return fig


@_styled
def seeds(cards: dict[str, Rows], result: str, label: str) -> Figure:
    """Several runs per attention: the mean of their curves, in a band from lowest to highest, and a
    dot per run for its final result, with a stroke at the mean. cards: run cards by feature map;
    result: the key to plot, in their history and results; label: its name and unit."""
    fig, (left, right) = figure(1, 2, width=9.6, height=3.8)
    for row, (name, runs) in enumerate(cards.items()):
        steps = [point["step"] for point in runs[0]["results"]["history"]]
        values = [[p[result] for p in run["results"]["history"]] for run in runs]
        _band(left, steps, values, 0.15, **STYLES[name])
        finals, colour = [run["results"][result] for run in runs], STYLES[name]["color"]
        right.plot(finals, [row] * len(finals), "o", color=colour, alpha=0.7)
        mean = sum(finals) / len(finals)
        right.plot([mean, mean], [row - 0.3, row + 0.3], color=colour)
        right.annotate(f"{mean:.3f}", (mean, row - 0.37), ha="center", fontsize="small")
    left.set(xlabel="training step", ylabel=label)
    left.legend()
    right.set_yticks(range(len(cards)), [STYLES[name]["label"] for name in cards])
    right.set(xlabel=f"final {label}", ylim=(len(cards) - 0.4, -0.7))  # the first on top
    right.locator_params(axis="x", nbins=6)
    right.grid(False, axis="y")
    return fig


def _band(axes: Any, x: Sequence[float], values: Any, alpha: float, **style: Any) -> None:
    """Draw the mean of values (runs, n) against x (n), in a band from lowest to highest."""
    low, mean, high = np.min(values, axis=0), np.mean(values, axis=0), np.max(values, axis=0)
    axes.fill_between(x, low, high, color=style["color"], alpha=alpha)
    axes.plot(x, mean, **style)


@_styled
def premise(results: dict[str, Any]) -> Figure:
    """Entropy against the norms of the query and the key, one point per token and head, one column
    per attention. results: from a card of nala_min.lab.premise."""
    points, rows = results["points"], results["correlations"]
    fig, grid = figure(2, len(points), width=9.6, height=5.2, sharey=True)
    fig.suptitle("Last block of trained models: one point per token and head")
    last = max(row["block"] for row in rows)
    correlations = {r["variant"]: r for r in rows if (r["seed"], r["block"]) == (1, last)}
    for column, (name, found) in zip(grid.T, points.items(), strict=True):
        style = STYLES[{"nala": "cosine"}.get(name, name)]
        column[0].set_title(style["label"])
        for axes, side in zip(column, ("query", "key"), strict=True):
            norm = f"{side}_norm"
            for heads in zip(found[norm], found["entropy"], strict=True):
                axes.plot(*heads, ".", color=style["color"], markersize=2.5, alpha=0.6)
            axes.set(xlabel=f"norm of the {side}")
            note = f"rank correlation {correlations[name][norm]:+.2f}"
            axes.annotate(note, (0.04, 0.03), xycoords="axes fraction")
    lowest = min(min(head) for found in points.values() for head in found["entropy"])
    for axes in grid[:, 0]:
        axes.set(ylabel="entropy (nats)", ylim=(lowest - 0.6, None))
    return fig


# Display names of a study's variants. Suffixes such as ", same state" are kept.
DISPLAY_NAMES = {
    "nala": "NaLa",
    "split": "NaLa, sign split",
    "elu": "linear, elu + 1",
    "relu": "linear, ReLU",
    "focused": "FLatten",
    "polar": "PolaFormer",
    "magnitude-aware": "MALA",
    "hedgehog": "Hedgehog",
    "injective": "InLine",
    "delta": "DeltaNet",
    "no query norm": "NaLa, no query norm",
    "no cosine map": "NaLa, ReLU instead of cosines",
    "tanh(norm/s)": "NaLa, tanh(norm/s)",
    **{f"lam {lam}": f"NaLa, λ = {lam}" for lam in (1, 2, 4)},
    **{f"lam 1 of {what}": f"NaLa, λ = 1 for {what}" for what in ("queries", "keys")},
    **{f"tau {tau}": f"NaLa, τ = {tau}" for tau in (0, 1)},
    "alpha 2": "NaLa, α = 2",  # noqa: RUF001
}


def display_name(variant: str) -> str:
    """Display name of a study's variant. A user's file keeps its own name."""
    first, *rest = variant.split(", ")
    return ", ".join([DISPLAY_NAMES.get(first, first), *rest])


# Line styles of a study's variants. In dot plots, all others are grey.
VARIANT_STYLES = {
    "softmax": STYLES["softmax"],
    "nala": STYLES["cosine"],
    "no query norm": {"color": YELLOW, "linestyle": "-"},
    "no cosine map, same state": {"color": YELLOW, "linestyle": ":"},
    "elu, same state": STYLES["elu"],
    "relu, same state": STYLES["relu"],
}


@_styled
def recall(rows: Rows, pairs: Sequence[int]) -> Figure:
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
def study(panels: dict[str, Rows], title: str = "") -> Figure:
    """One panel per result: for each variant, a dot per run and a stroke at the mean. panels: the
    runs of a card of nala_min.lab.compare, by name of the result."""
    names = list(dict.fromkeys(row["variant"] for rows in panels.values() for row in rows))
    size = {"width": 2.6 + 3.4 * len(panels), "height": 1.2 + 0.27 * len(names)}
    fig, grid = figure(1, len(panels), squeeze=False, sharey=True, **size)
    fig.suptitle(title)
    for axes, (result, rows) in zip(grid[0], panels.items(), strict=True):
        for position, name in enumerate(names):
            found = [row[result] for row in rows if row["variant"] == name]
            colour = VARIANT_STYLES.get(name, {"color": GREY})["color"]
            axes.plot(found, [position] * len(found), "o", color=colour, alpha=0.6, markersize=5)
            average = sum(found) / len(found)
            axes.plot([average, average], [position - 0.35, position + 0.35], color=colour)
        axes.set(xlabel=result)
        axes.locator_params(axis="x", nbins=5)
    axes.set_yticks(range(len(names)), map(display_name, names))
    axes.set_ylim(len(names) - 0.4, -0.6)  # the first on top
    return fig
