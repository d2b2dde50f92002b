"""What nala_min/measure.py reads off an attention and off an image model."""

import math

import pytest
import torch
from matplotlib.figure import Figure
from torch.testing import assert_close

from nala_min import (
    ATTENTIONS,
    NaLaViT,
    ViTConfig,
    entropy,
    key_features,
    measure,
    query_features,
    runcard,
)
from nala_min.data import normalise

NORMS = torch.tensor([0.01, 1.0, 4.0, 16.0])


def curve(feature_map):
    torch.manual_seed(1)
    return measure.entropy_against_norm(feature_map, NORMS, draws=50)


def test_entropy_falls_for_softmax_and_not_at_all_for_relu():
    assert (curve("softmax").diff() < 0).all()
    assert curve("softmax")[0] == pytest.approx(math.log(64), abs=1e-3)
    assert curve("relu").tolist() == pytest.approx([curve("relu")[0].item()] * 4, abs=1e-4)


def test_nala_reacts_to_small_norms_only():
    fall = -curve("cosine").diff()
    assert fall[0] > 0.2
    assert fall[2].abs() < 1e-3


def test_the_committed_card_is_what_the_code_measures():
    """One of its points for each feature map, made again."""
    card = runcard.read_json(runcard.RESULTS / "entropy_gap.json")
    norms, config = torch.tensor(card["results"]["norms"]), dict(card["config"])
    seed = config.pop("seed")
    for name, values in card["results"]["entropies"].items():
        torch.manual_seed(seed)
        (again,) = measure.entropy_against_norm(name, norms[[20]], **config).tolist()
        assert again == pytest.approx(values[20], abs=1e-4)


def test_the_picture_is_a_png(tmp_path):
    values = {name: [1.0, 2.0] for name in measure.LOOKS}
    measure.plot_entropy_gap([0.1, 1.0], values, tmp_path / "gap.png")
    assert (tmp_path / "gap.png").read_bytes().startswith(b"\x89PNG")


# --- A trained image model ------------------------------------------------------------------------

ROWS, COLUMNS = 3, 5  # of patches in every image here


def small_vit(**options):
    """In float64, with weights so large that no two maps look alike."""
    sizes = {"num_classes": 7, "num_layers": 2, "num_heads": 2, "dim": 32, "patch_size": 2}
    model = NaLaViT(ViTConfig(**sizes | options)).double()
    for block in model.blocks:
        block.attention.project.weight.data.mul_(10.0)
    return model


def bytes_of(count=2, height=2 * ROWS, width=2 * COLUMNS - 1):
    """count images of noise, (count, 3, height, width) uint8."""
    return torch.randint(256, (count, 3, height, width), dtype=torch.uint8)


@pytest.fixture
def in_float64(monkeypatch):
    """So that a map can be held to what it is made of, digit by digit."""
    monkeypatch.setattr(measure, "normalise", lambda images: normalise(images).double())


def spy(module, seen, name):
    """Put what module takes and gives into seen[name], at every call."""
    module.register_forward_hook(
        lambda _, taken, given: seen.__setitem__(name, (taken[0].detach(), given))
    )


def weights_by_hand(layer, x, name):
    """Eq. (5) or (1), head by head, of x (B, R, S, E): the mean over heads, (B, N, N)."""
    q, k = (x.flatten(1, 2) @ layer.project.weight.chunk(4)[i].T for i in (0, 1))
    maps = []
    for q_h, k_h in zip(q.chunk(2, -1), k.chunk(2, -1), strict=True):
        if name == "softmax":
            scores = (q_h @ k_h.mT / math.sqrt(q_h.shape[-1])).exp()
        else:
            scores = query_features(q_h, name) @ key_features(k_h, name).mT
        maps.append(scores / scores.sum(-1, keepdim=True).clamp_min(1e-300))  # no mass: 0
    return sum(maps) / 2


@pytest.mark.parametrize("block", [0, 1, -1])
@pytest.mark.parametrize("attention", ["nala", "softmax", ("relu", "softmax"), ("softmax", "elu")])
def test_attention_maps_are_the_weights_of_the_block_s_own_queries_and_keys(
    attention, block, in_float64
):
    model, images, seen = small_vit(attention=attention), bytes_of(), {}
    layer = model.blocks[block].attention
    spy(layer, seen, "block")
    maps = measure.attention_maps(model, images, block)
    assert tuple(maps) == measure.MAPS
    for name, got in maps.items():
        want = weights_by_hand(layer, seen["block"][0], name)
        assert got.shape == (2, ROWS, COLUMNS, ROWS, COLUMNS)
        for r in range(ROWS):
            for s in range(COLUMNS):
                row = want[:, COLUMNS * r + s].view(2, ROWS, COLUMNS)
                assert_close(got[:, r, s], row, msg=f"{name} at {r}, {s}")


@pytest.mark.parametrize(
    "options",
    [{"attention": name} for name in ATTENTIONS]
    + [{"attention": ("softmax", "split")}, {"norm_scale": None}, {"norm_scale": 3.0}]
    + [{"rope": "numerator"}, {"rope": "numerator", "attention": "elu"}],
    ids=str,
)
def test_the_map_of_the_block_s_own_kernel_makes_what_its_attention_makes(options, in_float64):
    """o, read off between the attention and the normalisation; of one head, whose map is its own
    mean."""
    model, seen = small_vit(num_heads=1, **options), {}
    layer = model.blocks[-1].attention
    for name in ("project", "local", "norm"):
        spy(getattr(layer, name), seen, name)
    kernel = ATTENTIONS[model.config.attentions[-1]] or "softmax"
    (weights,) = measure.attention_maps(model, bytes_of(), feature_maps=[kernel]).values()
    v = seen["project"][1].chunk(4, dim=-1)[2]
    o = seen["norm"][0] - seen["local"][1][0]  # what is normalised is o + local(v)
    assert_close(torch.einsum("bhwrs,brse->bhwe", weights, v), o)


@pytest.mark.parametrize("attention", [*ATTENTIONS, ("split", "softmax"), ("softmax", "nala")])
@pytest.mark.parametrize("block", [0, 1])
def test_attention_maps_are_not_negative_and_sum_to_one(attention, block):
    """Or, under ReLU, to the share of the two heads that have any mass left."""
    maps = measure.attention_maps(small_vit(attention=attention).float(), bytes_of(), block)
    for name, weights in maps.items():
        assert weights.min() >= 0, name
        heads = 2 * weights.sum((-2, -1))
        want = heads.round().clamp(0, 2) if name == "relu" else torch.full_like(heads, 2)
        assert_close(heads, want, msg=name)


def test_attention_maps_leave_nothing_behind():
    """No hook, no gradient; one image alone has the map that it has among others."""
    model, images = small_vit().float(), bytes_of()
    maps = measure.attention_maps(model, images)
    assert not model.blocks[-1].attention._forward_pre_hooks
    alone = measure.attention_maps(model, images[1:])
    for name, weights in maps.items():
        assert not weights.requires_grad
        assert_close(alone[name], weights[1:])


@pytest.mark.parametrize("count", [1, 500, 1001])
def test_classify_in_parts_is_classify_at_once_and_keeps_the_order(count):
    """On normalised bytes, without dropout or gradients."""
    model, images = small_vit(dim=8, num_layers=1, dropout=0.5).float().train(), bytes_of(count)
    model.head.weight.data.mul_(100.0)
    images = images[:, :, :4, :4]
    logits = measure.classify(model, images)
    assert logits.shape == (count, 7) and not logits.requires_grad
    with torch.no_grad():
        assert_close(logits, model.eval()((images.float() - 120) / 64), rtol=1e-4, atol=1e-4)
    assert logits.unique(dim=0).shape[0] == count  # so that another order would differ


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


def test_confusion_matrix_by_hand():
    """Rows are what it is, columns what it was taken for."""
    labels = torch.tensor([0, 0, 0, 1, 2, 2, 0])
    guesses = torch.tensor([0, 2, 2, 1, 1, 2, 0])
    confusion = measure.confusion_matrix(guesses, labels, 4)
    assert confusion.tolist() == [[2, 0, 2, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]]


def test_the_worst_pairs_count_mistakes_in_both_directions():
    """Neither the right answers on the diagonal, nor a pair twice; of equals the first is first."""
    confusion = torch.tensor([[90, 4, 1, 0], [3, 50, 0, 5], [8, 0, 70, 2], [0, 2, 0, 60]])
    assert measure.worst_pairs(confusion) == [(0, 2, 9), (0, 1, 7), (1, 3, 7)]
    assert measure.worst_pairs(confusion, 1) == [(0, 2, 9)]
    assert measure.worst_pairs(confusion, 4)[3:] == [(2, 3, 2)]
    assert measure.worst_pairs(torch.eye(3, dtype=torch.long)) == []
    assert {type(x) for pair in measure.worst_pairs(confusion) for x in pair} == {int}


# --- Its pictures ---------------------------------------------------------------------------------


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved, which can still be asked what is on them."""
    saved, savefig = [], Figure.savefig
    monkeypatch.setattr(
        Figure,
        "savefig",
        lambda self, *args, **kw: (saved.append(self), savefig(self, *args, **kw)),
    )
    return saved


def check_png(path):
    png = path.read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n") and b"IEND" in png[-12:]
    assert list(path.parent.iterdir()) == [path]


def test_plot_confusion_has_the_per_cent_of_each_class(tmp_path, figures):
    """A class without an example has a row of zeros."""
    confusion = torch.tensor([[3, 1, 0], [0, 0, 0], [1, 0, 1]])
    measure.plot_confusion(confusion, ("cat", "Bär", "dog"), "Märchen", tmp_path / "c.png")
    check_png(tmp_path / "c.png")
    axes = figures[0].axes[0]
    shares = {text.get_position()[::-1]: text.get_text() for text in axes.texts}
    rows = [[shares[i, j] for j in range(3)] for i in range(3)]
    assert rows == [["75", "25", "0"], ["0", "0", "0"], ["50", "0", "50"]]
    assert axes.get_xlabel() == "taken for" and axes.get_title() == "Märchen"
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [label.get_text() for label in labels] == ["cat", "Bär", "dog"]


def test_plot_attention_maps_frames_the_query_and_shows_its_weights(tmp_path, figures):
    """Images of 6 x 9 pixels in 3 x 5 patches: the query is at (1, 2), and so, in units of pixels,
    3.6 to the right and 2 down."""
    model, images = small_vit().float(), bytes_of(2)
    maps = measure.attention_maps(model, images)
    measure.plot_attention_maps(images, maps, "nala", tmp_path / "maps.png")
    check_png(tmp_path / "maps.png")
    (figure,) = figures
    assert "nala" in figure.get_suptitle()
    panels = [axes for axes in figure.axes if axes.patches]
    assert len(panels) == 2 * (1 + len(maps))
    for axes in panels:
        (frame,) = axes.patches
        assert frame.get_xy() == pytest.approx((3.6, 2.0))
        assert (frame.get_width(), frame.get_height()) == pytest.approx((1.8, 2.0))
        assert axes.images[0].get_extent() == [0, 9, 6, 0]
    titles = [axes.get_title() for axes in panels[:4]]
    assert titles == ["image", *(measure.LOOKS[name]["label"] for name in maps)]
    for i in range(2):
        picture, *shown = panels[4 * i : 4 * i + 4]
        assert (picture.images[0].get_array() == images[i].movedim(0, -1).numpy()).all()
        brightest = max(weights[i, 1, 2].max().item() for weights in maps.values())
        for axes, weights in zip(shown, maps.values(), strict=True):
            assert (axes.images[0].get_array() == weights[i, 1, 2].numpy()).all()
            assert axes.images[0].get_clim() == (0, pytest.approx(brightest))  # one scale a row
            patches = entropy(weights[i, 1, 2].flatten()).exp().item()
            assert axes.get_xlabel() == f"as if over {patches:.0f} of 15"


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 11), (32, 32)])
def test_plot_attention_maps_of_any_grid(height, width, tmp_path):
    images = bytes_of(1, height, width)
    maps = measure.attention_maps(small_vit(num_layers=1).float(), images)
    measure.plot_attention_maps(images, maps, "hybrid", tmp_path / "maps.png")
    check_png(tmp_path / "maps.png")
