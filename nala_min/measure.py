"""Measurements of attentions and models. `python -m nala_min.measure` measures the entropy gap and
writes a run card and a picture, to notebooks/results in a checkout and to runs otherwise."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nala_min import plots, runcard
from nala_min.data import all_windows, normalise
from nala_min.flags import flag, parse_flags, run_script
from nala_min.model import (
    GatedAttention,
    NaLaLM,
    NaLaViT,
    attention_weights,
    decompose,
    entropy,
    in_mode,
    key_features,
    linear_attention,
    nala_attention,
    query_features,
    query_power,
)

MAPS = ("cosine", "softmax", "relu")  # NaLa, and the two whose strengths it combines
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
BUDGET = 2**20  # most numbers in the residual stream, (B, N, E), of an evaluation batch
MAX_QUERIES = 64  # at most, per image: the weights of all queries would be N x N


def entropy_against_norm(
    feature_map: str,
    norms: Tensor,
    *,
    num_keys: int = 64,
    dim: int = 32,
    draws: int = 200,
    **options: float,
) -> Tensor:
    """Mean entropy, Eq. (3), of queries rescaled to each norm, over standard normal keys.

    norms: (K,); draws: number of random queries, each with its own keys, from PyTorch's global
    generator; options: as for attention_weights, such as norm_scale. Returns (K,), in nats, at most
    log(num_keys).
    """
    factory_kwargs = {"dtype": torch.float32, "device": norms.device}
    _, direction = decompose(torch.randn(draws, 1, 1, dim, **factory_kwargs))
    k = torch.randn(draws, 1, num_keys, dim, **factory_kwargs)
    means = []
    for norm in norms:
        q = (norm * direction).expand_as(k)  # the same query at every position
        weights = attention_weights(q, k, feature_map=feature_map, **options)
        means.append(entropy(weights[:, 0, 0]).mean())
    return torch.stack(means)


# --- The cost of a computation --------------------------------------------------------------------


class Recorder(TorchDispatchMode):
    """Counts operations and memory inside `with Recorder() as recorder:`.

    recorder.operations: PyTorch operations. recorder.names: their names. recorder.bytes: what
    they read and write. recorder.peak: peak memory, in bytes, of tensors created inside,
    without memory that a kernel uses internally.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.bytes = self.allocated = self.peak = 0
        self.names: set[str] = set()
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        self.operations += 1
        self.names.add(name)
        inputs = {x.untyped_storage()._cdata for x in _tensors((args, kwargs))}
        outputs = {x.untyped_storage()._cdata for x in _tensors(out)}
        is_view = outputs <= inputs and not func._schema.is_mutable
        if not is_view and "empty" not in name:
            inputs_read = args, {k: v for k, v in (kwargs or {}).items() if k != "out"}
            self.bytes += sum(x.nbytes for x in _tensors((inputs_read, out)))
        for storage in (x.untyped_storage() for x in _tensors(out)):
            key, size = storage._cdata, storage.nbytes()
            if key not in inputs and key not in self._alive:  # not a view of an earlier tensor
                self._alive.add(key)
                self.allocated += size
                self.peak = max(self.peak, self.allocated)
                weakref.finalize(storage, self._forget, key, size)
        return out

    def _forget(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.allocated -= size


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


# --- A trained model ------------------------------------------------------------------------------


def eval_batch_size(model: NaLaLM | NaLaViT, inputs: Tensor) -> int:
    """Evaluation batch size of model for inputs, texts (B, N) or images (B, 3, height, width): as
    many as fit BUDGET, but at least 1. So memory does not grow with the number of inputs."""
    num_tokens = inputs.shape[1]
    if inputs.ndim == 4:
        num_tokens = inputs.shape[2] * inputs.shape[3] // model.config.patch_size**2
    return max(1, BUDGET // (num_tokens * model.config.dim))


@torch.no_grad()
def classify(model: NaLaViT, images: Tensor) -> Tensor:
    """Logits (n, Y), on the CPU, of images (n, 3, height, width) uint8."""
    weight = model.head.weight
    parts = (part.to(weight.device) for part in images.split(eval_batch_size(model, images)))
    with in_mode(model, training=False):
        return torch.cat([model(normalise(part).to(weight.dtype)).cpu() for part in parts])


def score(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Mean cross-entropy in nats and accuracy, from logits (n, Y)."""
    accuracy = (logits.argmax(dim=1) == labels).float().mean().item()
    return {"test_loss": F.cross_entropy(logits, labels).item(), "test_accuracy": accuracy}


def smoothed_loss(model: NaLaViT, inputs: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy in nats per image, with a tenth of each label shared among all classes."""
    return F.cross_entropy(model(inputs).float(), labels, label_smoothing=0.1)


def next_token_loss(model: NaLaLM, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats per character. inputs, targets: (B, N)."""
    logits, _ = model(inputs)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


@torch.no_grad()
def validation_loss(model: NaLaLM, tokens: Tensor, block_size: int, every: int = 1) -> float:
    """Mean loss over consecutive windows of tokens, or over every n-th window."""
    device, windows = model.head.weight.device, eval_batch_size(model, tokens[None, :block_size])
    total, count = 0.0, 0
    with in_mode(model, training=False):
        for inputs, targets in all_windows(tokens, block_size, windows, every):
            loss = next_token_loss(model, inputs.to(device), targets.to(device))
            total, count = total + loss.item() * targets.numel(), count + targets.numel()
    return total / count


class AttentionInputs(NamedTuple):
    """One block's attention layer, with its input, queries and keys."""

    layer: GatedAttention
    x: Tensor  # (B, N, E) or (B, R, S, E)
    q: Tensor  # (B, H, N, D)
    k: Tensor  # (B, H, N, D)
    options: dict[str, Any]  # for the layer's attention

    def weights(self, feature_map: str | None = None) -> Tensor:
        """The attention weights (B, H, N, N) of the layer, or those that another feature_map or
        "softmax" would give."""
        attention, options = feature_map or self.layer.attend, self.options
        if feature_map == "softmax":
            options = {}
        return attention_weights(
            self.q, self.k, causal=self.layer.causal, feature_map=attention, **options
        )

    def weights_of(self, queries: Sequence[int]) -> Tensor:
        """The weights (B, H, n, N) of these n queries only, in memory linear in N. The output is
        linear in the values, so its derivative with respect to them gives the weights."""
        with torch.inference_mode(False), torch.enable_grad():
            q, k = self.q.clone(), self.k.clone()
            v = torch.zeros_like(q, requires_grad=True)
            out = self.layer.attend(q, k, v, causal=self.layer.causal, **self.options)
            firsts = (out[:, :, query, 0].sum() for query in queries)  # the first channel only
            rows = [torch.autograd.grad(x, v, retain_graph=True)[0][..., 0] for x in firsts]
        return torch.stack(rows, dim=2)

    def sampled_queries(self) -> range:
        """The queries to inspect: the last token of a text, which sees all others, or at most
        MAX_QUERIES evenly spaced patches of an image."""
        count = self.q.shape[2]
        first, stride = (count - 1, 1) if self.layer.causal else (0, -(-count // MAX_QUERIES))
        return range(first, count, stride)

    def all_options(self) -> dict[str, Any]:
        """Options of the layer's attention, from its entry in ATTENTIONS and from the config."""
        return getattr(self.layer.attend, "keywords", {}) | self.options

    def uses(self, function: Callable) -> bool:
        """Whether the layer's attention is function, with any options."""
        return getattr(self.layer.attend, "func", self.layer.attend) is function

    def normaliser(self) -> Tensor | None:
        """The normaliser of linear attention over all keys, (B, H, N): phi(q) . z, Eq. (5). NaLa
        scales a query's largest channel to 1, Eq. (12). None for other attentions."""
        options = self.all_options()
        if self.uses(nala_attention):
            shared = select(options, "feature_map", "lam", "alpha")
            query = partial(query_features, **shared, **select(options, "tau", "norm_scale"))
            key = partial(key_features, **shared)
        elif self.uses(linear_attention):
            query, key = options["query_features"], options["key_features"]
        else:
            return None
        return (query(self.q) * key(self.k).sum(dim=2, keepdim=True)).sum(dim=-1)


def select(options: dict[str, Any], *names: str) -> dict[str, Any]:
    """The entries of options with these names."""
    return {name: x for name, x in options.items() if name in names}


@torch.no_grad()
def attention_inputs(model: NaLaLM | NaLaViT, inputs: Tensor) -> list[AttentionInputs]:
    """The inputs of each block's attention, first to last, when model reads inputs.

    inputs: tokens (B, N), or images (B, 3, height, width) uint8, read as one batch.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper calls no hooks
    seen: list[tuple] = []
    layers = [block.attention for block in model.blocks]
    hooks = [layer.register_forward_pre_hook(lambda *call: seen.append(call)) for layer in layers]
    try:
        with in_mode(model, training=False):
            weight = model.head.weight
            inputs = inputs.to(weight.device)
            if isinstance(model, NaLaViT):
                inputs = normalise(inputs).to(weight.dtype)
            model(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    found = []
    for layer, (x, state) in seen:
        q, k, _, _ = (layer.split_heads(y) for y in layer.project(x).chunk(4, dim=-1))
        found.append(AttentionInputs(layer, x, q, k, layer.options(x, state.position)))
    return found


@torch.no_grad()
def attention_stats(model: NaLaLM | NaLaViT, inputs: Tensor) -> list[dict[str, Any]]:
    """Statistics of each block's attention, first to last, when model reads inputs. Uses only the
    first eval_batch_size(model, inputs) of them. Arguments as for attention_inputs.

    Each dict has the name of the attention, and QUANTILES over all heads and examples. query_norm
    and, for NaLa, power, Eq. (7), are over all tokens. entropy, in nats, and top, the largest
    weight, are over AttentionInputs.sampled_queries. A module's weights may differ between the
    channels of a value, so it has neither. Linear attention has least_normaliser, the smallest
    value that it divides by.
    """
    blocks, inputs = [], inputs[: eval_batch_size(model, inputs)]
    for name, block in zip(model.config.attentions, attention_inputs(model, inputs), strict=True):
        norm, _ = decompose(block.q)  # (B, H, N, 1)
        numbers = {"query_norm": norm}
        options = block.all_options()
        if block.uses(nala_attention) and options.get("feature_map") not in ("elu", "relu"):
            numbers["power"] = query_power(norm, **select(options, "lam", "tau", "norm_scale"))
        queries = block.sampled_queries()
        if not isinstance(block.layer.attend, nn.Module):
            weights = block.weights_of(queries)  # (B, H, n, N)
            numbers |= {"entropy": entropy(weights), "top": weights.amax(dim=-1)}
        found = {
            key: np.quantile(x.float().cpu(), QUANTILES).tolist() for key, x in numbers.items()
        }
        if (normaliser := block.normaliser()) is not None:
            found["least_normaliser"] = normaliser[:, :, queries.start :].min().item()
        blocks.append({"attention": name} | found)
    return blocks


def norms_and_entropies(model: NaLaLM | NaLaViT, inputs: Tensor) -> list[dict[str, Tensor]]:
    """For each block, query_norm, key_norm and entropy, in nats, of each head and token. Each is
    (H, n).

    inputs: as for attention_inputs, but any number of them. The tokens are those of
    AttentionInputs.sampled_queries: the last one of each text, or at most MAX_QUERIES patches of
    each image.
    """
    batch_size = eval_batch_size(model, inputs)
    batches = [attention_inputs(model, part) for part in inputs.split(batch_size)]
    found = []
    for parts in zip(*batches, strict=True):
        numbers: dict[str, list[Tensor]] = {"query_norm": [], "key_norm": [], "entropy": []}
        for block in parts:
            queries = block.sampled_queries()
            for name, x in (("query_norm", block.q), ("key_norm", block.k)):
                numbers[name].append(torch.linalg.vector_norm(x[:, :, queries], dim=-1))
            numbers["entropy"].append(entropy(block.weights_of(queries)))  # (B, H, n)
        found.append({name: torch.cat(x).transpose(0, 1).flatten(1) for name, x in numbers.items()})
    return found


def rank_correlation(x: Tensor, y: Tensor) -> Tensor:
    """Spearman's rank correlation of x and y, each (..., n): 1 if both grow together, -1 if one
    falls as the other grows. Ties are ranked in order of appearance."""
    ranks = torch.stack([x, y]).argsort(dim=-1, stable=True).argsort(dim=-1).double()
    ranks = ranks - ranks.mean(dim=-1, keepdim=True)
    return F.cosine_similarity(*ranks, dim=-1)


def attention_maps(
    model: NaLaViT, images: Tensor, block: int = -1, feature_maps: Sequence[str] = MAPS
) -> dict[str, Tensor]:
    """The attention weights of each patch under several kernels, from the queries and keys of one
    block. It was trained with one kernel; the others show what they would do with the same inputs.

    images: (B, 3, height, width) uint8. Returns for each feature map the weights (B, R, S, R, S) of
    a query at (r, s) over the grid, on the CPU, averaged over the heads. A head where the query has
    no mass contributes zeros.
    """
    inputs = attention_inputs(model, images)[block]
    grid = inputs.x.shape[1:3]
    return {
        name: inputs.weights(name).mean(dim=1).cpu().unflatten(2, grid).unflatten(1, grid)
        for name in feature_maps
    }


def confusion_matrix(guesses: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Number of examples of each true class (row) per predicted class (column).

    guesses, labels: (n,) integers. Returns (num_classes, num_classes), with sum n.
    """
    pairs = labels * num_classes + guesses
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def worst_pairs(confusion: Tensor) -> list[tuple[int, int, int]]:
    """The three pairs of classes confused most often, in either direction, as (first, second,
    mistakes), most mistakes first. Pairs without mistakes are left out.

    confusion: (Y, Y), from confusion_matrix.
    """
    mistakes = (confusion + confusion.T).triu(1)
    indices = mistakes.flatten().argsort(descending=True, stable=True)[:3].tolist()
    pairs = [(*divmod(i, len(confusion)), int(mistakes.flatten()[i])) for i in indices]
    return [pair for pair in pairs if pair[2] > 0]


@dataclass
class Settings:
    """Measure the entropy of attention weights against the norm of the query."""

    out: Path = flag(
        runcard.RESULTS if runcard.RESULTS.is_dir() else Path("runs"),  # not next to a wheel
        "folder for the run card and the picture",
    )


def main() -> None:
    start, settings = time.perf_counter(), parse_flags(Settings)
    card_file, picture = (settings.out / f"entropy_gap.{kind}" for kind in ("json", "png"))
    runcard.check_writable(card_file, picture)
    config = {"seed": 1, "num_keys": 64, "dim": 32, "draws": 200}
    norms = torch.logspace(-2, 1.5, 40, dtype=torch.float32, device="cpu")
    entropies = {}
    for name in ("softmax", "cosine", "elu", "relu"):
        torch.manual_seed(config["seed"])  # the same queries and keys for every feature map
        sizes = {key: value for key, value in config.items() if key != "seed"}
        entropies[name] = entropy_against_norm(name, norms, **sizes).tolist()
    results = {"norms": norms.tolist(), "entropies": entropies}
    card = runcard.run_card(
        config,
        {"name": "standard normal queries and keys"},
        torch.device("cpu"),
        time.perf_counter() - start,
        results,
    )
    card["command"] = "python -m nala_min.measure"
    runcard.write_json(card_file, card)
    plots.write(plots.entropy_gap(norms.tolist(), entropies), picture)
    print(f"Written: {card_file} and .png")


if __name__ == "__main__":
    run_script(main)
