"""Measurements of an attention, a computation and a trained model, in nala_min/measure.py."""

import math
from functools import partial

import pytest
import torch
from scripts import ambient
from torch.testing import assert_close

from nala_min import (
    ATTENTIONS,
    Config,
    NaLaLM,
    NaLaViT,
    entropy,
    key_features,
    measure,
    query_features,
    runcard,
    softmax_attention,
)
from nala_min.data import normalise
from nala_min.flags import run_script
from nala_min.measure import BUDGET
from nala_min.model import nala_attention

FIVE = ("nala", "split", "elu", "relu", "softmax")
NORMS = torch.tensor([0.01, 1.0, 4.0, 16.0])


def curve(feature_map):
    torch.manual_seed(1)
    return measure.entropy_against_norm(feature_map, NORMS, draws=50)


def test_entropy_falls_for_softmax_and_not_at_all_for_relu():
    assert (curve("softmax").diff() < 0).all()
    assert curve("softmax")[0] == pytest.approx(math.log(64), abs=1e-3)
    assert curve("relu").tolist() == pytest.approx([curve("relu")[0].item()] * 4, abs=1e-4)


def test_nala_reacts_to_small_norms_only():
    fall = -curve("nala").diff()
    assert fall[0] > 0.2
    assert fall[2].abs() < 1e-3


# --- The cost of a computation --------------------------------------------------------------------


def test_recorder_counts_operations_and_peak_bytes():
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


def test_recorder_ignores_views_and_in_place_operations():
    x, y = torch.ones(10, 10), torch.ones(10, 10)
    with measure.Recorder() as recorder:
        x.add_(1).view(100)[:5].mul_(2)
        kept = x.T
        torch.mul(x, 2, out=y)  # out is a keyword argument
    assert (recorder.peak, kept.shape) == (0, (10, 10))


def test_recorder_counts_the_memory_of_the_backward_pass():
    x = torch.ones(1000, requires_grad=True)
    with measure.Recorder() as recorder:
        x.exp().exp().sum().backward()
    assert recorder.peak > 3 * 4000
    assert recorder.allocated == 4000  # x.grad


# --- A trained model ------------------------------------------------------------------------------

ROWS, COLUMNS = 3, 5  # patches in each image


def small_vit(**options):
    """In float64, with weights large enough to make all maps differ."""
    sizes = {"num_classes": 7, "num_layers": 2, "num_heads": 2, "dim": 32, "patch_size": 2}
    model = NaLaViT(Config(**sizes | options)).double()
    for block in model.blocks:
        block.attention.project.weight.data.mul_(10.0)
    return model


def noise(count=2, height=2 * ROWS, width=2 * COLUMNS - 1):
    """Random images, (count, 3, height, width) uint8."""
    return torch.randint(256, (count, 3, height, width), dtype=torch.uint8)


@pytest.fixture
def in_float64(monkeypatch):
    """Normalise images in float64, for exact comparisons."""
    monkeypatch.setattr(measure, "normalise", lambda images: normalise(images).double())


def spy(module, seen, name):
    """Record module's first input and its output in seen[name] at every call."""
    module.register_forward_hook(
        lambda _, inputs, output: seen.__setitem__(name, (inputs[0].detach(), output))
    )


def weights_by_hand(layer, x, name):
    """Weights by Eq. (5) or (1), head by head: x (B, R, P, E) to the mean over heads (B, N, N)."""
    q, k = (x.flatten(1, 2) @ layer.project.weight.chunk(4)[i].T for i in (0, 1))
    maps = []
    for q_h, k_h in zip(q.chunk(2, -1), k.chunk(2, -1), strict=True):
        if name == "softmax":
            scores = (q_h @ k_h.mT / math.sqrt(q_h.shape[-1])).exp()
        else:
            feature_map = name.replace("nala", "cosine")
            scores = query_features(q_h, feature_map) @ key_features(k_h, feature_map).mT
        maps.append(scores / scores.sum(-1, keepdim=True).clamp_min(1e-300))  # no mass: 0
    return sum(maps) / 2


@pytest.mark.parametrize("attention", ["nala", ("softmax", "elu")])
def test_attention_maps_are_the_weights_of_the_last_block_s_own_queries_and_keys(
    attention, in_float64
):
    model, images, seen = small_vit(attention=attention), noise(), {}
    layer = model.blocks[-1].attention
    spy(layer, seen, "block")
    maps = measure.attention_maps(model, images)
    assert tuple(maps) == ("nala", "softmax", "relu")
    for name, actual in maps.items():
        expected = weights_by_hand(layer, seen["block"][0], name)
        assert actual.shape == (2, ROWS, COLUMNS, ROWS, COLUMNS)
        for r in range(ROWS):
            for s in range(COLUMNS):
                row = expected[:, COLUMNS * r + s].view(2, ROWS, COLUMNS)
                assert_close(actual[:, r, s], row, msg=f"{name} at {r}, {s}")


@pytest.mark.parametrize("attention", FIVE)
def test_the_weights_of_a_block_give_its_attention_s_output(attention, in_float64):
    """o is the input of the normalisation minus the convolution."""
    model, seen = small_vit(num_heads=1, attention=attention), {}
    layer = model.blocks[-1].attention
    for name in ("project", "local", "norm"):
        spy(getattr(layer, name), seen, name)
    weights = measure.attention_inputs(model, noise())[-1].weights()[:, 0]  # its only head
    v = seen["project"][1].chunk(4, dim=-1)[2]
    o = seen["norm"][0] - seen["local"][1][0]  # the norm's input is o + local(v)
    assert_close((weights @ v.flatten(1, 2)).view_as(o), o)


@pytest.mark.parametrize("attention", FIVE)
def test_attention_maps_are_not_negative_and_sum_to_one(attention):
    """With ReLU, to the share of the two heads whose weights are not all 0."""
    maps = measure.attention_maps(small_vit(attention=attention).float(), noise())
    for name, weights in maps.items():
        assert weights.min() >= 0, name
        heads = 2 * weights.sum((-2, -1))
        expected = heads.round().clamp(0, 2) if name == "relu" else torch.full_like(heads, 2)
        assert_close(heads, expected, msg=name)


def test_attention_maps_have_no_side_effects():
    """No hooks and no gradients. An image's map does not depend on the rest of the batch."""
    model, images = small_vit().float(), noise()
    maps = measure.attention_maps(model, images)
    assert not model.blocks[-1].attention._forward_pre_hooks
    alone = measure.attention_maps(model, images[1:])
    for name, weights in maps.items():
        assert not weights.requires_grad
        assert_close(alone[name], weights[1:])


@pytest.mark.parametrize("count", [1, 500, 1001])
def test_classify_in_batches_equals_one_batch_and_keeps_the_order(count):
    """On normalised bytes, without dropout or gradients."""
    model, images = small_vit(dim=8, num_layers=1, dropout=0.5).float().train(), noise(count)
    model.head.weight.data.mul_(100.0)
    images = images[:, :, :4, :4]
    logits = measure.classify(model, images)
    assert logits.shape == (count, 7) and not logits.requires_grad
    with torch.no_grad():
        assert_close(logits, model.eval()((images.float() - 120) / 64), rtol=1e-4, atol=1e-4)
    assert logits.unique(dim=0).shape[0] == count  # so another order would differ


def test_only_bytes_are_classified_and_measured():
    """Floats from 0 to 1 would give confident nonsense."""
    model = small_vit().float()
    for function in (measure.classify, measure.attention_stats, measure.attention_maps):
        with pytest.raises(TypeError, match=r"images must be uint8, .* got torch\.float32"):
            function(model, noise() / 255)


def test_score_by_hand():
    logits = torch.tensor([[0.0, 0.0], [0.0, math.log(3)], [math.log(3), 0.0], [0.0, 9.0]])
    labels = torch.tensor([0, 1, 1, 1])
    losses = [math.log(2), math.log(4 / 3), math.log(4), math.log(1 + math.exp(-9))]
    numbers = measure.score(logits[1:], labels[1:])
    assert numbers == {
        "test_loss": pytest.approx(sum(losses[1:]) / 3, rel=1e-5),
        "test_accuracy": pytest.approx(2 / 3),
    }
    assert measure.score(logits[:1], labels[:1])["test_loss"] == pytest.approx(losses[0])
    assert {type(number) for number in numbers.values()} == {float}


# --- Attention statistics of a trained model ----------------------------------------------------


def quantiles(x):
    """The quantiles in attention_stats: 5, 25, 50, 75 and 95 %."""
    return [float(x.flatten().quantile(level)) for level in (0.05, 0.25, 0.5, 0.75, 0.95)]


@pytest.mark.parametrize("attention", ["nala", "softmax", ("split", "relu")])
def test_stats_of_an_image_model_by_hand(attention, in_float64):
    model, images, seen = small_vit(attention=attention), noise(), {}
    for i, block in enumerate(model.blocks):
        spy(block.attention, seen, i)
    blocks = measure.attention_stats(model, images)
    assert [block["attention"] for block in blocks] == list(model.config.attentions)
    for i, block in enumerate(blocks):
        x = seen[i][0].flatten(1, 2)
        to_q, to_k, _, _ = model.blocks[i].attention.project.weight.chunk(4)
        q, k = (x @ to_q.T).detach(), (x @ to_k.T).detach()
        q, k = (y.unflatten(-1, (2, -1)).transpose(1, 2) for y in (q, k))
        norm = q.norm(dim=-1)
        assert block["query_norm"] == pytest.approx(quantiles(norm), rel=1e-5)
        if block["attention"] in ("nala", "split"):
            power = 3 * (0.5 + norm.tanh())
            assert block["power"] == pytest.approx(quantiles(power), rel=1e-5)
        else:
            assert "power" not in block
        name = block["attention"].replace("nala", "cosine")
        if name == "softmax":
            weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(dim=-1)
        else:
            weights = query_features(q, name) @ key_features(k, name).mT
            weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-300)
        entropy = -(weights * weights.clamp_min(1e-300).log()).sum(-1)
        assert block["entropy"] == pytest.approx(quantiles(entropy), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("attention", ["nala", "softmax"])
def test_stats_of_a_language_model_are_of_its_last_token(attention):
    """With two tokens, the last one's entropy is at most log 2."""
    options = {"vocab_size": 9, "num_layers": 2, "num_heads": 2, "dim": 16, "attention": attention}
    model, tokens = NaLaLM(Config(**options)), torch.randint(9, (5, 12))
    for block in measure.attention_stats(model, tokens):
        assert math.log(2) < block["entropy"][0] <= block["entropy"][-1] <= math.log(12) + 1e-6
    for block in measure.attention_stats(model, tokens[:, :2]):
        assert 0 <= block["entropy"][0] <= block["entropy"][-1] <= math.log(2) + 1e-6


@pytest.mark.parametrize("attention", ["nala", "softmax"])
def test_the_weights_of_a_language_model_do_not_look_ahead(attention):
    options = {"vocab_size": 9, "num_layers": 2, "num_heads": 2, "dim": 16, "attention": attention}
    blocks = measure.attention_inputs(NaLaLM(Config(**options)), torch.randint(9, (5, 12)))
    assert len(blocks) == 2
    for block in blocks:
        for name in ("softmax", "nala", "relu", None):
            weights = block.weights(name)
            assert weights.shape == (5, 2, 12, 12)
            assert (weights.triu(1) == 0).all() and (weights >= 0).all()
        assert torch.equal(weights, block.weights(attention))  # None means the block's own


def test_stats_are_measured_without_dropout():
    """Also in training mode: repeated calls agree."""
    options = {"vocab_size": 9, "num_layers": 2, "dim": 16, "dropout": 0.5}
    model, tokens = NaLaLM(Config(**options)), torch.randint(9, (5, 12))
    first, second = (measure.attention_stats(model.train(), tokens) for _ in range(2))
    assert first == second == measure.attention_stats(model.eval(), tokens)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_classify_and_stats_of_a_model_in_any_dtype(dtype):
    images, model = noise(), small_vit()
    logits = measure.classify(model.float(), images)
    expected = measure.attention_stats(model, images)[0]["entropy"]
    model, tolerance = model.to(dtype), 0.05 if dtype == torch.bfloat16 else 1e-3
    assert_close(measure.classify(model, images).float(), logits, rtol=0, atol=tolerance / 10)
    actual = measure.attention_stats(model, images)[0]["entropy"]
    assert actual == pytest.approx(expected, abs=tolerance)


def test_the_power_is_that_of_the_attention_s_own_lam_and_tau(monkeypatch):
    monkeypatch.setitem(ATTENTIONS, "mine", partial(nala_attention, lam=2.0, tau=1.0, alpha=5.0))
    model, tokens = small_lm(attention=("nala", "mine")), torch.randint(9, (5, 12))
    for block, lam, tau in zip(
        measure.attention_stats(model, tokens), (3, 2), (0.5, 1), strict=True
    ):
        expected = [lam * (tau + math.tanh(norm)) for norm in block["query_norm"]]
        assert block["power"] == pytest.approx(expected, abs=0.02)  # quantiles are interpolated


def test_an_attention_with_parameters_has_no_entropy(monkeypatch):
    class Mine(torch.nn.Module):
        def __init__(self, config):
            super().__init__()

        def forward(self, q, k, v, **options):
            return softmax_attention(q, k, v, **options)

    monkeypatch.setitem(ATTENTIONS, "mine", Mine)
    (stats,) = measure.attention_stats(
        small_lm(attention="mine", num_layers=1), torch.randint(9, (5, 12))
    )
    assert stats.keys() == {"attention", "query_norm"}


def test_attention_inputs_leave_no_hooks_even_after_an_error():
    model = small_vit().float()
    with pytest.raises(ValueError, match="images must be"):
        measure.attention_inputs(model, noise()[:, :2])
    measure.attention_inputs(model, noise())
    assert all(not block.attention._forward_pre_hooks for block in model.blocks)


# --- Modes, memory, PyTorch's defaults ------------------------------------------------------------


def small_lm(**options):
    sizes = {"vocab_size": 9, "num_layers": 2, "num_heads": 2, "dim": 16}
    return NaLaLM(Config(**sizes | options))


READERS = {
    "validation_loss": lambda lm, vit: measure.validation_loss(lm, torch.randint(9, (50,)), 8),
    "classify": lambda lm, vit: measure.classify(vit, noise()).tolist(),
    "text's stats": lambda lm, vit: measure.attention_stats(lm, torch.randint(9, (3, 70))),
    "images' stats": lambda lm, vit: measure.attention_stats(vit, noise()),
    "maps": lambda lm, vit: [x.tolist() for x in measure.attention_maps(vit, noise()).values()],
}


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("reader", READERS)
def test_measuring_a_model_restores_every_module_s_mode(reader, fails):
    models = small_lm(dropout=0.5), small_vit(dropout=0.5).float()
    for model in models:
        model.train().blocks[0].eval()  # a block in evaluation mode
        if fails:
            model.norm.register_forward_pre_hook(lambda *call: 1 / 0)
    modes = [[module.training for module in model.modules()] for model in models]
    try:
        READERS[reader](*models)
        assert not fails
    except ZeroDivisionError:
        assert fails
    assert [[module.training for module in model.modules()] for model in models] == modes


@pytest.mark.parametrize("reader", READERS)
def test_measurements_do_not_depend_on_torch_s_defaults(reader):
    def read():
        torch.manual_seed(1)
        return READERS[reader](*models)

    models = small_lm(), small_vit().float()
    expected = read()
    for dtype in (torch.float64, torch.bfloat16):
        with ambient(dtype, "cpu"):
            assert read() == expected


@pytest.mark.parametrize("attention", [*FIVE, "focused", "magnitude-aware"])
def test_entropies_are_those_of_all_weights(attention, monkeypatch):
    monkeypatch.setattr(measure, "MAX_QUERIES", 7)
    for model, inputs, queries in (
        (small_lm(attention=attention), torch.randint(9, (3, 12)), [11]),
        (small_vit(attention=attention).float(), noise(), [0, 3, 6, 9, 12]),
    ):
        for block in measure.attention_inputs(model, inputs):
            expected = entropy(block.weights()[:, :, queries])
            assert_close(block.entropies(), expected, rtol=1e-4, atol=1e-5)


def test_stats_of_a_compiled_model_are_those_of_the_model():
    for model, inputs in ((small_lm(), torch.randint(9, (3, 12))), (small_vit().float(), noise())):
        compiled = torch.compile(model, backend="eager")
        assert measure.attention_stats(compiled, inputs) == measure.attention_stats(model, inputs)


def peak(function, *arguments):
    with measure.Recorder() as recorder:
        function(*arguments)
    return recorder.peak


def test_memory_for_measuring_does_not_grow_with_examples_or_the_square_of_tokens(monkeypatch):
    monkeypatch.setattr(measure, "BUDGET", 2**16)
    for attention in ("nala", "softmax"):
        lm, vit = small_lm(attention=attention), small_vit(attention=attention).float()
        text, limit = torch.randint(9, (2**13 + 1,)), 60 * 4 * 2**16  # bytes
        for block in (32, 2048):
            assert peak(measure.validation_loss, lm, text, block) < limit
            assert peak(measure.attention_stats, lm, text[:-1].view(-1, block)) < limit
        for count, side in ((128, 16), (1, 64)):
            assert peak(measure.classify, vit, noise(count, side, side)) < limit
            assert peak(measure.attention_stats, vit, noise(count, side, side)) < 3 * limit


def test_batch_sizes_for_evaluating_the_default_runs():
    assert measure.eval_batch_size(small_lm(dim=128, num_heads=4), torch.zeros(1, 128)) == 64
    assert measure.eval_batch_size(small_lm(), torch.zeros(1, BUDGET)) == 1
    images = torch.zeros(3, 3, 32, 32, dtype=torch.uint8)
    assert measure.eval_batch_size(small_vit(patch_size=4, dim=64, num_heads=4), images) == 256


def test_sampled_queries_represent_all(monkeypatch):
    vit, images = small_vit().float(), noise(2, 24, 24)
    stats = []
    for queries in (64, 10**6):
        monkeypatch.setattr(measure, "MAX_QUERIES", queries)
        stats.append(measure.attention_stats(vit, images)[0])
    sampled, whole = stats
    assert sampled["query_norm"] == whole["query_norm"]
    assert sampled["entropy"] != whole["entropy"]
    assert sampled["entropy"][2] == pytest.approx(whole["entropy"][2], abs=0.1)


# --- The program ----------------------------------------------------------------------------------


@pytest.mark.parametrize("installed", [False, True])
def test_the_program_writes_the_committed_card(installed, tmp_path, monkeypatch, capsys):
    """An installed wheel writes to runs, not beside itself."""
    committed, folder = runcard.RESULTS / "entropy_gap.json", tmp_path / "results"
    card = runcard.read_json(committed)
    (folder if not installed else tmp_path).mkdir(exist_ok=True)
    monkeypatch.setattr(runcard, "RESULTS", folder)
    monkeypatch.chdir(tmp_path)
    run_script(measure.main)
    written = (tmp_path / "runs" if installed else folder) / "entropy_gap.json"
    assert runcard.read_json(written).keys() == card.keys()
    for key in ("command", "config", "data"):
        assert runcard.read_json(written)[key] == card[key]
    for name, entropies in runcard.read_json(written)["results"]["entropies"].items():
        assert entropies == pytest.approx(card["results"]["entropies"][name], abs=1e-4)
    assert written.with_suffix(".png").exists()
    assert "entropy_gap.json" in capsys.readouterr().out


def test_an_unwritable_output_is_an_error_before_the_work(tmp_path, monkeypatch, capsys):
    (tmp_path / "entropy_gap.png").mkdir()
    monkeypatch.setattr(runcard, "RESULTS", tmp_path)
    monkeypatch.setattr(measure, "entropy_against_norm", lambda *_, **__: pytest.fail("measured"))
    with pytest.raises(SystemExit, match="2"):
        run_script(measure.main)
    assert "cannot be written" in capsys.readouterr().err


def test_attention_maps_are_moved_to_the_cpu():
    """From any device. Moving from "meta", which has no values, fails."""
    with torch.device("meta"):
        model = NaLaViT(Config(num_layers=1, num_heads=2, dim=8))
        images = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    with pytest.raises(NotImplementedError, match="copy out of meta"):
        measure.attention_maps(model, images)
