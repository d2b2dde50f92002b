"""`--attention FILE.py`, as in the README: a custom attention trains, resumes, samples, is measured
and compared like any other."""

import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from scripts import assert_mistake, flags_of, run_here

import train_cifar
import train_shakespeare
from nala_min import ATTENTIONS, data, runcard
from nala_min.flags import run_script
from nala_min.lab import compare

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
EXAMPLE, USE = re.findall(r"```python title=mine.py\n(.+?)```.+?```bash\n(.+?)```", README, re.S)[0]
TEXT = "".join(f"Line {i}: the quick brown fox jumps over 5 dogs.\n" for i in range(44))
SIZES = {"layers": 2, "heads": 2, "dim": 16, "batch": 2, "steps": 4}
ATTENTION = """
from nala_min.model import softmax_attention

def attention(q, k, v, *, causal, state=None, return_state=False):
    return softmax_attention(q, k, 2 * v, causal=causal, state=state, return_state=return_state)
"""


@pytest.fixture(params=["features", "attention"])
def folder(request, tmp_path):
    source = EXAMPLE if request.param == "features" else ATTENTION
    (tmp_path / "mine.py").write_text(source, encoding="utf-8")
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    yield tmp_path
    ATTENTIONS.pop("mine.py", None)


def text_run(folder, *flags):
    sizes = flags_of(SIZES | {"block": 8})
    return run_here(train_shakespeare, folder, *sizes, "--data", "text.txt", *flags)


def test_the_example_has_four_lines_and_these_commands():
    assert len([line for line in EXAMPLE.splitlines() if line.strip()]) == 4
    commands = [line.partition("#")[0].strip() for line in USE.strip().splitlines()]
    assert commands == [
        "python train_shakespeare.py --attention mine.py",
        'python train_shakespeare.py --attention mine.py --sample 500 --prompt "ROMEO:"',
        "python train_cifar.py --attention nala,nala,mine.py",
        "python -m nala_min.lab.compare --study recall --attention mine.py",
    ]


def test_it_trains_resumes_and_samples(folder):
    flags = ("--attention", "mine.py")
    whole = text_run(folder, *flags, "--out", "whole")
    assert whole.returncode == 0, whole.stderr
    assert "attention mine.py" in whole.stdout
    card = runcard.read_json(folder / "whole" / "card.json")
    (digest,) = card["config"]["attention_sha256"].values()
    assert re.fullmatch("[0-9a-f]{64}", digest)
    assert [block["attention"] for block in card["results"]["attention_stats"]] == ["mine.py"] * 2
    assert all("entropy" in block for block in card["results"]["attention_stats"])

    sample = text_run(folder, *flags, "--sample", "30", "--prompt", "Line", "--out", "whole")
    assert sample.returncode == 0, sample.stderr
    assert sample.stdout.startswith("Line") and len(sample.stdout) == 4 + 30 + 1
    default = run_here(train_shakespeare, folder, "--sample", "30", "--prompt", "Line",
                       "--out", "whole", "--device", "cpu")  # fmt: skip
    assert default.stdout == sample.stdout

    resumed = text_run(folder, *flags, "--out", "whole", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    settings = train_shakespeare.Settings(preset="cpu", attention=str(folder / "mine.py"))
    assert settings.out.name == "shakespeare_cpu_mine_seed1"


def test_one_block_of_an_image_model_may_use_it(folder, monkeypatch):
    images = data.drawn_images(num_train=40, num_test=20)
    monkeypatch.setattr(data, "drawn_images", lambda: images)
    flags = [*flags_of(SIZES | {"layers": 3}), "--data", "synthetic", "--out", "run"]
    result = run_here(train_cifar, folder, *flags, "--attention", "nala,nala,mine.py")
    assert result.returncode == 0, result.stderr
    assert "attention nala,nala,mine.py" in result.stdout
    stats = runcard.read_json(folder / "run" / "card.json")["results"]["attention_stats"]
    assert [block["attention"] for block in stats] == ["nala", "nala", "mine.py"]
    evaluated = run_here(train_cifar, folder, "--eval", "--data", "synthetic", "--out", "run")
    assert evaluated.returncode == 0, evaluated.stderr


def test_a_changed_file_is_another_attention(folder):
    assert text_run(folder, "--attention", "mine.py", "--out", "run").returncode == 0
    with (folder / "mine.py").open("a", encoding="utf-8") as file:
        file.write("\n# another\n")
    changed = text_run(folder, "--sample", "5", "--out", "run")
    assert_mistake(changed, train_shakespeare, "mine.py has changed since the run was trained")
    resumed = text_run(folder, "--attention", "mine.py", "--out", "run", "--resume")
    assert_mistake(resumed, train_shakespeare, "attention = mine.py, since changed")
    (folder / "mine.py").unlink()
    deleted = text_run(folder, "--sample", "5", "--out", "run")
    assert_mistake(deleted, train_shakespeare, "mine.py cannot be read")


@pytest.mark.parametrize("folder", ["features"], indirect=True)
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x = 1", "mine.py: the file must define query_features and key_features, or attention"),
        (EXAMPLE.replace(".softmax(dim=-1)", ""), "mine.py: query_features must be finite and non"),
        ("def f(:", "mine.py does not run: SyntaxError"),
    ],
)
def test_an_invalid_file_is_reported_in_one_line(folder, source, message):
    (folder / "mine.py").write_text(source, encoding="utf-8")
    for script in (train_shakespeare, train_cifar):
        result = run_here(script, folder, *flags_of(SIZES), "--attention", "mine.py")
        assert_mistake(result, script, f"--attention, --layers, --heads, --dim: {message}")
    result = run_here(train_shakespeare, folder, *flags_of(SIZES), "--attention", "other.py")
    assert_mistake(result, train_shakespeare, "other.py cannot be read: No such file")


@pytest.mark.parametrize("folder", ["features"], indirect=True)
def test_it_is_compared(folder, monkeypatch, capsys):
    """With the others, in separate processes. Only a change to the file repeats finished runs."""
    monkeypatch.chdir(folder)
    recall = compare.STUDIES["recall"]
    task = replace(recall.task, steps=2, pairs=(4, 64), tokens=256)
    study = replace(recall, task=task, variants=("nala", "elu"), seeds=1)
    monkeypatch.setitem(compare.STUDIES, "recall", study)
    argv = ["compare", "--study", "recall", "--attention", "mine.py", "--workers", "1"]
    monkeypatch.setattr("sys.argv", argv)
    run_script(compare.main)
    assert "mine.py" in capsys.readouterr().out
    card = runcard.read_json(folder / "runs" / "compare" / "recall.json")
    assert [row["variant"] for row in card["results"]["runs"]] == ["nala", "elu", "mine.py"]
    assert "--study recall --attention mine.py" in card["command"]
    assert list(card["config"]["attention_sha256"]) == ["mine.py"]

    study = compare.configured_study(
        compare.Settings(study="recall", attention="mine.py"), "recall"
    )
    done = partial(compare.finished, study, folder / "runs" / "compare" / "recall")
    assert done().keys() == {("nala", 1), ("elu", 1), ("mine.py", 1)}
    (folder / "mine.py").write_text(EXAMPLE + "\n", encoding="utf-8")
    assert done().keys() == {("nala", 1), ("elu", 1)}
