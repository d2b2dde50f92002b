"""Checkpoints: a run that is stopped resumes bit for bit, no run is overwritten or continued by
another, and what cannot be read is refused in one line."""

import argparse
import math
import shutil
import signal
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import training
from training import EXTRA, RECIPE, SAVED, batch, evaluate, loss, noting, small_model, train_small

from nala_min import NaLaLM, runcard, train
from nala_min.flags import UsageError, run_script
from nala_min.train import Recipe

signals_stay_inside, stopping_at = training.signals_stay_inside, training.stopping_at
SIGNALS = training.SIGNALS
HANGUP = getattr(signal, "SIGHUP", signal.SIGTERM)  # a closed terminal; Windows has no such signal


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "checkpoint.pt"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The checkpoint of a run that was not stopped."""
    path = tmp_path_factory.mktemp("whole") / "checkpoint.pt"
    train_small(small_model(), path)
    return path


@pytest.fixture
def finished(whole, path):
    """A copy of it, to resume or to damage."""
    path.parent.mkdir()
    return Path(shutil.copy(whole, path))


exactly = partial(torch.testing.assert_close, rtol=0, atol=0)  # dicts and lists of tensors


def assert_same_run(one, other):
    """Two checkpoints are equal bit for bit, except for their times."""
    one, other = (train.load_checkpoint(path) | {"seconds": 0} for path in (one, other))
    assert one.pop("extra") == other.pop("extra")
    assert "exp_avg_sq" in one["optimizers"][0]["state"][0]
    exactly(one, other)


@pytest.mark.parametrize(
    ("stop", "number", "muon"),
    [(0, signal.SIGINT, None), (5, signal.SIGTERM, 0.02), (6, HANGUP, None)],
)
def test_a_stopped_run_is_saved_and_resumes_bit_for_bit(stop, number, muon, path, tmp_path):
    recipe = Recipe(steps=7, learning_rate=0.01, muon=muon, warmup=2, eval_every=3)
    drawing = lambda model: evaluate(model) | {"drawn": torch.rand(())}  # noqa: E731
    model = small_model(seed=1, dropout=0.2)
    history, _ = train_small(model, tmp_path / "whole.pt", recipe, evaluate=drawing)
    assert [point["step"] for point in history] == [3, 6, 7]

    handlers, model = [signal.getsignal(x) for x in SIGNALS], small_model(seed=1, dropout=0.2)
    with pytest.raises(KeyboardInterrupt, match=f"--resume continues from step {stop + 1}$"):
        train_small(model, path, recipe, batch=stopping_at(stop, number), evaluate=drawing)
    assert [signal.getsignal(x) for x in SIGNALS] == handlers

    torch.manual_seed(17)  # another random state, and other weights
    steps, model = [], small_model(seed=2, dropout=0.2)
    options = {"batch": noting(steps.append, batch), "evaluate": drawing, "resume": True}
    assert train_small(model, path, recipe, **options)[0] == history
    assert steps == list(range(stop + 1, 7))
    assert_same_run(tmp_path / "whole.pt", path)
    exactly(model.state_dict(), train.load_checkpoint(path)["model"])


def test_ctrl_c_during_the_first_checkpoint_waits_and_so_does_a_second(path, monkeypatch):
    """Launchers signal a process and its parent, which forwards the signal."""
    stop = lambda *_: (signal.raise_signal(signal.SIGINT), signal.raise_signal(signal.SIGTERM))  # noqa: E731
    monkeypatch.setattr(train, "write_atomically", noting(stop, runcard.write_atomically))
    with pytest.raises(KeyboardInterrupt, match=r"--resume continues from step 0$"):
        train_small(small_model(), path)
    assert train.load_checkpoint(path)["step"] == 0


@pytest.mark.parametrize("number", SIGNALS)
def test_a_script_stopped_outside_training_says_how_to_resume(number, capsys):
    signal.signal(number, signal.SIG_DFL)
    with pytest.raises(SystemExit, match="130"):
        run_script(lambda: signal.raise_signal(number))
    assert "--resume continues from the last checkpoint" in capsys.readouterr().err
    assert signal.getsignal(number) == signal.SIG_DFL


def test_a_finished_run_resumes_to_itself_and_its_seconds_add_up(finished):
    assert 0 < train.load_checkpoint(finished)["seconds"] < 600
    torch.save(train.load_checkpoint(finished) | {"seconds": 1000.0}, finished)
    before, model = finished.read_bytes(), small_model(seed=2)
    history, seconds = train_small(model, finished, resume=True, batch=None)
    assert [point["step"] for point in history] == [3, 6, 7] and 1000 < seconds < 1600
    exactly(model.state_dict(), train.load_checkpoint(finished)["model"])
    assert finished.read_bytes() == before


def test_a_checkpoint_is_written_before_the_first_step_and_around_each_evaluation(path):
    seen = []

    def note(*args):
        saved = train.load_checkpoint(path)
        seen.append((saved["step"], len(saved["losses"]), len(saved["history"])))

    train_small(small_model(), path, loss=noting(note, loss), evaluate=noting(note, evaluate))
    first, second, third = [(0, 0, 0)] * 3, [(3, 0, 1)] * 3, [(6, 0, 2)]
    assert seen == [*first, (3, 3, 0), *second, (6, 3, 1), *third, (7, 1, 2)]
    saved = train.load_checkpoint(path)
    assert (saved["format"], saved["losses"], saved["extra"]) == (6, [], SAVED)


@pytest.mark.parametrize("failing", [3, 7])
def test_a_failed_evaluation_costs_no_step_and_is_repeated(failing, path, whole):
    fail = lambda model: 1 // (train.load_checkpoint(path)["step"] != failing)  # noqa: E731
    with pytest.raises(ZeroDivisionError):
        train_small(small_model(), path, evaluate=noting(fail, evaluate))
    train_small(small_model(seed=2), path, resume=True)
    assert_same_run(whole, path)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[9000] ^= 1  # in the weights
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        flip_a_bit,
        lambda path: path.write_bytes(path.read_bytes()[:2000]),
        lambda path: torch.save({"format": 5, "extra": SAVED}, path),
        lambda path: torch.save({"format": 6, "extra": argparse.Namespace()}, path),  # code
        lambda path: path.unlink() or path.mkdir(),
    ],
)
def test_a_damaged_checkpoint_is_refused_in_one_line(damage, finished):
    damage(finished)
    for resume in (False, True):
        with pytest.raises(UsageError, match="damaged, or of another version") as error:
            train_small(small_model(), finished, resume=resume, batch=None)
        assert str(finished) in str(error.value) and "\n" not in str(error.value)


def test_a_checkpoint_of_another_script_or_of_nobody_is_refused(finished):
    assert train.load_checkpoint(finished, "text", "dim")["extra"] == SAVED
    with pytest.raises(UsageError, match="version or script"):
        train.load_checkpoint(finished, "text", "patch")
    finished.unlink()
    with pytest.raises(UsageError, match="train first"):
        train_small(small_model(), finished, resume=True)


def test_a_run_s_description_may_hold_nan(path):
    extra = EXTRA | {"temperature": float("nan")}
    history, _ = train_small(small_model(), path, extra=extra)
    assert train_small(small_model(), path, extra=extra, resume=True)[0] == history


@pytest.mark.parametrize("name", ["step", "train_loss"])
def test_an_evaluation_does_not_replace_our_numbers(path, name):
    with pytest.raises(ValueError, match=name):
        train_small(small_model(), path, evaluate=lambda model: {name: 0.5})
    with pytest.raises(ValueError, match="must return numbers by name"):
        train_small(small_model(), path, evaluate=lambda _: None, resume=True)


def test_no_run_is_overwritten(path):
    """Neither unfinished nor finished, with the same flags or others."""
    with pytest.raises(KeyboardInterrupt):
        train_small(small_model(), path, batch=stopping_at(3))
    for step in (4, 7):
        before = path.read_bytes()
        with pytest.raises(UsageError, match=f"is the same run, at step {step}: use it with --res"):
            train_small(small_model(), path, batch=None)
        with pytest.raises(UsageError, match="trained with dim = 16, not 32: use the same flags"):
            train_small(small_model(), path, extra=EXTRA | {"dim": 32}, batch=None)
        other = replace(RECIPE, clip=5.0)
        with pytest.raises(UsageError, match=r"recipe.clip = 1.0, not 5.0: use the same flags"):
            train_small(small_model(), path, other, resume=True)
        assert path.read_bytes() == before
        train_small(small_model(), path, resume=True)


@pytest.mark.skipif(sys.platform == "win32", reason="no locks of folders")
def test_a_folder_has_one_writer_at_a_time(path):
    again = noting(lambda step: train_small(small_model(), path, resume=True), batch)
    with pytest.raises(UsageError, match="another run trains in"):
        train_small(small_model(), path, batch=again)
    train_small(small_model(), path, resume=True)


def test_a_run_from_code_knows_its_model(path):
    """A script's extra names its attention, perhaps by a file's SHA-256."""
    other = NaLaLM(replace(small_model().config, attention="softmax"))
    train_small(small_model(), path, extra={})
    with pytest.raises(UsageError, match=r"model = Config\(.*, not Config\("):
        train_small(other, path, extra={}, resume=True)


def files(attention, text="1", **digests):
    digests = {f"{name}.py": digest for name, digest in digests.items()}
    data = {"name": f"{text}.txt", "sha256": text[0]}
    return EXTRA | {"attention": attention, "attention_sha256": digests, "data": data}


@pytest.mark.parametrize(
    ("before", "now", "change"),
    [
        (files("nala", "1"), files("nala", "1 renamed"), None),
        (files("nala", "1"), files("nala", "2"), "data = 1.txt, not 2.txt"),
        (files("a.py,nala", a="1"), files("a.py,nala", a="2"), "attention = .*, since changed"),
        (EXTRA, EXTRA | {"attention": "softmax"}, "attention = nala, not softmax"),
        (EXTRA | {"note": "no sha256"}, EXTRA | {"note": "other"}, "note = no sha256, not other"),
        (EXTRA, EXTRA | {"letters": "x" * 5000}, f"letters = None, not {'x' * 99}"),
    ],
)
def test_a_run_resumes_with_renamed_files_but_not_as_another_run(before, now, change, path):
    train_small(small_model(), path, recipe := Recipe(1, 0.01), extra=before)
    if change is None:
        return train_small(small_model(), path, recipe, extra=now, resume=True)
    with pytest.raises(UsageError, match=f"{change}: use the same flags"):
        train_small(small_model(), path, recipe, extra=now, resume=True)


@pytest.mark.parametrize("broken", ["loss", "evaluation", "weight"])
def test_numbers_that_are_not_finite_end_the_run_and_are_not_saved(broken, path):
    """Of the loss, of an evaluation, or of the weights while the loss is still finite."""
    model, number = small_model(), math.inf if broken == "evaluation" else 1.0
    spoil = lambda model: broken == "weight" and model.head.weight.data.fill_(math.nan)  # noqa: E731
    recipe = Recipe(steps=9, learning_rate=1e30 if broken == "loss" else 0.01, eval_every=3)
    with pytest.raises(UsageError, match="not finite at step 3: lower --lr"):
        train_small(model, path, recipe, evaluate=noting(spoil, lambda _: {"a": number, "b": 1}))
    saved = train.load_checkpoint(path)
    assert (saved["step"], saved["history"]) == (0 if broken == "loss" else 3, [])
