"""The README: its length, its commands, its code and every number in it."""

import math
import re
import tomllib
from pathlib import Path
from statistics import mean

import pytest
import test_results
from test_results import SPEED, final_results, results_of, shorter_runs, small_tasks, speed_in_short

from nala_min import runcard
from nala_min.lab import bench

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROSE = " ".join(README.split())


def test_it_is_one_page():
    """Short enough to read in one sitting, with the first command near the top."""
    assert len(README.split()) <= 1200
    assert len(README[: README.index("```bash")].split()) <= 150
    tables = re.findall(r"(?:^\|.+\n)+", README, re.MULTILINE)
    assert max(len(table.splitlines()) for table in tables) <= 2 + 8


def seconds(form, length=16384):
    which = {"form": form, "length": length, "causal": True, "pass": "forward + backward"}
    (row,) = bench.select(SPEED["attention"], **which)
    return f"{row['median']:.2f} s"


def test_the_first_table_agrees_with_the_run_cards():
    (table,) = re.findall(r"^\| \| NaLa .+\n\|---.+\n((?:\|.+\n)+)", README, re.MULTILINE)
    rows = [line.strip("|").split("|")[1:] for line in table.strip().splitlines()]
    names = ("nala", "elu", "softmax")
    recall = [results_of("recall", name) for name in ("nala", "elu, same state", "softmax")]
    assert [[cell.strip().replace(" %", "%") for cell in row] for row in rows] == [
        [f"{mean(values):.0%}" for values in recall],
        [f"{mean(final_results('shakespeare', name)):.2f}" for name in names],
        [f"{mean(final_results('cifar', name)):.1%}" for name in names],
        [seconds("nala"), "", seconds("softmax")],
    ]


def test_its_sample_is_from_the_default_run():
    (sample,) = re.findall(r"```text\n(.+?)\n```", README, re.DOTALL)
    assert len(sample.splitlines()) == 6
    assert sample in test_results.default("shakespeare")["results"]["sample"]


def test_its_conclusions_agree_with_the_run_cards():
    """test_results.py checks those that are also on the results page."""
    level = "no significant difference over five seeds."
    assert f"3. {small_tasks()[:-1]}: {level} {shorter_runs()}" in PROSE
    for task in ("shakespeare", "cifar"):  # the norm has no effect
        blocks = test_results.cards(task, "nala")[0]["results"]["attention_stats"]
        assert min(min(block["power"]) for block in blocks) > 4.4  # the maximum is 4.5
    crossover, speedup = speed_in_short()
    assert f"faster than the fused softmax {crossover}; {speedup}" in PROSE


def test_the_alt_text_of_its_first_picture_agrees_with_the_run_card():
    gap = runcard.read_json(runcard.RESULTS / "entropy_gap.json")["results"]["entropies"]
    keys = {name: [math.exp(x) for x in values] for name, values in gap.items()}
    assert (
        f"Softmax falls from {keys['softmax'][0]:.0f} to {keys['softmax'][-1]:.1f} keys. Linear"
        f" attention stays flat, elu + 1 at {min(keys['elu']):.0f} and ReLU at"
        f" {min(keys['relu']):.0f}. NaLa falls from {keys['nala'][0]:.0f} to"
        f" {keys['nala'][-1]:.0f}"
    ) in PROSE
    for name in ("elu", "relu"):
        assert max(keys[name]) - min(keys[name]) < 2


def test_requirements_are_all_optional_dependencies_together():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    parts = [project["dependencies"], *project["optional-dependencies"].values()]
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    requirements = {re.split("[=>]=", line)[0] for line in lines if not line.startswith("#")}
    assert sorted(re.split("[=>]=", x)[0] for part in parts for x in part) == sorted(requirements)
    assert all(f".[{name}]`" in PROSE for name in project["optional-dependencies"])


def test_code_in_the_readme_runs():
    (code,) = re.findall(r"```python\n(.+?)```", README, re.DOTALL)
    scope = {}
    exec(code, scope)
    whole = scope["nala_attention"](scope["q"], scope["k"], scope["v"], causal=True)
    assert scope["out_rest"] == pytest.approx(whole[:, :, 700:], abs=1e-5)


@pytest.mark.parametrize("page", ["README.md", "notebooks/results/README.md"])
def test_every_linked_file_exists(page):
    folder = (ROOT / page).parent
    links = re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / page).read_text(encoding="utf-8"))
    assert len(links) > 8
    assert [link for link in links if not (folder / link).exists()] == []


def test_the_package_is_small():
    """A reader opens all of it: the bound is a promise of the repository."""
    files = [path.read_text(encoding="utf-8") for path in (ROOT / "nala_min").rglob("*.py")]
    assert sum(len(text.splitlines()) for text in files) <= 4700
    heart = ROOT / "nala_min" / "model.py"
    assert len(heart.read_text(encoding="utf-8").splitlines()) <= 506
