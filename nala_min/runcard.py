"""Run cards, which record everything needed to repeat a result, and atomic file writes."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import platform
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy
import torch

from nala_min import distributed
from nala_min.flags import UsageError

RESULTS = Path(__file__).parent.parent / "notebooks" / "results"  # the committed run cards


def run_card(
    config: dict[str, Any], data: dict[str, Any], device: torch.device, seconds: float, results: Any
) -> dict[str, Any]:
    """Everything needed to repeat a result, ready for JSON. config: what determines it."""
    processes, threads = distributed.world_size(), torch.get_num_threads()  # threads per process
    launcher = ["torchrun", f"--nproc_per_node={processes}"] if processes > 1 else ["python"]
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    return {
        "command": shlex.join([*launcher, Path(sys.argv[0]).name, *sys.argv[1:]]),
        "config": config,
        "data": data,
        "code": code_sha256(),
        "versions": versions | {"numpy": numpy.__version__},
        "hardware": {"device": _device_name(device), "threads": threads, "processes": processes},
        "date": time.strftime("%Y-%m-%d"),
        "seconds": round(seconds, 1),
        "results": results,
    }


@lru_cache  # as it was when the run began
def code_sha256(*others: Path) -> str:
    """Hash of the code on which every run depends: the method, the training, the program that was
    started, and others. Comments do not count."""
    names = "model.py fast.py relatives.py train.py data.py measure.py".split()
    program = Path(getattr(sys.modules["__main__"], "__file__", None) or "")  # none in a notebook
    paths = *map(Path(__file__).with_name, names), *[program] * program.is_file(), *others
    trees = (ast.parse(path.read_text(encoding="utf-8")) for path in paths)
    return hashlib.sha256("\n".join(map(ast.unparse, trees)).encode("utf-8")).hexdigest()


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpus = Path("/proc/cpuinfo")  # of Linux
    text = cpus.read_text(encoding="utf-8") if device.type == "cpu" and cpus.exists() else ""
    name = re.search(r"^model name\s*: (.+)", text, re.MULTILINE)
    return name[1] if name else f"{device.type}, {platform.processor() or platform.machine()}"


def expected(pattern: str, config: dict[str, Any], sha256: str, result: str) -> str:
    """What committed runs, in files of this pattern, reached with this config and any seed."""
    cards = [read_json(path) for path in RESULTS.glob(pattern)]
    cards = [card for card in cards if card["config"] | {"seed": 0} == config | {"seed": 0}]
    reached = [card["results"][result] for card in cards if card["data"]["sha256"] == sha256]
    if not reached:
        return "No committed run used these flags and this data: nothing to compare with."
    about = f"a {result.replace('_', ' ')} of about {sum(reached) / len(reached):.2f}"
    return f"Expect {about} ({min(reached):.3f} to {max(reached):.3f} in {len(reached)} runs)."


def check_writable(*paths: Path | str) -> None:
    """Create the folders of paths. Raises UsageError if files cannot be written there."""
    for path in map(Path, paths):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=path.parent).close()
            if path.is_dir():
                raise IsADirectoryError("a folder is in the way")
        except OSError as error:
            raise UsageError(f"--out: {path} cannot be written ({error})") from error


def to_plain(value: Any) -> Any:
    """value as read back from JSON. Raises TypeError for values that JSON cannot hold."""
    text = json.dumps(value, default=lambda x: x.tolist() if hasattr(x, "tolist") else os.fspath(x))
    return json.loads(text)


def write_json(path: Path | str, value: Any) -> None:
    """Convert value with to_plain and write it as indented JSON, completely or not at all."""
    text = json.dumps(to_plain(value), indent=2) + "\n"
    write_atomically(path, lambda file: file.write(text.encode("utf-8")))


def read_json(path: Path | str) -> Any:
    """Read what write_json wrote."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def lock(folder: Path) -> int:
    """A file descriptor that locks folder until it is closed. Raises UsageError if it is locked."""
    import fcntl  # not on Windows

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # a file system may have no locks
        if isinstance(error, BlockingIOError):
            raise UsageError(f"another run trains in {folder}: use another --out") from error
    return descriptor


def write_atomically(path: Path | str, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file completely or not at all, through a temporary file and a rename."""
    part = Path(f"{path}.part")
    try:
        with part.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
