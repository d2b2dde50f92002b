"""Run cards, which record everything needed to repeat a result, and atomic file writes."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import torch

from nala_min import distributed
from nala_min.flags import UsageError

RESULTS = Path(__file__).parent.parent / "notebooks" / "results"  # the committed run cards


def run_card(
    config: dict[str, Any],
    data: dict[str, Any],
    device: torch.device,
    seconds: float,
    results: dict[str, Any],
) -> dict[str, Any]:
    """Everything needed to repeat a result, ready for JSON.

    config: what determines the result; data: name and checksum of the data; seconds: run time.
    """
    return {
        "command": shlex.join([*_launcher(), Path(sys.argv[0]).name, *sys.argv[1:]]),
        "config": config,
        "data": data,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "numpy")},
        },
        "hardware": {
            "device": _device_name(device),
            "threads": torch.get_num_threads(),  # per process
            "processes": distributed.world_size(),
        },
        "date": time.strftime("%Y-%m-%d"),
        "seconds": round(seconds, 1),
        "results": results,
    }


def _launcher() -> list[str]:
    if distributed.world_size() == 1:
        return ["python"]
    per_node = distributed.local_size()
    nodes = distributed.world_size() // per_node
    return ["torchrun", f"--nnodes={nodes}", f"--nproc_per_node={per_node}"]


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if device.type == "cpu" and cpuinfo.exists():
        names = [
            line.partition(":")[2].strip()
            for line in cpuinfo.read_text(encoding="utf-8").splitlines()
            if line.startswith("model name")
        ]
        if names:
            return names[0]
    return f"{device.type}, {platform.processor() or platform.machine()}"


def expected(pattern: str, config: dict[str, Any], sha256: str, result: str) -> str:
    """A sentence that says what committed runs reached with this config, for any seed.

    pattern: file names in RESULTS; sha256: of the data; result: a key of the cards' results.
    """
    reached = [
        card["results"][result]
        for card in map(read_json, RESULTS.glob(pattern))
        if card["config"] | {"seed": 0} == config | {"seed": 0} and card["data"]["sha256"] == sha256
    ]
    if not reached:
        return "No committed run used these flags and this data: nothing to compare with."
    return (
        f"Expect a {result.replace('_', ' ')} of about {sum(reached) / len(reached):.2f}"
        f" ({min(reached):.3f} to {max(reached):.3f} in {len(reached)} committed runs)."
    )


def check_writable(*paths: Path | str) -> None:
    """Create the folders of paths and check that files can be written there, before any work
    begins. Leaves no file behind. Raises UsageError, which names --out."""
    for path in map(Path, paths if distributed.rank() == 0 else ()):  # only rank 0 writes
        trial = path.with_name(path.name + ".trial")
        try:
            if path.is_dir():
                raise IsADirectoryError("a folder is in the way")
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(trial, lambda file: file.write(b"?"))
            trial.unlink()
        except OSError as error:
            raise UsageError(
                f"--out: {path} cannot be written ({error}): name another folder with --out"
            ) from error


def to_plain(value: Any) -> Any:
    """value as read back from JSON: NumPy numbers, tensors and paths become plain values.

    Raises TypeError for values that JSON cannot hold.
    """

    def convert(x: Any) -> Any:
        if hasattr(x, "tolist"):
            return x.tolist()
        if isinstance(x, os.PathLike):
            return os.fspath(x)
        raise TypeError(f"values must be numbers or strings, got {x!r} ({type(x).__name__})")

    return json.loads(json.dumps(value, default=convert))


def write_json(path: Path | str, value: Any) -> None:
    """Convert value with to_plain and write it as indented JSON, completely or not at all."""
    text = json.dumps(to_plain(value), indent=2) + "\n"
    write_atomically(path, lambda file: file.write(text.encode("utf-8")))


def read_json(path: Path | str) -> Any:
    """Read what write_json wrote."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def write_atomically(path: Path | str, write: Callable[[BinaryIO], None]) -> None:
    """Write a file completely or not at all, through a temporary file and a rename."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
