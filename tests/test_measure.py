"""What nala_min/measure.py reads off an attention."""

import math

import pytest
import torch

from nala_min import measure, runcard

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
