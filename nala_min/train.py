"""The training loop that both scripts share, with its flags, optimisers and checkpoints."""

from __future__ import annotations

import argparse
import math
import sys
import time
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn
from tqdm import tqdm

from nala_min.model import BlockConfig
from nala_min.runcard import write_whole


class UsageError(ValueError):
    """A user's mistake: its message names the flag and the mend."""


# --- Flags from a dataclass ----------------------------------------------------------------------


def flag(
    default: Any,
    help: str,
    choices: Sequence[str] | None = None,
    *,
    decides: bool = True,
    zero: bool = False,
) -> Any:
    """A dataclass field that parse_flags turns into a command-line flag.

    decides: whether the result depends on it, or it only says where and how to run; zero: whether a
    number of PRESETS may be 0.
    """
    about = {"help": help, "choices": choices, "decides": decides, "zero": zero}
    return field(default=default, metadata=about)


@dataclass
class Settings:
    """The flags that every script has; a script's own subclass adds to them. What PRESETS names
    has the value of the chosen preset, unless it is given.

    Raises UsageError for values that no run can have.
    """

    NAME: ClassVar[str] = ""  # of the run's folder
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {}

    preset: str | None = flag(
        None, "sizes and recipe (default: gpu with CUDA, else cpu)", choices=["cpu", "gpu"]
    )
    attention: str = flag(
        "nala", "kernel of every block, or one for each: nala,nala,softmax,softmax"
    )
    seed: int = flag(1, "of initial weights, data order and dropout")
    out: Path | None = flag(
        None, "folder of the run (default: runs/NAME_PRESET_ATTENTION_seedN)", decides=False
    )
    device: str = flag(
        "auto", "where to run", choices=["auto", "cpu", "cuda", "mps"], decides=False
    )
    resume: bool = flag(False, "go on from the checkpoint in --out", decides=False)
    steps: int | None = flag(None, "training steps")
    batch: int | None = flag(None, "examples in a batch")
    lr: float | None = flag(None, "highest learning rate")
    dropout: float | None = flag(None, "share of activations dropped in training", zero=True)
    layers: int | None = flag(None, "blocks")
    heads: int | None = flag(None, "attention heads in a block")
    dim: int | None = flag(None, "width of the model")

    def __post_init__(self) -> None:
        self.preset = self.preset or ("gpu" if torch.cuda.is_available() else "cpu")
        zero = {item.name for item in fields(self) if item.metadata["zero"]}
        for name, default in self.PRESETS[self.preset].items():
            if getattr(self, name) is None:
                setattr(self, name, default)
            value = getattr(self, name)
            if not (0 < value < math.inf or (value == 0 and name in zero)):
                wanted = "0 or more" if name in zero else "positive"
                raise UsageError(f"--{name} {value} is not {wanted} and finite")
        if self.dropout >= 1:
            raise UsageError(f"--dropout {self.dropout} is not a share from 0 to less than 1")
        try:
            BlockConfig(**block_options(self.config()), conv_size=1)
        except ValueError as error:
            raise UsageError(f"--attention, --layers, --heads, --dim: {error}") from error
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"--seed {self.seed} is not a number from 0 to 2^63 - 1")
        attention = self.attention.replace(",", "-")  # there may be one for each block
        run = f"{self.NAME}_{self.preset}_{attention}_seed{self.seed}"
        self.out = self.out or Path("runs") / run

    def config(self) -> dict[str, Any]:
        """What decides the result, ready for JSON."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.metadata["decides"]}

    def recipe(self, device: torch.device) -> Recipe:
        """How to train: ten points on the curve, and on a CUDA card in bfloat16."""
        every, half = max(1, self.steps // 10), device.type == "cuda"
        return Recipe(self.steps, self.lr, eval_every=every, bfloat16=half)


def block_options(config: dict[str, Any]) -> dict[str, Any]:
    """What a run's config says of its model's blocks, for LMConfig and ViTConfig."""
    names = config["attention"].split(",")
    return {
        "num_layers": config["layers"],
        "num_heads": config["heads"],
        "dim": config["dim"],
        "dropout": config["dropout"],
        "attention": names if len(names) > 1 else names[0],
    }


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse_flags(settings: type, argv: Sequence[str] | None = None) -> Any:
    """Read argv (the command line by default) into the dataclass settings, a flag a field.

    Its docstring is the description; PRESETS, if it has them, stand in the help of what they set.
    Prints one line and exits with code 2 on a flag that is unknown or does not parse.
    """
    parser = _Parser(
        description=settings.__doc__,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=28, width=100),
    )
    hints = typing.get_type_hints(settings)
    for item in fields(settings):
        kind = hints[item.name]
        if isinstance(kind, types.UnionType):  # X | None
            kind = kind.__args__[0]
        presets = getattr(settings, "PRESETS", {})
        options: dict[str, Any] = {"help": item.metadata["help"], "default": item.default}
        if item.default:
            options["help"] += " (default: %(default)s)"
        elif any(item.name in preset for preset in presets.values()):
            values = (f"{name}: {preset[item.name]}" for name, preset in presets.items())
            options["help"] += f" ({', '.join(values)})"
        if kind is bool:
            options["action"] = "store_true"
        else:
            options |= {"type": kind, "choices": item.metadata["choices"]}
            options["metavar"] = None if item.metadata["choices"] else kind.__name__.upper()
        parser.add_argument("--" + item.name.replace("_", "-"), **options)
    return settings(**vars(parser.parse_args(argv)))


def run_script(main: Callable[[], None]) -> None:
    """Run a script's main: a user's mistake is one line on stderr and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a console may not know every character of a text
    try:
        main()
    except UsageError as error:
        sys.exit(_fail(str(error), 2))
    except KeyboardInterrupt:
        sys.exit(_fail("interrupted", 130))


def _fail(message: str, code: int) -> int:
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    return code


def choose_device(name: str) -> torch.device:
    """The device called name; "auto" is the first of cuda, mps, cpu that is there.

    Raises UsageError for one that is not there.
    """
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(kind for kind, is_there in there.items() if is_there)
    if not there[name]:
        raise UsageError(f"--device {name} is not available here: use --device auto")
    return torch.device(name)


FORMAT = 2  # of a checkpoint: counted up when what fit saves changes


# --- Checkpoints ----------------------------------------------------------------------------------


def load_checkpoint(path: Path, *names: str) -> dict[str, Any]:
    """What fit saved at path, on the CPU, with names in its extra.

    Raises UsageError if there is none, it is damaged, or it lacks a name: another script's.
    """
    if not path.exists():
        raise UsageError(f"no checkpoint at {path}: train first, or name its folder with --out")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved["format"] != FORMAT:
            raise ValueError("another format")
    except Exception as error:  # torch raises many kinds for a damaged file, in many lines
        kind = type(error).__name__
        raise UsageError(f"{path} is no checkpoint of this version ({kind}): train anew") from error
    if not set(names) <= saved.get("extra", {}).keys():
        raise UsageError(f"{path} is a run of another script: name another folder with --out")
    return saved


def _check_same_run(saved: dict[str, Any], wanted: dict[str, Any], path: Path) -> None:
    for name in sorted(saved.keys() | wanted.keys()):
        if saved.get(name) != wanted.get(name):
            raise UsageError(
                f"--resume: {path} was trained with {name} = {saved.get(name)!r}, not"
                f" {wanted.get(name)!r}: give the same flags, or another folder with --out"
            )


# --- The loop ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """How to train: AdamW, or Muon beside it, with linear warm-up and cosine decay to a tenth."""

    steps: int
    learning_rate: float
    muon: float | None = None  # learning rate of Muon, for matrices; None: AdamW for all
    warmup: int = 100
    weight_decay: float = 0.1
    beta2: float = 0.99
    clip: float = 1.0
    eval_every: int = 500  # steps between two points of the curve, and two checkpoints
    bfloat16: bool = False

    def learning_rate_at(self, step: int, highest: float) -> float:
        """Learning rate of step 0, 1, ..., steps - 1, which rises to highest and falls."""
        warm = min(1.0, (step + 1) / self.warmup)
        decay = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return highest * warm * (0.1 + 0.9 * decay)


class Muon(torch.optim.Optimizer):
    """Momentum whose matrix is made orthogonal before it is added, so that every direction learns
    at one speed (Jordan and others 2024, https://kellerjordan.github.io/posts/muon).

    torch.optim.Muon takes no convolutions, and works in bfloat16, which is slow on a CPU that lacks
    such arithmetic.
    """

    def __init__(self, params: list[nn.Parameter], lr: float, weight_decay: float):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                state["momentum"].lerp_(weight.grad, 0.05)
                ahead = weight.grad.lerp(state["momentum"], 0.95).flatten(1)  # Nesterov's momentum
                rate = group["lr"] * max(1.0, ahead.shape[0] / ahead.shape[1]) ** 0.5
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.sub_(rate * orthogonal(ahead).view_as(weight))


def orthogonal(x: Tensor) -> Tensor:
    """The matrix nearest to orthogonal in x's direction: singular values of 1, or about it.

    x: (R, S). By Newton and Schulz's iteration with Jordan's coefficients: five steps of an odd
    polynomial bring every singular value between 0.002 and 1 to between 0.68 and 1.21.
    """
    if x.shape[0] > x.shape[1]:
        return orthogonal(x.mT).mT
    x = x / (torch.linalg.matrix_norm(x) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def make_optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """AdamW that decays matrices, but not biases and normalisation gains. With recipe.muon it
    leaves all matrices to Muon but those at the model's two ends, embedding and head."""
    ends = [getattr(model, name).weight for name in ("embed", "head") if hasattr(model, name)]
    inner = []
    if recipe.muon:
        inner = [p for p in model.parameters() if p.ndim >= 2 and all(p is not end for end in ends)]
    rest = [p for p in model.parameters() if all(p is not matrix for matrix in inner)]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, recipe.beta2), fused=True)
    optimizers = [adam, Muon(inner, recipe.muon, recipe.weight_decay)] if inner else [adam]
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["initial_lr"] = group["lr"]  # the highest, as PyTorch's schedulers call it
    return optimizers


def update(
    model: nn.Module, optimizers: list[torch.optim.Optimizer], loss: Tensor, clip: float
) -> None:
    """One step downhill: gradients of loss, at most of norm clip, and every optimiser's move."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), clip)
    for optimizer in optimizers:
        optimizer.step()


def fit(
    model: nn.Module,
    recipe: Recipe,
    *,
    batch: Callable[[int], tuple[Tensor, Tensor]],
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor],
    evaluate: Callable[[nn.Module], dict[str, float]],
    checkpoint: Path,
    extra: dict[str, Any],
    resume: bool = False,
) -> tuple[list[dict[str, float]], float]:
    """Train model in place, on the device it is on.

    batch(step) gives inputs and targets and must depend on step alone; loss(model, inputs, targets)
    a scalar; evaluate(model) numbers by name, as validation_loss. Every recipe.eval_every steps
    and at the end, checkpoint is written: model, optimiser, random state, history and extra, a dict
    of plain values that must be the same when the run is resumed.

    Returns the history, a dict of step, train_loss and what evaluate gave a point, and the seconds
    spent.
    Raises UsageError if the checkpoint's folder cannot be made, or if it is to be resumed from and
    is not of this run.
    """
    device = next(model.parameters()).device
    optimizers = make_optimizers(model, recipe)
    first, history, spent = 0, [], 0.0
    if resume:
        saved = load_checkpoint(checkpoint)
        _check_same_run(saved["extra"], extra, checkpoint)
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        first, history, spent = saved["step"], saved["history"], saved["seconds"]
        torch.set_rng_state(saved["random"]["cpu"])
        if device.type == "cuda" and "cuda" in saved["random"]:
            torch.cuda.set_rng_state(saved["random"]["cuda"], device)
    try:
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {checkpoint.parent} cannot be made: {error}") from error
    start = time.perf_counter() - spent

    def save(step: int) -> None:
        random = {"cpu": torch.get_rng_state()}
        if device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(device)
        state = {
            "format": FORMAT,
            "model": model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "step": step,
            "history": history,
            "seconds": time.perf_counter() - start,
            "random": random,
            "extra": extra,
        }
        write_whole(checkpoint, lambda file: torch.save(state, file))

    model.train()
    losses: list[Tensor] = []
    bar = tqdm(total=recipe.steps, initial=first, desc="training", unit="step", dynamic_ncols=True)
    try:
        for step in range(first, recipe.steps):
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = recipe.learning_rate_at(step, group["initial_lr"])
            inputs, targets = (x.to(device, non_blocking=True) for x in batch(step))
            with torch.autocast(device.type, torch.bfloat16, enabled=recipe.bfloat16):
                value = loss(model, inputs, targets)
            update(model, optimizers, value, recipe.clip)
            losses.append(value.detach())
            bar.update()
            if step % 20 == 0:  # reading a loss makes a GPU wait
                bar.set_postfix(loss=f"{value.item():.3f}")
            if (step + 1) % recipe.eval_every == 0 or step + 1 == recipe.steps:
                point = {
                    "step": step + 1,
                    "train_loss": torch.stack(losses).mean().item(),
                    **evaluate(model),
                }
                if not all(map(math.isfinite, point.values())):
                    raise UsageError(f"the loss is not finite at step {step + 1}: lower --lr")
                model.train()
                losses.clear()
                history.append(point)
                numbers = (
                    f"{name.replace('_', ' ')} {point[name]:.3f}" for name in list(point)[1:]
                )
                bar.write(f"step {step + 1:5d}   {'   '.join(numbers)}")
                save(step + 1)
    except KeyboardInterrupt:
        if checkpoint.exists():
            bar.write(f"Interrupted at step {step}: --resume goes on from the last checkpoint.")
        raise
    finally:
        bar.close()
    return history, time.perf_counter() - start
