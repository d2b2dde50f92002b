"""Does the premise hold in trained models? `python -m nala_min.lab.premise` reads the models that
`compare --study text` (or images) has trained. For every head it measures whether attention is
sharper where the query, or the key, is longer. It writes a run card and a picture, in a checkout to
notebooks/results, otherwise to runs.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch

from nala_min import measure, plots, runcard
from nala_min.flags import UsageError, flag, parse_flags, run_script
from nala_min.lab import compare
from nala_min.lab.studies import MAIN_ATTENTIONS, STUDIES

NUM_INPUTS = {"text": 1024, "images": 128}  # number of windows of 128 characters, or of images
MAX_POINTS = 100  # per head, in the picture
NORMS = ("query_norm", "key_norm")


@dataclass
class Settings:
    """Correlate entropy with the norms of queries and keys in trained models."""

    study: str = flag("text", "study that trained the models", choices=list(NUM_INPUTS))
    runs: Path = flag(Path("runs/compare"), "folder of the runs of compare")
    data: Path | None = flag(None, "text of the study (default: Tiny Shakespeare)")
    data_dir: Path | None = flag(None, "folder with CIFAR-10, as for train_cifar.py")
    out: Path = flag(measure.Settings.out, "folder for the run card and the picture")


def main() -> None:
    start, settings = time.perf_counter(), parse_flags(Settings)
    card_file, picture = (settings.out / f"premise_{settings.study}.{x}" for x in ("json", "png"))
    runcard.check_writable(card_file, picture)
    study = STUDIES[settings.study]
    task = compare.with_data(study.task, settings.data, settings.data_dir)
    try:
        inputs = task.inputs(NUM_INPUTS[settings.study])
    except (OSError, ValueError) as error:
        raise UsageError(f"--data, --data-dir: {error}") from error
    rows, points = [], {}
    for name in MAIN_ATTENTIONS:
        for seed in range(1, study.seeds + 1):
            model = compare.load_trained(task, name, seed, settings.runs / settings.study)
            blocks = measure.norms_and_entropies(model, inputs)
            for number, block in enumerate(blocks, 1):
                found = {x: measure.rank_correlation(block[x], block["entropy"]) for x in NORMS}
                found = {x: round(mean(heads.tolist()), 4) for x, heads in found.items()}
                rows.append({"variant": name, "seed": seed, "block": number} | found)
            if seed == 1:  # the picture shows the last block of seed 1
                points[name] = {x: _subsample(block[x]) for x in (*NORMS, "entropy")}
    results = {"correlations": rows, "points": points}
    config = {"study": settings.study, "seeds": study.seeds, "inputs": len(inputs)}
    seconds = time.perf_counter() - start
    card = runcard.run_card(config, task.data_info(), torch.device("cpu"), seconds, results)
    card["command"] = f"python -m nala_min.lab.premise --study {settings.study}"
    runcard.write_json(card_file, card)
    plots.write(plots.premise(results), picture)
    print(f"Written: {card_file} and .png")


def _subsample(values: torch.Tensor) -> list[list[float]]:
    """At most MAX_POINTS numbers per head, evenly spaced, from (H, n)."""
    step = max(1, values.shape[1] // MAX_POINTS)
    return [[round(x, 4) for x in head] for head in values[:, ::step][:, :MAX_POINTS].tolist()]


if __name__ == "__main__":
    run_script(main)
