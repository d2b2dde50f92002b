"""Does norm-awareness help, and when? `python -m nala_min.compare` trains what a study compares,
each several times, and writes one run card with all of it.

A study is a task and the attentions that are compared on it: the same block, data in the same
order, steps, schedule and seeds, and parameters as equal as they can be. A run has one CPU thread,
so that its numbers do not depend on how many run at a time. What is finished is not run again; what
was interrupted goes on. Prints a table: mean, lowest and highest over the seeds, and the paired
difference from NaLa's with its 95 % interval.
"""

from __future__ import annotations

import math
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from nala_min import data, measure, relatives, runcard, train
from nala_min.flags import UsageError, flag, parse_flags, run_script
from nala_min.model import ATTENTIONS, GatedAttention, LMConfig, NaLaLM, NaLaViT, ViTConfig

# --- What is compared -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """An attention, and what is changed in a block for it."""

    attention: str = "nala"  # as in BlockConfig, or with a comma a name for each block
    options: dict[str, float] = field(default_factory=dict)  # of nala_attention
    norm_scale: float | None = 1.0  # as in BlockConfig
    wide: bool = False  # half as many heads: a state as large as NaLa's, which has 2D features
    change: Callable[[GatedAttention], None] = lambda layer: None


def _attend(function: Callable) -> Callable[[GatedAttention], None]:
    """A change that puts one of relatives' attentions into a layer."""

    def change(layer: GatedAttention) -> None:
        layer.attend = partial(function, layer)

    return change


def _polar(layer: GatedAttention) -> None:
    relatives.learn_polarity(layer)
    _attend(relatives.polar)(layer)


class _Open(nn.Module):
    """The projection of a block whose gate is always open: SiLU gives 1."""

    def __init__(self, project: nn.Linear):
        super().__init__()
        self.project = project

    def forward(self, x: Tensor) -> Tensor:
        qkvg = self.project(x)
        q_k_v, gate = qkvg.split([3 * x.shape[-1], x.shape[-1]], dim=-1)
        return torch.cat([q_k_v, torch.full_like(gate, 1.2784645)], dim=-1)


class _NoConv(nn.Module):
    def forward(self, x: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return torch.zeros_like(x), before


def _no_gate(layer: GatedAttention) -> None:
    layer.project = _Open(layer.project)


def _no_convolution(layer: GatedAttention) -> None:
    layer.local = _NoConv()


VARIANTS: dict[str, Variant] = {
    "nala": Variant(),
    "split": Variant("split"),
    "softmax": Variant("softmax"),
    "elu": Variant("elu"),
    "elu, same state": Variant("elu", wide=True),
    "relu": Variant("relu"),
    "relu, same state": Variant("relu", wide=True),
    # The closest relatives.
    "focused": Variant("relu", change=_attend(relatives.focused)),
    "polar": Variant("relu", change=_polar),
    "magnitude-aware": Variant("elu", change=_attend(relatives.magnitude_aware)),
    # NaLa with one thing changed.
    "lam 1": Variant(options={"lam": 1.0}),
    "lam 2": Variant(options={"lam": 2.0}),
    "lam 4": Variant(options={"lam": 4.0}),
    "tau 0": Variant(options={"tau": 0.0}),
    "tau 1": Variant(options={"tau": 1.0}),
    "alpha 2": Variant(options={"alpha": 2.0}),
    "no query norm": Variant(norm_scale=1e-9),  # tanh(norm / norm_scale) is 1 whatever the norm is
    "no cosine map": Variant(change=_attend(relatives.clipped)),
    "tanh(norm/s)": Variant(norm_scale=None),
    "no gate": Variant(change=_no_gate),
    "softmax, no gate": Variant("softmax", change=_no_gate),
    "no convolution": Variant(change=_no_convolution),
    "softmax, no convolution": Variant("softmax", change=_no_convolution),
    "hybrid": Variant("nala,softmax"),
}


def apply(variant: Variant, layers: list[GatedAttention]) -> None:
    """Change a model's layers, which are of variant.attention already, into variant's."""
    for layer in layers:
        variant.change(layer)
        if variant.options:
            plain = layer.options
            layer.options = lambda x, state, plain=plain: plain(x, state) | variant.options


# --- Tasks ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """What a model is trained on and how it is judged. A batch depends on seed and step alone."""

    steps: int
    learning_rate: float
    muon: float | None = None
    result: ClassVar[str]  # the number that the table shows
    better: ClassVar[str]  # "higher" or "lower"

    def build(self, variant: Variant) -> nn.Module:
        raise NotImplementedError

    def layers(self, model: nn.Module) -> list[GatedAttention]:
        return [block.attention for block in model.blocks]

    def batch(self, seed: int, step: int) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        raise NotImplementedError

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        raise NotImplementedError

    def health(self, model: nn.Module) -> list[dict[str, Any]] | None:
        return None

    def about(self) -> dict[str, Any]:
        return {"name": "generated"}


def _blocks(variant: Variant, layers: int, heads: int, dim: int) -> dict[str, Any]:
    names = variant.attention.split(",")
    return {
        "num_layers": layers,
        "num_heads": heads // 2 if variant.wide else heads,
        "dim": dim,
        "norm_scale": variant.norm_scale,
        "attention": names * (layers // len(names)) if len(names) > 1 else names[0],
    }


class PairEmbedding(nn.Module):
    """Of tokens that hold a key and a value: token = key (symbols + 1) + value, and symbols in the
    place of a value that is not told. The sum of two vectors."""

    def __init__(self, symbols: int, dim: int):
        super().__init__()
        self.symbols = symbols
        self.weight = nn.Parameter(0.02 * torch.randn(2 * symbols + 1, dim))

    def forward(self, tokens: Tensor) -> Tensor:
        keys = tokens.div(self.symbols + 1, rounding_mode="floor")
        values = self.symbols + tokens % (self.symbols + 1)
        return F.embedding(keys, self.weight) + F.embedding(values, self.weight)


@dataclass(frozen=True)
class Recall(Task):
    """Multi-query associative recall: pairs of a key and a value, a token each, then every key once
    more, in another order; its value is to be named. Easy for softmax, which looks a key up, hard
    for a state of fixed size that must hold all pairs (Arora and others 2023, arXiv 2312.04927)."""

    pairs: tuple[int, ...] = (4, 8, 16, 32, 64)  # drawn anew each step
    symbols: int = 64  # different keys, and as many values
    tokens: int = 2048  # in a batch, about
    sizes: tuple[int, int, int] = (1, 2, 32)  # layers, heads, dim
    result = "accuracy at 64 pairs"
    better = "higher"

    def build(self, variant: Variant) -> NaLaLM:
        vocabulary, dim = self.symbols * (self.symbols + 1), self.sizes[2]
        model = NaLaLM(LMConfig(vocab_size=vocabulary, **_blocks(variant, *self.sizes)))
        model.embed = PairEmbedding(self.symbols, dim)
        model.head = nn.Linear(dim, self.symbols, bias=False)
        nn.init.normal_(model.head.weight, std=0.02)
        return model

    def batch(self, seed: int, step: int) -> tuple[Tensor, Tensor]:
        pairs = self.pairs[np.random.default_rng([seed, step]).integers(len(self.pairs))]
        return self.examples(pairs, max(8, self.tokens // self.length(pairs)), seed, step)

    def length(self, pairs: int) -> int:
        return 2 * pairs

    def examples(self, pairs: int, count: int, seed: int, step: int) -> tuple[Tensor, Tensor]:
        """Tokens (count, length), and the answers to the last of them, (count, pairs)."""
        random = np.random.default_rng([seed, step, pairs])
        keys = random.random((count, self.symbols)).argsort(axis=1)[:, :pairs]
        values = random.integers(self.symbols, size=(count, pairs))
        order = random.random((count, pairs)).argsort(axis=1)
        asked = np.take_along_axis(keys, order, axis=1)
        tokens = torch.from_numpy(self.write(keys, values, asked))
        return tokens, torch.from_numpy(np.take_along_axis(values, order, axis=1))

    def write(self, keys: np.ndarray, values: np.ndarray, asked: np.ndarray) -> np.ndarray:
        """The text that tells the pairs and asks for them."""
        told = keys * (self.symbols + 1) + values
        return np.concatenate([told, asked * (self.symbols + 1) + self.symbols], axis=1)

    def answers(self, model: nn.Module, tokens: Tensor, pairs: int) -> Tensor:
        """Logits (B, pairs, symbols)."""
        return model(tokens)[0][:, -pairs:, -self.symbols :]

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        answers = self.answers(model, inputs, targets.shape[1])
        return F.cross_entropy(answers.flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        model.eval()
        found = {}
        for pairs in self.pairs:
            tokens, values = self.examples(pairs, 2048 // pairs, 10**6, 0)  # no training seed
            right = self.answers(model, tokens, pairs).argmax(dim=-1) == values
            found[f"accuracy at {pairs} pairs"] = right.float().mean().item()
        return found

    def health(self, model: nn.Module) -> list[dict[str, Any]]:
        return measure.health(model, self.examples(self.pairs[-1], 32, 10**6, 0)[0])


@dataclass(frozen=True)
class Binding(Recall):
    """The same with key and value as two tokens, which a model must first bind to one another."""

    pairs: tuple[int, ...] = (2, 4, 8, 16)
    sizes: tuple[int, int, int] = (2, 2, 64)
    result = "accuracy at 16 pairs"

    def build(self, variant: Variant) -> NaLaLM:
        return NaLaLM(LMConfig(vocab_size=2 * self.symbols, **_blocks(variant, *self.sizes)))

    def length(self, pairs: int) -> int:
        return 3 * pairs

    def write(self, keys: np.ndarray, values: np.ndarray, asked: np.ndarray) -> np.ndarray:
        told = np.stack([keys, self.symbols + values], axis=2)
        return np.concatenate([told.reshape(len(keys), -1), asked], axis=1)


class Bare(GatedAttention):
    """An attention alone: one head, queries and keys by a matrix each, no gate, no convolution, no
    normalisation, so that the scale of what asks is the scale of the query."""

    def __init__(self, size: int, dim: int, variant: Variant):
        nn.Module.__init__(self)
        self.num_heads, self.causal, self.rope = 1, False, None
        self.feature_map, self.norm_scale = ATTENTIONS[variant.attention], variant.norm_scale
        if self.norm_scale is None:
            self.norm_scale = nn.Parameter(torch.full((1,), math.sqrt(dim)))
        self.query = nn.Linear(size, dim, bias=False)
        self.key = nn.Linear(size, dim, bias=False)

    def forward(self, asks: Tensor, told: Tensor, values: Tensor) -> Tensor:
        q, k = self.query(asks)[:, None], self.key(told)[:, None]  # (B, 1, N, D)
        return self.attend(q, k, values[:, None], self.options(told, None), None)[0][:, 0]


@dataclass(frozen=True)
class Sharpness(Task):
    """Made for the claim: one direction asks for one item when it is long, for the mean of many
    when it is short. There are 16 items in 4 groups of 4, each with a code, its group's and its
    own, and a random value. A query is an item's code times 4: its value is wanted; or times 1/4:
    the mean of its group, or of all items. A kernel that is blind to the norm answers both alike.

    The error is squared, in units of the variance of what is wanted: knowing nothing gives 1.
    """

    of: int = 4  # how many items a short query asks for the mean of: its group, or all 16
    result = "error"
    better = "lower"
    GROUPS: ClassVar[int] = 4
    ITEMS: ClassVar[int] = 16
    CHANNELS: ClassVar[int] = 8  # of a value

    def build(self, variant: Variant) -> Bare:
        return Bare(self.GROUPS + self.ITEMS, 32 if variant.wide else 16, variant)

    def layers(self, model: nn.Module) -> list[GatedAttention]:
        return [model]

    def batch(self, seed: int, step: int) -> tuple[Tensor, Tensor]:
        return self.examples(64, seed, step)

    def examples(self, count: int, seed: int, step: int) -> tuple[Tensor, Tensor]:
        """Inputs (count, 16, 48): queries, codes and values; and targets (count, 16, 9): what is
        wanted, in units of its deviation, and this unit."""
        random = np.random.default_rng([seed, step])
        group = np.arange(self.ITEMS) // (self.ITEMS // self.GROUPS)
        codes = np.concatenate([np.eye(self.GROUPS)[group], np.eye(self.ITEMS)], axis=1) / 2**0.5
        order = random.random((count, self.ITEMS)).argsort(axis=1)
        told = codes[order]
        values = random.standard_normal((count, self.ITEMS, self.CHANNELS))
        long = random.integers(2, size=(count, self.ITEMS, 1))
        asks = told * np.where(long, 4.0, 0.25)
        group = group[order] if self.of < self.ITEMS else np.zeros_like(order)
        together = (group[:, :, None] == group[:, None, :]) / self.of
        unit = np.where(long, 1.0, self.of**-0.5)
        wanted = np.where(long, values, together @ values) / unit
        inputs = np.concatenate([asks, told, values], axis=2)
        targets = np.concatenate([wanted, unit], axis=2)
        return torch.from_numpy(inputs).float(), torch.from_numpy(targets).float()

    def errors(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        size = self.GROUPS + self.ITEMS
        asks, told, values = inputs.split([size, size, self.CHANNELS], dim=-1)
        wanted, unit = targets.split([self.CHANNELS, 1], dim=-1)
        return (model(asks, told, values) / unit - wanted).square().mean(dim=-1)  # (B, 16)

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        return self.errors(model, inputs, targets).mean()

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        inputs, targets = self.examples(512, 10**6, 0)  # no training seed
        errors, long = self.errors(model, inputs, targets), targets[..., -1] == 1
        one, many = errors[long].mean().item(), errors[~long].mean().item()
        norms = torch.linalg.vector_norm(
            model.query(inputs[..., : self.GROUPS + self.ITEMS]), dim=-1
        )
        return {
            "error": (one + many) / 2,
            "error of one": one,
            "error of many": many,
            "norm of one": norms[long].mean().item(),
            "norm of many": norms[~long].mean().item(),
        }


@cache
def _text(file: Path | None, block: int) -> tuple[data.Text, data.Vocabulary, Tensor, Tensor]:
    text = data.load_text(file)
    return text, *data.split_text(text.text, block)


@dataclass(frozen=True)
class Text(Task):
    """Tiny Shakespeare, with the model and the batches of train_shakespeare.py."""

    sizes: tuple[int, int, int] = (4, 4, 128)  # layers, heads, dim
    block: int = 128
    windows: int = 8  # in a batch
    dropout: float = 0.0
    every: int = 1  # of how many windows of the last tenth one is validated on
    file: Path | None = None  # None: Tiny Shakespeare
    result = "validation loss"
    better = "lower"

    def build(self, variant: Variant) -> NaLaLM:
        vocabulary = _text(self.file, self.block)[1]
        sizes = _blocks(variant, *self.sizes) | {"dropout": self.dropout}
        return NaLaLM(LMConfig(vocab_size=len(vocabulary.characters), **sizes))

    def about(self) -> dict[str, Any]:
        text = _text(self.file, self.block)[0]
        return {"name": text.name, "sha256": text.sha256}

    def batch(self, seed: int, step: int) -> tuple[Tensor, Tensor]:
        training = _text(self.file, self.block)[2]
        return data.random_windows(training, self.block, self.windows, seed, step)

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        return measure.next_token_loss(model, inputs, targets)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        tokens = _text(self.file, self.block)[3]
        return {"validation loss": measure.validation_loss(model, tokens, self.block, self.every)}

    def health(self, model: nn.Module) -> list[dict[str, Any]]:
        tokens = _text(self.file, self.block)[3]
        return measure.health(model, next(data.all_windows(tokens, self.block, 64))[0])


_images = cache(data.load_images)


@dataclass(frozen=True)
class Pictures(Task):
    """CIFAR-10, with the model and the batches of train_cifar.py."""

    sizes: tuple[int, int, int] = (3, 4, 64)  # layers, heads, dim
    patch: int = 4
    images: int = 32  # in a batch
    shift: int = 0
    tested: int | None = None  # on how many images; None: all
    folder: Path | None = None  # None: download
    result = "test accuracy"
    better = "higher"

    def load(self) -> data.Images:
        return _images("cifar10", self.folder)

    def build(self, variant: Variant) -> NaLaViT:
        model = NaLaViT(ViTConfig(patch_size=self.patch, **_blocks(variant, *self.sizes)))
        return model.to(memory_format=torch.channels_last)

    def about(self) -> dict[str, Any]:
        return {"name": self.load().name, "sha256": self.load().sha256}

    def batch(self, seed: int, step: int) -> tuple[Tensor, Tensor]:
        images, labels = data.shuffled_batch(*self.load().train, self.images, seed, step)
        moved = data.augment(images, seed, step, shift=self.shift, mirror=self.load().mirror)
        return data.normalise(moved), labels

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        return measure.smoothed_loss(model, inputs, targets)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        images, labels = (x[: self.tested] for x in self.load().test)
        found = measure.score(measure.classify(model, images), labels)
        return {name.replace("_", " "): value for name, value in found.items()}

    def health(self, model: nn.Module) -> list[dict[str, Any]]:
        return measure.health(model, self.load().test[0][:100])


# --- Studies --------------------------------------------------------------------------------------

KERNELS = ("nala", "lam 1", "split", "softmax", "elu", "relu")
SAME_STATE = ("elu, same state", "relu, same state")
RELATIVES = ("focused", "polar", "magnitude-aware")
CHANGES = ("lam 2", "lam 4", "tau 0", "tau 1", "alpha 2", "tanh(norm/s)")
CLAIMS = ("no query norm", "no cosine map")  # NaLa without what the paper claims to help
BLOCK = ("no gate", "softmax, no gate", "no convolution", "softmax, no convolution", "hybrid")


@dataclass(frozen=True)
class Study:
    """A task, what is compared on it, and how often."""

    task: Task
    quick: dict[str, Any]  # of the task, for --quick
    variants: tuple[str, ...]
    seeds: int = 3


STUDIES: dict[str, Study] = {
    "recall": Study(
        Recall(steps=500, learning_rate=5e-3, muon=0.02),
        {"steps": 60},
        (*KERNELS, *SAME_STATE, *CLAIMS, *RELATIVES, *CHANGES, *BLOCK[:4]),
        seeds=5,
    ),
    "binding": Study(
        Binding(steps=800, learning_rate=5e-3, muon=0.02),
        {"steps": 20},
        (*KERNELS, *SAME_STATE, *CLAIMS, *RELATIVES, *CHANGES, *BLOCK),
    ),
    "sharpness": Study(
        Sharpness(steps=1500, learning_rate=1e-2),
        {"steps": 300},
        (*KERNELS, *SAME_STATE, *CLAIMS, "focused", "magnitude-aware", *CHANGES),
        seeds=5,
    ),
    "sharpness-all": Study(
        Sharpness(steps=1500, learning_rate=1e-2, of=16),
        {"steps": 300},
        (*KERNELS, *SAME_STATE, *CLAIMS, "focused", "magnitude-aware", *CHANGES),
        seeds=5,
    ),
    "text": Study(
        Text(steps=400, learning_rate=3e-3),
        {"steps": 40, "every": 16},
        (*KERNELS, *CLAIMS, *RELATIVES, "tanh(norm/s)", "hybrid"),
    ),
    "images": Study(
        Pictures(steps=300, learning_rate=2e-3, muon=0.02),
        {"steps": 40, "tested": 1000},
        (*KERNELS, *CLAIMS, *RELATIVES),
    ),
    # nanoGPT's recipe, for a CUDA card.
    "text-gpu": Study(
        Text(5000, 1e-3, sizes=(6, 6, 384), block=256, windows=64, dropout=0.2),
        {"steps": 100},
        KERNELS,
    ),
}


# --- Runs -----------------------------------------------------------------------------------------


def run(task: Task, name: str, seed: int, folder: Path, device: str = "cpu") -> dict[str, Any]:
    """Train one variant once, or go on with it, in folder. Returns its row of the study's card."""
    variant = VARIANTS[name]
    torch.manual_seed(seed)
    model = task.build(variant)
    apply(variant, task.layers(model))
    model.to(device)
    recipe = train.Recipe(
        task.steps,
        task.learning_rate,
        muon=task.muon,
        eval_every=task.steps,
        bfloat16=device == "cuda",
        seed=seed,
    )
    history, seconds = train.fit(
        model,
        recipe,
        batch=partial(task.batch, seed),
        loss=task.loss,
        evaluate=task.evaluate,
        checkpoint=(path := folder / "checkpoint.pt"),
        extra={"variant": name, "seed": seed, "task": repr(task)},
        resume=path.exists(),
    )
    row = {
        "variant": name,
        "seed": seed,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": round(seconds, 1),
        **{key: value for key, value in history[-1].items() if key != "step"},
    }
    known = variant.change == Variant().change and not variant.options
    return row | ({"health": task.health(model)} if known else {})


def _work(task: Task, name: str, seed: int, folder: Path, device: str) -> dict[str, Any]:
    """run, in a process that says nothing."""
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
        with redirect_stdout(nowhere), redirect_stderr(nowhere):
            row = run(task, name, seed, folder, device)
    runcard.write_json(folder / "row.json", {"task": repr(task), "row": row})
    return row


def run_all(study: Study, folder: Path, workers: int, device: str) -> list[dict[str, Any]]:
    """Every run of study that folder does not hold yet, several at a time. Returns all rows."""
    wanted = [(name, seed) for seed in range(1, study.seeds + 1) for name in study.variants]
    rows, left = {}, []
    for name, seed in wanted:
        place = folder / f"{_slug(name)}_seed{seed}"
        done = runcard.read_json(place / "row.json") if (place / "row.json").exists() else {}
        if done.get("task") == repr(study.task):
            rows[name, seed] = done["row"]
        else:
            left.append((name, seed, place, device))
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(workers, mp_context=context) as pool,
        tqdm(total=len(wanted), initial=len(rows), unit="run", dynamic_ncols=True) as bar,
    ):
        jobs = {pool.submit(_work, study.task, *job): job[:2] for job in left}
        try:
            for job in as_completed(jobs):
                rows[jobs[job]] = job.result()
                bar.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [rows[key] for key in wanted]


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)


# --- What came out --------------------------------------------------------------------------------

# Student's t, 97.5 %, by the number of pairs.
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306}


def values(rows: list[dict[str, Any]], variant: str, result: str) -> list[float]:
    """A result of every run of variant, by seed."""
    found = sorted((row["seed"], row[result]) for row in rows if row["variant"] == variant)
    return [value for _, value in found]


def difference(ours: list[float], theirs: list[float]) -> tuple[float, float]:
    """Mean of ours - theirs, seed by seed, and half its 95 % interval, by Student's t."""
    pairs = [a - b for a, b in zip(ours, theirs, strict=True)]
    if len(pairs) < 2:
        return mean(pairs), math.inf
    return mean(pairs), STUDENT[len(pairs)] * stdev(pairs) / math.sqrt(len(pairs))


def table(rows: list[dict[str, Any]], result: str) -> str:
    """A line a variant: mean, lowest and highest result, difference from NaLa."""
    names = list(dict.fromkeys(row["variant"] for row in rows))
    lines = [f"{result:<24}    mean    lowest   highest   minus nala's (95 %)"]
    for name in names:
        found = values(rows, name, result)
        line = f"{name:<24} {mean(found):8.4f}  {min(found):8.4f}  {max(found):8.4f}"
        if name != "nala" and "nala" in names:
            away, half = difference(found, values(rows, "nala", result))
            line += f"   {away:+.4f} ± {half:.4f}"
        lines.append(line)
    return "\n".join(lines)


@dataclass
class Settings:
    """Compare attentions on a task, fairly. Without a study's name: all of the CPU's studies."""

    study: str | None = flag(None, "which (default: all for a CPU)", choices=list(STUDIES))
    quick: bool = flag(False, "few steps and one seed, to see that it works: minutes")
    workers: int = flag(os.cpu_count() or 1, "runs at a time")
    device: str = flag("cpu", "where to run", choices=["cpu", "cuda", "mps"])
    data: Path | None = flag(None, "text for the study of text (default: Tiny Shakespeare)")
    data_dir: Path | None = flag(None, "folder of CIFAR-10, as for train_cifar.py")
    out: Path = flag(Path("runs/compare"), "folder of the runs and of the studies' cards")

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise UsageError(f"--workers {self.workers} is not positive")


def chosen(settings: Settings, name: str) -> Study:
    """The study called name, with what the flags say of it."""
    study = STUDIES[name]
    own = {"file": settings.data, "folder": settings.data_dir}
    has = {key: value for key, value in own.items() if hasattr(study.task, key)}
    task = replace(study.task, **has, **(study.quick if settings.quick else {}))
    return replace(study, task=task, seeds=1 if settings.quick else study.seeds)


def main() -> None:
    settings = parse_flags(Settings)
    train.choose_device(settings.device)
    names = [settings.study] if settings.study else [n for n in STUDIES if not n.endswith("-gpu")]
    for name in names:
        study = chosen(settings, name)
        folder = settings.out / (name + "-quick" * settings.quick)
        try:
            about = study.task.about()
        except (OSError, ValueError) as error:
            raise UsageError(f"--data, --data-dir: {error}") from error
        print(f"{name}: {len(study.variants)} attentions, {study.seeds} seeds.")
        rows = run_all(study, folder, settings.workers, settings.device)
        shown = {key: str(x) if isinstance(x, Path) else x for key, x in vars(study.task).items()}
        config = {"study": name, "seeds": study.seeds, "variants": list(study.variants)}
        config["task"] = {key: x for key, x in shown.items() if key not in ("file", "folder")}
        seconds = sum(row["seconds"] for row in rows)
        card = runcard.run_card(
            config, about, torch.device(settings.device), seconds, {"runs": rows}
        )
        card["command"] = f"python -m nala_min.compare --study {name}" + " --quick" * settings.quick
        card["hardware"]["threads"] = 1  # of each run
        runcard.write_json(folder.with_suffix(".json"), card)
        print(table(rows, study.task.result))
        print(f"{seconds:.0f} s of training in all. Card: {folder.with_suffix('.json')}\n")


if __name__ == "__main__":
    run_script(main)
