"""Run cards and atomic writes."""

import datetime
import json
import os

import numpy as np
import pytest
import torch

from nala_min import runcard
from nala_min.flags import UsageError


def test_write_atomically_writes_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old and longer")
    runcard.write_atomically(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_write_atomically_keeps_the_old_file_if_writing_fails(tmp_path):
    def write(file):
        file.write(b"ne")
        file.flush()
        raise OSError("disk full")

    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(OSError, match="disk full"):
        runcard.write_atomically(path, write)
    assert path.read_bytes() == b"old"


def test_json_takes_numpy_numbers_tensors_and_paths_and_a_path_may_be_a_string(tmp_path):
    value = {
        "mean": np.float32(1.5),
        "count": np.int64(3),
        "list": np.arange(2),
        "tensor": torch.ones(2),
        "path": tmp_path,
    }
    runcard.write_json(path := str(tmp_path / "card.json"), value)
    plain = {"mean": 1.5, "count": 3, "list": [0, 1], "tensor": [1.0, 1.0], "path": str(tmp_path)}
    assert runcard.read_json(path) == plain
    with pytest.raises(TypeError):
        runcard.write_json(path, {"object": object()})
    assert runcard.read_json(path) == plain


def test_check_writable_leaves_nothing_behind(tmp_path):
    path = tmp_path / "new" / "folder" / "card.json"
    runcard.check_writable(path, str(path.with_suffix(".png")))
    assert list(path.parent.iterdir()) == []
    path.write_bytes(b"old")
    runcard.check_writable(path)
    assert list(path.parent.iterdir()) == [path] and path.read_bytes() == b"old"


UNWRITABLE = {
    "a file in place of the folder": lambda path: (
        path.parent.parent.mkdir(),
        path.parent.write_bytes(b""),
    ),
    "a file further up": lambda path: path.parent.parent.write_bytes(b""),
    "a folder in place of the file": lambda path: path.mkdir(parents=True),
    "a folder that may not be written to": lambda path: path.parent.mkdir(mode=0o500, parents=True),
}


@pytest.mark.parametrize("reason", UNWRITABLE)
def test_an_unwritable_path_is_one_line_with_the_flag(reason, tmp_path):
    if "may not" in reason and getattr(os, "geteuid", lambda: 0)() == 0:
        pytest.skip("root may write anywhere, and Windows ignores the mode")
    path = tmp_path / "some" / "folder" / "card.json"
    UNWRITABLE[reason](path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UsageError, match=r"--out: .*card\.json cannot be written") as error:
        runcard.check_writable(path)
    assert "\n" not in str(error.value)
    assert [p for p in sorted(tmp_path.rglob("*")) if p not in before] == []


def test_a_run_card_describes_the_run_and_survives_json(tmp_path, monkeypatch):
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
    assert card["versions"]["torch"] == torch.__version__
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
def test_expected_results_are_from_cards_of_the_same_config_and_data(
    config, sha256, sentence, tmp_path, monkeypatch
):
    monkeypatch.setattr(runcard, "RESULTS", tmp_path)
    losses = {"run_1": (1, "a", 1.0), "run_2": (2, "a", 1.5), "run_3": (1, "b", 9.0)}
    for name, (seed, data, loss) in (losses | {"other": (1, "a", 5.0)}).items():
        card = {"config": {"dim": 16, "seed": seed}, "data": {"sha256": data}}
        runcard.write_json(tmp_path / f"{name}.json", card | {"results": {"test_loss": loss}})
    assert runcard.expected("run_*", config, sha256, "test_loss").startswith(sentence)
