"""What checkpoint.py saves, loads, resumes and stops; runs are those of test_train.py."""

import argparse
import errno
import itertools
import math
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from faults import tensors_of
from test_train import EXTRA, batch, small_model, train_small

from nala_min import checkpoint
from nala_min.flags import UsageError, run_script
from nala_min.train import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")


# --- Files ---------------------------------------------------------------------------------------


def test_a_checkpoint_of_another_script_is_refused(tmp_path):
    path = tmp_path / "checkpoint.pt"
    torch.save({"format": checkpoint.FORMAT, "extra": {"patch": 4}}, path)
    assert checkpoint.load_checkpoint(path, "patch")["extra"] == {"patch": 4}
    with pytest.raises(UsageError, match="another script"):
        checkpoint.load_checkpoint(path, "patch", "characters")


def test_load_checkpoint_reads_what_was_saved(tmp_path):
    saved = {"format": checkpoint.FORMAT, "model": {"weight": torch.randn(3)}, "text": "ä"}
    torch.save(saved, tmp_path / "checkpoint.pt")
    loaded = checkpoint.load_checkpoint(tmp_path / "checkpoint.pt")
    assert torch.equal(loaded["model"].pop("weight"), saved["model"].pop("weight"))
    assert loaded == saved


def truncated(path):
    torch.save({"model": torch.randn(1000)}, path)
    path.write_bytes(path.read_bytes()[:2000])


DAMAGES = {
    "missing": lambda path: None,
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(b"garbage\n" * 100),
    "truncated": truncated,
    "code": lambda path: torch.save({"model": argparse.Namespace()}, path),
    "folder": lambda path: path.mkdir(),
    "a file of something else": lambda path: torch.save({"model": torch.zeros(3)}, path),
    "another version": lambda path: torch.save({"format": checkpoint.FORMAT + 1}, path),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_checkpoint_that_does_not_load_is_one_line_that_names_it(damage, tmp_path):
    path = tmp_path / "checkpoint.pt"
    DAMAGES[damage](path)
    with pytest.raises(UsageError) as error:
        checkpoint.load_checkpoint(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value).strip()


# --- Stop and resume -----------------------------------------------------------------------------


def until(stop, number=signal.SIGINT, times=1):
    """A batch function in whose step stop the signal comes."""

    def interrupted(step):
        if step == stop:
            for _ in range(times):
                signal.raise_signal(number)
        return batch(step)

    return interrupted


SIGNALS = [signal.SIGINT, signal.SIGTERM]


def assert_same_run(one, other):
    """Two checkpoints hold the same, but for the time that it took, to the last bit."""
    saved, again = checkpoint.load_checkpoint(one), checkpoint.load_checkpoint(other)
    assert saved.keys() == again.keys()
    for name in ("format", "step", "history", "extra"):
        assert saved[name] == again[name]
    saved, again = tensors_of(saved), tensors_of(again)
    assert saved.keys() == again.keys()
    assert any("exp_avg_sq" in name for name in saved)
    for name in saved:
        assert torch.equal(saved[name], again[name]), name


@pytest.mark.parametrize(
    ("stop", "number", "muon"),
    [
        (0, *SIGNALS[:1], None),
        (3, *SIGNALS[1:], None),
        (5, *SIGNALS[:1], 0.02),
        (6, *SIGNALS[1:], None),
    ],
)
def test_a_stopped_run_is_saved_and_goes_on_to_the_very_same_bits(stop, number, muon, tmp_path):
    recipe = Recipe(steps=7, learning_rate=0.01, muon=muon, warmup=2, eval_every=3)
    whole = small_model(seed=1, dropout=0.2)
    history, _ = train_small(whole, tmp_path / "whole.pt", recipe)

    handlers = [signal.getsignal(each) for each in SIGNALS]
    stopped = small_model(seed=1, dropout=0.2)
    with pytest.raises(KeyboardInterrupt, match=f"goes on from step {stop + 1}$"):
        train_small(stopped, tmp_path / "parts.pt", recipe, batch=until(stop, number))
    assert [signal.getsignal(each) for each in SIGNALS] == handlers
    assert checkpoint.load_checkpoint(tmp_path / "parts.pt")["step"] == stop + 1

    torch.manual_seed(17)  # another random state
    resumed, seen = small_model(seed=2, dropout=0.2), []
    resumed_history, _ = train_small(
        resumed,
        tmp_path / "parts.pt",
        recipe,
        batch=lambda step: (seen.append(step), batch(step))[1],
        resume=True,
    )
    assert seen == list(range(stop + 1, 7))
    assert [point["step"] for point in history] == [3, 6, 7]
    assert resumed_history == history
    assert_same_run(tmp_path / "whole.pt", tmp_path / "parts.pt")
    weights = (model.state_dict().values() for model in (whole, resumed))
    assert all(map(torch.equal, *weights))


def test_a_second_ctrl_c_does_not_wait_for_the_step(tmp_path):
    with pytest.raises(KeyboardInterrupt, match="at step 4: --resume goes on from step 3"):
        train_small(small_model(), tmp_path / "parts.pt", batch=until(4, times=2))
    train_small(small_model(), tmp_path / "whole.pt")
    train_small(small_model(seed=2), tmp_path / "parts.pt", resume=True)
    assert_same_run(tmp_path / "whole.pt", tmp_path / "parts.pt")


def test_ctrl_c_while_the_first_checkpoint_is_written_says_how_to_go_on(tmp_path, monkeypatch):
    """Whoever sees a checkpoint may stop the run, before its first step too."""
    write = checkpoint.write_whole

    def interrupted(path, function):
        write(path, function)
        monkeypatch.setattr(checkpoint, "write_whole", write)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(checkpoint, "write_whole", interrupted)
    with pytest.raises(KeyboardInterrupt, match=r"at step 1: --resume goes on from step 1$"):
        train_small(small_model(), tmp_path / "checkpoint.pt")


@pytest.mark.parametrize("number", SIGNALS)
def test_a_script_stopped_after_training_says_how_to_go_on(number, capsys):
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit, match="130"):
            run_script(lambda: signal.raise_signal(number))
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert "--resume goes on from the last checkpoint" in capsys.readouterr().err


def test_a_second_sigterm_waits(tmp_path):
    """Launchers send it to a process and to its parent, which hands it on."""
    with pytest.raises(KeyboardInterrupt, match="goes on from step 5"):
        train_small(small_model(), tmp_path / "parts.pt", batch=until(4, signal.SIGTERM, times=2))


def test_training_in_another_thread_leaves_signals_alone(tmp_path):
    with ThreadPoolExecutor(1) as pool:
        history, _ = pool.submit(train_small, small_model(), tmp_path / "checkpoint.pt").result()
    assert [point["step"] for point in history] == [3, 6, 7]


def test_a_finished_run_resumes_to_itself(tmp_path):
    path, steps = tmp_path / "checkpoint.pt", []
    history, _ = train_small(small_model(), path)
    expected, before = checkpoint.load_checkpoint(path)["model"], path.read_bytes()
    model = small_model(seed=2)
    assert train_small(model, path, resume=True, batch=steps.append)[0] == history
    assert steps == []
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert path.read_bytes() == before


def test_the_seconds_of_a_resumed_run_count_from_its_first_start(tmp_path, monkeypatch):
    path, clock = tmp_path / "checkpoint.pt", itertools.count()
    monkeypatch.setattr(checkpoint.time, "perf_counter", lambda: next(clock))
    train_small(small_model(), path)
    saved = checkpoint.load_checkpoint(path)["seconds"]
    assert saved > 1
    assert train_small(small_model(), path, resume=True)[1] == saved + 1


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        (EXTRA | {"attention": "softmax"}, "attention"),
        (EXTRA | {"dim": 32}, "dim"),
        (EXTRA | {"seed": 1}, "seed"),
        ({"attention": "nala", "dim": 16}, "text"),
    ],
)
def test_a_run_of_another_kind_does_not_resume(extra, named, tmp_path):
    train_small(small_model(), tmp_path / "checkpoint.pt")
    with pytest.raises(UsageError, match=rf"--resume.* {named} = "):
        train_small(small_model(), tmp_path / "checkpoint.pt", extra=extra, resume=True)


def test_a_run_without_a_checkpoint_does_not_resume(tmp_path):
    with pytest.raises(UsageError, match="no checkpoint"):
        train_small(small_model(), tmp_path / "checkpoint.pt", resume=True)


def test_a_loss_that_is_not_finite_ends_the_run_and_is_not_saved(tmp_path):
    recipe = Recipe(steps=9, learning_rate=1e30, warmup=2, eval_every=3)
    with pytest.raises(UsageError, match="not finite at step 3: lower --lr"):
        train_small(small_model(), tmp_path / "checkpoint.pt", recipe)
    assert checkpoint.load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 0


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_an_evaluation_that_is_not_finite_ends_the_run_too(broken, tmp_path):
    numbers = {"test_accuracy": 0.5, "test_loss": broken}
    with pytest.raises(UsageError, match="not finite at step 3: lower --lr"):
        train_small(small_model(), tmp_path / "checkpoint.pt", evaluate=lambda model: dict(numbers))
    assert checkpoint.load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 0


def test_a_stop_after_a_loss_that_is_not_finite_saves_nothing(tmp_path):
    recipe = Recipe(steps=9, learning_rate=1e30, warmup=2, eval_every=9)
    with pytest.raises(UsageError, match="not finite at step 5: lower --lr"):
        train_small(small_model(), tmp_path / "checkpoint.pt", recipe, batch=until(4))
    assert checkpoint.load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 0


def test_a_run_that_is_not_finished_is_not_overwritten(tmp_path):
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(KeyboardInterrupt):
        train_small(small_model(), path, batch=until(3))
    before = path.read_bytes()
    with pytest.raises(UsageError, match="has come to step 4 of 7: --resume goes on with it"):
        train_small(small_model(), path)
    assert path.read_bytes() == before


def test_another_run_is_not_overwritten_but_the_same_one_is_made_again(tmp_path):
    path = tmp_path / "checkpoint.pt"
    history, _ = train_small(small_model(), path)
    before = path.read_bytes()
    with pytest.raises(UsageError, match="trained with dim = 16, not 32: delete it, or name"):
        train_small(small_model(), path, extra=EXTRA | {"dim": 32})
    path.with_name("other.pt").write_bytes(b"something else")
    with pytest.raises(UsageError, match=r"no checkpoint of this version .* delete it, or name"):
        train_small(small_model(), path.with_name("other.pt"))
    assert path.read_bytes() == before
    assert train_small(small_model(), path)[0] == history


@pytest.mark.parametrize("stop", [0, 2])
def test_a_full_disk_is_one_line_and_the_run_goes_on_from_the_last_checkpoint(
    stop, tmp_path, monkeypatch
):
    """In the first checkpoint or a later one, half of which is written."""
    write, count = checkpoint.write_whole, itertools.count()

    def full(path, fill):
        def half(file):
            fill(file)
            if next(count) == stop:
                file.truncate(file.tell() // 2)
                raise OSError(errno.ENOSPC, "No space left on device")

        write(path, half)

    monkeypatch.setattr(checkpoint, "write_whole", full)
    path = tmp_path / "run" / "checkpoint.pt"
    mend = ["mend that, or name another folder with --out", "", "--resume goes on from step 3"]
    with pytest.raises(
        UsageError, match=f"cannot be written .*No space left.*{mend[stop]}"
    ) as error:
        train_small(small_model(), path)
    assert "\n" not in str(error.value)
    train_small(small_model(), path, resume=stop > 0)
    train_small(small_model(), tmp_path / "whole.pt")
    assert_same_run(tmp_path / "whole.pt", path)
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_that_is_a_file_is_one_line_before_any_training(tmp_path):
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(UsageError, match=r"cannot be written .*name another folder with --out"):
        train_small(small_model(), tmp_path / "file" / "checkpoint.pt", batch=None)
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_the_checkpoint_is_written_at_every_evaluation(tmp_path):
    path, steps = tmp_path / "checkpoint.pt", []

    def look(step):
        steps.append(checkpoint.load_checkpoint(path)["step"] if path.exists() else 0)
        return batch(step)

    train_small(small_model(), path, batch=look)
    assert steps == [0, 0, 0, 3, 3, 3, 6]
    saved = checkpoint.load_checkpoint(path)
    assert saved["step"] == 7 and saved["extra"] == EXTRA
