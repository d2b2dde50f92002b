import dataclasses
import hashlib
import re
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from scripts import assert_mistake, files_below, flags_of, run_here, run_process

import train_shakespeare
from nala_min import Config, NaLaLM, data, runcard, synthetic, train

TEXT = "".join(f"Line {i}: the quick brown fox jumps över 5 € dogs.\n" for i in range(44))
SIZES = {"layers": 1, "heads": 2, "dim": 16, "block": 8, "batch": 2, "steps": 3, "dropout": 0.25}
FLAGS = flags_of(SIZES)
RECIPE = {"lr": 4e-3, "muon": 0.02, "weight_decay": 0.02, "schedule": "linear"}
CONFIG = SIZES | RECIPE | {"preset": "cpu", "attention": "nala", "seed": 1}


@pytest.fixture
def run(tmp_path):
    """run(*flags): run the script in this process, from tmp_path."""
    return partial(run_here, train_shakespeare, tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run on TEXT: its folders, card and output."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_bytes(TEXT.encode("utf-8"))
    result = run_process(
        train_shakespeare, folder, *FLAGS, "--data", "text.txt", "--out", "run", "--prompt", "över"
    )
    assert result.returncode == 0, result.stderr
    card = runcard.read_json(folder / "run" / "card.json")
    return SimpleNamespace(folder=folder, run=folder / "run", card=card, result=result)


@pytest.fixture
def files(trained, tmp_path):
    """tmp_path, with good and bad texts and a copy of the run."""
    shutil.copytree(trained.folder, tmp_path, dirs_exist_ok=True)
    texts = {
        "latin1.txt": TEXT.encode("latin-1", "replace"),
        "empty.txt": b"",
        "short.txt": TEXT[:80].encode("utf-8"),
        "one_line.txt": TEXT.replace("\n", " ").encode("utf-8"),
    }
    for name, content in texts.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "garbage").mkdir()
    (tmp_path / "garbage" / "checkpoint.pt").write_bytes(b"garbage\n")
    return tmp_path


# --- Training ------------------------------------------------------------------------------------


def test_a_run_writes_its_three_files_and_nothing_else(trained):
    assert sorted(path.name for path in trained.run.iterdir()) == [
        "card.json",
        "checkpoint.pt",
        "curve.png",
    ]
    assert (trained.run / "curve.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert not (trained.folder / "cache" / "nala_min").exists()


def test_a_run_prints_its_text_loss_and_a_sample(trained):
    out, loss = trained.result.stdout, trained.card["results"]["validation_loss"]
    assert out.startswith(f"text.txt: {len(TEXT):,} characters, {len(set(TEXT))} distinct.")
    assert f"Validation loss {loss:.4f}" in out
    before, sample = out.split(f"run card: {Path('run')}\n")
    assert "step     3" in before
    assert len(sample) == len("över") + 500 + 1 and sample.startswith("över")
    assert set(sample) <= set(TEXT)


def test_a_run_gives_no_warning(trained):
    assert "Warning" not in trained.result.stderr
    assert "Error" not in trained.result.stderr


def test_the_run_card_has_the_recipe_and_the_text(trained):
    assert trained.card["config"] == CONFIG
    sha256 = hashlib.sha256(TEXT.encode("utf-8")).hexdigest()
    assert trained.card["data"] == {"name": "text.txt", "sha256": sha256, "characters": len(TEXT)}
    assert trained.card["command"].startswith("python train_shakespeare.py --preset cpu ")


def test_the_loss_on_the_card_is_that_of_the_checkpoint_on_the_last_tenth(trained):
    saved = train.load_checkpoint(trained.run / "checkpoint.pt")
    characters = sorted(set(TEXT))
    assert saved["extra"] == CONFIG | {
        "data": trained.card["data"],
        "characters": "".join(characters),
    }
    model = NaLaLM(Config(vocab_size=len(characters), num_layers=1, num_heads=2, dim=16))
    model.load_state_dict(saved["model"])
    model.eval()
    tokens = torch.tensor([characters.index(character) for character in TEXT])
    tokens = tokens[len(tokens) * 9 // 10 :]
    losses = []
    for start in range(0, len(tokens) - 8, 8):
        with torch.no_grad():
            shares = model(tokens[None, start : start + 8])[0].log_softmax(dim=-1)
        losses += [-shares[0, i, tokens[start + i + 1]].item() for i in range(8)]
    assert len(losses) > 200
    results = trained.card["results"]
    assert results["validation_loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-6)
    assert results["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert [point["step"] for point in results["history"]][-1] == 3


def test_the_last_tenth_is_not_trained_on(run, files, monkeypatch):
    """Another last tenth of the same characters gives the same weights, but another loss."""
    cut = len(TEXT) * 9 // 10
    other = TEXT[:cut] + TEXT[cut:].translate(str.maketrans("qui", "uiq"))
    assert other != TEXT and set(other) == set(TEXT)
    (files / "other.txt").write_bytes(other.encode("utf-8"))
    monkeypatch.setattr(train_shakespeare, "generate_text", lambda *arguments: "")
    weights, losses = [], []
    for name in ("text", "other"):
        windows = ["--batch", 100, "--steps", 2]  # enough that some would be in the last tenth
        assert run(*FLAGS, *windows, "--data", f"{name}.txt", "--out", name).returncode == 0
        weights.append(train.load_checkpoint(files / name / "checkpoint.pt")["model"])
        card = runcard.read_json(files / name / "card.json")
        losses.append(card["results"]["validation_loss"])
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert losses[0] != losses[1]


def test_the_data_order_depends_on_the_seed_not_the_attention(run, files, monkeypatch):
    """For a fair comparison, every attention reads the same batches."""
    seen = []
    original = data.random_windows
    monkeypatch.setattr(data, "random_windows", lambda *a: seen.append(original(*a)) or seen[-1])
    for flags in ([], ["--attention", "softmax"], ["--seed", "2"]):
        assert run(*FLAGS, "--data", "text.txt", *flags).returncode == 0
    first, softmax, other_seed = (torch.stack([x for x, _ in seen[i : i + 3]]) for i in (0, 3, 6))
    assert torch.equal(first, softmax)
    assert not torch.equal(first, other_seed)


@pytest.mark.parametrize(
    ("options", "batch", "steps"),
    [
        ({"block": 64}, 8, 3400),
        ({"block": 8192}, 1, 425),
        ({"block": 500_000}, 1, 6),
        ({"block": 8192, "batch": 3}, 3, 425),
        ({"block": 8192, "steps": 7}, 1, 7),
        ({"block": 8192, "preset": "gpu"}, 2, 4000),
    ],
    ids=str,
)
def test_longer_windows_mean_fewer_windows_and_steps(options, batch, steps):
    """By default, the total number of characters stays the same."""
    settings = train_shakespeare.Settings(**{"preset": "cpu"} | options)
    assert (settings.batch, settings.steps) == (batch, steps)
    named = {f"{name}{value}" for name, value in options.items() if name != "preset"}
    assert set(settings.out.name.split("_")[4:]) == named


def test_without_network_and_data_the_stand_in_is_announced_and_named(run, tmp_path):
    result = run(*FLAGS, "--block", 64, "--steps", 2, "--out", "run")
    assert result.returncode == 0, result.stderr
    assert "NO SHAKESPEARE" in result.stdout
    assert "Warning" not in result.stderr
    card = runcard.read_json(tmp_path / "run" / "card.json")
    assert card["data"]["name"] == synthetic.MANUAL_NAME
    assert card["data"]["sha256"] != data.SHAKESPEARE.sha256
    assert f"the last tenth of {synthetic.MANUAL_NAME}" in result.stdout
    assert list((tmp_path / "cache" / "nala_min").iterdir()) == []


def test_a_text_without_a_newline_trains(run, files):
    result = run(*FLAGS, "--data", "one_line.txt", "--out", "one_line")
    assert result.returncode == 0
    assert "Validation loss" in result.stdout


# --- Sampling, resuming, help --------------------------------------------------------------------


def test_a_sample_continues_the_prompt_from_a_checkpoint_alone(run, trained, tmp_path):
    (tmp_path / "run").mkdir()
    shutil.copy(trained.run / "checkpoint.pt", tmp_path / "run")
    command = ["--out", "run", "--device", "cpu", "--sample", 20, "--prompt", "fox ö"]
    first, again, other = run(*command), run(*command), run(*command, "--seed", 2)
    assert first.returncode == 0 and first.stderr == "run, step 3:\n"
    assert first.stdout.startswith("fox ö") and len(first.stdout) == 5 + 20 + 1
    assert again.stdout == first.stdout != other.stdout
    assert other.stdout.startswith("fox ö")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint.pt"]
    before = (trained.run / "checkpoint.pt").read_bytes()
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before


def test_a_finished_run_resumes_without_training(run, files, trained):
    command = [*FLAGS, "--data", "text.txt", "--out", "run", "--prompt", "över"]
    result = run(*command, "--resume")
    assert result.returncode == 0
    assert "step     3" not in result.stdout
    assert result.stdout.splitlines()[-1] == trained.result.stdout.splitlines()[-1]
    card = runcard.read_json(files / "run" / "card.json")
    assert card["results"] == trained.card["results"]
    assert card["command"].endswith("--resume")


def test_a_run_announces_the_results_of_committed_runs(run, files, trained, monkeypatch):
    command = [*FLAGS, "--data", "text.txt", "--out", "run", "--resume"]
    monkeypatch.setattr(runcard, "RESULTS", files)
    assert "No committed run" in run(*command).stdout
    runcard.write_json(files / "shakespeare_1.json", trained.card)
    loss = trained.card["results"]["validation_loss"]
    assert f"Expect a validation loss of about {loss:.2f}" in run(*command).stdout


def test_help_names_every_flag(run):
    result = run("--help")
    assert result.returncode == 0 and result.stderr == ""
    for field in dataclasses.fields(train_shakespeare.Settings):
        name = field.name.replace("_", "-")
        assert re.search(rf"^  --{name}\b", result.stdout, re.MULTILINE), name


# --- Mistakes of a user --------------------------------------------------------------------------

MISSING_DEVICE = "mps" if torch.cuda.is_available() else "cuda"

MISTAKES = {
    "a file that is missing": (["--data", "nowhere.txt"], "--data"),
    "a folder in place of a file": (["--data", "run"], "--data"),
    "a file that is not UTF-8": (["--data", "latin1.txt"], "--data"),
    "an empty file": (["--data", "empty.txt"], "--data"),
    "a text that is too short": (["--data", "short.txt"], "--data"),
    "a text shorter than a block": (["--block", "500"], "--data"),
    "a missing accelerator": (["--device", MISSING_DEVICE], "--device"),
    "a sample without a checkpoint": (["--sample", "5"], "--out"),
    "a sample from garbage": (["--out", "garbage", "--sample", "5"], "garbage"),
    "a prompt with an unknown character": (
        ["--out", "run", "--sample", "5", "--prompt", "ß"],
        "--prompt",
    ),
    "a sample of 0 characters": (["--out", "run", "--sample", "0"], "--sample"),
    "a training prompt with an unknown character": (["--prompt", "ß"], "--prompt"),
    "no checkpoint to resume": (["--resume"], "--out"),
    "another attention to resume": (
        ["--out", "run", "--attention", "softmax", "--resume"],
        "attention",
    ),
    "a file in place of the run's folder": (["--out", "text.txt"], "--out"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_that_names_the_flag(mistake, run, files):
    flags, named = MISTAKES[mistake]
    before = files_below(files)
    result = run(*FLAGS, "--data", "text.txt", "--out", "new", *flags)
    assert_mistake(result, train_shakespeare, named)
    assert files_below(files) == before
