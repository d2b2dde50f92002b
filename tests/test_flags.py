"""Wrong values of every flag of every command, made from its dataclass: one line that names the
flag, and exit code 2."""

import types
import typing
from dataclasses import fields

import pytest

import train_cifar
import train_shakespeare
from nala_min.flags import parse_flags, run_script
from nala_min.lab import bench, compare

COMMANDS = {
    "train_shakespeare.py": train_shakespeare.Settings,
    "train_cifar.py": train_cifar.Settings,
    "bench.py": bench.Settings,
    "compare.py": compare.Settings,
}
WRONG = {
    int: ["x", "1.5", "", "0x10", "-1", str(2**70)],
    float: ["x", "nan", "inf", "-0.5", "", "-1e400"],
    str: ["nope", ""],
    bool: ["--{}=yes", "--no-{}"],
}
# Any text is right, or is found out only when a file or an address is looked for: tests of the
# scripts do that.
FREE = {"data", "data_dir", "out", "predict", "prompt", "url"}


def wrong_values(settings):
    """(flag, argv) for each flag and wrong value; a flag without one is a mistake of this file."""
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
        if any(item.name in preset for preset in presets.values()) and not item.metadata["zero"]:
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
