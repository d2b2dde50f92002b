"""The training loop that both scripts share, with settings, recipe and optimisers."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from nala_min import distributed, relatives
from nala_min.arguments import BlockConfig
from nala_min.checkpoint import Run, Stop
from nala_min.flags import UsageError, flag
from nala_min.model import ATTENTIONS, in_mode

# --- Settings of every script ---------------------------------------------------------------------

SCHEDULES: dict[str, Callable[[float], float]] = {  # rate / peak, after a fraction of the run
    "linear": lambda done: 1 - done,
    "cosine": lambda done: 0.55 + 0.45 * math.cos(math.pi * done),  # decays to a tenth
}


@dataclass
class Settings:
    """Flags that all scripts share; each script's subclass adds its own. A flag that is not given
    takes its value from the chosen preset, if PRESETS has one.

    Raises UsageError for invalid values.
    """

    NAME: ClassVar[str] = ""  # starts the name of the run's folder
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {}
    CAUSAL: ClassVar[bool] = True  # whether a token sees only the past

    preset: str | None = flag(
        None, "model size and recipe (default: gpu on CUDA, else cpu)", choices=["cpu", "gpu"]
    )
    attention: str = flag(
        "nala", "a name or your own FILE.py, or one per block: nala,nala,softmax,softmax"
    )
    seed: int = flag(1, "seed for the weights, the data order and dropout")
    out: Path | None = flag(
        None, "folder for this run (default: in runs/, named after the flags)", affects_result=False
    )
    device: str = flag(
        "auto", "device to train on", choices=["auto", "cpu", "cuda", "mps"], affects_result=False
    )
    resume: bool = flag(False, "continue from the checkpoint in --out", affects_result=False)
    compile: bool = flag(
        False, "train with torch.compile, if there is a compiler", affects_result=False
    )
    steps: int | None = flag(None, "number of training steps")
    batch: int | None = flag(None, "examples per batch")
    lr: float | None = flag(None, "peak learning rate of AdamW")
    muon: float | None = flag(
        None, "peak learning rate of Muon, for matrices; 0: AdamW for everything", allow_zero=True
    )
    weight_decay: float | None = flag(None, "decoupled weight decay of matrices", allow_zero=True)
    schedule: str = flag(
        "linear", "learning-rate decay: linear to 0, or cosine to a tenth", choices=list(SCHEDULES)
    )
    dropout: float | None = flag(None, "dropout probability", allow_zero=True)
    layers: int | None = flag(None, "number of blocks")
    heads: int | None = flag(None, "attention heads per block")
    dim: int | None = flag(None, "width of the model")

    def __post_init__(self) -> None:
        on_cuda = self.device in ("auto", "cuda") and torch.cuda.is_available()
        self.preset = self.preset or ("gpu" if on_cuda else "cpu")
        may_be_zero = {item.name for item in fields(self) if item.metadata["allow_zero"]}
        for name, default in self.defaults().items():
            if getattr(self, name) is None:
                setattr(self, name, default)
            value = getattr(self, name)
            if not (0 < value < 2**31 or (value == 0 and name in may_be_zero)):
                allowed = "at least 0" if name in may_be_zero else "positive"
                flag_name = f"--{name.replace('_', '-')}"
                raise UsageError(f"{flag_name} must be {allowed} and below 2^31, got {value}")
        if self.batch % distributed.world_size():
            processes = distributed.world_size()
            raise UsageError(
                "--batch must be divisible by the number of processes,"
                f" got {self.batch} and {processes}"
            )
        if self.dropout >= 1:
            raise UsageError(f"--dropout must be a probability in [0, 1), got {self.dropout}")
        self.attention_sha256: dict[str, str] = {}  # SHA-256 of each file in --attention
        for name in filter(relatives.is_file, self.attention.split(",")):
            dim = max(1, self.dim // self.heads)
            try:
                self.attention_sha256[name] = relatives.register(name, dim, causal=self.CAUSAL)
            except ValueError as error:
                raise UsageError(f"--attention {error}") from error
        try:
            BlockConfig(**block_options(self.config()), conv_size=1)
        except ValueError as error:
            raise UsageError(f"--attention, --layers, --heads, --dim: {error}") from error
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"--seed must be from 0 to 2^63 - 1, got {self.seed}")
        names = self.attention.split(",")  # one, or one per block
        attention = "-".join(Path(n).stem if relatives.is_file(n) else n for n in names)
        run_name = f"{self.NAME}_{self.preset}_{attention}_seed{self.seed}"
        for name, default in self.defaults().items():  # add values that differ from the preset's
            if getattr(self, name) != default:
                run_name += f"_{name}{getattr(self, name):g}"
        run_name += f"_{self.schedule}" if self.schedule != "linear" else ""
        run_name += "_compiled" if self.compile else ""
        self.out = Path(self.out or Path("runs") / run_name)

    def defaults(self) -> dict[str, Any]:
        """The values of the chosen preset."""
        return self.PRESETS[self.preset]

    def config(self) -> dict[str, Any]:
        """Everything that determines the result, ready for JSON."""
        flags = {
            f.name: getattr(self, f.name) for f in fields(self) if f.metadata["affects_result"]
        }
        flags |= {"compile": True} if self.compile else {}  # compilation changes rounding
        digests = self.attention_sha256
        return flags | ({"attention_sha256": digests} if digests else {})

    def recipe(self, device: torch.device) -> Recipe:
        """The recipe, with ten points on the curve, and bfloat16 on CUDA cards that support it."""
        every = max(1, self.steps // 10)
        return Recipe(
            self.steps,
            self.lr,
            muon=self.muon,
            weight_decay=self.weight_decay,
            schedule=self.schedule,
            eval_every=every,
            bfloat16=has_bfloat16(device),
            seed=self.seed,
        )


def load_attentions(config: dict[str, Any], settings: Settings) -> None:
    """Register the files that define a saved run's attention. If --attention now names a file with
    the same content at another path, uses that one.

    Raises UsageError if a file is missing or has changed.
    """
    paths_by_sha256 = {digest: name for name, digest in settings.attention_sha256.items()}
    for name, digest in config.get("attention_sha256", {}).items():
        path, dim = paths_by_sha256.get(digest, name), config["dim"] // config["heads"]
        try:
            found = relatives.register(path, dim, causal=settings.CAUSAL)
        except ValueError as error:
            raise UsageError(
                f"the run's attention: {error}: give its file with --attention"
            ) from error
        if found != digest:
            raise UsageError(
                f"{name} has changed since the run was trained: give the original with --attention"
            )
        ATTENTIONS[name] = ATTENTIONS[path]


def block_options(config: dict[str, Any]) -> dict[str, Any]:
    """Options for LMConfig or ViTConfig, from a run's config."""
    names = config["attention"].split(",")
    return {
        "num_layers": config["layers"],
        "num_heads": config["heads"],
        "dim": config["dim"],
        "dropout": config["dropout"],
        "attention": names if len(names) > 1 else names[0],
    }


def choose_device(name: str) -> torch.device:
    """The device called name; "auto" is the first available of cuda, mps, cpu. With several
    processes on a machine, each gets its own CUDA card.

    Raises UsageError if the device is not available, or if there are fewer cards than processes.
    """
    distributed_run = distributed.world_size() > 1
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available() and not distributed_run,
        "cpu": True,
    }
    if name == "auto":
        name = next(kind for kind, is_available in available.items() if is_available)
    if not available[name]:
        raise UsageError(f"--device {name} is not available here: use --device auto")
    if name == "cuda" and distributed_run:
        gpus, processes = torch.cuda.device_count(), distributed.local_size()
        if gpus < processes:
            raise UsageError(
                f"{processes} processes on a machine with {gpus} CUDA cards: start one process"
                " per card, or use --device cpu"
            )
        torch.cuda.set_device(distributed.local_rank())
        return torch.device(name, distributed.local_rank())
    return torch.device(name)


def has_bfloat16(device: torch.device) -> bool:
    """Whether device is a CUDA card with native bfloat16; older cards only emulate it."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


# --- Recipe and optimisers ------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """How to train: AdamW, alone or with Muon, with linear warm-up and a decay schedule."""

    steps: int
    learning_rate: float
    muon: float | None = None  # learning rate of Muon, for matrices; None or 0: AdamW only
    warmup: int = 100
    weight_decay: float = 0.1
    schedule: str = "linear"  # a name in SCHEDULES
    beta2: float = 0.99
    clip: float = 1.0
    eval_every: int = 500  # steps between points of the curve, and between checkpoints
    bfloat16: bool = False
    seed: int = 1  # for dropout

    def learning_rate_at(self, step: int, peak: float) -> float:
        """Learning rate at step 0, 1, ..., steps - 1, with this peak."""
        warm = min(1.0, (step + 1) / self.warmup)
        return peak * warm * SCHEDULES[self.schedule](step / self.steps)


class Muon(torch.optim.Optimizer):
    """Momentum with an orthogonalised update, so every direction learns at the same speed (Jordan
    and others 2024, https://kellerjordan.github.io/posts/muon).

    torch.optim.Muon does not accept convolutions, and it computes in bfloat16, which is slow on a
    CPU without native support.
    """

    def __init__(self, params: list[nn.Parameter], lr: float, weight_decay: float):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
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

    def _nesterov(self, weight: nn.Parameter) -> Tensor:
        """Nesterov momentum, as a matrix with one row per output."""
        state = self.state[weight]
        if not state:
            state["momentum"] = torch.zeros_like(weight)
        momentum = state["momentum"].lerp_(weight.grad, 0.05)
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
    embed_and_head = [
        getattr(model, name).weight for name in ("embed", "head") if hasattr(model, name)
    ]
    muon_params = []
    if recipe.muon:
        muon_params = [
            p for p in model.parameters() if p.ndim >= 2 and all(p is not x for x in embed_and_head)
        ]
    adam_params = [p for p in model.parameters() if all(p is not x for x in muon_params)]
    groups = [
        {"params": [p for p in adam_params if p.ndim >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in adam_params if p.ndim < 2], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, recipe.beta2), fused=True)
    optimizers = (
        [adam, Muon(muon_params, recipe.muon, recipe.weight_decay)] if muon_params else [adam]
    )
    for group in _groups(optimizers):
        group["initial_lr"] = group["lr"]  # the peak; PyTorch's schedulers use this name
    return optimizers


def _groups(optimizers: list[torch.optim.Optimizer]) -> list[dict[str, Any]]:
    """All parameter groups, each with its own learning rate."""
    return [group for optimizer in optimizers for group in optimizer.param_groups]


# --- The loop -------------------------------------------------------------------------------------


def update(
    model: nn.Module, optimizers: list[torch.optim.Optimizer], loss: Tensor, clip: float
) -> None:
    """One training step: backpropagate loss, clip gradients to norm clip, step each optimiser."""
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
    checkpoint: Path | str,
    extra: dict[str, Any],
    resume: bool = False,
    compile: bool = False,
) -> tuple[list[dict[str, float]], float]:
    """Train model in place, on its device.

    batch(step) returns inputs and targets and must depend on step alone. loss(model, inputs,
    targets) returns a scalar. evaluate(model) returns numbers by name, such as validation_loss.
    checkpoint is written at the start, before and after evaluate (every recipe.eval_every steps and
    at the end) and on Ctrl-C. It holds the model, the optimisers, the history and extra, a dict of
    plain values that must be the same when the run is resumed. All randomness depends on
    recipe.seed and the step alone, so a resumed run gives the same results. Afterwards each module
    is back in its earlier mode, training or evaluation. compile: train with torch.compile if there
    is a compiler; evaluation and checkpoints use the uncompiled model.

    With several processes, each computes the gradient of its share of a batch. The first evaluates
    and writes.

    Returns the history and the seconds spent. The history has a dict per point, with step,
    train_loss and the numbers from evaluate. Raises UsageError if checkpoint cannot be written or
    belongs to another run, or to an unfinished one and resume is not set. Raises TypeError if extra
    or the numbers from evaluate are not plain values. KeyboardInterrupt says how to continue.
    """
    device = next(model.parameters()).device
    is_cuda = device.type == "cuda"  # elsewhere, an asynchronous copy may outlive its source
    run = Run(model, make_optimizers(model, recipe), recipe.steps, checkpoint, extra)
    with Stop() as stop:  # first, so a run with a checkpoint can always be stopped
        if resume:
            run.load()
        elif distributed.rank() == 0:
            run.save_first()
        if not distributed.is_same([run.extra, recipe, run.step]):
            raise UsageError("the processes of this job differ in flags, data or checkpoint")
        wrapped = torch.compile(model) if compile and can_compile(device) else model
        if distributed.world_size() > 1:
            wrapped = DistributedDataParallel(wrapped)
        bar = _progress_bar(run.step, recipe.steps)
        precision = _tf32_matmul(recipe.bfloat16)
        with in_mode(model, training=True), precision, bar, run.explain_resume():
            while True:
                if run.losses and (run.step % recipe.eval_every == 0 or run.step == recipe.steps):
                    run.add_point(evaluate, bar)
                if distributed.any_of(stop.requested):
                    run.save()
                    distributed.barrier()
                    raise KeyboardInterrupt
                if run.step == recipe.steps:
                    break
                torch.manual_seed(_mix_seeds(recipe.seed, run.step, distributed.rank()))
                for group in _groups(run.optimizers):
                    group["lr"] = recipe.learning_rate_at(run.step, group["initial_lr"])
                part = (distributed.shard(x) for x in batch(run.step))
                inputs, targets = (x.to(device, non_blocking=is_cuda) for x in part)
                with torch.autocast(device.type, torch.bfloat16, enabled=recipe.bfloat16):
                    loss_value = loss(wrapped, inputs, targets)
                update(wrapped, run.optimizers, loss_value, recipe.clip)
                run.losses.append(loss_value.detach())
                run.step += 1
                bar.update()
                if run.step % 20 == 1:  # reading a loss synchronises the GPU
                    bar.set_postfix(loss=f"{loss_value.item():.3f}")
    return run.history, run.seconds()


@contextmanager
def _tf32_matmul(enabled: bool) -> Iterator[None]:
    """If enabled, compute float32 matrix products in TF32 inside the block. It is much faster, and
    more precise than bfloat16, which the run's other products use."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if enabled else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile works on device: it needs a C++ compiler, or Triton on a GPU. Prints a
    notice if it does not."""
    try:
        torch.compile(torch.sin)(torch.zeros(2, device=device))
    except Exception as error:  # many causes: no C++ compiler, no Triton, no Python headers
        print(f"torch.compile does not work here ({type(error).__name__}): training without it.")
        return False
    return True


def _progress_bar(first: int, steps: int) -> tqdm:
    """One progress bar for all processes."""
    return tqdm(
        total=steps,
        initial=first,
        desc="training",
        unit="step",
        dynamic_ncols=True,
        disable=distributed.rank() > 0,
    )


def _mix_seeds(*numbers: int) -> int:
    """A seed that depends on all numbers."""
    return random.Random(repr(numbers)).getrandbits(63)
