"""README.md is short; its commands, code, links and numbers are right. The package is small."""

import importlib
import re
import shlex
from math import exp
from statistics import mean

import pytest

from nala_min import runcard
from nala_min.flags import parse_flags
from nala_min.lab import bench, compare

RESULTS = runcard.RESULTS
ROOT = RESULTS.parents[1]
README, PAGE = ((x / "README.md").read_text(encoding="utf-8") for x in (ROOT, RESULTS))
PROSE = " ".join(README.split())


def card(name):
    return runcard.read_json(RESULTS / f"{name}.json")


def mean_of(task, attention, result):
    cards = (card(f"{task}_cpu_{attention}_seed{seed}") for seed in range(1, 6))
    return mean(each["results"][result] for each in cards)


def seconds(form, machine="float32"):
    which = {"length": 16384, "causal": True, "pass": "forward + backward", "form": form}
    (row,) = bench.select(card(f"speed_cpu_{machine}")["results"]["attention"], **which)
    return row["median"]


def test_it_is_one_page():
    assert len(README.split()) <= 1200
    assert len(README[: README.index("```bash")].split()) <= 150  # before the first command


def test_its_table_agrees_with_the_run_cards():
    (table,) = re.findall(r"^\| \| NaLa .+\n\|---.+\n((?:\|.+\n)+)", README, re.MULTILINE)
    runs, names = card("compare_recall")["results"]["runs"], ("nala", "elu", "softmax")
    same_state = ("nala", "elu, same state", "softmax")
    recall = [mean(compare.values(runs, name, "accuracy at 64 pairs")) for name in same_state]
    assert [[cell.strip() for cell in row.split("|")[2:-1]] for row in table.splitlines()] == [
        [f"{100 * share:.0f} %" for share in recall],
        [f"{mean_of('shakespeare', name, 'validation_loss'):.2f}" for name in names],
        [f"{100 * mean_of('cifar', name, 'test_accuracy'):.1f} %" for name in names],
        [f"{seconds('nala'):.2f} s", "", f"{seconds('softmax'):.2f} s"],
    ]


def test_its_sample_and_sentences_agree_with_the_run_cards():
    (sample,) = re.findall(r"```text\n(.+?)\n```", README, re.DOTALL)
    assert sample in card("shakespeare_cpu_default")["results"]["sample"]
    for pattern in (r"With a small.+? everything\.", "On Sh.+? ReLU", r"In runs a.+? behind\."):
        assert re.findall(pattern, " ".join(PAGE.split()))[0] in PROSE
    for task in ("shakespeare", "cifar"):  # the norm has no effect: the power is at most 4.5
        for block in card(f"{task}_cpu_nala_seed1")["results"]["attention_stats"]:
            assert min(block["power"]) > 4.4
    ours, epyc = (seconds("softmax", x) / seconds("nala", x) for x in ("float32", "epyc"))
    crossover = card("speed_cpu_float32")["results"]["crossover"]["causal, forward + backward"]
    softmax, nala = (card(f"shakespeare_cpu_{x}_block8192")["seconds"] for x in ("softmax", "nala"))
    assert f"softmax from {crossover:,} tokens; at 16,384 it is {ours:.2f} times" in PROSE
    assert f"({epyc:.1f} on an AMD EPYC)" in PROSE and f"trains {softmax / nala:.1f} times" in PROSE
    keys = {x: [*map(exp, y)] for x, y in card("entropy_gap")["results"]["entropies"].items()}
    assert f"falls from {keys['softmax'][0]:.0f} to {keys['softmax'][-1]:.1f} keys." in PROSE
    assert f"flat, elu + 1 at {min(keys['elu']):.0f} and ReLU at {min(keys['relu']):.0f}." in PROSE
    assert f"NaLa falls from {keys['nala'][0]:.0f} to {keys['nala'][-1]:.0f}" in PROSE
    assert all(max(keys[name]) - min(keys[name]) < 2 for name in ("elu", "relu"))


def test_its_commands_code_and_links_work():
    """Those of the results page, too. test_6_relatives.py has an attention of your own."""
    program = r"^(?:python|torchrun).*? (train_\w+|nala_min\.lab\.\w+)(?:\.py)?\b(.*)$"
    commands = re.findall(program, README + PAGE, re.MULTILINE)
    assert len(commands) >= 20
    for name, comment in commands:
        flags = shlex.split(comment, comments=True)
        if not any("mine.py" in flag for flag in flags):
            parse_flags(importlib.import_module(name).Settings, flags)
    (code,) = re.findall(r"```python\n(.+?)```", README, re.DOTALL)
    exec(code, scope := {})
    assert scope["out_rest"] == pytest.approx(scope["out"][:, :, 700:], abs=1e-5)
    for folder, text in ((ROOT, README), (RESULTS, PAGE)):
        links = re.findall(r"\]\((?!http)([^)#]+)\)", text)
        assert len(links) > 8 and all((folder / link).exists() for link in links), links


def test_the_package_is_small():
    """A reader opens all of it: the bound is a promise of the repository."""
    package = ROOT / "nala_min"
    lines = {x: len(x.read_text(encoding="utf-8").splitlines()) for x in package.rglob("*.py")}
    assert sum(lines.values()) <= 4700 and lines[package / "model.py"] <= 506
