"""Saving, loading, stopping and resuming, in checkpoint.py; the runs are those of test_train.py."""

import argparse
import errno
import itertools
import math
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from faults import flipped, tensors_of
from test_train import EXTRA, batch, evaluate, small_model, train_small

from nala_min import train
from nala_min.flags import UsageError, run_script
from nala_min.train import Recipe

# --- Files ---------------------------------------------------------------------------------------


def test_a_checkpoint_of_another_script_is_refused(tmp_path):
    path = tmp_path / "checkpoint.pt"
    torch.save({"format": train.FORMAT, "extra": {"patch": 4}}, path)
    assert train.load_checkpoint(path, "patch")["extra"] == {"patch": 4}
    with pytest.raises(UsageError, match="of another version or script"):
        train.load_checkpoint(path, "patch", "characters")


def changed(path, change):
    torch.save({"model": torch.ones(1000), "format": train.FORMAT, "extra": EXTRA}, path)
    path.write_bytes(change(path.read_bytes()))


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(b"garbage\n" * 100),
    "truncated": lambda path: changed(path, lambda content: content[:2000]),
    "one flipped bit": lambda path: changed(path, flipped),
    "code": lambda path: torch.save({"model": argparse.Namespace()}, path),
    "folder": lambda path: path.mkdir(),
    "a file of something else": lambda path: torch.save({"model": torch.zeros(3)}, path),
    "another version": lambda path: torch.save({"format": train.FORMAT + 1}, path),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_unreadable_checkpoint_should_be_moved_aside_not_deleted(damage, tmp_path):
    DAMAGES[damage](path := tmp_path / "checkpoint.pt")
    for resume in (False, True):
        with pytest.raises(UsageError, match="move it aside, or use another --out") as error:
            train_small(small_model(), path, resume=resume)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
        assert "delete" not in str(error.value)


# --- Stop and resume -----------------------------------------------------------------------------


def interrupt_at(stop, number=signal.SIGINT, times=1):
    """A batch function that raises the signal in step stop."""

    def interrupting(step):
        if step == stop:
            for _ in range(times):
                signal.raise_signal(number)
        return batch(step)

    return interrupting


@pytest.fixture(autouse=True)
def no_ignored_signals():
    """Under nohup or in the background, the tests would ignore signals."""
    names = [name for name in ("SIGINT", "SIGHUP") if hasattr(signal, name)]
    before = {name: signal.getsignal(getattr(signal, name)) for name in names}
    for name in names:
        handler = signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL
        signal.signal(getattr(signal, name), handler)
    yield
    for name, handler in before.items():
        signal.signal(getattr(signal, name), handler)


SIGNALS = [signal.SIGINT, signal.SIGTERM]
HANGUP = getattr(signal, "SIGHUP", signal.SIGTERM)  # a closed terminal; Windows has no such signal


def assert_same_run(one, other):
    """Two checkpoints are equal bit for bit, except for their times."""
    saved, again = train.load_checkpoint(one), train.load_checkpoint(other)
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
    [(0, signal.SIGINT, None), (5, signal.SIGINT, 0.02), (6, signal.SIGTERM, None), (4, HANGUP, 0)],
)
def test_a_stopped_run_is_saved_and_resumes_bit_for_bit(stop, number, muon, tmp_path):
    recipe = Recipe(steps=7, learning_rate=0.01, muon=muon, warmup=2, eval_every=3)
    whole = small_model(seed=1, dropout=0.2)
    history, _ = train_small(whole, tmp_path / "whole.pt", recipe)

    handlers = [signal.getsignal(sig) for sig in (*SIGNALS, HANGUP)]
    stopped = small_model(seed=1, dropout=0.2)
    with pytest.raises(KeyboardInterrupt, match=f"continues from step {stop + 1}$"):
        train_small(stopped, tmp_path / "parts.pt", recipe, batch=interrupt_at(stop, number))
    assert [signal.getsignal(sig) for sig in (*SIGNALS, HANGUP)] == handlers
    assert train.load_checkpoint(tmp_path / "parts.pt")["step"] == stop + 1

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


def test_ctrl_c_during_the_first_checkpoint_says_how_to_resume(tmp_path, monkeypatch):
    """A run can be stopped before its first step, as soon as it has a checkpoint."""
    write = train.write_atomically

    def interrupted(path, function):
        write(path, function)
        monkeypatch.setattr(train, "write_atomically", write)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(train, "write_atomically", interrupted)
    with pytest.raises(KeyboardInterrupt, match=r"--resume continues from step 0$"):
        train_small(small_model(), tmp_path / "checkpoint.pt")


@pytest.mark.parametrize("number", SIGNALS)
def test_a_script_stopped_after_training_says_how_to_resume(number, capsys):
    with pytest.raises(SystemExit, match="130"):
        run_script(lambda: signal.raise_signal(number))
    assert "--resume continues from the last checkpoint" in capsys.readouterr().err


def test_a_second_sigterm_waits(tmp_path):
    """Launchers signal a process and its parent, which forwards the signal."""
    with pytest.raises(KeyboardInterrupt, match="continues from step 5"):
        train_small(
            small_model(), tmp_path / "parts.pt", batch=interrupt_at(4, signal.SIGTERM, times=2)
        )


def test_a_finished_run_resumes_to_itself(tmp_path):
    path, steps = tmp_path / "checkpoint.pt", []
    history, _ = train_small(small_model(), path)
    expected, before = train.load_checkpoint(path)["model"], path.read_bytes()
    model = small_model(seed=2)
    assert train_small(model, path, resume=True, batch=steps.append)[0] == history
    assert steps == []
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert path.read_bytes() == before


def test_the_seconds_of_a_resumed_run_count_from_its_first_start(tmp_path):
    path = tmp_path / "checkpoint.pt"
    train_small(small_model(), path)
    torch.save(train.load_checkpoint(path) | {"seconds": 1000.0}, path)
    assert 1000 < train_small(small_model(), path, resume=True)[1] < 1060


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        (EXTRA | {"attention": "softmax"}, "attention"),
        (EXTRA | {"seed": 1}, "seed"),
        ({"attention": "nala", "dim": 16}, "text"),
    ],
)
def test_a_run_of_another_kind_does_not_resume(extra, named, tmp_path):
    train_small(small_model(), tmp_path / "checkpoint.pt")
    with pytest.raises(UsageError, match=rf"trained with {named} = "):
        train_small(small_model(), tmp_path / "checkpoint.pt", extra=extra, resume=True)


def test_a_run_without_a_checkpoint_does_not_resume(tmp_path):
    with pytest.raises(UsageError, match="no checkpoint"):
        train_small(small_model(), tmp_path / "checkpoint.pt", resume=True)


def test_a_loss_that_is_not_finite_ends_the_run_and_is_not_saved(tmp_path):
    recipe = Recipe(steps=9, learning_rate=1e30, warmup=2, eval_every=3)
    with pytest.raises(UsageError, match="not finite at step 3: lower --lr"):
        train_small(small_model(), tmp_path / "checkpoint.pt", recipe)
    assert train.load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 0


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_an_evaluation_that_is_not_finite_also_ends_the_run(broken, tmp_path):
    numbers = {"test_accuracy": 0.5, "test_loss": broken}
    with pytest.raises(UsageError, match="not finite at step 3: lower --lr"):
        train_small(small_model(), tmp_path / "checkpoint.pt", evaluate=lambda model: dict(numbers))
    assert train.load_checkpoint(tmp_path / "checkpoint.pt")["history"] == []


def test_a_run_that_is_not_finished_is_not_overwritten(tmp_path):
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(KeyboardInterrupt):
        train_small(small_model(), path, batch=interrupt_at(3))
    before = path.read_bytes()
    with pytest.raises(UsageError, match="is the same run, at step 4: use it with --resume"):
        train_small(small_model(), path)
    assert path.read_bytes() == before


def test_no_run_is_overwritten(tmp_path):
    """A finished run or a file of something else, with the same settings or others."""
    path = tmp_path / "checkpoint.pt"
    history, _ = train_small(small_model(), path)
    before = path.read_bytes()
    with pytest.raises(UsageError, match="at step 7: use it with --resume, --sample or --eval, or"):
        train_small(small_model(), path)
    with pytest.raises(UsageError, match="trained with dim = 16, not 32: use the same flags, move"):
        train_small(small_model(), path, extra=EXTRA | {"dim": 32})
    assert path.read_bytes() == before
    assert train_small(small_model(), path, resume=True)[0] == history


@pytest.mark.parametrize("stop", [0, 2])
def test_a_full_disk_is_one_line_and_the_run_resumes_from_the_last_checkpoint(
    stop, tmp_path, monkeypatch, capsys
):
    """The disk fills up halfway through the first checkpoint or a later one."""
    write, count = train.write_atomically, itertools.count()

    def full(path, fill):
        def half(file):
            fill(file)
            if next(count) == stop:
                file.truncate(file.tell() // 2)
                raise OSError(errno.ENOSPC, "No space left on device")

        write(path, half)

    monkeypatch.setattr(train, "write_atomically", full)
    monkeypatch.setattr("sys.argv", ["script.py"])
    path = tmp_path / "run" / "checkpoint.pt"
    with pytest.raises(SystemExit, match="1"):
        run_script(lambda: train_small(small_model(), path))
    assert capsys.readouterr().err.endswith(
        "script.py: error: [Errno 28] No space left on device\n"
    )
    train_small(small_model(), path, resume=stop > 0)
    train_small(small_model(), tmp_path / "whole.pt")
    assert_same_run(tmp_path / "whole.pt", path)
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_that_is_a_file_is_one_line_before_any_training(tmp_path):
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(UsageError, match=r"--out: .* cannot be written"):
        train_small(small_model(), tmp_path / "file" / "checkpoint.pt", batch=None)
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_the_checkpoint_is_written_at_every_evaluation(tmp_path):
    path, steps = tmp_path / "checkpoint.pt", []

    def read_step(step):
        steps.append(train.load_checkpoint(path)["step"] if path.exists() else 0)
        return batch(step)

    train_small(small_model(), path, batch=read_step)
    assert steps == [0, 0, 0, 3, 3, 3, 6]
    saved = train.load_checkpoint(path)
    assert saved["step"] == 7 and saved["extra"] == EXTRA


# --- Saved values can be read again --------------------------------------------------------------

PLAIN = {  # kind: (a value, its plain form)
    "paths below": ({"files": [Path("a"), (Path("b"),)]}, {"files": ["a", ["b"]]}),
    "numbers of NumPy": ([np.float32(0.5), np.float64(0.1), np.int64(3)], [0.5, 0.1, 3]),
    "an array": (np.eye(2), [[1.0, 0.0], [0.0, 1.0]]),
    "tensors": ([torch.tensor(0.5), torch.arange(3)], [0.5, [0, 1, 2]]),
    "a tuple": ((1, None), [1, None]),
}


@pytest.mark.parametrize("kind", PLAIN)
def test_values_in_extra_are_read_again_as_plain_values(kind, tmp_path):
    value, expected = PLAIN[kind]
    path, extra = tmp_path / "checkpoint.pt", EXTRA | {"more": value}
    history, _ = train_small(small_model(), path, extra=extra)
    assert train.load_checkpoint(path)["extra"]["more"] == expected
    assert train_small(small_model(), path, extra=extra, resume=True)[0] == history


@pytest.mark.parametrize("value", [{1}, {"a": [argparse.Namespace()]}, {(1, 2): 3}])
def test_values_that_cannot_be_saved_are_refused_before_any_training(value, tmp_path):
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(TypeError):
        train_small(small_model(), path, extra=EXTRA | {"more": value}, batch=None)
    assert not path.exists()


@pytest.mark.parametrize("number", [np.float32(1.5), torch.tensor(1.5)])
def test_numbers_from_evaluate_are_saved_as_plain_numbers(number, tmp_path):
    path = tmp_path / "checkpoint.pt"
    history, _ = train_small(small_model(), path, evaluate=lambda model: {"loss": number})
    assert history[-1]["loss"] == 1.5 and type(history[-1]["loss"]) is float
    assert train_small(small_model(), path, resume=True)[0] == history


@pytest.mark.parametrize(("failing", "error"), [(3, MemoryError), (7, KeyboardInterrupt)])
def test_a_failed_evaluation_costs_no_step_and_is_repeated(error, failing, tmp_path):
    """With the same random numbers."""
    path, points = tmp_path / "checkpoint.pt", iter([3, 6, 7])

    def drawing(model):
        return evaluate(model) | {"drawn": torch.rand(())}

    def drawing_or_failing(model):
        if next(points) == failing:
            raise error
        return drawing(model)

    with pytest.raises(error):
        train_small(small_model(), path, evaluate=drawing_or_failing)
    assert train.load_checkpoint(path)["step"] == failing
    train_small(small_model(seed=2), path, resume=True, evaluate=drawing)
    train_small(small_model(), tmp_path / "whole.pt", evaluate=drawing)
    assert_same_run(tmp_path / "whole.pt", path)


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    """The loss was still finite."""

    def breaking(step):
        if step == 4:
            model.frozen.fill_(math.inf)
            signal.raise_signal(signal.SIGINT)
        return batch(step)

    model = small_model()
    model.frozen = torch.nn.Parameter(torch.zeros(3), requires_grad=False)
    with pytest.raises(UsageError, match="not finite at step 5"):
        train_small(model, tmp_path / "checkpoint.pt", batch=breaking)
    assert train.load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 3


def with_data(name, digest, **more):
    return EXTRA | {"data": {"name": name, "sha256": digest}} | more


def with_attention(attention, **digests):
    files = {f"{name}.py": digest for name, digest in digests.items()}
    return EXTRA | {"attention": attention, "attention_sha256": files}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (with_data("a.txt", "1"), with_data("b.txt", "1")),
        (with_attention("nala,a.py", a="1"), with_attention("nala,b.py", b="1")),
        (
            with_attention("a.py,b.py,a.py", a="1", b="2"),
            with_attention("b.py,a.py,b.py", a="2", b="1"),
        ),
    ],
)
def test_renamed_data_and_attention_files_resume(one, other, tmp_path):
    path = tmp_path / "checkpoint.pt"
    history, _ = train_small(small_model(), path, extra=one)
    assert train_small(small_model(), path, extra=other, resume=True)[0] == history


@pytest.mark.parametrize(
    ("one", "other", "named"),
    [
        (with_data("a.txt", "1"), with_data("a.txt", "2"), "data = a.txt, since changed"),
        (
            with_attention("a.py,nala", a="1"),
            with_attention("a.py,nala", a="2"),
            "attention = a.py,nala, since changed",
        ),
        (with_attention("a.py,nala", a="1"), with_attention("nala,a.py", a="1"), "attention = "),
        (
            with_attention("a.py,b.py", a="1", b="2"),
            with_attention("b.py,a.py", a="1", b="2"),
            "attention = a.py,b.py, not b.py,a.py",
        ),
    ],
)
def test_other_content_under_the_same_name_does_not_resume(one, other, named, tmp_path):
    train_small(small_model(), path := tmp_path / "checkpoint.pt", extra=one)
    with pytest.raises(UsageError, match=named):
        train_small(small_model(), path, extra=other, resume=True)


def test_another_text_is_named_and_not_its_whole_vocabulary(tmp_path):
    path, letters = tmp_path / "checkpoint.pt", "".join(map(chr, range(0x4E00, 0x4E00 + 5000)))
    train_small(small_model(), path, extra=with_data("a.txt", "1", characters=letters))
    for digest, named in (("2", "data = .*a.txt.* not .*b.txt"), ("1", "characters = ")):
        other = with_data("b.txt", digest, characters=letters[1:])
        with pytest.raises(UsageError, match=named) as error:
            train_small(small_model(), path, extra=other, resume=True)
        assert len(str(error.value)) < 800


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no signal for a closed terminal")
def test_nohup_keeps_training_when_the_terminal_is_closed(tmp_path):
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        history, _ = train_small(
            small_model(), tmp_path / "checkpoint.pt", batch=interrupt_at(4, signal.SIGHUP)
        )
    finally:
        signal.signal(signal.SIGHUP, handler)
    assert history[-1]["step"] == 7
