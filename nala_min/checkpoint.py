"""Checkpoints: save, load, resume and stop a training run without loss. Used by train.fit."""

from __future__ import annotations

import io
import math
import signal
import statistics
import threading
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from nala_min import distributed
from nala_min.flags import UsageError
from nala_min.model import in_mode
from nala_min.runcard import to_plain, write_atomically

FORMAT = 4  # version of checkpoints: incremented when a model, or what Run saves, changes


def load_checkpoint(path: Path | str, *names: str) -> dict[str, Any]:
    """Load what Run saved at path, onto the CPU. Its extra must contain names.

    Raises UsageError if the file is missing or damaged, or lacks names (another script wrote it).
    """
    path = Path(path)
    if not path.exists():
        raise UsageError(f"no checkpoint at {path}: train first, or name its folder with --out")
    try:
        if (damaged := zipfile.ZipFile(path).testzip()) is not None:  # torch.load skips checksums
            raise ValueError(damaged)
        saved = _read(path)
        if saved["format"] != FORMAT:
            raise ValueError("another format")
    except Exception as error:  # for damaged files, torch raises many kinds of long errors
        kind = type(error).__name__
        raise UsageError(
            f"{path} cannot be read by this version ({kind}): move it aside, or name another folder"
            " with --out"
        ) from error
    if not set(names) <= saved.get("extra", {}).keys():
        raise UsageError(f"{path} belongs to another script: name another folder with --out")
    return saved


def _read(file: Path | BinaryIO) -> Any:
    """Read what torch.save wrote. Raises ValueError for anything but tensors and plain values."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise ValueError(str(error).splitlines()[0]) from error


def _uncompiled(name: str) -> str:
    """A weight's name without the prefix that torch.compile adds."""
    return name.replace("_orig_mod.", "")


def _without_file_names(extra: dict[str, Any]) -> dict[str, Any]:
    """extra without the names of files whose SHA-256 it has, because files may be renamed."""
    files = {n: x for n, x in extra.items() if isinstance(x, dict) and "sha256" in x}
    nameless: dict[str, Any] = {n: x | {"name": None} for n, x in files.items()}
    if hashes := extra.get("attention_sha256"):
        names = extra["attention"].split(",")
        nameless["attention"] = [None if name in hashes else name for name in names]
        nameless["attention_sha256"] = [hashes[name] for name in names if name in hashes]
    return extra | nameless


class Run:
    """The state of a training run, as saved in its checkpoint. steps: total number of steps."""

    def __init__(
        self,
        model: nn.Module,
        optimizers: list[Optimizer],
        steps: int,
        path: Path | str,
        extra: dict[str, Any],
    ):
        self.model, self.optimizers = model, optimizers
        self.steps, self.path, self.extra = steps, Path(path), to_plain(extra)
        self.step = self.saved = 0  # steps done, and steps in the checkpoint
        self.losses: list[Tensor | float] = []  # since the last point of the curve
        self.history: list[dict[str, float]] = []
        self.start = time.perf_counter()

    def seconds(self) -> float:
        return time.perf_counter() - self.start

    @contextmanager
    def explain_resume(self) -> Iterator[None]:
        """If the block is interrupted, say how to continue."""
        try:
            yield
        except KeyboardInterrupt as error:
            raise KeyboardInterrupt(
                f"interrupted at step {self.step}: --resume continues from step {self.saved}"
            ) from error

    def load(self) -> None:
        """Continue from the checkpoint."""
        saved = load_checkpoint(self.path)
        if different := self.difference(saved):
            raise UsageError(
                f"--resume: {different}: use the same flags, or name another folder with --out"
            )
        names = {_uncompiled(name): name for name in self.model.state_dict()}
        self.model.load_state_dict({names.get(n, n): x for n, x in saved["model"].items()})
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.step = self.saved = saved["step"]
        self.losses, self.history = list(saved["losses"]), saved["history"]
        self.start -= saved["seconds"]

    def save_first(self) -> None:
        """Write the first checkpoint, at step 0, to fail now and not after an hour if that is
        impossible. Never overwrites another run or an unfinished one."""
        if self.path.exists():
            saved = load_checkpoint(self.path)
            if different := self.difference(saved):
                raise UsageError(f"{different}: move it aside, or name another folder with --out")
            if saved["step"] < self.steps:
                raise UsageError(
                    f"{self.path} is at step {saved['step']} of {self.steps}: continue it with"
                    " --resume, or move it aside to start over"
                )
        self.save(first=True)

    def difference(self, saved: dict[str, Any]) -> str | None:
        """How the saved run differs from this one, if it does."""
        before, now = _without_file_names(saved["extra"]), _without_file_names(self.extra)
        for name in sorted(before.keys() | now.keys(), key=lambda name: (name != "data", name)):
            if before.get(name) != now.get(name):
                shown = (repr(extra.get(name))[:200] for extra in (saved["extra"], self.extra))
                return f"{self.path} was trained with {name} = {', not '.join(shown)}"
        return None

    def add_point(self, evaluate: Callable[[nn.Module], dict[str, float]], bar: tqdm) -> None:
        """Add a point to the curve and print it above the progress bar. Saves before and after:
        the evaluation may run out of memory."""
        self.save()
        train_loss = statistics.fmean(self.losses)
        self.losses.clear()
        if distributed.rank() == 0:
            with in_mode(self.model, training=False):
                numbers = to_plain(evaluate(self.model))
            point = {"step": self.step, "train_loss": train_loss, **numbers}
            self.check_finite(point.values())
            self.history.append(point)
            shown = (f"{name.replace('_', ' ')} {point[name]:.3f}" for name in list(point)[1:])
            bar.write(f"step {self.step:5d}   {'   '.join(shown)}")
        self.save()

    def check_finite(self, numbers: Iterable[float]) -> None:
        if not all(map(math.isfinite, numbers)):
            raise UsageError(f"the loss is not finite at step {self.step}: lower --lr")

    def save(self, first: bool = False) -> None:
        """Write the checkpoint, if all numbers are finite and it can be read back."""
        self.losses = [distributed.mean(float(value)) for value in self.losses]
        if distributed.rank() > 0:  # only rank 0 writes
            self.saved = self.step
            return
        self.check_finite(self.losses)
        self.check_finite((0 * weight.detach()).sum() for weight in self.model.parameters())
        state = {
            "format": FORMAT,
            "model": {_uncompiled(name): x for name, x in self.model.state_dict().items()},
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "losses": self.losses,
            "history": self.history,
            "seconds": self.seconds(),
            "extra": self.extra,
        }
        torch.save(state, content := io.BytesIO())
        content.seek(0)
        try:
            _read(content)
        except ValueError as error:
            raise UsageError(f"the model state cannot be checkpointed: {error}") from error
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, lambda file: file.write(content.getbuffer()))
        except OSError as error:
            advice = f"fix that, and --resume continues from step {self.saved}"
            if first:
                advice = "fix that, or name another folder with --out"
            raise UsageError(
                f"--out {self.path.parent} cannot be written ({error}): {advice}"
            ) from error
        self.saved = self.step


class Stop:
    """Whether someone asked the run to stop: by Ctrl-C, by SIGTERM (from a cluster), or by closing
    the terminal (SIGHUP, unless nohup ignores it). The current step finishes first; a second Ctrl-C
    does not wait for it."""

    SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")  # if the platform has them

    def __enter__(self) -> Stop:
        self.requested, self._handlers = False, {}
        if threading.current_thread() is threading.main_thread():  # only it may set handlers
            for number in (getattr(signal, n) for n in self.SIGNALS if hasattr(signal, n)):
                if number != signal.SIGINT and signal.getsignal(number) is signal.SIG_IGN:
                    continue
                self._handlers[number] = signal.signal(number, self._handle) or signal.SIG_DFL
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        if self.requested and number == signal.SIGINT and distributed.world_size() == 1:
            raise KeyboardInterrupt
        self.requested = True  # torchrun sends it again to all its processes
