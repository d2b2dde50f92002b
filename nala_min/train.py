"""Training, the same for both scripts: settings, recipe, optimisers and the loop."""

from __future__ import annotations

import math
import random
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from nala_min import distributed, relatives
from nala_min.arguments import BlockConfig
from nala_min.checkpoint import Run, load_checkpoint
from nala_min.flags import UsageError, flag, interrupts
from nala_min.model import ATTENTIONS, Config, in_mode
from nala_min.runcard import to_plain

# --- Settings of every script ---------------------------------------------------------------------

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
    MODEL_FLAGS: ClassVar[str] = "--attention, --layers, --heads, --dim"  # of model_config

    preset: str | None = flag(None, "size, recipe (default: gpu on CUDA, else cpu)", ("cpu", "gpu"))
    attention: str = flag("nala", "a name or your own FILE.py, or one per block: nala,softmax")
    seed: int = flag(1, "seed for weights, data order and dropout", allow_zero=True, below=2**63)
    out: Path | None = flag(None, "folder (default: in runs/, by the flags)", affects_result=False)
    device: str = flag("auto", "device to train on", DEVICES, affects_result=False)
    resume: bool = flag(False, "continue from the checkpoint in --out", affects_result=False)
    compile: bool = flag(False, "use torch.compile, if there is a compiler", affects_result=False)
    steps: int | None = flag(None, "number of training steps")
    batch: int | None = flag(None, "examples per batch")
    lr: float | None = flag(None, "peak learning rate of AdamW")
    muon: float | None = flag(None, "peak learning rate of Muon; 0: only AdamW", allow_zero=True)
    weight_decay: float | None = flag(None, "decoupled weight decay of matrices", allow_zero=True)
    schedule: str = flag("linear", "decay: linear to 0, or cosine to a tenth", tuple(SCHEDULES))
    dropout: float | None = flag(None, "dropout probability", allow_zero=True, below=1)
    layers: int | None = flag(None, "number of blocks")
    heads: int | None = flag(None, "attention heads per block")
    dim: int | None = flag(None, "width of the model")

    def __post_init__(self) -> None:
        on_cuda = self.device in ("auto", "cuda") and torch.cuda.is_available()
        self.preset = self.preset or ("gpu" if on_cuda else "cpu")
        for name, default in self.defaults().items():
            if getattr(self, name) is None:
                setattr(self, name, default)
        for item in fields(self):
            value, zero = getattr(self, item.name), item.metadata["allow_zero"]
            below = item.metadata["below"]
            if type(value) in (int, float) and not (0 < value < below or (zero and value == 0)):
                limits = f"{'at least 0' if zero else 'positive'} and below {below}"
                raise UsageError(f"--{item.name.replace('_', '-')} must be {limits}, got {value}")
        if self.batch % (processes := distributed.world_size()):
            raise UsageError(
                f"--batch must be divisible by {processes} processes, got {self.batch}"
            )
        names = self.attention.split(",")  # one, or one per block
        self.attention_sha256: dict[str, str] = {}  # SHA-256 of each file in --attention
        try:
            for name in filter(relatives.is_file, names):
                dim = max(1, self.dim // self.heads)
                self.attention_sha256[name] = relatives.register(name, dim, causal=self.CAUSAL)
        except ValueError as error:
            raise UsageError(f"--attention {error}") from error
        try:
            self.model_config()
        except ValueError as error:
            raise UsageError(f"{self.MODEL_FLAGS}: {error}") from error
        parts = [Path(name).stem if relatives.is_file(name) else name for name in names]
        parts = [self.NAME, self.preset, "-".join(parts), f"seed{self.seed}"]
        for name, default in self.defaults().items():  # values that differ from the preset's
            if getattr(self, name) != default:
                parts.append(f"{name}{getattr(self, name):g}")
        parts += [self.schedule] * (self.schedule != "linear") + ["compiled"] * self.compile
        self.out = Path(self.out or Path("runs") / "_".join(parts))

    def defaults(self) -> dict[str, Any]:
        """The values of the chosen preset."""
        return self.PRESETS[self.preset]

    def model_config(self) -> Config:
        """Sizes and options of the model. Raises ValueError if they do not fit together."""
        return BlockConfig(**block_options(self.config()), conv_size=1)

    def config(self) -> dict[str, Any]:
        """Everything that determines the result, ready for JSON."""
        names = [item.name for item in fields(self) if item.metadata["affects_result"]]
        config = {name: getattr(self, name) for name in names}
        if self.compile:  # compilation changes rounding
            config["compile"] = True
        if self.attention_sha256:
            config["attention_sha256"] = self.attention_sha256
        return config

    def recipe(self, device: torch.device) -> Recipe:
        """The recipe, with ten points on the curve, and bfloat16 on CUDA cards that support it."""
        shared = ("muon", "weight_decay", "schedule", "seed")
        options = {name: getattr(self, name) for name in shared}
        options |= {"eval_every": max(1, self.steps // 10), "bfloat16": has_bfloat16(device)}
        return Recipe(self.steps, self.lr, **options)


def load_run(settings: Settings, *names: str) -> dict[str, Any]:
    """Load the checkpoint in --out, whose extra must contain names, and register its attention
    files; one that was renamed is found with --attention. Raises UsageError if one has changed."""
    saved = load_checkpoint(settings.out / "checkpoint.pt", *names)
    paths_by_sha256 = {digest: name for name, digest in settings.attention_sha256.items()}
    dim = saved["extra"]["dim"] // saved["extra"]["heads"]
    for name, digest in saved["extra"].get("attention_sha256", {}).items():
        path = paths_by_sha256.get(digest, name)
        try:
            if relatives.register(path, dim, causal=settings.CAUSAL) != digest:
                raise ValueError(f"{name} has changed since the run was trained")
        except ValueError as error:
            raise UsageError(f"{error}: give the run's own file with --attention") from error
        ATTENTIONS[name] = ATTENTIONS[path]
    return saved


def block_options(config: dict[str, Any]) -> dict[str, Any]:
    """Options for LMConfig or ViTConfig, from a run's config."""
    names = config["attention"].split(",")
    sizes = {"num_layers": config["layers"], "num_heads": config["heads"], "dim": config["dim"]}
    attention = names if len(names) > 1 else names[0]
    return sizes | {"dropout": config["dropout"], "attention": attention}


def choose_device(name: str) -> torch.device:
    """The device called name; "auto" is the first available of cuda, mps, cpu. With several
    processes, each gets its own CUDA card. Raises UsageError if there is none."""
    processes = distributed.world_size()
    mps = torch.backends.mps.is_available() and processes == 1
    available = {"cuda": torch.cuda.is_available(), "mps": mps, "cpu": True}
    if name == "auto":
        name = next(kind for kind, is_available in available.items() if is_available)
    if not available[name]:
        raise UsageError(f"--device {name} is not available here: use --device auto")
    if name != "cuda" or processes == 1:
        return torch.device(name)
    card, cards = distributed.local_rank(), torch.cuda.device_count()
    if card >= cards:
        raise UsageError(f"{processes} processes need as many CUDA cards, not {cards}")
    torch.cuda.set_device(card)
    return torch.device(name, card)


def has_bfloat16(device: torch.device) -> bool:
    """Whether device is a CUDA card with native bfloat16; older cards only emulate it."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


# --- Recipe and optimisers ------------------------------------------------------------------------


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
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {tuple(SCHEDULES)}, got {self.schedule!r}")
        lowest = {"steps": 1, "learning_rate": 0, "muon": 0, "warmup": 0, "weight_decay": 0}
        for name, least in (lowest | {"clip": 0, "eval_every": 1}).items():
            if not (getattr(self, name) or 0) >= least:  # NaN is refused
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")

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
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for weight in group["params"]:
                if weight.grad is not None:  # not frozen, and used
                    by_shape.setdefault(weight.shape, []).append(weight)
            for weights in by_shape.values():  # stack matrices of one shape: a few large products
                steps = orthogonal(torch.stack([self._nesterov(weight) for weight in weights]))
                rate = group["lr"] * max(1.0, steps.shape[1] / steps.shape[2]) ** 0.5
                for weight, step in zip(weights, steps, strict=True):
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    weight.sub_(rate * step.view_as(weight))
        return loss

    def _nesterov(self, weight: nn.Parameter) -> Tensor:
        """Nesterov momentum, as a matrix with one row per output."""
        momentum = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
        momentum.lerp_(weight.grad, 0.05)
        return weight.grad.lerp(momentum, 0.95).flatten(1)


def orthogonal(x: Tensor) -> Tensor:
    """Roughly the nearest orthogonal matrix to each matrix in x: singular values become about 1.

    x: (..., R, S). Uses Newton-Schulz iteration with Jordan's coefficients: five steps of an odd
    polynomial map singular values in [0.002, 1] to [0.68, 1.21].
    """
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
    ends = [getattr(model, name).weight for name in ("embed", "head") if hasattr(model, name)]
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    hidden = [p for p in matrices if recipe.muon and all(p is not end for end in ends)]
    others = [p for p in matrices if all(p is not x for x in hidden)]
    groups = [
        {"params": others, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    betas = (0.9, recipe.beta2)
    optimizers = [torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=betas, fused=True)]
    if hidden:
        optimizers.append(Muon(hidden, recipe.muon, recipe.weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]  # the peak; PyTorch's schedulers use this name
    return optimizers


# --- The loop -------------------------------------------------------------------------------------


def update(
    model: nn.Module, optimizers: list[torch.optim.Optimizer], loss: Tensor, clip: float
) -> None:
    """One training step: backpropagate loss, clip gradients to norm clip, step each optimiser."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    if clip:
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
    checkpoint: Path | str,
    extra: dict[str, Any],
    resume: bool = False,
    compile: bool = False,
) -> tuple[list[dict[str, float]], float]:
    """Train model. Returns its curve, a dict per point (step, train_loss and the numbers from
    evaluate), and the seconds spent.

    batch(step) returns inputs and targets. loss(model, inputs, targets) returns a scalar.
    evaluate(model) returns numbers by name. All randomness depends on recipe.seed and the step
    alone, so a resumed run gives the same results; PyTorch's own random state stays as it was.
    checkpoint is written at the start, before and after evaluate (every recipe.eval_every steps and
    at the end) and on Ctrl-C. extra is saved in it: a dict of plain values that must be the same
    when the run is resumed. compile: train with torch.compile if there is a compiler. With several
    processes, each computes the gradient of its share of a batch; the first evaluates and writes.

    Raises UsageError if checkpoint cannot be written or belongs to another run, or to an unfinished
    one and resume is not set; TypeError if extra or the numbers from evaluate are not plain values.
    KeyboardInterrupt says how to continue.
    """
    device, rank = next(model.parameters()).device, distributed.rank()
    is_cuda = device.type == "cuda"  # elsewhere, an asynchronous copy may outlive its source
    optimizers = make_optimizers(model, recipe)
    run = Run(model, optimizers, Path(checkpoint), to_plain(extra))
    stops: list[int] = []  # signals that asked the run to stop after the current step

    def stop(number: int, frame: Any) -> None:
        if stops and number == signal.SIGINT and distributed.world_size() == 1:
            raise KeyboardInterrupt  # a second Ctrl-C does not wait; torchrun always sends two
        stops.append(number)

    with ExitStack() as stack:
        stack.enter_context(interrupts(stop))
        run.begin(recipe.steps, resume)
        if len(set(distributed.gather(repr([run.extra, recipe, run.step])))) > 1:
            raise UsageError("the processes of this job differ in flags, data or checkpoint")
        wrapped = torch.compile(model) if compile and can_compile(device) else model
        if distributed.world_size() > 1:
            wrapped = DistributedDataParallel(wrapped)
        cards = [] if device.type == "cpu" else [device]
        stack.enter_context(torch.random.fork_rng(cards, device_type=device.type))
        stack.enter_context(in_mode(model, training=True))
        stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        if recipe.bfloat16:  # TF32 is much faster, and more precise than bfloat16
            torch.set_float32_matmul_precision("high")
        bar = stack.enter_context(
            tqdm(total=recipe.steps, initial=run.step, desc="training", disable=rank > 0)
        )
        try:
            while True:
                if run.losses and (run.step % recipe.eval_every == 0 or run.step == recipe.steps):
                    _seed(device, recipe.seed, run.step, rank)
                    run.add_point(evaluate, bar)
                if any(distributed.gather(bool(stops))):
                    run.save()
                    raise KeyboardInterrupt
                if run.step == recipe.steps:
                    break
                _seed(device, recipe.seed, run.step, rank)
                for group in (g for optimizer in optimizers for g in optimizer.param_groups):
                    group["lr"] = recipe.learning_rate_at(run.step, group["initial_lr"])
                parts = (x.chunk(distributed.world_size())[rank] for x in batch(run.step))
                inputs, targets = (x.to(device, non_blocking=is_cuda) for x in parts)
                with torch.autocast(device.type, torch.bfloat16, enabled=recipe.bfloat16):
                    loss_value = loss(wrapped, inputs, targets)
                update(wrapped, optimizers, loss_value, recipe.clip)
                run.losses.append(loss_value.detach())
                run.step += 1
                bar.update()
                if run.step % 20 == 1:  # reading a loss synchronises the GPU
                    bar.set_postfix(loss=f"{loss_value.item():.3f}")
        except KeyboardInterrupt as error:
            how = f"interrupted at step {run.step}: --resume continues from step {run.saved}"
            raise KeyboardInterrupt(how) from error
    return run.history, time.perf_counter() - run.start


def _seed(device: torch.device, *numbers: int) -> None:
    """Seed the generators that training on device draws from, and no others."""
    seed = random.Random(repr(numbers)).getrandbits(63)
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile works on device. Prints a notice if it does not."""
    try:
        torch.compile(torch.sin)(torch.zeros(2, device=device))
    except Exception as error:  # many causes: no C++ compiler, no Triton, no Python headers
        print(f"torch.compile does not work here ({type(error).__name__}): training without it.")
        return False
    return True
