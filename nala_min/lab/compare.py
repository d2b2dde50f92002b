"""Does norm-awareness help, and when? `python -m nala_min.lab.compare` trains each variant of a
study with several seeds, writes a run card and a picture, and prints a table.

The variants share everything but the attention. A run uses one CPU thread, so its result does not
depend on the others. It resumes if interrupted, and repeats if task, data or code have changed.
"""

from __future__ import annotations

import hashlib
import io
import math
import multiprocessing
import os
import signal
import sys
import threading
from collections import namedtuple
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from nala_min import plots, relatives, runcard, train
from nala_min.flags import UsageError, flag, parse_flags, run_script
from nala_min.lab import studies
from nala_min.lab.studies import STUDIES, Study, Task, build_model

Row = dict[str, Any]  # the results of one run

# --- Runs -----------------------------------------------------------------------------------------


def run(task: Task, name: str, seed: int, folder: Path, device: str = "cpu") -> Row:
    """Train one variant in folder, or resume its run. Returns its row of the study's card."""
    identity = _identity(task, name)  # registers your FILE.py
    net, path = build_model(task, name, seed).to(device), folder / "checkpoint.pt"
    options = {x.name: getattr(task, x.name) for x in fields(Task)} | {"eval_every": task.steps}
    history, seconds = train.fit(
        net,
        train.Recipe(**options, bfloat16=train.has_bfloat16(torch.device(device)), seed=seed),
        batch=partial(task.batch, seed),
        loss=task.loss,
        evaluate=task.evaluate,
        checkpoint=path,
        extra={"seed": seed} | identity,
        resume=path.exists(),
    )
    parameters = sum(x.numel() for x in net.parameters() if x.requires_grad)
    row = {"variant": name, "seed": seed, "parameters": parameters, "seconds": round(seconds, 1)}
    return row | {key: value for key, value in history[-1].items() if key != "step"}


def _identity(task: Task, name: str) -> dict[str, str]:
    """Everything but the seed that determines a run's numbers. Registers your FILE.py."""
    identity = {"variant": name, "task": repr(task), "data": task.data_info().get("sha256", "")}
    if relatives.is_file(name):
        channels = task.sizes[2] // task.sizes[1]
        identity["attention"] = relatives.register(name, channels, causal=task.CAUSAL)
        identity["variant"] = Path(name).name
    return identity | {"code": runcard.code_sha256(Path(studies.__file__), Path(__file__))}


def _run_folder(folder: Path, seed: int, identity: dict[str, str]) -> Path:
    """The folder of a run. Another task, other data or other code lead to another folder."""
    digest = hashlib.sha256(repr(identity).encode("utf-8")).hexdigest()
    return folder / f"{identity['variant']}_seed{seed}_{digest[:8]}"


def finished(study: Study, folder: Path) -> dict[tuple[str, int], Row]:
    """The rows of the finished runs of study in folder, by variant and seed."""
    rows = {}
    for name in study.variants:
        identity = _identity(study.task, name)
        for seed in range(1, study.seeds + 1):
            path = _run_folder(folder, seed, identity) / "row.json"
            if path.exists():
                rows[name, seed] = runcard.read_json(path) | {"variant": name}
    return rows


def _work(task: Task, keys: list[tuple[str, int]], folder: Path, device: str) -> None:
    """Do the runs of these variants and seeds, in a worker process that ends with its parent."""

    def end_with_parent() -> None:
        multiprocessing.parent_process().join()  # returns however the parent ends
        signal.raise_signal(signal.SIGTERM)  # train.fit saves the run

    threading.Thread(target=end_with_parent, daemon=True).start()
    tqdm.set_lock(threading.RLock())  # a semaphore, the default, would outlive a killed process
    torch.set_num_threads(1)
    for name, seed in keys:
        path = _run_folder(folder, seed, _identity(task, name))
        path.mkdir(parents=True, exist_ok=True)
        try:
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                row = run(task, name, seed, path, device)
        except KeyboardInterrupt:
            return
        except UsageError as error:
            sys.exit(f"{name}, seed {seed}: {error}")
        runcard.write_json(path / "row.json", row)
        print(f"{name}, seed {seed}: {task.result} {row[task.result]:.4f}", flush=True)


def run_all(study: Study, folder: Path, workers: int, device: str) -> list[Row]:
    """Do all runs of study that folder lacks, shared among workers. Returns all rows."""
    keys = [(name, seed) for seed in range(1, study.seeds + 1) for name in study.variants]
    done = finished(study, folder)
    todo = [key for key in keys if key not in done]
    shares = [todo[i::workers] for i in range(min(workers, len(todo)))]
    worker = partial(multiprocessing.get_context("spawn").Process, target=_work)
    processes = [worker(args=(study.task, share, folder, device)) for share in shares]
    # Workers inherit this: between two runs, they ignore Ctrl-C and leave it to their parent.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    for process in processes:
        process.start()
    signal.signal(signal.SIGINT, handler)
    try:
        for process in processes:
            process.join()
    except KeyboardInterrupt as error:
        for process in processes:
            process.terminate()  # SIGTERM: it saves its run
        raise KeyboardInterrupt("interrupted: run the same command to continue") from error
    if any(process.exitcode for process in processes):
        remedy = "run the same command to continue, with fewer --workers if memory ran out"
        raise ChildProcessError(f"a worker was killed or failed: {remedy}")
    return list(finished(study, folder).values())


# --- Statistics -----------------------------------------------------------------------------------

# 97.5 % quantiles of Student's t for 2, 3, ... pairs.
T_QUANTILES = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179),
    *(2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093),
)


def values(rows: list[Row], variant: str, result: str) -> list[float]:
    """One result of all runs of variant, in the order of their seeds."""
    found = sorted((row["seed"], row[result]) for row in rows if row["variant"] == variant)
    return [value for _, value in found]


def difference(ours: list[float], theirs: list[float]) -> tuple[float, float]:
    """Mean of ours - theirs, paired by seed, and half of its 95 % interval (Student's t)."""
    pairs = [a - b for a, b in zip(ours, theirs, strict=True)]
    if len(pairs) < 2:
        return mean(pairs), math.inf
    return mean(pairs), T_QUANTILES[len(pairs) - 2] * stdev(pairs) / math.sqrt(len(pairs))


def p_value(t: float, pairs: int) -> float:
    """Two-sided p-value of a paired t-test: of a mean difference of t standard errors."""
    dof, steps = pairs - 1, 100_000
    x = (np.arange(steps) + 0.5) / steps * abs(t)
    integral = float(((1 + x * x / dof) ** (-pairs / 2)).mean()) * abs(t)
    constant = math.exp(math.lgamma(pairs / 2) - math.lgamma(dof / 2)) / math.sqrt(dof * math.pi)
    return max(0.0, 1 - 2 * constant * integral)


def holm(p_values: list[float]) -> list[float]:
    """p-values corrected for multiple tests (Holm 1979)."""
    corrected, running_max = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        running_max = max(running_max, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = running_max
    return corrected


# A mean difference of two variants' results, half of its 95 % interval, and a corrected p-value.
Answer = namedtuple("Answer", "variant baseline difference half_width p")


def answers(rows: list[Row], study: Study) -> list[Answer]:
    """Test each of a study's questions; p-values are corrected for their number (Holm)."""
    found, p_values = [], []
    for pair in study.questions:
        ours, theirs = (values(rows, name, study.task.result) for name in pair)
        effect, half_width = difference(ours, theirs)
        found.append((*pair, effect, half_width))
        error = half_width / T_QUANTILES[len(ours) - 2]
        p_values.append(p_value(effect / error, len(ours)) if 0 < error < math.inf else 1.0)
    return [Answer(*x, p) for x, p in zip(found, holm(p_values), strict=True)]


def table(rows: list[Row], result: str) -> str:
    """One line per variant: mean, lowest and highest result, difference from NaLa."""
    lines = [f"{result:<28}    mean    lowest   highest   difference from nala (95 %)"]
    for name in dict.fromkeys(row["variant"] for row in rows):
        found, ours = values(rows, name, result), values(rows, "nala", result)
        line = f"{name:<28} {mean(found):8.4f}  {min(found):8.4f}  {max(found):8.4f}"
        if ours and name != "nala":
            line += "   {:+.4f} ± {:.4f}".format(*difference(found, ours))
        lines.append(line)
    return "\n".join(lines)


# --- The program ----------------------------------------------------------------------------------


@dataclass
class Settings:
    """Compare attentions under the same conditions. By default: recall, sharpness and text."""

    study: str | None = flag(None, "study to run (default: several)", choices=list(STUDIES))
    quick: bool = flag(False, "few steps and one seed: a trial of a few minutes")
    seeds: int | None = flag(None, "seeds per attention (default: 5 or 8, by study)")
    workers: int | None = flag(None, "parallel runs (default: one per core; 1 on a GPU)")
    device: str = flag("cpu", "device to train on", choices=["cpu", "cuda", "mps"])
    data: Path | None = flag(None, "text for the text studies (default: Tiny Shakespeare)")
    data_dir: Path | None = flag(None, "folder with CIFAR-10, as for train_cifar.py")
    attention: str | None = flag(None, "your own attention, a FILE.py, to compare as well")
    out: Path = flag(Path("runs/compare"), "folder for the runs and the studies' cards")

    def __post_init__(self) -> None:
        if self.workers is None:
            linux = sys.platform == "linux"  # where a process may be held to some processors
            cores = len(os.sched_getaffinity(0)) if linux else os.cpu_count() or 1
            self.workers = cores if self.device == "cpu" else 1
        for name, most in (("workers", 10_000), ("seeds", len(T_QUANTILES) + 1)):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= most:
                raise UsageError(f"--{name} must be from 1 to {most}, got {value}")
        if self.attention is not None and not relatives.is_file(self.attention):
            raise UsageError(f"--attention must be a file, FILE.py, got {self.attention}")


def configured_study(settings: Settings, name: str) -> Study:
    """The study called name, as changed by the flags."""
    study = STUDIES[name]
    changes = {"file": settings.data, "folder": settings.data_dir}
    changes = {key: path for key, path in changes.items() if hasattr(study.task, key)}
    steps = study.quick if settings.quick else study.task.steps
    task = replace(study.task, steps=steps, **changes)
    variants = study.variants + ((settings.attention,) if settings.attention else ())
    seeds = settings.seeds or (1 if settings.quick else study.seeds)
    return replace(study, task=task, variants=variants, seeds=seeds)


def main() -> None:
    settings = parse_flags(Settings)
    train.choose_device(settings.device)
    names = [settings.study] if settings.study else ["recall", "sharpness", "text"]
    chosen = {name + "-quick" * settings.quick: configured_study(settings, name) for name in names}
    for name, study in chosen.items():  # find every mistake before the first hour of work
        folder = settings.out / name
        runcard.check_writable(f"{folder}.json", f"{folder}.png", folder / "run")
        try:
            finished(study, folder)
        except (OSError, ValueError) as error:
            raise UsageError(f"--data, --data-dir, --attention: {error}") from error
    for name, study in chosen.items():
        print(f"{name}: {len(study.variants)} attentions, {study.seeds} seeds")
        rows = run_all(study, settings.out / name, settings.workers, settings.device)
        task = {x.name: getattr(study.task, x.name) for x in fields(study.task) if x.repr}
        config = {"study": name, "seeds": study.seeds, "variants": study.variants, "task": task}
        if own := settings.attention:
            config["attention_sha256"] = {own: _identity(study.task, own)["attention"]}
        seconds, device = sum(row["seconds"] for row in rows), torch.device(settings.device)
        card = runcard.run_card(config, study.task.data_info(), device, seconds, {"runs": rows})
        card["command"] = card["command"].replace("compare.py", "-m nala_min.lab.compare")
        card["hardware"]["threads"] = 1  # per run
        runcard.write_json(settings.out / f"{name}.json", card)
        plots.write(study.task.draw(rows), settings.out / f"{name}.png")
        print(table(rows, study.task.result))
        for answer in answers(rows, study):
            print("{} - {}: {:+.4f} ± {:.4f}, p = {:.3f} (corrected by Holm)".format(*answer))
        print(f"{card['seconds']:.0f} s of training. Written to {settings.out}: {name}\n")


if __name__ == "__main__":
    run_script(main)
