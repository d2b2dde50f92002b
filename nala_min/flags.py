"""Command-line flags from a dataclass, and one-line errors."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import (
    ExitStack,
    contextmanager,
    nullcontext,
    redirect_stderr,
    redirect_stdout,
    suppress,
)
from dataclasses import field, fields
from pathlib import Path
from typing import Any, NoReturn, TextIO

import torch

from nala_min import distributed

# PyTorch's out-of-memory errors contain these words: the first on a GPU, the second on a CPU.
OUT_OF_MEMORY = ("out of memory", "can't allocate memory")


class UsageError(ValueError):
    """A user's mistake. The message names the flag and the remedy."""


def flag(
    default: Any,
    help: str,
    choices: Sequence[str] | None = None,
    *,
    affects_result: bool = True,
    allow_zero: bool = False,
) -> Any:
    """A dataclass field that parse_flags turns into a command-line flag.

    affects_result: False if it only says where and how the script runs. allow_zero: whether a
    number from PRESETS may be 0.
    """
    metadata = {"help": help, "choices": choices}
    metadata |= {"affects_result": affects_result, "allow_zero": allow_zero}
    return field(default=default, metadata=metadata)


def path(text: str) -> Path:
    """A path from the command line. ~ is the home folder, even after "--out="."""
    expanded = os.path.expanduser(text)  # Path.expanduser also expands ./~
    if expanded.startswith("~"):
        remedy = "give the full path, or write ./ before ~"
        raise argparse.ArgumentTypeError(f"{text}: no such home folder: {remedy}")
    return Path(expanded)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse_flags(settings: type, argv: Sequence[str] | None = None) -> Any:
    """Parse argv (by default the command line) into the dataclass settings, one flag per field.

    The help shows its docstring, unless Python strips docstrings, and the values of its PRESETS, if
    any. Prints one line and exits with code 2 if a flag is unknown or cannot be parsed.
    """
    parser = _Parser(
        description=settings.__doc__ if sys.flags.optimize < 2 else None,
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
            parse = path if kind is Path else kind
            options |= {"type": parse, "choices": item.metadata["choices"]}
            options["metavar"] = None if item.metadata["choices"] else kind.__name__.upper()
        parser.add_argument("--" + item.name.replace("_", "-"), **options)
    return settings(**vars(parser.parse_args(argv)))


def run_script(main: Callable[[], None]) -> None:
    """Run a script's main function. A user's mistake becomes one line on stderr and exit code 2.

    Under torchrun, each process runs main but only the first prints to stdout. Output that cannot
    be printed is dropped, so a closed pipe does not end a run.
    """
    if threading.current_thread() is threading.main_thread():  # others cannot set handlers
        for name in ("SIGTERM", "SIGHUP"):  # from a cluster; from a closing terminal
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number and signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                signal.signal(number, signal.default_int_handler)
    with _safe_streams() as devnull, _torch_defaults(), distributed.job():
        try:
            with redirect_stdout(devnull) if distributed.rank() else nullcontext():
                main()
            distributed.exit_together()
        except UsageError as error:
            _exit(f"error: {error}", 2)
        except KeyboardInterrupt as error:
            if distributed.rank():  # the first process reports it
                sys.exit(130)
            how = "--resume continues from the last checkpoint, if there is one"
            _exit(str(error) or f"interrupted: {how}", 130)
        except (MemoryError, RuntimeError) as error:
            if distributed.is_lost_peer(error):
                _exit(
                    f"error: process {distributed.rank()} stops because another process ended:"
                    f" --resume continues from the last checkpoint ({error})",
                    1,
                )
            if isinstance(error, MemoryError) or any(
                words in str(error) for words in OUT_OF_MEMORY
            ):
                _exit("error: out of memory: make the batch, the model or the input smaller", 1)
            raise
        except OSError as error:  # such as a full disk or a read-only folder
            _exit(f"error: {error}", 1)


class _SafeStream:
    """Wraps a standard stream. Drops output that cannot be written and never raises."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except UnicodeEncodeError:  # the console's encoding may lack a character
            encoding = getattr(self._stream, "encoding", None) or "ascii"
            self._attempt("write", text.encode(encoding, "replace").decode(encoding))
        except Exception as error:
            self._drop(error)
        return len(text)

    def flush(self) -> None:
        self._attempt("flush")

    def _attempt(self, method: str, *arguments: str) -> None:
        try:
            getattr(self._stream, method)(*arguments)
        except Exception as error:
            self._drop(error)

    def _drop(self, error: Exception) -> None:
        """After a broken pipe, point the descriptor at the null device; otherwise Python's flush at
        exit fails with exit code 120. Keep a stream that is only busy: it may recover."""
        if isinstance(error, OSError) and not isinstance(error, BlockingIOError):
            with suppress(Exception), Path(os.devnull).open("w", encoding="utf-8") as devnull:
                os.dup2(devnull.fileno(), self._stream.fileno())


@contextmanager
def _safe_streams() -> Iterator[TextIO]:
    """Make both standard streams safe to write to inside the block. Yields a stream that discards
    everything."""
    with ExitStack() as stack:
        for _ in range(3):  # take the descriptors of standard streams that were closed at startup:
            # libraries print to them, so no file of the run may get one
            devnull = stack.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
        stack.enter_context(redirect_stdout(out := _SafeStream(sys.stdout or devnull)))
        stack.enter_context(redirect_stderr(err := _SafeStream(sys.stderr or devnull)))
        try:
            yield devnull
        finally:
            out.flush()
            err.flush()


@contextmanager
def _torch_defaults() -> Iterator[None]:
    """Make new tensors float32 on the CPU inside the block, whatever a calling notebook has set."""
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    torch.set_default_dtype(torch.float32)
    if device.type != "cpu":
        torch.set_default_device(None)
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        if device.type != "cpu":
            torch.set_default_device(device)


def _exit(message: str, code: int) -> NoReturn:
    message = " ".join(message.splitlines())  # a library's message may have many
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(code)
