"""The attentions, tasks and studies that compare.py runs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from nala_min import ATTENTIONS, Config, NaLaLM, NaLaViT, data, measure, plots
from nala_min import model as method  # a model is a network below

TEST_SEED = 10**6  # seed for test data: no run trains with it
GROUPS, ITEMS, CHANNELS = 4, 16, 8  # of Sharpness: its items, and channels per value

# --- Attentions -----------------------------------------------------------------------------------


class OneNorm(nn.Module):
    """Softmax attention without the information in the query norm: all queries of a head share one
    learned norm, initially sqrt(D)."""

    def __init__(self, config: Config):
        super().__init__()
        root = math.sqrt(config.dim // config.num_heads)
        self.norm = nn.Parameter(torch.full((config.num_heads,), root))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **options):
        _, direction = method.decompose(q)  # (B, H, N, D)
        return method.softmax_attention(self.norm[:, None, None] * direction, k, v, **options)


def no_query_norm(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    """NaLa that takes every query for a very long one: its power is always lam (tau + 1)."""
    return method.nala_attention(2.0**30 * q, k, v, **options)  # a power of 2 changes no direction


for name in ("lam 1", "lam 2", "lam 4", "tau 0", "tau 1", "alpha 1", "alpha 2", "alpha 5"):
    option, value = name.split()
    ATTENTIONS[name] = partial(method.nala_attention, **{option: float(value)})
maps = {"query_map": method.query_features, "key_map": method.key_features}
for name, which in (("lam 1 of queries", "query_map"), ("lam 1 of keys", "key_map")):
    one = {which: partial(maps[which], lam=1.0)}
    ATTENTIONS[name] = partial(method.linear_attention, **maps | one)
ATTENTIONS |= {"no query norm": no_query_norm, "no cosine map": ATTENTIONS["clipped"]}
ATTENTIONS["softmax, one norm"] = OneNorm


def build_model(task: Task, name: str, seed: int) -> nn.Module:
    """The initial model of a variant: an attention; "elu, same state", with half as many heads; or
    "elu, no convolution" ("no convolution" for NaLa), whose local(v), Eq. (16), is 0."""
    torch.manual_seed(seed)
    attention, _, change = (name, "", "") if name in ATTENTIONS else name.rpartition(", ")
    heads = {"same state": 0.5, "no convolution": 1.0, "": 1.0}[change]
    model = task.build(attention or "nala", heads)
    if change == "no convolution":
        for block in model.blocks:
            for parameter in block.attention.local.parameters():
                nn.init.zeros_(parameter).requires_grad_(False)
    return model


# --- Tasks ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """How a model is trained and tested. Each task has build(attention, heads), a new model with
    this factor of the task's heads; batch(seed, step), inputs and targets that depend on nothing
    else; loss(model, inputs, targets); and evaluate(model), results by name."""

    steps: int
    learning_rate: float
    muon: float | None = None
    weight_decay: float = 0.1
    schedule: str = "cosine"
    result: ClassVar[str]  # name of the result that the table shows
    drawn: ClassVar[tuple[str, ...]] = ()  # names of those in the picture, if others
    title: ClassVar[str] = ""  # of the picture
    CAUSAL: ClassVar[bool] = True  # whether tokens see only the past
    sizes: ClassVar[tuple[int, int, int]]  # layers, heads, dim

    def config(self, attention: str, heads: float, **sizes: int) -> Config:
        layers, count, dim = self.sizes
        sizes |= {"num_layers": layers, "num_heads": int(heads * count), "dim": dim}
        return Config(attention=attention, **sizes)

    def data_info(self) -> dict[str, str]:
        """Name and checksum of the data, for the card."""
        return {"name": "generated"}

    def draw(self, rows: list[dict[str, Any]]) -> Figure:
        """Plot a study's rows."""
        return plots.study({name: rows for name in self.drawn or (self.result,)}, self.title)


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
    key-value pairs, one token each, then every key again, and must answer with its value."""

    pairs: tuple[int, ...] = (4, 8, 16, 32, 64)  # one of them is drawn for each step
    symbols: int = 64  # number of keys, and of values
    tokens: int = 2048  # per batch, approximately
    sizes: tuple[int, int, int] = (1, 2, 32)
    result = "accuracy at 64 pairs"

    def build(self, attention: str, heads: float) -> NaLaLM:
        vocab_size = self.symbols * (self.symbols + 1)
        model = NaLaLM(self.config(attention, heads, vocab_size=vocab_size))
        model.embed = PairEmbedding(self.symbols, self.sizes[2])
        model.head = nn.Linear(self.sizes[2], self.symbols, bias=False)
        nn.init.normal_(model.head.weight, std=0.02)
        return model

    def batch(self, seed: int, step: int) -> tuple[Tensor, Tensor]:
        pairs = self.pairs[np.random.default_rng([seed, step]).integers(len(self.pairs))]
        return self.examples(pairs, max(8, self.tokens // (2 * pairs)), seed, step)

    def examples(self, pairs: int, count: int, seed: int, step: int) -> tuple[Tensor, Tensor]:
        """Tokens (count, 2 pairs), pairs and then their keys; these keys' values (count, pairs)."""
        random = np.random.default_rng([seed, step, pairs])
        keys = random.random((count, self.symbols)).argsort(axis=1)[:, :pairs]
        values = random.integers(self.symbols, size=(count, pairs))
        order = random.random((count, pairs)).argsort(axis=1)
        queries = np.take_along_axis(keys, order, axis=1)
        pair_tokens = keys * (self.symbols + 1) + values
        query_tokens = queries * (self.symbols + 1) + self.symbols
        tokens = torch.from_numpy(np.concatenate([pair_tokens, query_tokens], axis=1))
        return tokens, torch.from_numpy(np.take_along_axis(values, order, axis=1))

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        logits = model(inputs)[0][:, -targets.shape[1] :]  # (B, pairs, symbols)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        found, device = {}, next(model.parameters()).device
        for pairs in self.pairs:
            tokens, values = self.examples(pairs, 2048 // pairs, TEST_SEED, 0)
            guesses = model(tokens.to(device))[0][:, -pairs:].argmax(dim=-1)
            right = guesses == values.to(device)
            found[f"accuracy at {pairs} pairs"] = right.float().mean().item()
        return found

    def draw(self, rows: list[dict[str, Any]]) -> Figure:
        return plots.recall(rows, self.pairs)


class SingleLayer(nn.Module):
    """A single attention layer: one head, one matrix each for queries and keys, no gate, no
    convolution, no normalisation. So scaling an input scales its query."""

    def __init__(self, size: int, dim: int, attention: str):
        super().__init__()
        attend = ATTENTIONS[attention]
        self.attend = attend(Config(num_heads=1, dim=dim)) if isinstance(attend, type) else attend
        self.query = nn.Linear(size, dim, bias=False)
        self.key = nn.Linear(size, dim, bias=False)

    def forward(self, queries: Tensor, codes: Tensor, values: Tensor) -> Tensor:
        q, k = self.query(queries)[:, None], self.key(codes)[:, None]  # (B, 1, N, D)
        return self.attend(q, k, values[:, None], causal=False)[:, 0]


@dataclass(frozen=True)
class Sharpness(Task):
    """A test of the claim: a long query asks for one item, a short one in the same direction for
    the mean of many. Each of 16 items, in 4 groups of 4, has a random value and a code for the item
    and its group. A query is an item's code times 4 or 1/4. Errors are divided by the target's
    variance: answering 0 gives 1."""

    of: int = 4  # number of items that a short query averages: its group, or all 16
    result = "error"
    drawn = ("error of one", "error of many")
    title = "Long queries ask for one item, short queries for the mean of many"
    CAUSAL: ClassVar[bool] = False
    sizes: ClassVar[tuple[int, int, int]] = (1, 1, 16)

    def build(self, attention: str, heads: float) -> SingleLayer:
        return SingleLayer(GROUPS + ITEMS, int(self.sizes[2] / heads), attention)

    def batch(self, seed: int, step: int) -> tuple[Tensor, Tensor]:
        return self.examples(64, seed, step)

    def examples(self, count: int, seed: int, step: int) -> tuple[Tensor, Tensor]:
        """Inputs (count, 16, 48): queries, codes and values; targets (count, 16, 9): the answer in
        units of its standard deviation, and that unit."""
        random = np.random.default_rng([seed, step])
        group = np.arange(ITEMS) // (ITEMS // GROUPS)
        codes = np.concatenate([np.eye(GROUPS)[group], np.eye(ITEMS)], axis=1) / 2**0.5
        order = random.random((count, ITEMS)).argsort(axis=1)
        told = codes[order]
        values = random.standard_normal((count, ITEMS, CHANNELS))
        long = random.integers(2, size=(count, ITEMS, 1))
        asks = told * np.where(long, 4.0, 0.25)
        group = group[order] if self.of < ITEMS else np.zeros_like(order)
        together = (group[:, :, None] == group[:, None, :]) / self.of
        unit = np.where(long, 1.0, self.of**-0.5)
        wanted = np.where(long, values, together @ values) / unit
        inputs = np.concatenate([asks, told, values], axis=2)
        targets = np.concatenate([wanted, unit], axis=2)
        return torch.from_numpy(inputs).float(), torch.from_numpy(targets).float()

    def errors(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        size = GROUPS + ITEMS
        queries, codes, values = inputs.split([size, size, CHANNELS], dim=-1)
        expected, unit = targets.split([CHANNELS, 1], dim=-1)
        return (model(queries, codes, values) / unit - expected).square().mean(dim=-1)  # (B, 16)

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        return self.errors(model, inputs, targets).mean()

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        device = next(model.parameters()).device
        inputs, targets = (x.to(device) for x in self.examples(512, TEST_SEED, 0))
        errors, long = self.errors(model, inputs, targets), targets[..., -1] == 1
        asks = inputs[..., : GROUPS + ITEMS]
        norms = torch.linalg.vector_norm(model.query(asks), dim=-1)
        found = {}
        for kind, chosen in (("one", long), ("many", ~long)):
            found[f"error of {kind}"] = errors[chosen].mean().item()
            found[f"norm of {kind}"] = norms[chosen].mean().item()
        return {"error": (found["error of one"] + found["error of many"]) / 2} | found


@cache
def _text(file: Path | None, block: int) -> tuple[data.Text, data.Vocabulary, Tensor, Tensor]:
    text = data.load_text(file)
    return text, *data.split_text(text.text, block)


@dataclass(frozen=True)
class Text(Task):
    """Tiny Shakespeare, with models and batches like those of train_shakespeare.py."""

    sizes: tuple[int, int, int] = (4, 4, 96)
    block: int = 128
    windows: int = 8  # per batch
    file: Path | None = field(default=None, repr=False)  # None: Tiny Shakespeare
    result = "validation loss"
    loss = staticmethod(measure.next_token_loss)

    def data_info(self) -> dict[str, str]:
        text, *_ = _text(self.file, self.block)
        return {"name": text.name, "sha256": text.sha256}

    def build(self, attention: str, heads: float) -> NaLaLM:
        _, vocabulary, *_ = _text(self.file, self.block)
        return NaLaLM(self.config(attention, heads, vocab_size=len(vocabulary.characters)))

    def batch(self, seed: int, step: int) -> tuple[Tensor, Tensor]:
        *_, training, _ = _text(self.file, self.block)
        return data.random_windows(training, self.block, self.windows, seed, step)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        *_, validation = _text(self.file, self.block)
        return {"validation loss": measure.validation_loss(model, validation, self.block)}


_images = cache(lambda folder: data.load_images(folder))


@dataclass(frozen=True)
class Pictures(Task):
    """CIFAR-10, with models and batches like those of train_cifar.py."""

    sizes: tuple[int, int, int] = (3, 4, 64)
    images: int = 32  # per batch
    folder: Path | None = field(default=None, repr=False)  # None: download
    result = "test accuracy"
    CAUSAL = False
    loss = staticmethod(measure.smoothed_loss)

    def data_info(self) -> dict[str, str]:
        images = _images(self.folder)
        return {"name": images.name, "sha256": images.sha256}

    def build(self, attention: str, heads: float) -> NaLaViT:
        return NaLaViT(self.config(attention, heads)).to(memory_format=torch.channels_last)

    def batch(self, seed: int, step: int) -> tuple[Tensor, Tensor]:
        images = _images(self.folder)
        inputs, labels = data.shuffled_batch(*images.train, self.images, seed, step)
        inputs = data.augment(inputs, seed, step, shift=0, mirror=images.mirror)
        return data.normalise(inputs), labels

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        images, labels = _images(self.folder).test
        found = measure.score(measure.classify(model, images), labels)
        return {name.replace("_", " "): value for name, value in found.items()}


# --- Studies --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Study:
    """A task, the variants to compare on it, and the number of seeds."""

    task: Task
    quick: int  # steps with --quick
    seeds: int
    variants: tuple[str, ...]
    questions: tuple[tuple[str, str], ...] = ()  # pairs of variants: one family of tests


VARIANTS = (  # for the small tasks
    *("nala", "split", "softmax", "elu", "elu, same state", "relu", "relu, same state"),
    *("no query norm", "no cosine map", "no cosine map, same state"),
    *("lam 1", "lam 2", "lam 4", "lam 1 of queries", "lam 1 of keys", "tau 0", "tau 1", "alpha 2"),
    *("focused", "focused, same state", "magnitude-aware", "magnitude-aware, same state"),
    *("hedgehog", "injective", "injective, same state"),
)
# Pairs of attentions to compare on text and on images, chosen before the runs.
OTHERS = ("softmax", "elu", "elu, same state", "relu", "relu, same state", "split")
OTHERS += ("no query norm", "no cosine map, same state")
QUESTIONS = (*((name, "nala") for name in OTHERS), ("softmax, one norm", "softmax"))
COMPARED = ("nala", *OTHERS, "softmax, one norm")

# The paper's language model: do NaLa's features help where SiLU stands? And the angle as printed.
RULES = [f"{x}{end}" for end in ("", ", no convolution") for x in ("delta", "gated-delta")]
PAIRS = (*((x, f"nala-{x}") for x in RULES), ("delta, same state", "nala-delta"))
DELTAS = tuple(dict.fromkeys(name for pair in PAIRS for name in pair))
ANGLES = ("alpha 1", "alpha 5", "split")

RECALL, SHARPNESS = Recall(500, 5e-3, 0.02), Sharpness(1500, 1e-2)
TEXT = Text(1000, 4e-3, 0.02, 0.02, "linear")
PICTURES = Pictures(500, 2e-3, 0.02, 0.02, "linear")

STUDIES: dict[str, Study] = {
    "recall": Study(RECALL, 60, 5, (*VARIANTS, "polar")),
    "recall-delta": Study(RECALL, 60, 8, ("nala", "softmax", *DELTAS), PAIRS),
    "text-delta": Study(TEXT, 40, 8, DELTAS[:4], PAIRS[:2]),
    "recall-alpha": Study(RECALL, 60, 8, ("nala", *ANGLES), tuple((x, "nala") for x in ANGLES)),
    "sharpness": Study(SHARPNESS, 300, 5, VARIANTS),
    "sharpness-all": Study(replace(SHARPNESS, of=16), 300, 5, VARIANTS),
    "text": Study(TEXT, 40, 8, COMPARED, QUESTIONS),
    "images": Study(PICTURES, 40, 5, COMPARED, QUESTIONS),
}
