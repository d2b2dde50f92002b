"""Training, the same for both scripts: settings, recipe, optimisers, checkpoints and the loop."""

from __future__ import annotations

import io
import math
import os
import random
import statistics
import sys
import time
import zipfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from functools import partial
from numbers import Integral, Real
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from nala_min import distributed, relatives
from nala_min.flags import UsageError, flag, interrupts
from nala_min.model import ATTENTIONS, Config, in_mode
from nala_min.runcard import check_writable, code_sha256, lock, to_plain, write_atomically

FORMAT = 6  # version of checkpoints: incremented when a model, or what Run saves, changes
DEVICES = ("auto", "cpu", "cuda", "mps")
SCHEDULES: dict[str, Callable[[float], float]] = {  # rate / peak, after a fraction of the run
    "linear": lambda done: 1 - done,
    "cosine": lambda done: 0.55 + 0.45 * math.cos(math.pi * done),  # decays to a tenth
}


@dataclass
class Settings:
    """Flags of all scripts; each script's subclass adds its own. A flag that is not given takes its
    value from the chosen preset, if PRESETS has one. Raises UsageError for invalid values."""

    NAME: ClassVar[str] = ""  # starts the name of the run's folder
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {}
    CAUSAL: ClassVar[bool] = True  # whether a token sees only the past

    preset: str | None = flag(None, "size, recipe (default: gpu on CUDA, else cpu)", ("cpu", "gpu"))
    attention: str = flag("nala", "a name or your own FILE.py, or one per block: nala,softmax")
    seed: int = flag(1, "seed for weights, data order and dropout", least=0, below=2**63)
    out: Path | None = flag(None, "folder (default: in runs/, by the flags)", affects_result=False)
    device: str = flag("auto", "where to train", DEVICES, affects_result=False)
    resume: bool = flag(False, "continue from the checkpoint in --out", affects_result=False)
    compile: bool = flag(False, "use torch.compile, which needs a compiler", affects_result=False)
    steps: int | None = flag(None, "number of training steps")
    batch: int | None = flag(None, "examples per batch")
    lr: float | None = flag(None, "peak learning rate of AdamW", least=1e-9)
    muon: float | None = flag(None, "peak learning rate of Muon; 0: only AdamW", least=0)
    weight_decay: float | None = flag(None, "decoupled weight decay of matrices", least=0)
    schedule: str = flag("linear", "decay: linear to 0, or cosine to a tenth", tuple(SCHEDULES))
    dropout: float | None = flag(None, "dropout probability", least=0, below=1)
    layers: int | None = flag(None, "number of blocks")
    heads: int | None = flag(None, "attention heads per block")
    dim: int | None = flag(None, "width of the model")

    def __post_init__(self) -> None:
        on_cuda = self.device in ("auto", "cuda") and torch.cuda.is_available()
        self.preset = self.preset or ("gpu" if on_cuda else "cpu")
        defaults = self.defaults()
        for name in defaults:
            if getattr(self, name) is None:
                setattr(self, name, defaults[name])
        for item in fields(self):
            value, least, below = getattr(self, item.name), *item.metadata["limits"]
            if type(value) in (int, float) and not least <= value < below:
                limits = f"at least {least} and below {below}"
                raise UsageError(f"--{item.name.replace('_', '-')} must be {limits}, got {value}")
        if self.batch % (processes := distributed.world_size()):
            raise UsageError(f"--batch must be divisible by {processes} processes")
        names = self.attention.split(",")  # one, or one per block
        try:
            dim, files = max(1, self.dim // self.heads), filter(relatives.is_file, names)
            reads = (getattr(self, x, None) for x in ("sample", "eval", "predict"))
            if any(x not in (None, False) for x in reads):  # an earlier run, of other sizes
                self.attention_sha256 = {name: relatives.files_of(name)[0] for name in files}
            else:
                register = partial(relatives.register, dim=dim, causal=self.CAUSAL)
                self.attention_sha256 = {name: register(name) for name in files}
                Config(**block_options(self.config()))
        except (ValueError, OSError, SyntaxError) as error:
            raise UsageError(f"--attention, --layers, --heads, --dim: {error}") from error
        parts = [self.NAME, self.preset, "-".join(Path(name).stem for name in names)]
        if (data := getattr(self, "data", None)) != getattr(type(self), "data", None):
            parts.append(Path(data).stem)
        changed = (name for name in defaults if getattr(self, name) != defaults[name])
        parts += [f"seed{self.seed}", *(f"{name}{getattr(self, name):g}" for name in changed)]
        parts += [self.schedule] * (self.schedule != "linear") + ["compiled"] * self.compile
        self.out = Path(self.out or Path("runs") / "_".join(parts))

    def defaults(self) -> dict[str, Any]:
        """The values of the chosen preset."""
        return self.PRESETS[self.preset]

    def config(self) -> dict[str, Any]:
        """Everything that determines the result, ready for JSON."""
        names = [item.name for item in fields(self) if item.metadata["affects_result"]]
        config = {name: getattr(self, name) for name in names}
        config |= {"compile": True} if self.compile else {}  # compilation changes rounding
        return config | ({"attention_sha256": x} if (x := self.attention_sha256) else {})

    def recipe(self, device: torch.device) -> Recipe:
        """The recipe, with ten points on the curve, and bfloat16 on CUDA cards that support it."""
        shared = ("muon", "weight_decay", "schedule", "seed")
        options = {name: getattr(self, name) for name in shared}
        options |= {"eval_every": max(1, self.steps // 10), "bfloat16": has_bfloat16(device)}
        return Recipe(self.steps, self.lr, **options)


def block_options(config: dict[str, Any]) -> dict[str, Any]:
    """Options for Config, from a run's config."""
    names = config["attention"].split(",")
    sizes = {"num_layers": config["layers"], "num_heads": config["heads"], "dim": config["dim"]}
    attention = names if len(names) > 1 else names[0]
    return sizes | {"dropout": config["dropout"], "attention": attention}


def load_run(settings: Settings, *names: str) -> dict[str, Any]:
    """Load the checkpoint in --out, whose extra must contain names, and register its attention
    files; one that was renamed is found with --attention. Raises UsageError if one has changed."""
    saved = load_checkpoint(settings.out / "checkpoint.pt", *names)
    renamed = {digest: name for name, digest in settings.attention_sha256.items()}
    dim = saved["extra"]["dim"] // saved["extra"]["heads"]
    for name, digest in saved["extra"].get("attention_sha256", {}).items():
        path = renamed.get(digest, name)
        try:
            if relatives.register(path, dim, causal=settings.CAUSAL) != digest:
                raise ValueError(f"{name} has changed since the run was trained")
        except ValueError as error:
            raise UsageError(f"{error}: give the run's own file with --attention") from error
        ATTENTIONS[name] = ATTENTIONS[path]
    if saved["extra"]["code"]["sha256"] != code_sha256():
        print("note: nala_min's code has changed since this run", file=sys.stderr)
    torch.manual_seed(saved["extra"]["seed"])  # for the model, as when it was trained
    return saved


def choose_device(name: str) -> torch.device:
    """The device called name; "auto" is the first available of cuda, mps, cpu. With several
    processes, each gets its own CUDA card. Raises UsageError if there is none."""
    several, card = distributed.world_size() > 1, distributed.local_rank()
    cuda, mps = torch.cuda.device_count() > card, torch.backends.mps.is_available() and not several
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if not {"cuda": cuda, "mps": mps, "cpu": True}[name]:
        raise UsageError(f"--device {name} is not available here (one card per process)")
    if name == "cuda" and several:
        torch.cuda.set_device(card)
        return torch.device(name, card)
    return torch.device(name)


def has_bfloat16(device: torch.device) -> bool:
    """Whether device is a CUDA card with native bfloat16; older cards only emulate it."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


@dataclass(frozen=True)
class Recipe:
    """How to train: AdamW, alone or with Muon, with linear warm-up and a decay schedule. muon,
    warmup and clip may be 0, which is off. Raises ValueError for invalid values."""

    steps: int
    learning_rate: float
    muon: float | None = None  # learning rate of Muon, for matrices; None or 0: AdamW only
    warmup: int = 100
    weight_decay: float = 0.1
    schedule: str = "linear"  # a name in SCHEDULES
    beta2: float = 0.99
    clip: float = 1.0  # largest norm of the gradient
    eval_every: int = 500  # steps between points of the curve, and between checkpoints
    bfloat16: bool = False
    seed: int = 1  # for dropout

    def __post_init__(self) -> None:
        for name, kind in ((item.name, item.type) for item in fields(self)):
            x, least = getattr(self, name), int(name in ("steps", "eval_every"))
            number = isinstance(x, Integral if kind == "int" else Real) and type(x) is not bool
            others = {"schedule": x in [*SCHEDULES], "bfloat16": type(x) is bool, "muon": x is None}
            below = 1 if name == "beta2" else math.inf
            if not (others.get(name) or (number and least <= x < below)):
                be = f"in {[*SCHEDULES]}" if kind == "str" else f"{kind} from {least} to {below}"
                raise ValueError(f"{name} must be {be}, got {x!r}")

    def learning_rate_at(self, step: int, peak: float) -> float:
        """Learning rate at step 0, 1, ..., steps - 1, with this peak."""
        warm = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        return peak * warm * SCHEDULES[self.schedule](step / self.steps)


class Muon(torch.optim.Optimizer):
    """Momentum with an orthogonalised update, so every direction learns at the same speed (Jordan
    and others 2024, https://kellerjordan.github.io/posts/muon). PyTorch's own accepts no
    convolutions and computes in bfloat16, which is slow on many CPUs."""

    def __init__(self, params: list[nn.Parameter], lr: float, weight_decay: float):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = torch.enable_grad()(closure)() if closure else None
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[tuple[nn.Parameter, Tensor]]] = {}
            for weight in group["params"]:
                if weight.grad is not None:  # not frozen, and used
                    if not (state := self.state[weight]):
                        state["momentum"] = torch.zeros_like(weight)
                    momentum = state["momentum"].lerp_(weight.grad, 0.05)
                    ahead = weight.grad.lerp(momentum, 0.95).flatten(1)  # Nesterov
                    by_shape.setdefault(weight.shape, []).append((weight, ahead))
            for pairs in by_shape.values():  # stack matrices of one shape: a few large products
                steps = orthogonal(torch.stack([ahead for _, ahead in pairs]))
                rate = group["lr"] * max(1.0, steps.shape[1] / steps.shape[2]) ** 0.5
                for (weight, _), step in zip(pairs, steps, strict=True):
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    weight.sub_(rate * step.view_as(weight))
        return loss


def orthogonal(x: Tensor) -> Tensor:
    """Roughly the nearest orthogonal matrix to each matrix in x (..., R, S): five steps of Jordan's
    odd polynomial (Newton-Schulz) map singular values in [0.002, 1] to [0.68, 1.21]."""
    if x.shape[-2] > x.shape[-1]:
        return orthogonal(x.mT).mT
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    gram = x @ x.mT  # (..., R, R): smaller than x
    factor = identity = torch.eye(x.shape[-2], dtype=x.dtype, device=x.device)
    for _ in range(5):  # the iterate is factor @ x, and gram is its Gram matrix
        polynomial = 3.4445 * identity - 4.7750 * gram + 2.0315 * gram @ gram
        factor = polynomial @ factor
        gram = polynomial @ gram @ polynomial
    return factor @ x


def make_optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """AdamW, with weight decay on matrices but not on biases and normalisation gains. With
    recipe.muon, Muon trains all matrices except the embedding and the head."""
    vectors, hidden, others = [], [], []
    for name, weight in model.named_parameters():
        is_end = name.endswith(("embed.weight", "head.weight"))
        group = vectors if weight.ndim < 2 else others if is_end or not recipe.muon else hidden
        group.append(weight)
    groups = [{"params": others}, {"params": vectors, "weight_decay": 0.0}]
    options = {"betas": (0.9, recipe.beta2), "weight_decay": recipe.weight_decay, "fused": True}
    optimizers = [torch.optim.AdamW(groups, lr=recipe.learning_rate, **options)]
    if hidden:
        optimizers.append(Muon(hidden, recipe.muon, recipe.weight_decay))
    return optimizers


def load_checkpoint(path: Path, *names: str) -> dict[str, Any]:
    """Load what Run saved at path, onto the CPU. Raises UsageError if there is none, or it is
    damaged or of another version, or its extra lacks names: another script wrote it."""
    if not path.exists():
        raise UsageError(f"no checkpoint at {path}: train first, or name its folder with --out")
    try:
        damaged = zipfile.ZipFile(path).testzip()  # torch.load ignores checksums
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if damaged or saved["format"] != FORMAT or not set(names) <= saved["extra"].keys():
            raise ValueError
    except Exception as error:  # for damaged files, torch raises many kinds of long errors
        reason = "cannot be read: it is damaged, or of another version or script"
        raise UsageError(f"{path} {reason}: move it aside, or use another --out") from error
    return saved


def _identity(extra: dict[str, Any]) -> dict[str, Any]:
    """extra, with the SHA-256 of each file in place of its name: files may be renamed."""
    files = {n: x for n, x in extra.items() if isinstance(x, dict) and {"name", "sha256"} <= {*x}}
    data = {name: x["sha256"] for name, x in files.items()}
    digests = extra.get("attention_sha256", {})
    names = [digests.get(name, name) for name in str(extra.get("attention")).split(",")]
    return extra | data | {"attention": names, "attention_sha256": None}


@dataclass
class Run:
    """A training run and its checkpoint at path. extra must be the same when it is resumed."""

    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    path: Path
    extra: dict[str, Any]
    step: int = 0  # steps done
    losses: list[Tensor | float] = field(default_factory=list)  # since the last point
    history: list[dict[str, float]] = field(default_factory=list)  # a dict per point
    start: float = field(default_factory=time.perf_counter)

    def begin(self, resume: bool) -> None:
        """Continue from the checkpoint; or write the first one, which fails now and not after an
        hour if that is impossible. Never overwrites a run, finished or not."""
        if not resume and not self.path.exists():
            check_writable(self.path)
            return self.save()
        saved = load_checkpoint(self.path)
        extras = saved["extra"], self.extra
        before, now = map(_identity, extras)
        for name in extras[0] | extras[1]:
            if repr(before.get(name)) != repr(now.get(name)):  # NaN equals itself
                values = (extra.get(name) for extra in extras)
                named = (x.get("name", x) if isinstance(x, dict) else x for x in values)
                old, new = (f"{x}"[:99] for x in named)
                change = f"{name} = {old}, " + (f"not {new}" if new != old else "since changed")
                remedy = "use the same flags, move it aside, or use another --out"
                raise UsageError(f"{self.path} was trained with {change}: {remedy}")
        if not resume:
            use = "use it with --resume, --sample or --eval, or name another folder with --out"
            raise UsageError(f"{self.path} is the same run, at step {saved['step']}: {use}")
        self.model.load_state_dict(saved["model"])
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.step = saved["step"]
        self.losses, self.history = saved["losses"], saved["history"]
        self.start -= saved["seconds"]

    def add_point(self, evaluate: Callable[[nn.Module], dict[str, float]]) -> None:
        """Add a point to the curve and print it above the progress bar. Saves before and after:
        the evaluation may run out of memory."""
        self.save()
        if distributed.rank() == 0:
            with in_mode(self.model, training=False):
                numbers = to_plain(evaluate(self.model))
            values = numbers.values() if isinstance(numbers, dict) else [None]
            if not all(isinstance(x, int | float) for x in values):
                raise ValueError(f"evaluate must return numbers by name, got {numbers!r:.99}")
            if taken := {"step", "train_loss"} & numbers.keys():
                raise ValueError(f"evaluate must call its numbers something else than {taken}")
            numbers = {"train_loss": statistics.fmean(self.losses), **numbers}
            self.history.append({"step": self.step, **numbers})
            shown = (f"{name.replace('_', ' ')} {x:.3f}" for name, x in numbers.items())
            tqdm.write(f"step {self.step:5d}   {'   '.join(shown)}")
        self.losses = []
        self.save()

    def save(self) -> None:
        """Write the checkpoint, if all numbers are finite."""
        losses = distributed.gather([float(loss) for loss in self.losses])
        self.losses = [statistics.fmean(each) for each in zip(*losses, strict=True)]
        if distributed.rank() == 0:
            numbers = [*self.losses, *(x for point in self.history[-1:] for x in point.values())]
            numbers += [(0 * weight.detach()).sum() for weight in self.model.parameters()]
            if not all(map(math.isfinite, numbers)):
                raise UsageError(f"a loss or weight is not finite at step {self.step}: lower --lr")
            state = {name: getattr(self, name) for name in ("step", "losses", "history", "extra")}
            state |= {"format": FORMAT, "seconds": time.perf_counter() - self.start}
            state["model"] = self.model.state_dict()
            state["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers]
            torch.save(state, content := io.BytesIO())  # a file would hide why it cannot be written
            write_atomically(self.path, lambda file: file.write(content.getbuffer()))


def fit(
    model: nn.Module, recipe: Recipe, *, batch: Callable[[int], tuple[Tensor, Tensor]],
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor],
    evaluate: Callable[[nn.Module], dict[str, float]], checkpoint: Path | str,
    extra: dict[str, Any], resume: bool = False, compile: bool = False,
) -> tuple[list[dict[str, float]], float]:  # fmt: skip
    """Train model. Returns its curve, a dict per point, and the seconds spent.

    batch(step) returns inputs and targets; loss(model, inputs, targets) a scalar; evaluate(model)
    numbers by name. All randomness depends on recipe.seed and the step alone; PyTorch's own state
    is given back. checkpoint is written before and after each evaluation and on Ctrl-C; extra says
    what the run is, in plain values. With several processes, each takes its share of a batch.
    Raises UsageError if checkpoint is another run's, or exists without resume; KeyboardInterrupt,
    which says how to continue.
    """
    device, rank = next(model.parameters()).device, distributed.rank()
    is_cuda = device.type == "cuda"  # elsewhere, an asynchronous copy may outlive its source
    optimizers, peaks = make_optimizers(model, recipe), (recipe.learning_rate, recipe.muon)
    extra = extra | {"code": {"name": "nala_min", "sha256": code_sha256()}}
    extra |= {f"recipe.{x}": vars(recipe)[x] for x in vars(recipe) if x != "bfloat16"}
    if "attention" not in extra:  # which may be a renamed file
        extra["model"] = str(getattr(model, "config", type(model).__name__))
    run = Run(model, optimizers, Path(checkpoint), to_plain(extra))
    stops: list[int] = []  # signals that asked the run to stop after the current step
    with ExitStack() as stack:
        stack.enter_context(interrupts(lambda number, frame: stops.append(number)))
        stack.enter_context(torch.random.fork_rng(range(torch.cuda.device_count())))
        run.begin(resume)
        if rank == 0 and sys.platform != "win32":
            stack.callback(os.close, lock(run.path.parent))
        net = torch.compile(model) if compile else model
        if distributed.world_size() > 1:  # static: a parameter may be unused
            net = DistributedDataParallel(net, static_graph=True)
        stack.enter_context(in_mode(model, training=True))
        stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        if recipe.bfloat16:  # TF32 is much faster, and more precise than bfloat16
            torch.set_float32_matmul_precision("high")
        bar = stack.enter_context(tqdm(total=recipe.steps, initial=run.step, disable=rank > 0))
        while True:
            seed = random.Random(repr((recipe.seed, run.step, rank))).getrandbits(63)
            torch.manual_seed(seed)
            if run.losses and (run.step % recipe.eval_every == 0 or run.step == recipe.steps):
                run.add_point(evaluate)
                torch.manual_seed(seed)  # whatever the evaluation drew
            if any(distributed.gather(bool(stops))):
                run.save()
                raise KeyboardInterrupt(f"interrupted: --resume continues from step {run.step}")
            if run.step >= recipe.steps:
                return run.history, time.perf_counter() - run.start
            for optimizer, peak in zip(optimizers, peaks, strict=False):
                for group in optimizer.param_groups:
                    group["lr"] = recipe.learning_rate_at(run.step, peak)
            parts = (x.chunk(distributed.world_size())[rank] for x in batch(run.step))
            inputs, targets = (x.to(device, non_blocking=is_cuda) for x in parts)
            with torch.autocast(device.type, torch.bfloat16, enabled=recipe.bfloat16):
                loss_value = loss(net, inputs, targets)
            model.zero_grad(set_to_none=True)
            loss_value.backward()
            if recipe.clip:
                nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            for optimizer in optimizers:
                optimizer.step()
            run.losses.append(loss_value.detach())
            run.step += 1
            bar.update()
            if run.step % 20 == 1:  # reading a loss synchronises the GPU
                bar.set_postfix(loss=f"{loss_value.item():.3f}")
