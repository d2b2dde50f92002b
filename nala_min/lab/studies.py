"""The attentions, tasks and studies that compare.py runs."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from nala_min import ATTENTIONS, LMConfig, NaLaLM, NaLaViT, ViTConfig, data, measure, plots
from nala_min.model import (
    Config,
    GatedAttention,
    decompose,
    key_features,
    linear_attention,
    nala_attention,
    query_features,
    softmax_attention,
)

TEST_SEED = 10**6  # seed for test data: no run trains with it

# --- Attentions -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """An attention, and a change to its block or learning rates."""

    attention: str = "nala"  # as in BlockConfig
    norm_scale: float | None = 1.0  # as in BlockConfig
    heads: float = 1.0  # times the task's; with 0.5, D features have NaLa's state size
    change: Callable[[GatedAttention], None] = lambda layer: None
    lr_factor: float = 1.0  # times the task's learning rates


class _OpenGate(nn.Module):
    """The projection of a block whose gate is always open: SiLU(1.2784645) = 1."""

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
    layer.project = _OpenGate(layer.project)


def _no_convolution(layer: GatedAttention) -> None:
    layer.local = _NoConv()


@torch.no_grad()
def _enlarge_q_and_k(layer: GatedAttention) -> None:
    q_k, v_gate = layer.project.weight.chunk(2)
    layer.project.weight.copy_(torch.cat([5 * q_k, v_gate]))


class OneNorm(nn.Module):
    """Softmax attention without the information in the query norm: all queries of a head share one
    learned norm, initially sqrt(D)."""

    def __init__(self, config: Config):
        super().__init__()
        root = math.sqrt(config.dim // config.num_heads)
        self.norm = nn.Parameter(torch.full((config.num_heads,), root))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **options):
        _, direction = decompose(q)  # (B, H, N, D)
        return softmax_attention(self.norm[:, None, None] * direction, k, v, **options)


def separate_lambdas(
    q: Tensor, k: Tensor, v: Tensor, *, queries=3.0, keys=3.0, **options
) -> Tensor | tuple[Tensor, Tensor | None]:
    """NaLa with separate λ for queries and keys."""
    maps = partial(query_features, lam=queries), partial(key_features, lam=keys)
    return linear_attention(q, k, v, *maps, **options)


class LearnedLambdas(nn.Module):
    """NaLa with two learned λ per head, one for queries and one for keys, both initially 3."""

    def __init__(self, config: Config):
        super().__init__()
        self.queries, self.keys = (
            nn.Parameter(torch.full((config.num_heads,), 3.0)) for _ in range(2)
        )

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **options):
        queries, keys = self.queries[:, None, None], self.keys[:, None, None]  # (H, 1, 1)
        return separate_lambdas(q, k, v, queries=queries, keys=keys, **options)


# NaLa with one number changed. tanh(norm / 1e-9) is 1 for any norm in practice.
CHANGED_OPTIONS = {
    **{f"lam {lam:g}": {"lam": lam} for lam in (1.0, 2.0, 4.0)},
    **{f"tau {tau:g}": {"tau": tau} for tau in (0.0, 1.0)},
    "alpha 2": {"alpha": 2.0},
    "no query norm": {"norm_scale": 1e-9},
}
ATTENTIONS.update(
    {name: partial(nala_attention, **options) for name, options in CHANGED_OPTIONS.items()}
)
ATTENTIONS["lam 1 of queries"] = partial(separate_lambdas, queries=1.0)
ATTENTIONS["lam 1 of keys"] = partial(separate_lambdas, keys=1.0)
ATTENTIONS["lam learned"] = LearnedLambdas
ATTENTIONS["one norm"] = OneNorm

# The attentions in the scripts' tables of results.
MAIN_ATTENTIONS = ("nala", "softmax", "elu", "relu")

VARIANTS: dict[str, Variant] = {
    "nala": Variant(),
    "split": Variant("split"),
    "softmax": Variant("softmax"),
    "softmax, one norm": Variant("one norm"),
    "elu": Variant("elu"),
    "elu, same state": Variant("elu", heads=0.5),
    "relu": Variant("relu"),
    "relu, same state": Variant("relu", heads=0.5),
    # NaLa's closest relatives.
    "focused": Variant("focused"),
    "focused, same state": Variant("focused", heads=0.5),
    "polar": Variant("polar"),
    "magnitude-aware": Variant("magnitude-aware"),
    "magnitude-aware, same state": Variant("magnitude-aware", heads=0.5),
    "hedgehog": Variant("hedgehog"),
    "injective": Variant("injective"),
    "injective, same state": Variant("injective", heads=0.5),
    "delta": Variant("delta"),
    "delta, same state": Variant("delta", heads=0.5),
    # NaLa with one thing changed.
    **{name: Variant(name) for name in CHANGED_OPTIONS},
    **{name: Variant(name) for name in ("lam 1 of queries", "lam 1 of keys", "lam learned")},
    "no cosine map": Variant("clipped"),
    "no cosine map, same state": Variant("clipped", heads=0.5),
    "tanh(norm/s)": Variant(norm_scale=None),
    "q and k 5 times as large": Variant(change=_enlarge_q_and_k),  # at initialisation
    "no gate": Variant(change=_no_gate),
    "softmax, no gate": Variant("softmax", change=_no_gate),
    "no convolution": Variant(change=_no_convolution),
    **{
        f"{name}, no convolution": Variant(name, change=_no_convolution)
        for name in ("softmax", "elu", "relu", "split", "lam 1", "no query norm")
    },
    # Recall with heads of D channels instead of its two of 16.
    **{
        f"{name}, D = {channels}": Variant(name, heads=16 / channels)
        for name in ("nala", "no query norm", "softmax")
        for channels in (4, 8, 32)
    },
    # Other learning rates.
    **{f"{name}, half rates": Variant(name, lr_factor=0.5) for name in MAIN_ATTENTIONS},
    **{f"{name}, double rates": Variant(name, lr_factor=2.0) for name in MAIN_ATTENTIONS},
}


def variant_of(name: str) -> Variant:
    """The variant called name, or one with the attention called name, such as your FILE.py."""
    return VARIANTS.get(name) or Variant(name)


# --- Tasks ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task(ABC):
    """How a model is trained and tested. A batch depends only on the seed and the step."""

    steps: int
    learning_rate: float
    muon: float | None = None
    weight_decay: float = 0.1
    schedule: str = "cosine"
    result: ClassVar[str]  # name of the result that the table shows
    CAUSAL: ClassVar[bool] = True  # whether tokens see only the past
    sizes: ClassVar[tuple[int, int, int]]  # layers, heads, dim

    @property
    def channels(self) -> int:
        """D, channels per head."""
        return self.sizes[2] // self.sizes[1]

    @abstractmethod
    def build(self, variant: Variant) -> nn.Module:
        """A new model, initialised from PyTorch's global generator."""

    def layers(self, model: nn.Module) -> list[GatedAttention]:
        return [block.attention for block in model.blocks]

    @abstractmethod
    def batch(self, seed: int, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets."""

    @abstractmethod
    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        """A scalar."""

    @abstractmethod
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Results by name, including self.result."""

    def attention_stats(self, model: nn.Module) -> list[dict[str, Any]] | None:
        return None

    def data_info(self) -> dict[str, Any]:
        """Description of the data for the card."""
        return {"name": "generated"}

    def draw(self, rows: list[dict[str, Any]]) -> Figure:
        """Plot a study's rows."""
        return plots.study({self.result: rows})


def _blocks(variant: Variant, layers: int, heads: int, dim: int) -> dict[str, Any]:
    return {
        "num_layers": layers,
        "num_heads": int(heads * variant.heads),
        "dim": dim,
        "norm_scale": variant.norm_scale,
        "attention": variant.attention,
    }


class PairEmbedding(nn.Module):
    """Embeds a token as the sum of two vectors, one for its key and one for its value.
    token = key (symbols + 1) + value, where value = symbols means that no value is given."""

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
    """Multi-query associative recall (Arora and others 2023, arXiv 2312.04927). The model reads
    key-value pairs, one token each, then every key again in another order, and must answer with its
    value. Easy for softmax, which looks keys up; hard for a state of fixed size, which must hold
    all pairs."""

    pairs: tuple[int, ...] = (4, 8, 16, 32, 64)  # one of them is drawn for each step
    symbols: int = 64  # number of keys, and of values
    tokens: int = 2048  # per batch, approximately
    sizes: tuple[int, int, int] = (1, 2, 32)  # layers, heads, dim
    result = "accuracy at 64 pairs"
    TESTED: ClassVar[int] = 2048  # values, for each number of pairs

    def build(self, variant: Variant) -> NaLaLM:
        vocabulary, dim = self.symbols * (self.symbols + 1), self.sizes[2]
        model = NaLaLM(LMConfig(vocab_size=vocabulary, **_blocks(variant, *self.sizes)))
        model.embed = PairEmbedding(self.symbols, dim)
        model.head = nn.Linear(dim, self.symbols, bias=False)
        nn.init.normal_(model.head.weight, std=0.02)
        return model

    def batch(self, seed: int, step: int) -> tuple[Tensor, Tensor]:
        pairs = self.pairs[np.random.default_rng([seed, step]).integers(len(self.pairs))]
        return self.examples(pairs, max(8, self.tokens // (2 * pairs)), seed, step)

    def examples(self, pairs: int, count: int, seed: int, step: int) -> tuple[Tensor, Tensor]:
        """Tokens (count, 2 pairs): first the pairs, then their keys; and the values of these keys,
        (count, pairs)."""
        random = np.random.default_rng([seed, step, pairs])
        keys = random.random((count, self.symbols)).argsort(axis=1)[:, :pairs]
        values = random.integers(self.symbols, size=(count, pairs))
        order = random.random((count, pairs)).argsort(axis=1)
        queries = np.take_along_axis(keys, order, axis=1)
        pair_tokens, query_tokens = (
            keys * (self.symbols + 1) + values,
            queries * (self.symbols + 1) + self.symbols,
        )
        tokens = torch.from_numpy(np.concatenate([pair_tokens, query_tokens], axis=1))
        return tokens, torch.from_numpy(np.take_along_axis(values, order, axis=1))

    def answers(self, model: nn.Module, tokens: Tensor, pairs: int) -> Tensor:
        """Logits (B, pairs, symbols)."""
        return model(tokens)[0][:, -pairs:]

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        answers = self.answers(model, inputs, targets.shape[1])
        return F.cross_entropy(answers.flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        model.eval()
        found, device = {}, next(model.parameters()).device
        for pairs in self.pairs:
            examples = self.examples(pairs, self.TESTED // pairs, TEST_SEED, 0)
            tokens, values = (x.to(device) for x in examples)
            right = self.answers(model, tokens, pairs).argmax(dim=-1) == values
            found[f"accuracy at {pairs} pairs"] = right.float().mean().item()
        return found

    def attention_stats(self, model: nn.Module) -> list[dict[str, Any]]:
        return measure.attention_stats(model, self.examples(self.pairs[-1], 32, TEST_SEED, 0)[0])

    def draw(self, rows: list[dict[str, Any]]) -> Figure:
        return plots.recall(rows, self.pairs)


class SingleLayer(GatedAttention):
    """A single attention layer: one head, one matrix each for queries and keys, no gate, no
    convolution, no normalisation. So scaling an input scales its query."""

    def __init__(self, size: int, dim: int, variant: Variant):
        nn.Module.__init__(self)
        self.num_heads, self.causal, self.rope = 1, False, None
        self.attend = ATTENTIONS[variant.attention]
        self.norm_aware, self.norm_scale = variant.norm_scale is None, None
        if self.norm_aware:
            self.norm_scale = nn.Parameter(torch.full((1,), math.sqrt(dim)))
        self.query = nn.Linear(size, dim, bias=False)
        self.key = nn.Linear(size, dim, bias=False)

    def forward(self, queries: Tensor, codes: Tensor, values: Tensor) -> Tensor:
        q, k = self.query(queries)[:, None], self.key(codes)[:, None]  # (B, 1, N, D)
        return self.attend(q, k, values[:, None], causal=False, **self.options(codes, 0))[:, 0]


@dataclass(frozen=True)
class Sharpness(Task):
    """A test of the claim: a long query asks for one item, a short one in the same direction for
    the mean of many.

    There are 16 items in 4 groups of 4. Each has a random value and a code that identifies the item
    and its group. A query is an item's code times 4, which asks for its value, or times 1/4, which
    asks for the mean of its group or of all items. A kernel that ignores the norm answers both
    alike. The error is the squared error divided by the target's variance: answering 0 gives 1.
    """

    of: int = 4  # number of items that a short query averages: its group, or all 16
    result = "error"
    GROUPS: ClassVar[int] = 4
    ITEMS: ClassVar[int] = 16
    CHANNELS: ClassVar[int] = 8  # per value
    CAUSAL: ClassVar[bool] = False
    sizes: ClassVar[tuple[int, int, int]] = (1, 1, 16)

    def build(self, variant: Variant) -> SingleLayer:
        return SingleLayer(self.GROUPS + self.ITEMS, int(self.channels / variant.heads), variant)

    def layers(self, model: nn.Module) -> list[GatedAttention]:
        return [model]

    def batch(self, seed: int, step: int) -> tuple[Tensor, Tensor]:
        return self.examples(64, seed, step)

    def examples(self, count: int, seed: int, step: int) -> tuple[Tensor, Tensor]:
        """Inputs (count, 16, 48): queries, codes and values; targets (count, 16, 9): the answer in
        units of its standard deviation, and that unit."""
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
        queries, codes, values = inputs.split([size, size, self.CHANNELS], dim=-1)
        expected, unit = targets.split([self.CHANNELS, 1], dim=-1)
        return (model(queries, codes, values) / unit - expected).square().mean(dim=-1)  # (B, 16)

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        return self.errors(model, inputs, targets).mean()

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        device = next(model.parameters()).device
        inputs, targets = (x.to(device) for x in self.examples(512, TEST_SEED, 0))
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

    def draw(self, rows: list[dict[str, Any]]) -> Figure:
        title = "Long queries ask for one item, short queries for the mean of many"
        labels = {"error of one": "squared error, one item", "error of many": "squared error, mean"}
        panels = {label: [row | {label: row[x]} for row in rows] for x, label in labels.items()}
        return plots.study(panels, title)


@cache
def _text(file: Path | None, block: int) -> tuple[data.Text, data.Vocabulary, Tensor, Tensor]:
    text = data.load_text(file)
    return text, *data.split_text(text.text, block)


@dataclass(frozen=True)
class Text(Task):
    """Tiny Shakespeare, with models and batches like those of train_shakespeare.py."""

    sizes: tuple[int, int, int] = (4, 4, 96)  # layers, heads, dim
    block: int = 128
    windows: int = 8  # per batch
    dropout: float = 0.0
    every: int = 1  # validate on every n-th window of the last tenth
    held_out: bool = False  # validate on the last tenth of the training text
    file: Path | None = None  # None: Tiny Shakespeare
    result = "validation loss"

    def parts(self) -> tuple[Tensor, Tensor]:
        """The training and the validation tokens."""
        *_, training, validation = _text(self.file, self.block)
        cut = len(training) * 9 // 10
        return (training[:cut], training[cut:]) if self.held_out else (training, validation)

    def build(self, variant: Variant) -> NaLaLM:
        vocabulary = _text(self.file, self.block)[1]
        sizes = _blocks(variant, *self.sizes) | {"dropout": self.dropout}
        return NaLaLM(LMConfig(vocab_size=len(vocabulary.characters), **sizes))

    def data_info(self) -> dict[str, Any]:
        text = _text(self.file, self.block)[0]
        return {"name": text.name, "sha256": text.sha256}

    def batch(self, seed: int, step: int) -> tuple[Tensor, Tensor]:
        return data.random_windows(self.parts()[0], self.block, self.windows, seed, step)

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        return measure.next_token_loss(model, inputs, targets)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        loss = measure.validation_loss(model, self.parts()[1], self.block, self.every)
        return {"validation loss": loss}

    def inputs(self, count: int) -> Tensor:
        """The first windows of the validation text, at most count."""
        return next(data.all_windows(self.parts()[1], self.block, count))[0]

    def attention_stats(self, model: nn.Module) -> list[dict[str, Any]]:
        return measure.attention_stats(model, self.inputs(64))


_images = cache(data.load_images)


@dataclass(frozen=True)
class Pictures(Task):
    """CIFAR-10, with models and batches like those of train_cifar.py."""

    sizes: tuple[int, int, int] = (3, 4, 64)  # layers, heads, dim
    patch: int = 4
    images: int = 32  # per batch
    shift: int = 0
    tested: int | None = None  # number of test images; None: all
    held_out: int = 0  # test on this many of the training images, the last ones
    folder: Path | None = None  # None: download
    result = "test accuracy"
    CAUSAL: ClassVar[bool] = False

    def load(self) -> data.Images:
        images = _images("cifar10", self.folder)
        if not self.held_out:
            return images
        (pictures, labels), cut = images.train, len(images.train[0]) - self.held_out
        training, held_out = (pictures[:cut], labels[:cut]), (pictures[cut:], labels[cut:])
        return replace(images, train=training, test=held_out)

    def build(self, variant: Variant) -> NaLaViT:
        model = NaLaViT(ViTConfig(patch_size=self.patch, **_blocks(variant, *self.sizes)))
        return model.to(memory_format=torch.channels_last)

    def data_info(self) -> dict[str, Any]:
        images = _images("cifar10", self.folder)
        return {"name": images.name, "sha256": images.sha256}

    def batch(self, seed: int, step: int) -> tuple[Tensor, Tensor]:
        images, labels = data.shuffled_batch(*self.load().train, self.images, seed, step)
        images = data.augment(images, seed, step, shift=self.shift, mirror=self.load().mirror)
        return data.normalise(images), labels

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        return measure.smoothed_loss(model, inputs, targets)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        images, labels = (x[: self.tested] for x in self.load().test)
        found = measure.score(measure.classify(model, images), labels)
        return {name.replace("_", " "): value for name, value in found.items()}

    def inputs(self, count: int) -> Tensor:
        """The first test images, at most count."""
        return self.load().test[0][:count]

    def attention_stats(self, model: nn.Module) -> list[dict[str, Any]]:
        return measure.attention_stats(model, self.inputs(100))


# --- Studies --------------------------------------------------------------------------------------

KERNELS = ("nala", "lam 1", "split", "softmax", "elu", "relu")
LEARNED = ("polar", "delta", "delta, same state", "lam learned")  # classes: not for SingleLayer
SAME_STATE = tuple(x for x in VARIANTS if x.endswith(", same state") and x not in LEARNED)
RELATIVES = ("focused", "magnitude-aware", "hedgehog", "injective")
SEPARATE_LAMBDAS = ("lam 1 of queries", "lam 1 of keys")
HYPERPARAMETERS = (*SEPARATE_LAMBDAS, "lam 2", "lam 4", "tau 0", "tau 1", "alpha 2", "tanh(norm/s)")
ABLATIONS = ("no query norm", "no cosine map")  # NaLa without a part that the paper claims to help
LEARNING_RATES = tuple(
    f"{name}{suffix}"
    for name in MAIN_ATTENTIONS
    for suffix in ("", ", half rates", ", double rates")
)
BLOCK = ("no gate", "softmax, no gate", "no convolution", "softmax, no convolution")
HEADS = tuple(name for name in VARIANTS if ", D = " in name)
# Pairs of attentions to compare on text and on images, chosen before the runs.
QUESTIONS = (
    ("softmax", "nala"),
    ("elu", "nala"),
    ("elu, same state", "nala"),
    ("relu", "nala"),
    ("relu, same state", "nala"),
    ("split", "nala"),
    ("no query norm", "nala"),
    ("no cosine map, same state", "nala"),
    ("softmax, one norm", "softmax"),
)
COMPARED = ("nala", *(name for name, _ in QUESTIONS))
# Added later: is it the power that holds NaLa back on text?
POWERS = ("lam 1", "lam 2", *SEPARATE_LAMBDAS)
LONG = ("softmax", "elu", "lam 1")
NO_CONVOLUTION = tuple(name for name in VARIANTS if name.endswith(", no convolution"))


@dataclass(frozen=True)
class Study:
    """A task, the variants compared on it, and the number of seeds."""

    task: Task
    quick: dict[str, Any]  # changes to the task for --quick
    variants: tuple[str, ...]
    seeds: int = 3
    questions: tuple[tuple[str, str], ...] = ()  # pairs of variants: one family of tests


def _study_against(
    first: str, others: tuple[str, ...], task: Task, quick: dict[str, Any], seeds: int
) -> Study:
    """A study that compares each of others with first."""
    return Study(task, quick, (first, *others), seeds, tuple((name, first) for name in others))


RECALL = Recall(steps=500, learning_rate=5e-3, muon=0.02)
# The scripts' recipes with fewer steps.
TEXT = Text(1000, 4e-3, 0.02, 0.02, "linear")
PICTURES = Pictures(500, 2e-3, 0.02, 0.02, "linear")
QUICK_TEXT, QUICK_PICTURES = {"steps": 40, "every": 16}, {"steps": 40, "tested": 1000}

STUDIES: dict[str, Study] = {
    "recall": Study(
        RECALL,
        {"steps": 60},
        (
            *(*KERNELS, *SAME_STATE, *ABLATIONS, *RELATIVES, *LEARNED, *HYPERPARAMETERS),
            *("q and k 5 times as large", *BLOCK, *HEADS),
        ),
        seeds=5,
    ),
    "sharpness": Study(
        Sharpness(steps=1500, learning_rate=1e-2),
        {"steps": 300},
        (*KERNELS, *SAME_STATE, *ABLATIONS, *RELATIVES, *HYPERPARAMETERS),
        seeds=5,
    ),
    "sharpness-all": Study(
        Sharpness(steps=1500, learning_rate=1e-2, of=16),
        {"steps": 300},
        (*KERNELS, *SAME_STATE, *ABLATIONS, *RELATIVES, *HYPERPARAMETERS),
        seeds=5,
    ),
    "text": Study(TEXT, QUICK_TEXT, COMPARED, seeds=8, questions=QUESTIONS),
    "images": Study(PICTURES, QUICK_PICTURES, COMPARED, seeds=5, questions=QUESTIONS),
    "text-powers": _study_against("nala", POWERS, TEXT, QUICK_TEXT, seeds=8),
    "recall-powers": _study_against("nala", ("lam 2",), RECALL, {"steps": 60}, seeds=20),
    "images-powers": _study_against("nala", ("lam 1", "lam 2"), PICTURES, QUICK_PICTURES, seeds=5),
    # The same number of tokens per step, but in one window: sharpness should matter more.
    "text-long": _study_against(
        "nala", LONG, replace(TEXT, block=1024, windows=1), QUICK_TEXT, seeds=8
    ),
    # Does the convolution, which shows each token its neighbours, hide a difference? All pairs
    # but softmax's were added after its result was known.
    "text-convolution": _study_against("no convolution", NO_CONVOLUTION, TEXT, QUICK_TEXT, seeds=8),
    "text-gate": _study_against("no gate", ("softmax, no gate",), TEXT, QUICK_TEXT, seeds=8),
    # Is one learning rate fair to all? Tested on held-out training data.
    "text-rates": Study(replace(TEXT, steps=1200, held_out=True), QUICK_TEXT, LEARNING_RATES),
    "images-rates": Study(
        replace(PICTURES, steps=900, held_out=5000), QUICK_PICTURES, LEARNING_RATES
    ),
    # nanoGPT's recipe, for a CUDA card.
    "text-gpu": Study(
        Text(5000, 1e-3, sizes=(6, 6, 384), block=256, windows=64, dropout=0.2),
        {"steps": 100},
        KERNELS,
    ),
}
