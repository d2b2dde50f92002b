"""Every picture of the project, in one style, with one line style per attention."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

try:
    Path.home()
except RuntimeError:  # no HOME and no passwd entry: matplotlib up to 3.9 fails to import
    os.environ.setdefault("MPLCONFIGDIR", str(Path(tempfile.gettempdir(), "nala_min")))

import matplotlib
import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from nala_min.model import entropy
from nala_min.runcard import write_atomically

# Okabe and Ito's palette, safe for colour-blind readers.
BLACK, ORANGE, BLUE, GREEN = "#000000", "#d55e00", "#0072b2", "#009e73"
PURPLE, YELLOW = "#cc79a7", "#e69f00"

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
_styled = matplotlib.rc_context(RC_PARAMS)  # decorator: applies RC_PARAMS while a function runs


@_styled
def figure(
    rows: int = 1, columns: int = 1, *, width: float = 6.4, height: float = 3.6, **options: Any
) -> tuple[Figure, Any]:
    """A figure of width x height inches, and its axes: one or an array.

    options: as for matplotlib's Figure.subplots. Avoids pyplot, its display and its global state.
    """
    fig = Figure(figsize=(width, height))
    return fig, fig.subplots(rows, columns, **options)


def write(fig: Figure, path: Path | str) -> None:
    """Write fig as a PNG, completely or not at all."""
    dpi = RC_PARAMS["savefig.dpi"]
    write_atomically(path, lambda file: fig.savefig(file, format="png", dpi=dpi))


@_styled
def entropy_gap(norms: Sequence[float], entropies: dict[str, list[float]]) -> Figure:
    """Entropy and effective number of keys against the norm of the query, one line per feature
    map."""
    fig, axes = figure(height=3.9)
    for name, values in entropies.items():
        axes.plot(norms, np.exp(values), **STYLES[name])
    axes.set_xscale("log")
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:.0f}")
    axes.set(xlabel="norm of the query", ylabel="effective number of keys")
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
        for name in history[0]:
            if name.endswith(quantity):
                training = name.startswith("train")
                colour, style = (BLUE, "--") if training else (ORANGE, "-")
                values = [point[name] for point in history]
                label = name.replace("_", " ")
                axes.plot(steps, values, style, color=colour, marker="o", markersize=3, label=label)
        axes.set(ylabel=units[quantity])
        axes.legend()
    panels[-1, 0].set(xlabel="step")
    return fig


@_styled
def attention_maps(images: Tensor, maps: dict[str, Tensor], trained_with: str) -> Figure:
    """One row per image. The query patch, at the middle of the grid, is framed. Next to the
    image are its attention weights under each kernel, relative to uniform attention.

    images: (B, 3, height, width) uint8; maps: from measure.attention_maps.
    """
    height, width = images.shape[2:]
    fig, grid = figure(
        len(images),
        1 + len(maps),
        width=1.9 * (1 + len(maps)) + 0.8,
        height=1.9 * len(images) + 0.9,
        squeeze=False,
    )
    fig.suptitle(
        f"What the framed patch attends to, in the last block of a {trained_with} model:\n"
        "the same queries and keys under each kernel"
    )
    rows, columns = next(iter(maps.values())).shape[1:3]
    r, s, uniform = rows // 2, columns // 2, 1 / (rows * columns)
    extent = {"extent": (0, width, height, 0)}
    for i, (image, (first, *others)) in enumerate(zip(images, grid, strict=True)):
        first.imshow(image.movedim(0, -1).numpy(), **extent)
        for axes, weights in zip(others, maps.values(), strict=True):
            query_weights = weights[i, r, s]  # (rows, columns)
            relative = (query_weights / uniform).clamp_min(1e-9).numpy()  # 0 has no logarithm
            heatmap = axes.imshow(relative, cmap="PuOr_r", norm=LogNorm(1 / 16, 16), **extent)
            effective_keys = entropy(query_weights.flatten()).exp().item()
            label = f"effectively {effective_keys:.0f} of {rows * columns}"
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
    ticks = range(len(classes))
    axes.set_xticks(ticks, classes, rotation=45, ha="right")
    axes.set_yticks(ticks, classes)
    axes.set(xlabel="predicted", ylabel="true class (each row in per cent)", title=title)
    return fig


@_styled
def attention_stats(
    nala_blocks: list[dict[str, Any]],
    softmax_blocks: list[dict[str, Any]],
    num_keys: int | None = None,
) -> Figure:
    """measure.attention_stats of two models, block by block: medians, with bars from the 5th to the
    95th percentile.

    nala_blocks: from a model with NaLa in every block; softmax_blocks: from one with softmax;
    num_keys: number of keys per query, for a line at the highest possible entropy.
    """
    labels = {
        "query_norm": "norm of the query",
        "power": "power p, Eq. (7)",
        "entropy": "entropy of the attention (nats)",
    }
    fig, panels = figure(1, 3, width=9.6, height=3.5)
    for axes, (name, label) in zip(panels, labels.items(), strict=True):
        sides = (-0.12, "cosine", nala_blocks), (0.12, "softmax", softmax_blocks)
        for offset, key, rows in sides:
            if any(name not in row for row in rows):
                continue
            low, _, median, _, high = np.array([row[name] for row in rows]).T
            positions = np.arange(1, len(rows) + 1) + offset
            bars = {"yerr": [median - low, high - median], "fmt": "o", "capsize": 4}
            style = {"color": STYLES[key]["color"], "label": STYLES[key]["label"]}
            axes.errorbar(positions, median, **bars, **style)
        axes.set(xlabel="block", ylabel=label, xticks=range(1, len(nala_blocks) + 1))
        axes.set_xlim(0.5, len(nala_blocks) + 0.5)
        axes.set_ylim(bottom=0)
        axes.grid(False, axis="x")
    panels[0].axhspan(0, 2, color=YELLOW, alpha=0.25, linewidth=0, zorder=0)
    panels[0].annotate("tanh is not flat here", (0.02, 0.05), xycoords="axes fraction")
    panels[1].set_ylim(1.2, 5.0)
    bounds = [(panels[1], 1.5, "lowest possible", 4), (panels[1], 4.5, "highest possible", 4)]
    if num_keys is not None:
        max_entropy = float(np.log(num_keys))
        panels[2].set_ylim(top=1.18 * max_entropy)
        uniform = f"uniform over {num_keys} keys: {max_entropy:.2f}"
        bounds.append((panels[2], max_entropy, uniform, 4))
    for axes, height, text, above in bounds:
        axes.axhline(height, color="#888888", linestyle=":", linewidth=1.2, zorder=1)
        offset_text = {"xytext": (0, above), "textcoords": "offset points", "fontsize": "small"}
        axes.annotate(
            text, (0.55, height), **offset_text, bbox={"color": "white", "pad": 0.5}, zorder=1.5
        )
    panels[1].legend(*panels[0].get_legend_handles_labels(), loc="center")  # this spot is empty
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
    fig, panels = figure(1, 3, width=11.5, height=4.2)
    causal = [r for r in results["attention"] if r["causal"] and r["pass"] == "forward + backward"]
    curves = (
        (panels[0], causal, "length", "median", 1e3),
        (panels[1], causal, "length", "peak", 2**-20),
        (panels[2], results["decode"], "context", "median", 1e3),
    )
    for axes, rows, x_name, y_name, unit in curves:
        for form, style in styles.items():
            points = [
                (row[x_name], unit * row[y_name])
                for row in rows
                if row["form"] == form and row[y_name] is not None
            ]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", markersize=3, **style)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        ticks = sorted({row[x_name] for row in rows})[::2]
        axes.set_xticks(ticks, [f"{n:,}" if n < 2**10 else f"{n // 2**10}k" for n in ticks])
        axes.legend(loc="upper left", fontsize="x-small")
    tokens = "number of tokens"
    titles = (
        ("Time: softmax grows as N², NaLa as N", tokens, "forward + backward (ms)"),
        ("Memory: softmax and NaLa grow as N", tokens, "peak memory beyond q, k, v (MiB)"),
        ("Decoding: NaLa's time is constant", "context length (tokens)", "time per token (ms)"),
    )
    for axes, (title, xlabel, ylabel) in zip(panels, titles, strict=True):
        axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    if (crossover := results["crossover"]["causal, forward + backward"]) is not None:
        panels[0].axvline(crossover, ymax=0.65, color=YELLOW, linewidth=1.5)  # below the legend
        note = f" NaLa is faster\n from {crossover:,} tokens"
        panels[0].annotate(note, (crossover, 0.04), xycoords=("data", "axes fraction"))
    return fig


@_styled
def seeds(cards: dict[str, list[dict[str, Any]]], result: str, label: str) -> Figure:
    """Several training runs per attention. Left: the mean of their curves, in a band from lowest to
    highest. Right: a dot per run for its result, and a stroke at the mean.

    cards: run cards by name of the feature map; result: the key to plot, in their history and
    results; label: its name and unit.
    """
    fig, (left, right) = figure(1, 2, width=9.6, height=3.8)
    for row, (name, runs) in enumerate(cards.items()):
        style = STYLES[name]
        steps = [point["step"] for point in runs[0]["results"]["history"]]
        values = np.array([[p[result] for p in run["results"]["history"]] for run in runs])
        left.fill_between(
            steps, values.min(axis=0), values.max(axis=0), color=style["color"], alpha=0.15
        )
        left.plot(steps, values.mean(axis=0), **style)
        finals = [run["results"][result] for run in runs]
        right.plot(finals, [row] * len(finals), "o", color=style["color"], alpha=0.7)
        mean = sum(finals) / len(finals)
        right.plot([mean, mean], [row - 0.3, row + 0.3], color=style["color"])
        right.annotate(f"{mean:.3f}", (mean, row - 0.37), ha="center", fontsize="small")
    left.set(xlabel="training step", ylabel=label)
    left.legend()
    right.set_yticks(range(len(cards)), [STYLES[name]["label"] for name in cards])
    right.set_ylim(len(cards) - 0.4, -0.7)  # the first on top
    right.set(xlabel=f"final {label}")
    right.locator_params(axis="x", nbins=6)
    right.grid(False, axis="y")
    return fig


@_styled
def premise(results: dict[str, Any]) -> Figure:
    """Entropy against the norms of the query and the key, one point per token and head, one column
    per attention. results: from a card of nala_min.lab.premise."""
    points, labels = results["points"], {"query_norm": "query", "key_norm": "key"}
    fig, grid = figure(2, len(points), width=9.6, height=5.2, sharey=True)
    fig.suptitle("Last block of trained models: one point per token and head")
    last = max(row["block"] for row in results["correlations"])
    for column, (name, found) in zip(grid.T, points.items(), strict=True):
        style = STYLES[{"nala": "cosine"}.get(name, name)]
        column[0].set_title(style["label"])
        for axes, (norm, label) in zip(column, labels.items(), strict=True):
            for heads in zip(found[norm], found["entropy"], strict=True):
                axes.plot(*heads, ".", color=style["color"], markersize=2.5, alpha=0.6)
            (correlation,) = (
                row[norm]
                for row in results["correlations"]
                if (row["variant"], row["seed"], row["block"]) == (name, 1, last)
            )
            axes.set(xlabel=f"norm of the {label}")
            note = f"rank correlation {correlation:+.2f}"
            axes.annotate(note, (0.04, 0.03), xycoords="axes fraction")
    lowest = min(min(head) for found in points.values() for head in found["entropy"])
    for axes in grid[:, 0]:
        axes.set(ylabel="entropy (nats)", ylim=(lowest - 0.6, None))
    return fig


# Display names of a study's variants. Suffixes such as ", same state" are kept.
DISPLAY_NAMES = {
    "nala": "NaLa",
    "split": "NaLa, sign split",
    "softmax": "softmax",
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
def recall(rows: list[dict[str, Any]], pairs: Sequence[int]) -> Figure:
    """Accuracy against the number of pairs, for VARIANT_STYLES and user files in rows: the mean
    over seeds, in a band from lowest to highest.

    rows: the runs of a card of nala_min.lab.compare.
    """
    fig, axes = figure()
    files = {row["variant"] for row in rows if row["variant"].endswith(".py")}  # a user's own
    file_styles = {name: {"color": "#666666", "linestyle": "-."} for name in sorted(files)}
    for name, style in (VARIANT_STYLES | file_styles).items():
        runs = [row for row in rows if row["variant"] == name]
        if not runs:
            continue
        values = np.array([[run[f"accuracy at {n} pairs"] for n in pairs] for run in runs])
        axes.fill_between(
            pairs, values.min(axis=0), values.max(axis=0), color=style["color"], alpha=0.12
        )
        axes.plot(pairs, values.mean(axis=0), **style | {"label": display_name(name)})
    axes.set_xscale("log", base=2)
    axes.set_xticks(pairs, [str(n) for n in pairs])
    axes.set(xlabel="number of key-value pairs in the text", ylabel="share of values recalled")
    axes.set_title("How much a state can recall")
    axes.set_ylim(0, 1.03)
    axes.legend(loc="lower left", fontsize="small")
    return fig


@_styled
def study(panels: dict[str, list[dict[str, Any]]], title: str = "") -> Figure:
    """One panel per result: for each variant, a dot per run and a stroke at the mean.

    panels: the runs of a card of nala_min.lab.compare, by name of the result.
    """
    names = list(dict.fromkeys(row["variant"] for rows in panels.values() for row in rows))
    size = {"width": 2.6 + 3.4 * len(panels), "height": 1.2 + 0.27 * len(names)}
    fig, grid = figure(1, len(panels), squeeze=False, sharey=True, **size)
    fig.suptitle(title)
    for axes, (result, rows) in zip(grid[0], panels.items(), strict=True):
        for position, name in enumerate(names):
            found = [row[result] for row in rows if row["variant"] == name]
            colour = VARIANT_STYLES.get(name, {"color": "#666666"})["color"]
            axes.plot(found, [position] * len(found), "o", color=colour, alpha=0.6, markersize=5)
            average = sum(found) / len(found)
            axes.plot([average, average], [position - 0.35, position + 0.35], color=colour)
        axes.set(xlabel=result)
        axes.locator_params(axis="x", nbins=5)
    axes.set_yticks(range(len(names)), map(display_name, names))
    axes.set_ylim(len(names) - 0.4, -0.6)  # the first on top
    return fig
