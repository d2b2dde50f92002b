"""All GPU measurements for the results page: run `python -m nala_min.lab.gpu` in a checkout.

It runs the programs below one after another. After an interruption, run it again: it skips each
program that has written its run card, and resumes training from its checkpoint.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from nala_min import train
from nala_min.flags import UsageError, flag, parse_flags, run_script


@dataclass
class Settings:
    """Measure speed on a CUDA card, train with both scripts and run a study there."""

    quick: bool = flag(False, "a trial of a few minutes: small models and few steps")
    device: str = flag("cuda", "device to measure", choices=["cpu", "cuda", "mps"])
    out: Path = flag(Path("runs/gpu"), "folder for the run cards")


def programs(settings: Settings) -> dict[Path, list[str]]:
    """The programs to run: {run card that it writes: its arguments for python}."""
    out, device = settings.out, settings.device
    quick, shared = ["--quick"] * settings.quick, ["--device", device, "--out"]
    bench = ["-m", "nala_min.lab.bench", *quick, *shared, str(out)]
    speed = {"bfloat16": ["--dtype", "bfloat16"], "float32": [], "long": ["--long"]}
    speed |= {"segments": ["--segments"], "peers": ["--peers"]}  # those that are installed
    if device != "cpu":
        speed["peers_bfloat16"] = ["--peers", *speed["bfloat16"]]
    found = {out / f"speed_{device}_{name}.json": bench + more for name, more in speed.items()}
    recipe = ["--preset", "cpu", "--steps", "20"] if quick else ["--preset", "gpu"]
    for script in ("shakespeare", "cifar"):
        for attention in ("nala", "softmax"):
            run = out / f"{script}_{attention}"
            flags = [*recipe, "--compile", "--attention", attention, *shared, str(run)]
            found[run / "card.json"] = [f"train_{script}.py", *flags]
    study = ["-m", "nala_min.lab.compare", "--study", "text" if quick else "text-gpu"]
    card = "text-quick.json" if quick else "text-gpu.json"
    found[out / card] = [*study, *quick, *shared, str(out)]
    return found


def main() -> None:
    settings = parse_flags(Settings)
    train.choose_device(settings.device)
    if not Path("train_shakespeare.py").exists():
        raise UsageError("train_shakespeare.py is not here: run this in a checkout of nala_min")
    failed = []
    for card, command in programs(settings).items():
        shown = " ".join(["python", *command])
        print(f"\n{'Done: ' if card.exists() else ''}{shown}", flush=True)
        if not card.exists() and run(command, resume=card.with_name("checkpoint.pt").exists()):
            failed.append(shown)
    if failed:
        raise UsageError(f"these programs failed, with the errors above: {'; '.join(failed)}")
    print(f"\nEvery run card is in {settings.out}")


def run(command: list[str], resume: bool) -> int:
    """Run a program to its end and return its exit code. On Ctrl-C, terminate the program, which
    saves its state, and raise KeyboardInterrupt."""
    with subprocess.Popen([sys.executable, *command, *["--resume"] * resume]) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            raise KeyboardInterrupt("interrupted: run the same command to continue") from None


if __name__ == "__main__":
    run_script(main)
