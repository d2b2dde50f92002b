"""Measurements in nala_min/measure.py: entropies, memory, losses, and the attention of a model."""

import math
from functools import partial

import pytest
import torch
from scripts import ambient
from torch.testing import assert_close

from nala_min import ATTENTIONS, Config, NaLaLM, NaLaViT, entropy, measure, runcard
from nala_min.flags import run_script
from nala_min.model import key_features, nala_attention, query_features


def small_vit(**options):
    """For images of 2 x 2 patches. Its large weights make all attentions differ."""
    sizes = {"num_classes": 7, "num_layers": 2, "num_heads": 2, "dim": 32, "patch_size": 2}
    model = NaLaViT(Config(**sizes | options))
    for block in model.blocks:
        block.attention.project.weight.data.mul_(10.0)
    return model


def small_lm(**options):
    sizes = {"vocab_size": 9, "num_layers": 2, "num_heads": 2, "dim": 16}
    return NaLaLM(Config(**sizes | options))


def noise(count=2, height=6, width=10):
    """Random images, (count, 3, height, width) uint8."""
    return torch.randint(256, (count, 3, height, width), dtype=torch.uint8)


def letters(*shape):
    """Random tokens."""
    return torch.randint(9, shape)


def test_the_program_writes_the_committed_card(tmp_path, monkeypatch):
    """To the folder of results. An installed wheel has none, and writes to runs."""
    card = runcard.read_json(runcard.RESULTS / "entropy_gap.json")
    measured = measure.entropy_against_norm

    def some_entropies(name, norms):  # the others need no second proof
        entropies = torch.tensor(card["results"]["entropies"][name])
        entropies[::13] = measured(name, norms[::13])
        return entropies

    monkeypatch.setattr(measure, "entropy_against_norm", some_entropies)
    monkeypatch.setattr(runcard, "RESULTS", tmp_path / "results")
    monkeypatch.chdir(tmp_path)
    for folder in ("runs", "results"):
        run_script(measure.main)
        assert (tmp_path / folder / "entropy_gap.png").exists()
        written = runcard.read_json(tmp_path / folder / "entropy_gap.json")
        assert all(written[key] == card[key] for key in ("command", "config", "data"))
        found = written["results"]
        assert found["norms"] == pytest.approx(card["results"]["norms"], rel=1e-5)
        for name, entropies in card["results"]["entropies"].items():
            assert found["entropies"][name] == pytest.approx(entropies, abs=1e-4)
        (tmp_path / "results").mkdir(exist_ok=True)


def test_recorder_counts_operations_and_peak_bytes_also_of_a_backward_pass():
    """Two tensors of 4,000 bytes, then a third after the first is freed."""
    x = torch.ones(1000)
    with measure.Recorder() as recorder:
        first = x + 1
        second = first * 2
        del first
        third = second * 3
    assert (recorder.operations, recorder.peak, recorder.allocated) == (3, 8000, 8000)
    del second, third
    assert recorder.allocated == 0
    with measure.Recorder() as recorder:  # views and tensors that exist already need no memory
        torch.mul(x.add_(1).view(100, 10)[:5].mul_(2), 2, out=x[:50].view(5, 10))
    assert recorder.peak == 0
    x.requires_grad_()
    with measure.Recorder() as recorder:
        x.exp().exp().sum().backward()
    assert recorder.peak > 12_000 and recorder.allocated == 4000  # x.grad


def test_losses_by_hand():
    logits = torch.tensor([[0.0, math.log(3)], [math.log(3), 0.0], [0.0, 9.0]]).bfloat16()
    ones, losses = torch.tensor([1, 1, 1]), [math.log(4 / 3), math.log(4), 0.0]
    score = {"test_loss": sum(losses) / 3, "test_accuracy": 2 / 3}
    assert measure.score(logits.float(), ones) == pytest.approx(score, abs=1e-3)
    smoothed = measure.smoothed_loss(lambda x: logits[:1], None, ones[:1])  # 95 and 5 %
    assert smoothed == pytest.approx(0.95 * losses[0] + 0.05 * losses[1], abs=2e-3)
    loss = measure.next_token_loss(lambda x: (logits.view(1, 3, 2), None), None, ones[None])
    assert loss == pytest.approx(sum(losses) / 3, abs=1e-3)
    assert smoothed.dtype == loss.dtype == torch.float32
    half = measure.score(torch.zeros(70_000, 10).half(), torch.zeros(70_000, dtype=torch.long))
    assert half["test_loss"] == pytest.approx(math.log(10), abs=1e-3)


@pytest.mark.parametrize(("every", "starts"), [(1, [0, 8, 16]), (2, [0, 16])])
def test_the_validation_loss_is_the_mean_over_tokens_without_dropout(every, starts, monkeypatch):
    """Not over batches: two of the three windows are in the first."""
    monkeypatch.setattr(measure, "BUDGET", 2 * 8 * 16)
    model, tokens = small_lm(dropout=0.5), letters(28)
    model.head.weight.data.mul_(50.0)
    model.head = torch.nn.Sequential(model.head)  # as in a model that is quantised or adapted
    loss = measure.validation_loss(model.train(), tokens.int(), 8, every)
    with torch.no_grad():
        windows = [(model.eval()(tokens[None, i : i + 8])[0][0], tokens[i + 1 :]) for i in starts]
    losses = [-x.softmax(dim=-1)[t, y[t]].log() for x, y in windows for t in range(8)]
    assert loss == pytest.approx(sum(losses).item() / len(losses), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_classify_reads_normalised_images_in_batches_in_order_without_dropout(dtype, monkeypatch):
    monkeypatch.setattr(measure, "BUDGET", 2 * 15 * 32)  # two images
    model, images = small_vit(dropout=0.5).to(dtype).train(), noise(5)
    logits = measure.classify(model, images)
    assert logits.shape == (5, 7) and not logits.requires_grad
    with torch.no_grad():
        expected = model.eval().double()((images.double() - 120) / 64)
    tolerance = {torch.float64: 1e-9, torch.bfloat16: 0.1}[dtype] * expected.abs().max()
    assert (logits - expected).abs().max() < tolerance
    assert measure.attention_stats(model, images) == measure.attention_stats(model, images[:2])


def by_hand(model, inputs):
    """For each block, its queries (B, H, N, D) and keys, and whether it is causal."""
    found = []

    def hook(layer, inputs):
        x = inputs[0].flatten(1, -2)  # (B, N, E)
        to_q, to_k, _, _ = layer.project.weight.chunk(4)
        q, k = ((x @ m.T).unflatten(-1, (2, -1)).transpose(1, 2) for m in (to_q, to_k))
        found.append((q, k, layer.causal))

    for block in model.blocks:
        block.attention.register_forward_pre_hook(hook)
    with torch.no_grad():
        model(inputs if inputs.ndim == 2 else (inputs - 120.0) / 64)
    return found


def weights_by_hand(name, q, k, causal):
    """The weights (B, H, N, N) of an attention, by Eq. (5) or (1)."""
    q, k, name = q.double(), k.double(), name.replace("nala", "cosine")
    if name == "softmax":
        scores = (q @ k.mT / math.sqrt(q.shape[-1])).exp()
    else:
        scores = query_features(q, name) @ key_features(k, name).mT
    scores = scores.tril() if causal else scores
    return (scores / scores.sum(-1, keepdim=True).clamp_min(1e-300)).float()  # no mass: 0


@pytest.mark.parametrize("attention", [("nala", "softmax"), ("split", "relu")])
@pytest.mark.parametrize("build", [small_vit, small_lm])
def test_stats_are_quantiles_over_tokens_and_heads(attention, build):
    """The entropy is that of all patches, or of the last token of each text."""
    model = build(attention=attention)
    inputs = noise() if build is small_vit else letters(5, 12)
    stats = measure.attention_stats(model, inputs)
    for name, found, (q, k, causal) in zip(attention, stats, by_hand(model, inputs), strict=True):
        norm, entropies = q.norm(dim=-1), entropy(weights_by_hand(name, q, k, causal))
        expected = {"query_norm": norm, "power": 3 * (0.5 + norm.tanh()), "entropy": entropies}
        if name not in ("nala", "split"):
            del expected["power"]
        if build is small_lm:
            expected["entropy"] = entropies[:, :, -1]
        assert found.pop("attention") == name and found.keys() == expected.keys()
        for key, values in expected.items():
            levels = [values.quantile(level).item() for level in (0.05, 0.25, 0.5, 0.75, 0.95)]
            assert found[key] == pytest.approx(levels, rel=1e-3, abs=1e-4)


def test_a_block_gives_its_own_weights_and_the_entropies_of_at_most_64_queries():
    (block,) = measure.attention_inputs(small_vit(num_layers=1), noise(1, 10, 26))  # 65 patches
    expected = entropy(block.weights())[:, :, ::2]
    assert_close(block.entropies(), expected, rtol=1e-4, atol=1e-5)
    (block,) = measure.attention_inputs(small_lm(num_layers=1), letters(3, 12))
    assert (block.weights("softmax").triu(1) == 0).all()


def test_attention_maps_are_the_weights_of_the_last_block_s_own_queries():
    model, images = small_vit(attention=("relu", "softmax", "elu"), num_layers=3), noise()
    maps = measure.attention_maps(model, images)
    *_, last = by_hand(model, images)
    assert tuple(maps) == ("nala", "softmax", "relu")
    for name, actual in maps.items():
        expected = weights_by_hand(name, *last).mean(dim=1)
        assert_close(actual, expected.view(2, 3, 5, 3, 5), rtol=1e-3, atol=1e-4)


def test_the_power_is_that_of_an_attention_s_own_lam_and_tau(monkeypatch):
    """Its quantiles are interpolated. One with parameters has neither power nor entropy."""
    monkeypatch.setitem(ATTENTIONS, "mine", partial(nala_attention, lam=2.0, tau=1.0, alpha=5.0))
    mine, delta = measure.attention_stats(small_lm(attention=("mine", "delta")), letters(5, 12))
    expected = [2 * (1 + math.tanh(norm)) for norm in mine["query_norm"]]
    assert mine["power"] == pytest.approx(expected, abs=0.02)
    assert delta.keys() == {"attention", "query_norm"}


READERS = [
    lambda lm, vit: measure.validation_loss(lm, letters(50), 8),
    lambda lm, vit: measure.classify(vit, noise()).tolist(),
    lambda lm, vit: measure.attention_stats(lm, letters(3, 70)),
    lambda lm, vit: measure.attention_stats(vit, noise()),
    lambda lm, vit: [x.tolist() for x in measure.attention_maps(vit, noise()).values()],
]


@pytest.mark.parametrize("read", READERS)
def test_measuring_depends_neither_on_modes_nor_on_defaults_and_restores_them(read):
    models = small_lm(dropout=0.5), small_vit(dropout=0.5)

    def numbers():
        torch.manual_seed(1)
        return read(*models)

    expected = numbers()
    for dtype in (torch.float64, torch.bfloat16):
        with ambient(dtype, "cpu"):
            assert numbers() == expected
    for model in models:
        model.eval().blocks[0].train()
    assert numbers() == expected
    for model in models:  # even after an error
        model.norm.register_forward_pre_hook(lambda *call: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        read(*models)
    for model in models:
        assert model.blocks[0].training and not model.blocks[1].training and not model.training
        assert not any(block.attention._forward_pre_hooks for block in model.blocks)
