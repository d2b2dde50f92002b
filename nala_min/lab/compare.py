"""Does norm-awareness help, and when? `python -m nala_min.lab.compare` trains each variant of a
study with several seeds and writes one run card per study.

A study compares attentions on one task. They share the block, the data and its order, the steps,
the schedule and the seeds, and their numbers of parameters are nearly equal. Each run uses one CPU
thread, so its result does not depend on how many runs share the machine. A finished run is repeated
only if the code that trains has changed; an interrupted run resumes. The program first estimates
the time that is left. At the end it prints a table: mean, lowest and highest over the seeds, and
the paired difference from NaLa with its 95 % interval.
"""

from __future__ import annotations

import hashlib
import math
import multiprocessing
import os
import shlex
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from nala_min import data, fast, measure, model, plots, relatives, runcard, synthetic, train
from nala_min.checkpoint import load_checkpoint
from nala_min.flags import UsageError, flag, parse_flags, run_script
from nala_min.lab import studies
from nala_min.lab.studies import STUDIES, Study, Task, Variant, variant_of

# --- Runs -----------------------------------------------------------------------------------------


def run(task: Task, name: str, seed: int, folder: Path, device: str = "cpu") -> dict[str, Any]:
    """Train one variant in folder, or resume its run. Returns its row of the study's card."""
    extra = _run_info(task, name, seed)  # also registers your FILE.py
    model, recipe = _model_and_recipe(task, name, seed, device)
    history, seconds = train.fit(
        model,
        recipe,
        batch=partial(task.batch, seed),
        loss=task.loss,
        evaluate=task.evaluate,
        checkpoint=(path := folder / "checkpoint.pt"),
        extra=extra,
        resume=path.exists(),
    )
    row = {
        "variant": name,
        "seed": seed,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": round(seconds, 1),
        **{key: value for key, value in history[-1].items() if key != "step"},
    }
    unchanged = variant_of(name).change == Variant().change  # statistics need unchanged blocks
    stats = task.attention_stats(model) if unchanged else None
    return row | ({"attention_stats": stats} if stats else {})


def _model_and_recipe(
    task: Task, name: str, seed: int, device: str = "cpu"
) -> tuple[nn.Module, train.Recipe]:
    """The initial model of a run, and its training recipe."""
    variant = variant_of(name)
    torch.manual_seed(seed)
    model = task.build(variant)
    for layer in task.layers(model):
        variant.change(layer)
    recipe = train.Recipe(
        task.steps,
        variant.lr_factor * task.learning_rate,
        muon=task.muon and variant.lr_factor * task.muon,
        weight_decay=task.weight_decay,
        schedule=task.schedule,
        eval_every=task.steps,
        bfloat16=train.has_bfloat16(torch.device(device)),
        seed=seed,
    )
    return model.to(device), recipe


def load_trained(task: Task, name: str, seed: int, folder: Path) -> nn.Module:
    """The trained model of a finished run in folder, even if the code has changed since then.
    Raises UsageError if there is none."""
    model, _ = _model_and_recipe(task, name, seed)
    path = _run_folder(folder, name, seed) / "checkpoint.pt"
    saved = load_checkpoint(path)
    found, wanted = (x | {"code_sha256": 0} for x in (saved["extra"], _run_info(task, name, seed)))
    if found != wanted or saved["step"] != task.steps:
        raise UsageError(f"{path} is not from a finished run of this study: run the study")
    model.load_state_dict(saved["model"])
    return model


def seconds_of_a_step(task: Task, name: str, device: str = "cpu") -> float:
    """Mean time of three training steps of a variant, with PyTorch's current number of threads."""
    model, recipe = _model_and_recipe(task, name, 1, device)
    optimizers = train.make_optimizers(model, recipe)
    for step in range(4):
        if step == 1:  # the first step is a warm-up
            start = time.perf_counter()
        inputs, targets = (x.to(device) for x in task.batch(1, step))
        loss = task.loss(model, inputs, targets)
        train.update(model, optimizers, loss, recipe.clip)
        loss.item()  # waits for the GPU
    return (time.perf_counter() - start) / 3


def _run_in_worker(task: Task, name: str, seed: int, folder: Path, device: str) -> dict[str, Any]:
    """Do one run silently. Called in its own process."""
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    with Path(os.devnull).open("w", encoding="utf-8") as devnull:
        with redirect_stdout(devnull), redirect_stderr(devnull):
            row = run(task, name, seed, folder, device)
    runcard.write_json(folder / "row.json", _identity(task, name) | {"row": row})
    return row


# The code that, together with this file, determines a run's numbers.
CODE_MODULES = (model, fast, relatives, train, data, synthetic, measure, studies)


def _identity(task: Task, name: str) -> dict[str, Any]:
    """The task, data and code that a finished run must have been trained with, and the content of
    your FILE.py, which this registers."""
    files = [__file__, *(module.__file__ for module in CODE_MODULES)]
    code = b"".join(Path(file).read_bytes() for file in files)
    identity = {"task": repr(task), "data": task.data_info()}
    identity["code_sha256"] = hashlib.sha256(code).hexdigest()
    if relatives.is_file(name):
        identity["attention_sha256"] = relatives.register(name, task.channels, causal=task.CAUSAL)
    return identity


def _run_info(task: Task, name: str, seed: int) -> dict[str, Any]:
    """The description of a run in its checkpoint."""
    return runcard.to_plain({"variant": name, "seed": seed} | _identity(task, name))


def finished(study: Study, folder: Path) -> dict[tuple[str, int], dict[str, Any] | None]:
    """The row of each run of study, by variant and seed; None for an unfinished run."""
    rows = {}
    for seed in range(1, study.seeds + 1):
        for name in study.variants:
            done = {}
            with suppress(OSError, ValueError):  # missing or damaged: its run resumes
                done = runcard.read_json(_run_folder(folder, name, seed) / "row.json")
            row = done.pop("row", None) if isinstance(done, dict) else None
            rows[name, seed] = row if done == _identity(study.task, name) else None
    return rows


def _run_folder(folder: Path, name: str, seed: int) -> Path:
    slug = "".join(c if c.isalnum() else "-" for c in name)
    return folder / f"{slug}_seed{seed}"


def check_run_folders(study: Study, folder: Path) -> None:
    """Raise UsageError if the folder of an unfinished run cannot be written or holds the checkpoint
    of another run."""
    for (name, seed), row in finished(study, folder).items():
        if row is None:
            path = _run_folder(folder, name, seed) / "checkpoint.pt"
            runcard.check_writable(path, path.with_name("row.json"))
            if path.exists() and load_checkpoint(path)["extra"] != _run_info(
                study.task, name, seed
            ):
                raise UsageError(
                    f"{path} is from another task, other data or other code: move it aside, or"
                    " name another folder with --out"
                )


def _start_worker(parent: Connection) -> None:
    """Make this worker end when its parent ends. It ignores the terminal's signals, because the
    parent also receives them and then stops its workers."""
    if hasattr(signal, "SIGHUP"):  # not on Windows
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    tqdm.set_lock(threading.RLock())  # a semaphore, the default, would outlive a killed process
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Connection) -> None:
    """Wait until the other end of parent closes, as it does however the parent process ends. Then
    raise SIGTERM: train.fit saves the current run, and between two runs this process ends."""
    with suppress(EOFError):
        parent.recv()
    while True:
        signal.raise_signal(signal.SIGTERM)
        time.sleep(0.5)


@contextmanager
def _ctrl_c_ignored() -> Iterator[None]:
    """Ignore Ctrl-C in this process inside the block, and for good in processes started there."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before or signal.SIG_DFL)


def run_all(study: Study, folder: Path, workers: int, device: str) -> list[dict[str, Any]]:
    """Do all runs of study that folder lacks, several in parallel. Returns all rows."""
    rows = finished(study, folder)
    todo = [key for key, row in rows.items() if row is None]
    context = multiprocessing.get_context("spawn")
    worker_end, parent_end = context.Pipe(duplex=False)
    with (
        ProcessPoolExecutor(workers, context, _start_worker, (worker_end,)) as pool,
        tqdm(total=len(rows), initial=len(rows) - len(todo), unit="run", dynamic_ncols=True) as bar,
    ):
        try:
            with _ctrl_c_ignored():
                jobs = {
                    pool.submit(
                        _run_in_worker, study.task, *key, _run_folder(folder, *key), device
                    ): key
                    for key in todo
                }
            for job in as_completed(jobs):
                rows[jobs[job]] = job.result()
                bar.update()
        except BaseException as error:
            parent_end.close()  # every worker saves its run and ends
            pool.shutdown(cancel_futures=True)
            if isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt("interrupted: run the same command to continue") from error
            if isinstance(error, BrokenProcessPool):
                raise ChildProcessError(
                    "a worker was killed, perhaps because memory ran out: run the same command to"
                    " continue, with fewer --workers to use less memory"
                ) from error
            raise
    return list(rows.values())


# --- Statistics -----------------------------------------------------------------------------------

# 97.5 % quantiles of Student's t for 2, 3, ... pairs.
T_QUANTILES = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179),
    *(2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093),
)


def values(rows: list[dict[str, Any]], variant: str, result: str) -> list[float]:
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
    """Two-sided p-value of a paired t-test: the probability, if there is no effect, that the mean
    of this many differences is at least |t| standard errors from 0."""
    dof, steps = pairs - 1, 100_000
    x = (np.arange(steps) + 0.5) / steps * abs(t)
    integral = float(((1 + x * x / dof) ** (-pairs / 2)).mean()) * abs(t)
    constant = math.exp(math.lgamma(pairs / 2) - math.lgamma(dof / 2)) / math.sqrt(dof * math.pi)
    return max(0.0, 1 - 2 * constant * integral)


def holm(p_values: list[float]) -> list[float]:
    """p-values corrected for multiple tests (Holm 1979): with a threshold of 0.05, at most one
    family of tests in twenty has a false positive."""
    corrected, running_max = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        running_max = max(running_max, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = running_max
    return corrected


class Answer(NamedTuple):
    """The difference between two variants."""

    variant: str
    baseline: str
    difference: float  # mean difference of their results
    half_width: float  # half of its 95 % interval, not corrected
    p: float  # p-value, corrected for the number of questions


def answers(rows: list[dict[str, Any]], study: Study) -> list[Answer]:
    """Test each of a study's questions; p-values are corrected for their number (Holm)."""
    found, p_values = [], []
    for pair in study.questions:
        ours, theirs = (values(rows, name, study.task.result) for name in pair)
        effect, half_width = difference(ours, theirs)
        found.append((*pair, effect, half_width))
        error = half_width / T_QUANTILES[len(ours) - 2]
        p_values.append(p_value(effect / error, len(ours)) if 0 < error < math.inf else 1.0)
    return [Answer(*x, p) for x, p in zip(found, holm(p_values), strict=True)]


def table(rows: list[dict[str, Any]], result: str) -> str:
    """One line per variant: mean, lowest and highest result, difference from NaLa."""
    names = list(dict.fromkeys(row["variant"] for row in rows))
    lines = [f"{result:<28}    mean    lowest   highest   difference from nala (95 %)"]
    for name in names:
        found = values(rows, name, result)
        line = f"{name:<28} {mean(found):8.4f}  {min(found):8.4f}  {max(found):8.4f}"
        if name != "nala" and "nala" in names:
            effect, half_width = difference(found, values(rows, "nala", result))
            line += f"   {effect:+.4f} ± {half_width:.4f}"
        lines.append(line)
    return "\n".join(lines)


MAX_WORKERS = 61  # Windows cannot wait for more
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # a container's CPU quota, on Linux


def processors() -> int:
    """Number of processors that this process may use, by its affinity and its container's quota; at
    most MAX_WORKERS."""
    if hasattr(os, "process_cpu_count"):  # Python 3.13
        count = os.process_cpu_count() or 1
    elif hasattr(os, "sched_getaffinity"):  # Linux
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    with suppress(OSError, ValueError):  # there is no quota, or it is "max"
        quota, period = map(int, CPU_QUOTA.read_text(encoding="ascii").split())
        count = min(count, math.ceil(quota / period))
    return min(count, MAX_WORKERS)


# Without --study: two hours on two cores, and no download of images.
DEFAULT_STUDIES = ("recall", "sharpness", "text")


@dataclass
class Settings:
    """Compare attentions on the same task, under the same conditions. By default: recall,
    sharpness and text, one study after another."""

    study: str | None = flag(None, "study to run (default: several)", choices=list(STUDIES))
    quick: bool = flag(False, "few steps and one seed: a trial of a few minutes")
    seeds: int | None = flag(None, "seeds per attention (default: 3 to 20, by study)")
    workers: int | None = flag(
        None, f"parallel runs (default: {processors()}, one per core; 1 on a GPU)"
    )
    device: str = flag("cpu", "device to train on", choices=["cpu", "cuda", "mps"])
    data: Path | None = flag(None, "text for the text studies (default: Tiny Shakespeare)")
    data_dir: Path | None = flag(None, "folder with CIFAR-10, as for train_cifar.py")
    attention: str | None = flag(None, "your own attention, a FILE.py, to compare as well")
    out: Path = flag(Path("runs/compare"), "folder for the runs and the studies' cards")

    def __post_init__(self) -> None:
        if self.workers is None:
            self.workers = processors() if self.device == "cpu" else 1
        if not 1 <= self.workers <= MAX_WORKERS:
            raise UsageError(f"--workers must be from 1 to {MAX_WORKERS}, got {self.workers}")
        max_seeds = len(T_QUANTILES) + 1
        if self.seeds is not None and not 1 <= self.seeds <= max_seeds:
            raise UsageError(f"--seeds must be from 1 to {max_seeds}, got {self.seeds}")
        if self.attention is not None and not relatives.is_file(self.attention):
            raise UsageError(f"--attention must be a file, FILE.py, got {self.attention}")


def with_data(task: Task, file: Path | None, folder: Path | None) -> Task:
    """A copy of task that reads file or folder, if it is a task on text or images."""
    paths = {"file": file, "folder": folder}
    return replace(task, **{key: value for key, value in paths.items() if hasattr(task, key)})


def configured_study(settings: Settings, name: str) -> Study:
    """The study called name, as changed by the flags."""
    study = STUDIES[name]
    task = with_data(study.task, settings.data, settings.data_dir)
    task = replace(task, **(study.quick if settings.quick else {}))
    variants = study.variants + ((settings.attention,) if settings.attention else ())
    seeds = settings.seeds or (1 if settings.quick else study.seeds)
    return replace(study, task=task, variants=variants, seeds=seeds)


def check_study(study: Study, folder: Path, attention: str | None) -> None:
    """Raise UsageError for anything that would stop the study later: data, folders or your
    FILE.py."""
    try:
        study.task.data_info()
    except (OSError, ValueError) as error:
        raise UsageError(f"--data, --data-dir: {error}") from error
    if attention:
        try:
            _identity(study.task, attention)
        except ValueError as error:
            raise UsageError(f"--attention {error}") from error
    runcard.check_writable(folder.with_suffix(".json"), folder.with_suffix(".png"))
    check_run_folders(study, folder)


def minutes_left(study: Study, folder: Path, settings: Settings) -> float:
    """Estimated time of the unfinished runs, from a few steps of each variant on one thread."""
    todo = [name for (name, _), row in finished(study, folder).items() if row is None]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        steps = {n: seconds_of_a_step(study.task, n, settings.device) for n in set(todo)}
    finally:
        torch.set_num_threads(threads)
    return (
        study.task.steps * sum(steps[n] for n in todo) / min(settings.workers, len(todo) or 1) / 60
    )


def study_card(
    settings: Settings, name: str, study: Study, rows: list[dict[str, Any]]
) -> dict[str, Any]:
    """The run card of the study called name."""
    config = {"study": name, "seeds": study.seeds, "variants": list(study.variants)}
    command = ["python", "-m", "nala_min.lab.compare", "--study", name]
    command += ["--quick"] * settings.quick
    command += ["--seeds", str(settings.seeds)] * (settings.seeds is not None)
    if settings.attention:
        digest = _identity(study.task, settings.attention)["attention_sha256"]
        config["attention_sha256"] = {settings.attention: digest}
        command += ["--attention", settings.attention]
    config["task"] = {k: x for k, x in vars(study.task).items() if k not in ("file", "folder")}
    seconds, device = sum(row["seconds"] for row in rows), torch.device(settings.device)
    card = runcard.run_card(config, study.task.data_info(), device, seconds, {"runs": rows})
    card["command"] = shlex.join(command)
    card["hardware"]["threads"] = 1  # per run
    return card


def main() -> None:
    settings = parse_flags(Settings)
    train.choose_device(settings.device)
    names = [settings.study] if settings.study else [x for x in STUDIES if x in DEFAULT_STUDIES]
    studies = {name: configured_study(settings, name) for name in names}
    folders = {name: settings.out / (name + "-quick" * settings.quick) for name in names}
    for name, study in studies.items():  # find every mistake before the first hour of work
        check_study(study, folders[name], settings.attention)
    for name, study in studies.items():
        folder = folders[name]
        print(
            f"{name}: {len(study.variants)} attentions, {study.seeds} seeds; about"
            f" {minutes_left(study, folder, settings):.0f} min of training left."
        )
        rows = run_all(study, folder, settings.workers, settings.device)
        card = study_card(settings, name, study, rows)
        runcard.write_json(folder.with_suffix(".json"), card)
        plots.write(study.task.draw(rows), folder.with_suffix(".png"))
        print(table(rows, study.task.result))
        for answer in answers(rows, study):
            print(
                f"{answer.variant} - {answer.baseline}: {answer.difference:+.4f} ±"
                f" {answer.half_width:.4f}, p = {answer.p:.3f} (Holm, {len(study.questions)} tests)"
            )
        print(f"{card['seconds']:.0f} s of training in total. Written: {folder}.json and .png\n")


if __name__ == "__main__":
    run_script(main)
