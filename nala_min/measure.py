"""Measurements of attentions and models. `python -m nala_min.measure` measures the entropy gap and
writes its run card and picture, in a checkout to notebooks/results, otherwise to runs."""

import time
import weakref
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nala_min import NaLaLM, NaLaViT, attention_weights, decompose, entropy, plots, runcard
from nala_min.data import all_windows, normalise
from nala_min.flags import run_script
from nala_min.model import GatedAttention, in_mode, nala_attention, query_power

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
BUDGET = 2**20  # most numbers in the residual stream, (B, N, E), of an evaluation batch
MAX_QUERIES = 64  # per image: the weights of all queries would be N x N


def entropy_against_norm(attention: str, norms: Tensor, draws=200, **options: float) -> Tensor:
    """Mean entropy (K,) in nats, Eq. (3), of queries rescaled to each of norms (K,). PyTorch's
    global generator draws queries, and 64 standard normal keys of 32 channels for each. options: as
    for attention_weights, such as lam."""
    factory_kwargs = {"dtype": torch.float32, "device": norms.device}
    _, direction = decompose(torch.randn(draws, 1, 1, 32, **factory_kwargs))
    k = torch.randn(draws, 1, 64, 32, **factory_kwargs)
    queries = [(norm * direction).expand_as(k) for norm in norms]  # the same at every position
    weights = [attention_weights(q, k, attention, **options)[:, 0, 0] for q in queries]
    return torch.stack([entropy(w).mean() for w in weights])


class Recorder(TorchDispatchMode):
    """Counts PyTorch's operations inside `with Recorder() as recorder:`. peak: the most bytes of
    tensors created inside that were alive at once, without what a kernel uses internally."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.allocated = self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operations += 1
        inputs = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(out):
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


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, Tensor)]


def eval_batch_size(model: NaLaLM | NaLaViT, inputs: Tensor) -> int:
    """How many of inputs, texts (B, N) or images (B, 3, height, width), fit BUDGET: at least 1."""
    num_tokens = inputs.shape[1]
    if inputs.ndim == 4:
        num_tokens = inputs.shape[2] * inputs.shape[3] // model.config.patch_size**2
    return max(1, BUDGET // (num_tokens * model.config.dim))


@torch.no_grad()
def classify(model: NaLaViT, images: Tensor) -> Tensor:
    """Logits (n, Y), on the CPU, of images (n, 3, height, width) uint8."""
    weight = model.norm.weight
    parts = (part.to(weight.device) for part in images.split(eval_batch_size(model, images)))
    with in_mode(model, training=False):
        return torch.cat([model(normalise(part).to(weight.dtype)).cpu() for part in parts])


def score(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Mean cross-entropy in nats and accuracy, from logits (n, Y)."""
    loss, right = F.cross_entropy(logits.float(), labels), logits.argmax(dim=1) == labels
    return {"test_loss": loss.item(), "test_accuracy": right.float().mean().item()}


def smoothed_loss(model: NaLaViT, inputs: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy in nats per image, with a tenth of each label shared among all classes."""
    return F.cross_entropy(model(inputs).float(), labels, label_smoothing=0.1)


def next_token_loss(model: NaLaLM, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats per character. inputs, targets: (B, N)."""
    logits, _ = model(inputs)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten().long())


@torch.no_grad()
def validation_loss(model: NaLaLM, tokens: Tensor, block_size: int, every: int = 1) -> float:
    """Mean loss over consecutive windows of tokens, or over every n-th window."""
    device, windows = model.norm.weight.device, eval_batch_size(model, tokens[None, :block_size])
    total, count = 0.0, 0
    with in_mode(model, training=False):
        for inputs, targets in all_windows(tokens, block_size, windows, every):
            loss = next_token_loss(model, inputs.to(device), targets.to(device))
            total, count = total + loss.item() * targets.numel(), count + targets.numel()
    return total / count


class AttentionInputs(NamedTuple):
    """One block's attention layer, with its input, queries and keys."""

    layer: GatedAttention
    x: Tensor  # (B, N, E) or (B, R, P, E)
    q: Tensor  # (B, H, N, D)
    k: Tensor  # (B, H, N, D)

    def weights(self, attention: str | None = None) -> Tensor:
        """The weights (B, H, N, N) of the layer, or those that another attention would give."""
        attend = attention or self.layer.attend
        return attention_weights(self.q, self.k, attend, causal=self.layer.causal)

    def entropies(self) -> Tensor:
        """Entropy (B, H, n) in nats of the last token of a text, or of at most MAX_QUERIES evenly
        spaced patches, in memory linear in N. The output is linear in the values, so its derivative
        with respect to them gives the weights."""
        count = self.q.shape[2]
        first, step = (count - 1, 1) if self.layer.causal else (0, -(-count // MAX_QUERIES))
        with torch.inference_mode(False), torch.enable_grad():
            q, k = self.q.clone(), self.k.clone()
            v = torch.zeros_like(q, requires_grad=True)
            out = self.layer.attend(q, k, v, causal=self.layer.causal)
            firsts = (out[:, :, query, 0].sum() for query in range(first, count, step))
            rows = [torch.autograd.grad(x, v, retain_graph=True)[0][..., 0] for x in firsts]
        return entropy(torch.stack(rows, dim=2))


@torch.no_grad()
def attention_inputs(model: NaLaLM | NaLaViT, inputs: Tensor) -> list[AttentionInputs]:
    """The inputs of each block's attention, first to last, when model reads inputs as one batch:
    tokens (B, N), or images (B, 3, height, width) uint8."""
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper calls no hooks
    seen: list[tuple] = []
    layers = [block.attention for block in model.blocks]
    hooks = [layer.register_forward_pre_hook(lambda *call: seen.append(call)) for layer in layers]
    try:
        with in_mode(model, training=False):
            inputs = inputs.to(model.norm.weight.device)
            if isinstance(model, NaLaViT):
                inputs = normalise(inputs).to(model.norm.weight.dtype)
            model(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    found = []
    for layer, (x, _) in seen:
        q, k, _, _ = (layer.split_heads(y) for y in layer.project(x).chunk(4, dim=-1))
        found.append(AttentionInputs(layer, x, q, k))
    return found


@torch.no_grad()
def attention_stats(model: NaLaLM | NaLaViT, inputs: Tensor) -> list[dict[str, Any]]:
    """Statistics of each block's attention, first to last, when model reads one evaluation batch of
    inputs, as in attention_inputs: the attention's name, and QUANTILES of query_norm, of NaLa's
    power, Eq. (7), and of AttentionInputs.entropies. A module has no entropy: its weights may
    depend on the channel."""
    blocks, inputs = [], inputs[: eval_batch_size(model, inputs)]
    for name, block in zip(model.config.attentions, attention_inputs(model, inputs), strict=True):
        norm, _ = decompose(block.q)  # (B, H, N, 1)
        numbers, attend = {"query_norm": norm}, block.layer.attend
        options = getattr(attend, "keywords", {})  # of functools.partial
        is_nala = getattr(attend, "func", attend) is nala_attention
        if is_nala and options.get("feature_map") not in ("elu", "relu"):
            numbers["power"] = query_power(norm, options.get("lam", 3.0), options.get("tau", 0.5))
        if not isinstance(attend, nn.Module):
            numbers["entropy"] = block.entropies()
        found = {x: np.quantile(y.float().cpu(), QUANTILES).tolist() for x, y in numbers.items()}
        blocks.append({"attention": name} | found)
    return blocks


def attention_maps(model: NaLaViT, images: Tensor) -> dict[str, Tensor]:
    """The weights (B, R, P, R, P), on the CPU, that the last block's query at (r, p) gives to its
    keys under three kernels, averaged over the heads. images: (B, 3, height, width) uint8."""
    inputs = attention_inputs(model, images)[-1]
    grid = inputs.x.shape[1:3]
    return {
        name: inputs.weights(name).mean(dim=1).cpu().unflatten(2, grid).unflatten(1, grid)
        for name in ("nala", "softmax", "relu")
    }


def main() -> None:
    """Measure the entropy gap: write its run card and picture."""
    start, config = time.perf_counter(), {"seed": 1, "num_keys": 64, "dim": 32, "draws": 200}
    folder = runcard.RESULTS if runcard.RESULTS.is_dir() else Path("runs")  # not next to a wheel
    runcard.check_writable(folder / "entropy_gap.json", folder / "entropy_gap.png")
    norms, entropies = torch.logspace(-2, 1.5, 40), {}
    for name in ("softmax", "nala", "elu", "relu"):
        torch.manual_seed(config["seed"])  # the same queries and keys for every attention
        entropies[name] = entropy_against_norm(name, norms).tolist()
    results = {"norms": norms.tolist(), "entropies": entropies}
    data_info, seconds = {"name": "standard normal queries and keys"}, time.perf_counter() - start
    card = runcard.run_card(config, data_info, norms.device, seconds, results)
    card["command"] = "python -m nala_min.measure"
    runcard.write_json(folder / "entropy_gap.json", card)
    plots.write(plots.entropy_gap(**results), folder / "entropy_gap.png")
    print(f"Written: {folder / 'entropy_gap.json'} and .png")


if __name__ == "__main__":
    run_script(main)
