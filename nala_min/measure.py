"""What is read off an attention. `python -m nala_min.measure` measures the entropy gap anew and
writes its run card and picture to notebooks/results."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import Tensor

from nala_min import runcard
from nala_min.model import attention_weights, decompose, entropy

# One look for each attention, wherever it is drawn; Okabe and Ito's colours, for the colour-blind.
LOOKS = {
    "softmax": {"label": "softmax", "color": "#000000", "linestyle": "--"},
    "cosine": {"label": "NaLa", "color": "#d55e00", "linestyle": "-"},
    "elu": {"label": "linear, elu + 1", "color": "#0072b2", "linestyle": "-."},
    "relu": {"label": "linear, ReLU", "color": "#009e73", "linestyle": ":"},
}


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
