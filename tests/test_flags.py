"""A wrong value of any flag gives one line that names the flag, and exit code 2; the values are
generated from the commands' dataclasses. No kind of standard stream ends a run."""

import io
import os
import signal
import subprocess
import sys
import types
import typing
from dataclasses import dataclass, fields
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from scripts import environment, flags_of

import train_cifar
import train_shakespeare
from nala_min import train
from nala_min.flags import UsageError, flag, parse_flags, run_script
from nala_min.lab import bench, compare

COMMANDS = {
    "train_shakespeare.py": train_shakespeare.Settings,
    "train_cifar.py": train_cifar.Settings,
    "bench.py": bench.Settings,
    "compare.py": compare.Settings,
}
ROOT = Path(__file__).parent.parent
TEXT = ["Der Rabe flog im Mai.\n" * 40, "text.txt"]
SMALL = {"layers": 1, "heads": 2, "dim": 8, "block": 8, "batch": 2, "steps": 3}
TRAIN = [*flags_of(SMALL), "--data", TEXT[1], "--out", "run"]
WRONG = {
    int: ["x", "1.5", "", "0x10", "-1", str(2**70)],
    float: ["x", "nan", "inf", "-0.5", "", "-1e400"],
    str: ["nope", ""],
    bool: ["--{}=yes", "--no-{}"],
}
# Flags that accept any text, or whose files and URLs are only checked when opened; the scripts'
# tests cover those.
FREE = {"data", "data_dir", "out", "predict", "prompt"}


def wrong_values(settings):
    """(flag, argv) for each flag and each of its wrong values."""
    hints, presets = typing.get_type_hints(settings), getattr(settings, "PRESETS", {})
    for item in fields(settings):
        kind, flag = hints[item.name], item.name.replace("_", "-")
        kind = kind.__args__[0] if isinstance(kind, types.UnionType) else kind
        if item.name in FREE and not item.metadata["choices"]:
            continue
        values = WRONG[kind]
        if kind is bool:
            yield from ((flag, [value.format(flag)]) for value in values)
            continue
        if (
            any(item.name in preset for preset in presets.values())
            and item.metadata["limits"][0] > 0
        ):
            values = [*values, "0"]
        yield from ((flag, [f"--{flag}={value}"]) for value in values)


CASES = [
    pytest.param(command, flag, argv, id=f"{command} {argv[0]}")
    for command, settings in COMMANDS.items()
    for flag, argv in wrong_values(settings)
]


@pytest.mark.parametrize(("command", "flag", "argv"), CASES)
def test_a_wrong_value_is_one_line_that_names_the_flag(command, flag, argv, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [f"/somewhere/{command}", *argv])
    with pytest.raises(SystemExit) as exit:
        run_script(lambda: parse_flags(COMMANDS[command]))
    out, err = capsys.readouterr()
    assert exit.value.code == 2 and out == ""
    assert err.startswith(f"{command}: error: ") and err.count("\n") == 1 and err.endswith("\n")
    assert f"--{flag}" in err or argv[0] in err


def test_every_flag_has_a_wrong_value_or_is_free():
    for command, settings in COMMANDS.items():
        tried = {case.values[1] for case in CASES if case.values[0] == command}
        free = {item.name.replace("_", "-") for item in fields(settings) if item.name in FREE}
        assert tried | free == {item.name.replace("_", "-") for item in fields(settings)}


@dataclass
class Flags:
    """What this script is for."""

    name: str = flag("word", "what it is called", ["word", "other"])
    size: int = flag(3, "how large it is")
    rate: float | None = flag(None, "how fast it is")
    file: Path | None = flag(None, "where it is")
    go_on: bool = flag(False, "whether it goes on")


@pytest.mark.parametrize(
    ("argv", "field", "value"),
    [
        (["--name", "other"], "name", "other"),
        (["--size", "-7"], "size", -7),
        (["--rate", "1"], "rate", 1.0),
        (["--file", "a b/c"], "file", Path("a b/c")),
        (["--go-on"], "go_on", True),
    ],
)
def test_a_flag_sets_its_field_with_the_field_s_type(argv, field, value):
    flags = parse_flags(Flags, argv)
    assert getattr(flags, field) == value
    assert type(getattr(flags, field)) is type(value)
    setattr(flags, field, getattr(Flags(), field))
    assert flags == Flags()


def test_flags_are_read_from_the_command_line(monkeypatch):
    monkeypatch.setattr("sys.argv", ["script.py", "--size", "4"])
    assert parse_flags(Flags).size == 4


@pytest.mark.parametrize("wrong", ["--bogus", "positional", "--name=third", "--size", "--size=1.5"])
def test_a_wrong_flag_is_one_line_and_exit_code_2(wrong, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse_flags(Flags, [wrong])
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.endswith("\n")
    assert "error" in err and wrong.partition("=")[0] in err


def test_help_has_the_description_every_flag_and_the_defaults(capsys):
    with pytest.raises(SystemExit) as exit:
        parse_flags(Flags, ["--help"])
    assert exit.value.code == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert Flags.__doc__ in out
    for name in ("--name", "--size", "--rate", "--file", "--go-on"):
        assert name in out
    assert "(default: 3)" in out and "(default: word)" in out
    assert "None" not in out and "False" not in out


@dataclass
class Place:
    out: Path = flag(Path("runs"), "where")


def test_a_tilde_is_the_home_folder_even_after_an_equals_sign(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("USERPROFILE", "/home/somebody")  # for Windows
    for argv in (["--out=~/x"], ["--out", "~/x"]):
        assert parse_flags(Place, argv).out == Path("/home/somebody/x")
    assert parse_flags(Place, ["--out=./~/x"]).out == Path("./~/x")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UsageError("one\ntwo\r\nthree"), 2, "script.py: error: one two three\n"),
        (KeyboardInterrupt(), 130, "script.py: interrupted: --resume continues from the last"),
        (KeyboardInterrupt("interrupted, saved"), 130, "script.py: interrupted, saved\n"),
        (OSError(28, "No space left", "x"), 1, "error: [Errno 28] No space left: 'x'\n"),
        (MemoryError(), 1, "script.py: error: out of memory\n"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried\nto"), 1, "error: CUDA out of memory. "),
        (RuntimeError("No working C++ compiler found\nin"), 1, "error: No working C++ compiler"),
    ],
)
def test_a_script_turns_an_error_into_one_line_and_an_exit_code(
    error, code, line, monkeypatch, capsys
):
    def main():
        raise error

    monkeypatch.setattr("sys.argv", ["/somewhere/script.py"])
    with pytest.raises(SystemExit) as exit:
        run_script(main)
    assert exit.value.code == code
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert line in err and err.startswith("script.py: ")


@pytest.mark.parametrize("kind", [ValueError, RuntimeError])
def test_a_bug_in_a_script_keeps_its_traceback(kind):
    def main():
        raise kind("a bug")

    with pytest.raises(kind, match="a bug"):
        run_script(main)


def test_a_model_too_large_for_the_machine_is_one_line(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run_script(lambda: torch.empty(2**50))
    assert "can't allocate memory" in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
@pytest.mark.parametrize("before", [signal.SIG_DFL, signal.SIG_IGN], ids=["plain", "nohup"])
def test_a_closed_terminal_acts_like_ctrl_c_unless_ignored(before):
    old = signal.signal(signal.SIGHUP, before)
    seen = []
    try:
        run_script(lambda: seen.append(signal.getsignal(signal.SIGHUP)))
        assert signal.getsignal(signal.SIGHUP) == before
    finally:
        signal.signal(signal.SIGHUP, old)
    assert seen == [signal.default_int_handler if before == signal.SIG_DFL else before]


# --- Standard streams -----------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["ascii", "cp437"])
def test_characters_that_a_console_cannot_show_become_question_marks(encoding, monkeypatch):
    console = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="")
    monkeypatch.setattr("sys.stdout", console)
    run_script(lambda: print("5 € an hour © \udc80"))
    assert console.buffer.getvalue() == b"5 ? an hour ? ?\n"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / TEXT[1]).write_text(TEXT[0], encoding="utf-8")
    return tmp_path


def assert_finished(folder):
    assert {"checkpoint.pt", "card.json", "curve.png"} <= {
        p.name for p in (folder / "run").iterdir()
    }


def test_a_run_whose_reader_went_away_ends_and_resumes(folder):
    """As with `| head -1`: it ends at its next line, quietly and with a checkpoint."""
    command = [sys.executable, train_shakespeare.__file__, *TRAIN]
    options = {"cwd": folder, "env": os.environ | environment(folder)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **options, **pipes) as process:
        for _ in range(2):
            process.stdout.readline()
        process.stdout.close()
        error = process.stderr.read().decode()
    assert process.returncode == 1 and "Traceback" not in error and "Broken" not in error
    saved = train.load_checkpoint(folder / "run" / "checkpoint.pt")
    assert saved["step"] >= 1
    again = subprocess.run([*command, "--resume"], **options, timeout=300, stderr=subprocess.PIPE)
    assert again.returncode == 0, again.stderr
    assert_finished(folder)


def test_a_script_runs_in_a_notebook(folder):
    """Its streams have no reconfigure and no file descriptors."""
    cell = nbformat.v4.new_code_cell(f"%run {train_shakespeare.__file__} {' '.join(TRAIN)}")
    client = NotebookClient(
        nbformat.v4.new_notebook(cells=[cell]),
        timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        coalesce_streams=True,
    )
    notebook = client.execute(env=os.environ | environment(folder) | {"PYTHONPATH": str(ROOT)})
    shown = "".join(output.get("text", "") for output in notebook.cells[0].outputs)
    assert "Validation loss" in shown and "error" not in shown
    assert_finished(folder)
