"""Run cards, and files that are there whole or not at all."""

import datetime
import json
from importlib.metadata import version

import pytest
import torch

from nala_min import runcard


def test_write_whole_writes_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old and longer")
    runcard.write_whole(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_write_whole_keeps_the_old_file_if_the_writer_breaks_half_way(tmp_path):
    def write(file):
        file.write(b"ne")
        file.flush()
        raise OSError("disk full")

    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(OSError, match="disk full"):
        runcard.write_whole(path, write)
    assert path.read_bytes() == b"old"


def test_a_run_card_says_what_ran_on_what_and_survives_json(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/somewhere/script.py", "--prompt", "a b", "--steps", "3"])
    config, data, results = {"dim": 16}, {"name": "Märchen"}, {"loss": 0.1, "history": [{"s": 1}]}
    card = runcard.run_card(config, data, torch.device("cpu"), 1.26, results)
    runcard.write_json(tmp_path / "card.json", card)
    assert json.loads((tmp_path / "card.json").read_text(encoding="utf-8")) == card
    assert runcard.read_json(tmp_path / "card.json") == card
    assert list(tmp_path.iterdir()) == [tmp_path / "card.json"]
    assert card["command"] == "python script.py --prompt 'a b' --steps 3"
    assert (card["config"], card["data"], card["results"]) == (config, data, results)
    assert card["seconds"] == 1.3
    assert card["versions"].keys() == {"python", "torch", "numpy"}
    assert card["versions"]["torch"] == version("torch")
    assert card["hardware"]["device"] and card["hardware"]["threads"] == torch.get_num_threads()
    assert datetime.date.fromisoformat(card["date"]) >= datetime.date(2025, 1, 1)


@pytest.mark.parametrize(
    ("config", "sha256", "sentence"),
    [
        ({"dim": 16, "seed": 1}, "a", "Expect a test loss of about 1.25 (1.000 to 1.500 in 2 "),
        ({"dim": 16, "seed": 7}, "a", "Expect a test loss of about 1.25 (1.000 to 1.500 in 2 "),
        ({"dim": 16, "seed": 1}, "b", "Expect a test loss of about 9.00 (9.000 to 9.000 in 1 "),
        ({"dim": 16, "seed": 1}, "c", "No committed run"),
        ({"dim": 32, "seed": 1}, "a", "No committed run"),
        ({"dim": 16, "seed": 1, "more": 1}, "a", "No committed run"),
    ],
)
def test_what_to_expect_is_read_off_the_cards_of_the_same_config_and_data(
    config, sha256, sentence, tmp_path, monkeypatch
):
    monkeypatch.setattr(runcard, "RESULTS", tmp_path)
    losses = {"run_1": (1, "a", 1.0), "run_2": (2, "a", 1.5), "run_3": (1, "b", 9.0)}
    for name, (seed, data, loss) in (losses | {"other": (1, "a", 5.0)}).items():
        card = {"config": {"dim": 16, "seed": seed}, "data": {"sha256": data}}
        runcard.write_json(tmp_path / f"{name}.json", card | {"results": {"test_loss": loss}})
    assert runcard.expected("run_*", config, sha256, "test_loss").startswith(sentence)
