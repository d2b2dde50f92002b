"""Command-line flags from a dataclass, and one-line errors."""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import field, fields
from pathlib import Path
from typing import Any

from nala_min import distributed


class UsageError(ValueError):
    """A user's mistake. The message names the flag and the remedy."""


def flag(
    default: Any, help: str, choices=None, *, affects_result=True, least=1, below=2**31
) -> Any:
    """A dataclass field that parse_flags turns into a command-line flag. affects_result=False: it
    only says where and how a script runs. least, below: limits of a number in train.Settings."""
    metadata = {"help": help, "choices": choices, "affects_result": affects_result}
    return field(default=default, metadata=metadata | {"limits": (least, below)})


def parse_flags(settings: type, argv: Sequence[str] | None = None) -> Any:
    """Parse argv into the dataclass settings. A wrong flag prints one line: exit code 2."""
    parser = argparse.ArgumentParser(description=settings.__doc__)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {message}\n")
    kinds, presets = typing.get_type_hints(settings), getattr(settings, "PRESETS", {})
    for item in fields(settings):
        name, kind = item.name, kinds[item.name]
        values = [f"{x}: {preset[name]}" for x, preset in presets.items() if name in preset]
        values += [f"default: {item.default}"] if item.default else []
        help = item.metadata["help"] + (f" ({', '.join(values)})" if values else "")
        kind = next(iter(typing.get_args(kind)), kind)  # X of X | None
        parse = (lambda x: Path(os.path.expanduser(x))) if kind is Path else kind
        options = {"type": parse, "choices": item.metadata["choices"]}
        options = {"action": "store_true"} if kind is bool else options
        options |= {"default": item.default, "help": help}
        parser.add_argument("--" + name.replace("_", "-"), **options)
    return settings(**vars(parser.parse_args(argv)))


@contextmanager
def interrupts(handler: Callable[[int, Any], Any]) -> Iterator[None]:
    """Inside the block, call handler on Ctrl-C, on SIGTERM (from a cluster) and on SIGHUP (from a
    closing terminal), except for those that are ignored, as under nohup."""
    names = {"SIGINT", "SIGTERM", "SIGHUP"} & {*dir(signal)}  # Windows lacks the last
    before = {getattr(signal, x): signal.getsignal(getattr(signal, x)) for x in names}
    for number, old in before.items():
        signal.signal(number, old if old == signal.SIG_IGN else handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def run_script(main: Callable[[], None]) -> None:
    """Run a script's main function. A user's mistake becomes one line on stderr and exit code 2.
    Under torchrun, each process runs main but only the first prints to stdout."""
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        sys.stdout.reconfigure(errors="replace", line_buffering=True)  # the console may be ASCII
    try:
        with interrupts(signal.default_int_handler), distributed.job():
            with redirect_stdout(None) if distributed.rank() else nullcontext():
                return main()
    except UsageError as error:
        code, line = 2, f"error: {error}"
    except KeyboardInterrupt as error:
        code, line = 130, str(error) or "interrupted: --resume continues from the last checkpoint"
    except BrokenPipeError:  # the reader of `| head -1` is gone; Python's last flush would fail
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        sys.exit(1)
    except (OSError, MemoryError, RuntimeError) as error:  # such as a full disk
        if isinstance(error, RuntimeError) and not re.search("memory|compiler", str(error)):
            raise
        code, line = 1, f"error: {str(error) or 'out of memory'}"
    print(f"{Path(sys.argv[0]).name}:", *line.splitlines(), file=sys.stderr)  # in one line
    sys.exit(code)
