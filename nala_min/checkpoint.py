"""Checkpoints: save, load and resume a training run without loss. Used by train.fit."""

from __future__ import annotations

import io
import math
import statistics
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

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
        if damaged := zipfile.ZipFile(path).testzip():  # torch.load ignores checksums
            raise ValueError(damaged)
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved["format"] != FORMAT:
            raise ValueError("another format")
    except Exception as error:  # for damaged files, torch raises many kinds of long errors
        reason = f"cannot be read by this version ({type(error).__name__})"
        raise UsageError(f"{path} {reason}: move it aside, or use another --out") from error
    if not set(names) <= saved.get("extra", {}).keys():
        raise UsageError(f"{path} belongs to another script: name another folder with --out")
    return saved


def _without_file_names(extra: dict[str, Any]) -> dict[str, Any]:
    """extra, with the SHA-256 of each file but not its name: files may be renamed."""
    files = {n: x for n, x in extra.items() if isinstance(x, dict) and "sha256" in x}
    nameless: dict[str, Any] = {n: x | {"name": None} for n, x in files.items()}
    if isinstance(hashes := extra.get("attention_sha256"), dict):
        names = extra["attention"].split(",")
        nameless["attention"] = [None if name in hashes else name for name in names]
        nameless["attention_sha256"] = [hashes.get(name) for name in names]
    return extra | nameless


@dataclass
class Run:
    """A training run and its checkpoint at path. extra must be the same when it is resumed."""

    model: nn.Module
    optimizers: list[Optimizer]
    path: Path
    extra: dict[str, Any]
    step: int = 0  # steps done
    saved: int = 0  # steps in the checkpoint
    losses: list[Tensor | float] = field(default_factory=list)  # since the last point
    history: list[dict[str, float]] = field(default_factory=list)  # a dict per point
    start: float = field(default_factory=time.perf_counter)

    def begin(self, steps: int, resume: bool) -> None:
        """Continue from the checkpoint; or write the first one, which fails now and not after an
        hour if that is impossible. Never overwrites another run or an unfinished one."""
        if resume or (distributed.rank() == 0 and self.path.exists()):
            saved = load_checkpoint(self.path)
            before, now = _without_file_names(saved["extra"]), _without_file_names(self.extra)
            for name in sorted(before.keys() | now.keys(), key=lambda name: (name != "data", name)):
                if before.get(name) != now.get(name):
                    values = (repr(extra.get(name))[:200] for extra in (saved["extra"], self.extra))
                    raise UsageError(
                        f"{self.path} was trained with {name} = {', not '.join(values)}: use the"
                        " same flags, move it aside, or use another --out"
                    )
            if not resume and saved["step"] < steps:
                done = f"{self.path} is at step {saved['step']} of {steps}"
                raise UsageError(f"{done}: continue it with --resume, or move it aside")
        if not resume:
            return self.save()
        names = {name.replace("_orig_mod.", ""): name for name in self.model.state_dict()}
        self.model.load_state_dict({names.get(n, n): x for n, x in saved["model"].items()})
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.step = self.saved = saved["step"]
        self.losses, self.history = saved["losses"], saved["history"]
        self.start -= saved["seconds"]

    def add_point(self, evaluate: Callable[[nn.Module], dict[str, float]], bar: tqdm) -> None:
        """Add a point to the curve and print it above the progress bar. Saves before and after:
        the evaluation may run out of memory."""
        self.save()
        train_loss = statistics.fmean(self.losses)
        self.losses = []
        if distributed.rank() == 0:
            with in_mode(self.model, training=False):
                numbers = to_plain(evaluate(self.model))
            point = {"step": self.step, "train_loss": train_loss, **numbers}
            self.history.append(point)
            shown = (f"{name.replace('_', ' ')} {point[name]:.3f}" for name in list(point)[1:])
            bar.write(f"step {self.step:5d}   {'   '.join(shown)}")
        self.save()

    def save(self) -> None:
        """Write the checkpoint, if all numbers are finite and it can be read back."""
        losses = distributed.gather([float(loss) for loss in self.losses])
        self.losses = [statistics.fmean(each) for each in zip(*losses, strict=True)]
        if distributed.rank() == 0:
            numbers = [*self.losses, *(x for point in self.history[-1:] for x in point.values())]
            numbers += [(0 * weight.detach()).sum() for weight in self.model.parameters()]
            if not all(map(math.isfinite, numbers)):
                raise UsageError(f"the loss is not finite at step {self.step}: lower --lr")
            self._write(io.BytesIO())
        self.saved = self.step

    def _write(self, content: io.BytesIO) -> None:
        weights = self.model.state_dict()
        state = {name: getattr(self, name) for name in ("step", "losses", "history", "extra")}
        state |= {"format": FORMAT, "seconds": time.perf_counter() - self.start}
        state["model"] = {name.replace("_orig_mod.", ""): x for name, x in weights.items()}
        state["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers]
        torch.save(state, content)
        content.seek(0)
        try:
            torch.load(content, weights_only=True)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, lambda file: file.write(content.getbuffer()))
        except UnpicklingError as error:
            reason = str(error).splitlines()[0]
            raise UsageError(f"the model state cannot be checkpointed: {reason}") from error
        except OSError as error:
            resume = f"and --resume continues from step {self.saved}"
            remedy = resume if self.step else "or name another folder with --out"
            where = f"--out {self.path.parent} cannot be written ({error})"
            raise UsageError(f"{where}: fix that, {remedy}") from error
