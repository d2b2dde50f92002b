"""Command-line flags from a dataclass, and one-line errors."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import field, fields
from pathlib import Path
from typing import Any

import torch

from nala_min import distributed

OUT_OF_MEMORY = "out of memory: make the batch, the model or the input smaller"
LOST_PROCESS = "another process ended: --resume continues from the last checkpoint"
ERRORS = {  # PyTorch's words: ours
    **dict.fromkeys(("MemoryError", "out of memory", "can't allocate memory"), OUT_OF_MEMORY),
    **dict.fromkeys(("by peer", "Broken pipe", "DistBackendError"), LOST_PROCESS),
}


class UsageError(ValueError):
    """A user's mistake. The message names the flag and the remedy."""


def flag(default: Any, help: str, choices: Sequence[str] | None = None, **rules: Any) -> Any:
    """A dataclass field that parse_flags turns into a command-line flag.

    rules: affects_result=False if it only says where and how a script runs; for train.Settings, the
    limits of a number, allow_zero=True and below.
    """
    rules = {"affects_result": True, "allow_zero": False, "below": 2**31} | rules
    return field(default=default, metadata={"help": help, "choices": choices} | rules)


def path(text: str) -> Path:
    """A path from the command line. ~ is the home folder, even after "--out="."""
    expanded = os.path.expanduser(text)  # Path.expanduser also expands ./~
    if expanded.startswith("~"):
        raise argparse.ArgumentTypeError(f"{text}: no such home folder: write ./ before ~")
    return Path(expanded)


def parse_flags(settings: type, argv: Sequence[str] | None = None) -> Any:
    """Parse argv (by default the command line) into the dataclass settings, one flag per field.

    The help has its docstring and the values of its PRESETS, if any. A wrong flag prints one line
    and exits with code 2.
    """
    doc = settings.__doc__ if sys.flags.optimize < 2 else None  # python -OO strips docstrings
    parser = argparse.ArgumentParser(description=doc)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {message}\n")
    hints, presets = typing.get_type_hints(settings), getattr(settings, "PRESETS", {})
    for item in fields(settings):
        name, kind = item.name, hints[item.name]
        kind = next(iter(typing.get_args(kind)), kind)  # X of X | None
        values = [f"{x}: {preset[name]}" for x, preset in presets.items() if name in preset]
        values = [f"default: {item.default}"] if item.default else values
        text = item.metadata["help"] + (f" ({', '.join(values)})" if values else "")
        options: dict[str, Any] = {"action": "store_true"}
        if kind is not bool:
            parse = path if kind is Path else kind
            options = {"type": parse, "choices": item.metadata["choices"]}
        name = "--" + name.replace("_", "-")
        parser.add_argument(name, default=item.default, help=text, **options)
    return settings(**vars(parser.parse_args(argv)))


@contextmanager
def interrupts(handler: Callable[[int, Any], Any]) -> Iterator[None]:
    """Inside the block, call handler on Ctrl-C, on SIGTERM (from a cluster) and on SIGHUP (from a
    closing terminal), except for those that are ignored, as under nohup."""
    is_main = threading.current_thread() is threading.main_thread()  # others cannot set handlers
    names = ("SIGINT", "SIGTERM", "SIGHUP") if is_main else ()
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    numbers = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


class _Output:
    """A standard stream that drops what it cannot write: `| head -1` does not end a run."""

    def __init__(self, stream: Any):
        self.stream, self.flush = stream, lambda: None  # each write flushes

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> None:
        try:
            print(text, end="", file=self.stream, flush=True)
        except UnicodeError:  # the console lacks a character
            self.write(text.encode("ascii", "replace").decode())
        except Exception:  # drop the rest, or Python's own flush as it exits would fail
            with suppress(Exception):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def run_script(main: Callable[[], None]) -> None:
    """Run a script's main function. A user's mistake becomes one line on stderr and exit code 2.

    Under torchrun, each process runs main but only the first prints to stdout.
    """
    with ExitStack() as stack:
        for name in ("stdin", "stdout", "stderr"):
            if getattr(sys, name) is None:  # closed: no file of the run may get its descriptor
                setattr(sys, name, stack.enter_context(open(os.devnull, "w", encoding="utf-8")))
        stack.enter_context(interrupts(signal.default_int_handler))
        stack.enter_context(redirect_stdout(_Output(sys.stdout)))
        stack.enter_context(redirect_stderr(_Output(sys.stderr)))
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)  # whatever a calling notebook has set
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        try:
            with distributed.job():
                if distributed.rank():
                    stack.enter_context(redirect_stdout(None))
                return main()
        except UsageError as error:
            code, line = 2, f"error: {error}"
        except KeyboardInterrupt as error:
            how = "interrupted: --resume continues from the last checkpoint, if there is one"
            code, line = 130, str(error) or how
        except OSError as error:  # such as a full disk
            code, line = 1, f"error: {error}"
        except (MemoryError, RuntimeError) as error:
            text = f"{type(error).__name__} {error}"
            known = [ours for words, ours in ERRORS.items() if words in text]
            if not known:
                raise
            code, line = 1, f"error: {known[0]}"
        line = " ".join(line.splitlines())  # a library's message may have many
        print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
        sys.exit(code)
