"""What is kept of a training run: its checkpoint is saved, loaded and resumed without loss, and the
run is stopped without loss. train.fit uses it."""

from __future__ import annotations

import io
import math
import signal
import threading
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from nala_min import distributed
from nala_min.flags import UsageError
from nala_min.runcard import write_whole

FORMAT = 3  # of a checkpoint: counted up when what Run saves changes


def load_checkpoint(path: Path, *names: str) -> dict[str, Any]:
    """What Run saved at path, on the CPU, with names in its extra.

    Raises UsageError if there is none, it is damaged, or it lacks a name: another script's.
    """
    if not path.exists():
        raise UsageError(f"no checkpoint at {path}: train first, or name its folder with --out")
    try:
        if (damaged := zipfile.ZipFile(path).testzip()) is not None:  # torch checks no checksum
            raise ValueError(damaged)
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved["format"] != FORMAT:
            raise ValueError("another format")
    except Exception as error:  # torch raises many kinds for a damaged file, in many lines
        kind = type(error).__name__
        raise UsageError(
            f"{path} is no checkpoint of this version ({kind}): delete it, or name another folder"
            " with --out"
        ) from error
    if not set(names) <= saved.get("extra", {}).keys():
        raise UsageError(f"{path} is a run of another script: name another folder with --out")
    return saved


class Run:
    """A run so far: what its checkpoint holds. steps: how many it is to have in the end."""

    def __init__(
        self,
        model: nn.Module,
        optimizers: list[Optimizer],
        steps: int,
        path: Path,
        extra: dict[str, Any],
    ):
        self.model, self.optimizers = model, optimizers
        self.steps, self.path, self.extra = steps, path, extra
        self.step = self.saved = 0  # steps made, and those that are in the checkpoint
        self.losses: list[Tensor] = []  # since the last point of the curve
        self.history: list[dict[str, float]] = []
        self.start = time.perf_counter()

    def seconds(self) -> float:
        return time.perf_counter() - self.start

    @contextmanager
    def saying_how_to_go_on(self) -> Iterator[None]:
        """Give an interruption of the block its message."""
        try:
            yield
        except KeyboardInterrupt as error:
            raise KeyboardInterrupt(
                f"interrupted at step {self.step}: --resume goes on from step {self.saved}"
            ) from error

    def load(self) -> None:
        """Go on from the checkpoint."""
        saved = load_checkpoint(self.path)
        if different := self.difference(saved):
            raise UsageError(
                f"--resume: {different}: give the same flags, or another folder with --out"
            )
        self.model.load_state_dict(saved["model"])
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.step = self.saved = saved["step"]
        self.losses, self.history = list(saved["losses"]), saved["history"]
        self.start -= saved["seconds"]

    def begin(self) -> None:
        """Write the first checkpoint, at step 0: better to learn now than after an hour that it
        cannot be written. Never in the place of a run that is another, or not finished."""
        if self.path.exists():
            saved = load_checkpoint(self.path)
            if different := self.difference(saved):
                raise UsageError(f"{different}: delete it, or name another folder with --out")
            if saved["step"] < self.steps:
                raise UsageError(
                    f"{self.path} has come to step {saved['step']} of {self.steps}: --resume goes"
                    " on with it; delete it to begin anew"
                )
        self.save(first=True)

    def difference(self, saved: dict[str, Any]) -> str | None:
        """How the run that was saved differs from this one, if it does."""
        before = saved["extra"]
        for name in sorted(before.keys() | self.extra.keys()):
            if before.get(name) != self.extra.get(name):
                return (
                    f"{self.path} was trained with {name} = {before.get(name)!r}, not"
                    f" {self.extra.get(name)!r}"
                )
        return None

    def add_point(self, evaluate: Callable[[nn.Module], dict[str, float]], bar: tqdm) -> None:
        """Add a point to the curve, and write it above the bar."""
        train_loss = distributed.mean(torch.stack(self.losses).mean().item())
        self.losses.clear()
        if distributed.rank() > 0:
            return
        point = {"step": self.step, "train_loss": train_loss, **evaluate(self.model)}
        self.model.train()
        self.check_finite(point.values())
        self.history.append(point)
        numbers = (f"{name.replace('_', ' ')} {point[name]:.3f}" for name in list(point)[1:])
        bar.write(f"step {self.step:5d}   {'   '.join(numbers)}")

    def check_finite(self, numbers: Iterable[float]) -> None:
        if not all(map(math.isfinite, numbers)):
            raise UsageError(f"the loss is not finite at step {self.step}: lower --lr")

    def save(self, first: bool = False) -> None:
        """Write the checkpoint, if there is something new, and sound."""
        if self.step == self.saved and not first:
            return
        if distributed.rank() > 0:  # the first process writes
            self.saved = self.step
            return
        self.check_finite(losses := [value.item() for value in self.losses])
        state = {
            "format": FORMAT,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "losses": torch.tensor(losses),
            "history": self.history,
            "seconds": self.seconds(),
            "extra": self.extra,
        }
        torch.save(state, content := io.BytesIO())
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.path, lambda file: file.write(content.getbuffer()))
        except OSError as error:
            mend = f"mend that, and --resume goes on from step {self.saved}"
            if first:
                mend = "mend that, or name another folder with --out"
            raise UsageError(
                f"--out {self.path.parent} cannot be written ({error}): {mend}"
            ) from error
        self.saved = self.step


class Stop:
    """Whether someone has requested an end, by Ctrl-C or as clusters do by SIGTERM. The step at
    hand is finished first; a second Ctrl-C does not wait for it."""

    def __enter__(self) -> Stop:
        self.requested, self._handlers = False, {}
        if threading.current_thread() is threading.main_thread():  # the only one that may
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._ask) or signal.SIG_DFL
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: object) -> None:
        if self.requested and number == signal.SIGINT and distributed.world_size() == 1:
            raise KeyboardInterrupt
        self.requested = True  # torchrun sends it again to all of its processes
