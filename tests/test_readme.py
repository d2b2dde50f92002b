"""The README: its commands, its code and every number of its table."""

import re
from pathlib import Path
from statistics import mean

import pytest

from nala_min import runcard

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def cards(attention):
    """The committed cards of the default Shakespeare run with another attention, by seed."""
    paths = runcard.RESULTS.glob(f"shakespeare_cpu_{attention}_seed*.json")
    return sorted((runcard.read_json(path) for path in paths), key=lambda c: c["config"]["seed"])


def test_results_table_is_the_run_cards():
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \|$", README, re.MULTILINE)
    assert {name for name, _ in rows} == {"nala", "softmax", "elu", "relu"}
    for name, row in rows:
        losses = [card["results"]["validation_loss"] for card in cards(name)]
        assert len(losses) == 3
        values = [f"{loss:.3f}" for loss in losses]
        assert row.split(" | ") == [*values, f"**{mean(losses):.3f}**"], name


def test_the_default_run_is_its_run_card():
    card = runcard.read_json(runcard.RESULTS / "shakespeare_cpu_default.json")
    assert card["command"] == "python train_shakespeare.py"
    loss, seconds = card["results"]["validation_loss"], card["seconds"]
    said = f"reached {loss:.3f} after {seconds:.0f} s of training"
    assert said in " ".join(README.split())
    assert card["config"] == cards("nala")[0]["config"]


def test_the_runs_of_the_table_differ_in_attention_and_seed_only():
    everything = [card for name in ("nala", "softmax", "elu", "relu") for card in cards(name)]
    for key in ("data", "versions"):
        assert all(card[key] == everything[0][key] for card in everything), key
    same = {"attention": "", "seed": 0}
    assert all(card["config"] | same == everything[0]["config"] | same for card in everything)
    assert len({card["results"]["parameters"] for card in everything}) == 1
    assert everything[0]["data"]["name"] == "Tiny Shakespeare"


def test_code_in_the_readme_runs():
    (code,) = re.findall(r"```python\n(.+?)```", README, re.DOTALL)
    scope = {}
    exec(code, scope)
    whole = scope["nala_attention"](scope["q"], scope["k"], scope["v"], causal=True)
    assert scope["out_rest"] == pytest.approx(whole[:, :, 700:], abs=1e-5)


def test_every_linked_file_is_there():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert len(links) > 8
    assert [link for link in links if not (ROOT / link).exists()] == []
