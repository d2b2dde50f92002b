"""How long attention takes as texts grow. `python -m nala_min.bench` measures it anew and writes
its run card and picture to notebooks/results."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from torch import Tensor

from nala_min import plots, runcard
from nala_min.model import nala_attention, softmax_attention

# name: causal attention, and the longest text it is measured on
FORMS: dict[str, tuple[Callable[..., Tensor], int]] = {
    "softmax": (partial(softmax_attention, causal=True), 2**14),
    "chunked": (partial(nala_attention, causal=True), 2**14),
    "quadratic": (partial(nala_attention, causal=True, mode="parallel"), 2**12),
}


def measure_time(
    lengths: list[int], heads: int, dim: int, repeats: int
) -> dict[str, list[float | None]]:
    """Median seconds of a forward and a backward pass of each form at each length, float32, batch
    1; None where a form is not measured. Forms take turns, so that a slow minute slows them all."""
    seconds: dict[str, list[float | None]] = {name: [] for name in FORMS}
    for length in lengths:
        q, k, v = torch.randn(3, 1, heads, length, dim).requires_grad_()
        forms = {name: form for name, (form, longest) in FORMS.items() if length <= longest}
        taken: dict[str, list[float]] = {name: [] for name in forms}
        for turn in range(repeats + 1):
            for name, attention in forms.items():
                start = time.perf_counter()
                torch.autograd.grad(attention(q, k, v).sum(), (q, k, v))
                if turn:  # the first is a warm-up
                    taken[name].append(time.perf_counter() - start)
        for name in FORMS:
            seconds[name].append(median(taken[name]) if name in taken else None)
    return seconds


def crossover(lengths: list[int], slower: list[float], faster: list[float]) -> int | None:
    """The first length from which on the second is never slower than the first, or None."""
    found = None
    for length, first, second in reversed(list(zip(lengths, slower, faster, strict=True))):
        if second > first:
            break
        found = length
    return found


def main() -> None:
    start = time.perf_counter()
    config = {"seed": 1, "heads": 4, "dim": 64, "repeats": 5}
    lengths = [2**i for i in range(6, 15)]
    torch.manual_seed(config["seed"])
    sizes = {key: value for key, value in config.items() if key != "seed"}
    seconds = measure_time(lengths, **sizes)
    results = {"lengths": lengths, "seconds": seconds}
    results["crossover"] = crossover(lengths, seconds["softmax"], seconds["chunked"])
    card = runcard.run_card(
        config,
        {"name": "standard normal queries, keys and values"},
        torch.device("cpu"),
        time.perf_counter() - start,
        results,
    )
    card["command"] = "python -m nala_min.bench"
    runcard.RESULTS.mkdir(parents=True, exist_ok=True)
    runcard.write_json(runcard.RESULTS / "time_against_length.json", card)
    plots.write(plots.time_against_length(results), runcard.RESULTS / "time_against_length.png")
    print(f"Written: {runcard.RESULTS / 'time_against_length.json'} and .png")


if __name__ == "__main__":
    main()
