"""What is read off an attention or a model. `python -m nala_min.measure` measures the entropy gap
anew and writes its run card and picture to notebooks/results."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from nala_min import runcard
from nala_min.data import normalise
from nala_min.model import BlockState, NaLaViT, attention_weights, decompose, entropy

# One look for each attention, wherever it is drawn; Okabe and Ito's colours, for the colour-blind.
LOOKS = {
    "softmax": {"label": "softmax", "color": "#000000", "linestyle": "--"},
    "cosine": {"label": "NaLa", "color": "#d55e00", "linestyle": "-"},
    "elu": {"label": "linear, elu + 1", "color": "#0072b2", "linestyle": "-."},
    "relu": {"label": "linear, ReLU", "color": "#009e73", "linestyle": ":"},
}


MAPS = ("cosine", "softmax", "relu")  # NaLa, between what it joins


def entropy_against_norm(
    feature_map: str, norms: Tensor, *, num_keys: int = 64, dim: int = 32, draws: int = 200
) -> Tensor:
    """Mean entropy, Eq. (3), of queries rescaled to each norm, over random standard normal keys.

    norms: (K,). Returns (K,), in nats, the mean over draws of a query and its keys, from PyTorch's
    own generator; at most log(num_keys).
    """
    _, direction = decompose(torch.randn(draws, 1, 1, dim))
    k = torch.randn(draws, 1, num_keys, dim)
    means = []
    for norm in norms:
        q = (norm * direction).expand_as(k)  # the same query at every place
        weights = attention_weights(q, k, feature_map=feature_map)
        means.append(entropy(weights[:, 0, 0]).mean())
    return torch.stack(means)


def plot_entropy_gap(norms: list[float], entropies: dict[str, list[float]], path: Path) -> None:
    """Entropy against the norm of the query, a line a feature map, as a PNG."""
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, values in entropies.items():
        axes.plot(norms, values, linewidth=2, **LOOKS[name])
    axes.set_xscale("log")
    axes.set(xlabel="norm of the query", ylabel="entropy of its attention (nats)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="lower left")
    runcard.write_whole(path, lambda file: figure.savefig(file, format="png", dpi=150))


# --- A trained image model ------------------------------------------------------------------------


@torch.no_grad()
def classify(model: NaLaViT, images: Tensor) -> Tensor:
    """Logits (n, Y), on the CPU, of images (n, 3, height, width) uint8."""
    model.eval()
    device = model.head.weight.device
    return torch.cat([model(normalise(part.to(device))).cpu() for part in images.split(500)])


def score(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Mean cross-entropy in nats, and share of right answers, of logits (n, Y)."""
    right = (logits.argmax(dim=1) == labels).float().mean().item()
    return {"test_loss": F.cross_entropy(logits, labels).item(), "test_accuracy": right}


@torch.no_grad()
def attention_maps(
    model: NaLaViT, images: Tensor, block: int = -1, feature_maps: Sequence[str] = MAPS
) -> dict[str, Tensor]:
    """Whom each patch attends to, under several kernels, from the queries and keys of one block.

    images: (B, 3, height, width) uint8. Returns for each feature map the weights (B, R, S, R, S) of
    a query at (r, s) over the grid, the mean of all heads; a head where the query has no mass adds
    nothing. The block was trained with one kernel; the others show what they would make of the same
    queries and keys.
    """
    layer, inputs = model.blocks[block].attention, []
    hook = layer.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    classify(model, images)
    hook.remove()
    x = inputs[0]  # (B, R, S, E)
    q, k, _, _ = (layer.split_heads(y) for y in layer.project(x).chunk(4, dim=-1))
    options = layer.options(x, BlockState())
    grid = x.shape[1:3]
    return {
        name: attention_weights(q, k, feature_map=name, **options)
        .mean(dim=1)
        .unflatten(2, grid)
        .unflatten(1, grid)
        for name in feature_maps
    }


def plot_attention_maps(
    pictures: Tensor, maps: dict[str, Tensor], trained_with: str, path: Path
) -> None:
    """A row for each picture: the query patch at the middle of its grid, framed, and its weights
    over the image under each kernel, as a PNG.

    pictures: (B, 3, height, width) uint8; maps: what attention_maps returns.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    height, width = pictures.shape[2:]
    figure = Figure(
        figsize=(1.9 * (1 + len(maps)) + 0.8, 1.9 * len(pictures) + 0.9), layout="constrained"
    )
    figure.suptitle(
        f"Weights of one query, the framed patch, in the last block of a {trained_with} model:\n"
        "the same queries and keys under each kernel",
        fontsize="medium",
    )
    grid = figure.subplots(len(pictures), 1 + len(maps), squeeze=False)
    for i, (picture, row) in enumerate(zip(pictures, grid, strict=True)):
        weights = {name: values[i] for name, values in maps.items()}
        rows, columns = next(iter(weights.values())).shape[:2]
        r, s = rows // 2, columns // 2
        brightest = max(values[r, s].max().item() for values in weights.values())
        if i == 0:
            row[0].set_title("image", fontsize="medium")
        row[0].imshow(picture.movedim(0, -1).numpy(), extent=(0, width, height, 0))
        for axes, (name, values) in zip(row[1:], weights.items(), strict=True):
            image = axes.imshow(
                values[r, s].numpy(),
                extent=(0, width, height, 0),
                cmap="cividis",
                vmin=0,
                vmax=brightest,
            )
            spread = entropy(values[r, s].flatten()).exp().item()
            axes.set_xlabel(f"as if over {spread:.0f} of {rows * columns}", fontsize="small")
            if i == 0:
                axes.set_title(LOOKS[name]["label"], fontsize="medium")
        for axes in row:
            patch = (s * width / columns, r * height / rows), width / columns, height / rows
            axes.add_patch(Rectangle(*patch, fill=False, edgecolor="#d55e00", linewidth=1.5))
            axes.set(xticks=[], yticks=[])
        figure.colorbar(image, ax=row, label="weight", shrink=0.8)
    runcard.write_whole(path, lambda file: figure.savefig(file, format="png", dpi=150))


def confusion_matrix(guesses: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """How many examples of each class (row) were taken for each class (column).

    guesses, labels: (n,) integers. Returns (num_classes, num_classes), summing to n.
    """
    pairs = labels * num_classes + guesses
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def worst_pairs(confusion: Tensor, count: int = 3) -> list[tuple[int, int, int]]:
    """The classes most often taken for one another: pairs (first, second, mistakes), in both
    directions together, most mistakes first; fewer than count if there are no more."""
    mistakes = (confusion + confusion.T).triu(1)
    places = mistakes.flatten().argsort(descending=True, stable=True)[:count].tolist()
    pairs = [(*divmod(i, len(confusion)), int(mistakes.flatten()[i])) for i in places]
    return [pair for pair in pairs if pair[2] > 0]


def plot_confusion(confusion: Tensor, classes: Sequence[str], title: str, path: Path) -> None:
    """The confusion matrix in per cent of each class, as a PNG."""
    from matplotlib.figure import Figure

    shares = 100 * confusion / confusion.sum(dim=1, keepdim=True).clamp_min(1)
    figure = Figure(figsize=(6.4, 5.8), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares.numpy(), cmap="cividis", vmin=0, vmax=100)
    for i, row in enumerate(shares.tolist()):
        for j, share in enumerate(row):
            colour = "#000000" if share > 50 else "#ffffff"
            axes.text(j, i, f"{share:.0f}", ha="center", va="center", color=colour, fontsize=8)
    places = range(len(classes))
    axes.set_xticks(places, classes, rotation=45, ha="right")
    axes.set_yticks(places, classes)
    axes.set(xlabel="taken for", ylabel="what it is (each row in per cent)")
    axes.set_title(title, fontsize="medium")
    runcard.write_whole(path, lambda file: figure.savefig(file, format="png", dpi=150))


def main() -> None:
    start = time.perf_counter()
    config = {"seed": 1, "num_keys": 64, "dim": 32, "draws": 200}
    norms = torch.logspace(-2, 1.5, 40)
    entropies = {}
    for name in LOOKS:
        torch.manual_seed(config["seed"])  # the same queries and keys for every feature map
        sizes = {key: value for key, value in config.items() if key != "seed"}
        entropies[name] = entropy_against_norm(name, norms, **sizes).tolist()
    results = {"norms": norms.tolist(), "entropies": entropies}
    card = runcard.run_card(
        config,
        {"name": "standard normal queries and keys"},
        torch.device("cpu"),
        time.perf_counter() - start,
        results,
    )
    card["command"] = "python -m nala_min.measure"
    runcard.RESULTS.mkdir(parents=True, exist_ok=True)
    runcard.write_json(runcard.RESULTS / "entropy_gap.json", card)
    plot_entropy_gap(norms.tolist(), entropies, runcard.RESULTS / "entropy_gap.png")
    print(f"Written: {runcard.RESULTS / 'entropy_gap.json'} and .png")


if __name__ == "__main__":
    main()
