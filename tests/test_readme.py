"""The README: its length, its commands, its code and every number in it."""

import math
import re
import tomllib
from pathlib import Path
from statistics import mean

import pytest
import test_results
from test_results import SPEED, found, reached, shorter_runs, small_tasks, speed_in_short

from nala_min import runcard
from nala_min.lab import bench

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROSE = " ".join(README.split())


def test_it_is_one_page():
    """Short enough to be read at a sitting, and the first command comes soon."""
    assert len(README.split()) <= 1200
    assert len(README[: README.index("```bash")].split()) <= 150
    tables = re.findall(r"(?:^\|.+\n)+", README, re.MULTILINE)
    assert max(len(table.splitlines()) for table in tables) <= 2 + 8


def seconds(form, length=16384):
    which = {"form": form, "length": length, "causal": True, "pass": "forward + backward"}
    (row,) = bench.select(SPEED["attention"], **which)
    return f"{row['median']:.2f} s"


def test_the_first_table_is_the_run_cards():
    (table,) = re.findall(r"^\| \| NaLa .+\n\|---.+\n((?:\|.+\n)+)", README, re.MULTILINE)
    rows = [line.strip("|").split("|")[1:] for line in table.strip().splitlines()]
    names = ("nala", "elu", "softmax")
    recall = [found("recall", name) for name in ("nala", "elu, same state", "softmax")]
    assert [[cell.strip().replace(" %", "%") for cell in row] for row in rows] == [
        [f"{mean(values):.0%}" for values in recall],
        [f"{mean(reached('shakespeare', name)):.2f}" for name in names],
        [f"{mean(reached('cifar', name)):.1%}" for name in names],
        [seconds("nala"), "", seconds("softmax")],
    ]


def test_its_verse_is_of_the_default_run():
    (verse,) = re.findall(r"```text\n(.+?)\n```", README, re.DOTALL)
    assert len(verse.splitlines()) == 6
    assert verse in test_results.default("shakespeare")["results"]["sample"]


def test_its_conclusions_are_the_run_cards():
    """Further ones are proved in test_results.py, where the page of results has them as well."""
    level = "no significant difference over five seeds."
    assert f"3. {small_tasks()[:-1]}: {level} {shorter_runs()}" in PROSE
    for task in ("shakespeare", "cifar"):  # the norm is silent
        blocks = test_results.cards(task, "nala")[0]["results"]["attention_stats"]
        assert min(min(block["power"]) for block in blocks) > 4.4  # of at most 4.5
    where, how_fast = speed_in_short()
    assert f"faster than the fused softmax {where}; {how_fast}" in PROSE


def test_the_alternative_text_of_its_first_picture_is_the_run_card():
    gap = runcard.read_json(runcard.RESULTS / "entropy_gap.json")["results"]["entropies"]
    keys = {name: [math.exp(x) for x in values] for name, values in gap.items()}
    assert (
        f"Softmax falls from {keys['softmax'][0]:.0f} to {keys['softmax'][-1]:.1f} keys. Linear"
        f" attention stays flat, elu + 1 at {min(keys['elu']):.0f} and ReLU at"
        f" {min(keys['relu']):.0f}. NaLa falls from {keys['cosine'][0]:.0f} to"
        f" {keys['cosine'][-1]:.0f}"
    ) in PROSE
    for name in ("elu", "relu"):
        assert max(keys[name]) - min(keys[name]) < 2


def test_the_parts_of_an_installation_are_the_whole():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    parts = [project["dependencies"], *project["optional-dependencies"].values()]
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    whole = {re.split("[=>]=", line)[0] for line in lines if not line.startswith("#")}
    assert sorted(re.split("[=>]=", x)[0] for part in parts for x in part) == sorted(whole)
    assert all(f".[{name}]`" in PROSE for name in project["optional-dependencies"])


def test_code_in_the_readme_runs():
    (code,) = re.findall(r"```python\n(.+?)```", README, re.DOTALL)
    scope = {}
    exec(code, scope)
    whole = scope["nala_attention"](scope["q"], scope["k"], scope["v"], causal=True)
    assert scope["out_rest"] == pytest.approx(whole[:, :, 700:], abs=1e-5)


@pytest.mark.parametrize("page", ["README.md", "notebooks/results/README.md"])
def test_every_linked_file_is_there(page):
    folder = (ROOT / page).parent
    links = re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / page).read_text(encoding="utf-8"))
    assert len(links) > 8
    assert [link for link in links if not (folder / link).exists()] == []
