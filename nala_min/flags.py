"""A script's flags from a dataclass, and its mistakes in one line."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import types
import typing
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import field, fields
from pathlib import Path
from typing import Any, NoReturn

from nala_min import distributed

# What PyTorch's errors say, of a GPU and of a CPU, that has no memory left.
NO_MEMORY = ("out of memory", "can't allocate memory")


class UsageError(ValueError):
    """A user's mistake: its message names the flag and the mend."""


def flag(
    default: Any,
    help: str,
    choices: Sequence[str] | None = None,
    *,
    decides: bool = True,
    zero: bool = False,
) -> Any:
    """A dataclass field that parse_flags turns into a command-line flag.

    decides: whether the result depends on it, or it only says where and how to run; zero: whether a
    number of PRESETS may be 0.
    """
    metadata = {"help": help, "choices": choices, "decides": decides, "zero": zero}
    return field(default=default, metadata=metadata)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse_flags(settings: type, argv: Sequence[str] | None = None) -> Any:
    """Read argv (the command line by default) into the dataclass settings, a flag a field.

    Its docstring is the description; PRESETS, if it has them, stand in the help of what they set.
    Prints one line and exits with code 2 on a flag that is unknown or does not parse.
    """
    parser = _Parser(
        description=settings.__doc__,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=28, width=100),
    )
    hints = typing.get_type_hints(settings)
    for item in fields(settings):
        kind = hints[item.name]
        if isinstance(kind, types.UnionType):  # X | None
            kind = kind.__args__[0]
        presets = getattr(settings, "PRESETS", {})
        options: dict[str, Any] = {"help": item.metadata["help"], "default": item.default}
        if item.default:
            options["help"] += " (default: %(default)s)"
        elif any(item.name in preset for preset in presets.values()):
            values = (f"{name}: {preset[item.name]}" for name, preset in presets.items())
            options["help"] += f" ({', '.join(values)})"
        if kind is bool:
            options["action"] = "store_true"
        else:
            options |= {"type": kind, "choices": item.metadata["choices"]}
            options["metavar"] = None if item.metadata["choices"] else kind.__name__.upper()
        parser.add_argument("--" + item.name.replace("_", "-"), **options)
    return settings(**vars(parser.parse_args(argv)))


def run_script(main: Callable[[], None]) -> None:
    """Run a script's main: a user's mistake is one line on stderr and exit code 2.

    Under torchrun in each of its processes, of which only the first prints what goes well.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a cluster's Ctrl-C
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a console may not know every character of a text
    with distributed.job(), Path(os.devnull).open("w", encoding="utf-8") as nowhere:
        try:
            with redirect_stdout(nowhere) if distributed.rank() else nullcontext():
                main()
            distributed.leave()
        except UsageError as error:
            _exit(f"error: {error}", 2)
        except KeyboardInterrupt as error:
            if distributed.rank():  # the first process tells
                sys.exit(130)
            how = "--resume goes on from the last checkpoint, if there is one"
            _exit(str(error) or f"interrupted: {how}", 130)
        except (MemoryError, RuntimeError) as error:
            if distributed.is_lost_peer(error):
                _exit(
                    f"error: process {distributed.rank()} ends, as another one of this job did:"
                    " --resume goes on from the last checkpoint",
                    1,
                )
            if isinstance(error, MemoryError) or any(words in str(error) for words in NO_MEMORY):
                _exit("error: out of memory: make the batch, the model or the input smaller", 1)
            raise
        except OSError as error:  # a full disk, a folder that may not be written to
            _exit(f"error: {error}", 1)


def _exit(message: str, code: int) -> NoReturn:
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(code)
