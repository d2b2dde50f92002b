"""Marks one file of exercises in a fresh process, so no mark depends on what ran before it.

mark() starts the process, which runs main(): it imports the file like any module and checks the
exercises. Each verdict is a line in one file; the output of the student's code goes to another. An
exercise that crashes the process, or does not end, loses only its own mark: another process checks
the rest.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from contextlib import suppress
from importlib import util
from pathlib import Path

import numpy as np
import torch

START_LIMIT = 600  # seconds until PyTorch is imported
TIME_LIMIT = 60  # seconds for the import of the file, and for each exercise
PRINT_LIMIT = 10  # MB that a file may print; the first 10 kB are shown

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = str(Path(torch.__file__).parents[1])  # maybe only on PYTHONPATH, which ENVIRONMENT drops
CODE = """import sys; sys.path.append(sys.argv[1])
from nala_min.course import marking; marking.main(*sys.argv[2:])"""
# The variables as they were before any file ran, without those that change how Python runs.
ENVIRONMENT = {
    name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST"))
} | {"PYTHONHASHSEED": "0"}

_is_marking = False  # True in the fresh process, where a file may call checks.report


def mark(path: str | os.PathLike, names: list[str]) -> tuple[dict[str, str], str]:
    """Check the named exercises in a file. No mistake in the file raises an error.

    Returns a verdict for each exercise and the output of the file. A verdict is "right", "not done
    yet" or "wrong - ..."; its next lines may hold a traceback. A file that cannot be imported gets
    a verdict under its own name.
    """
    path = os.path.abspath(os.path.expanduser(os.fsdecode(path)))
    file, verdicts, printed = os.path.basename(path), {}, ""
    if not os.path.isfile(path) or not file.endswith(".py"):
        verdict = f"wrong - There is no Python file {path}: give the path of a .py file."
        return {file: verdict}, ""
    while not _is_marking and (remaining := [name for name in names if name not in verdicts]):
        found, text = _run(path, [file, *remaining])
        printed += text
        if found[file] != "right":
            return verdicts | found, printed
        verdicts |= found
    verdicts.pop(file, None)
    return verdicts, printed


def _run(path, steps):
    """Run one process. Returns its verdicts on the import and on the exercises, and its output."""
    with tempfile.TemporaryDirectory(prefix="nala_min_", ignore_cleanup_errors=True) as folder:
        verdict_file, printed = Path(folder, "verdicts"), Path(folder, "printed")
        verdict_file.touch()
        with printed.open("wb") as stdout:
            process = subprocess.Popen(
                [sys.executable, "-u", "-Xutf8", "-c", CODE, PACKAGES, folder, path, *steps],
                cwd=ROOT,
                env=ENVIRONMENT,
                stdin=subprocess.PIPE,  # closes when the caller ends
                stdout=stdout,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches the caller only
                creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),  # the same on Windows
            )
        with process:
            try:
                failure = _wait(process, verdict_file, printed)
            finally:
                with suppress(OSError):  # the process and its children have ended
                    if os.name == "posix":
                        os.killpg(process.pid, signal.SIGKILL)
                    else:
                        process.kill()
        lines = verdict_file.read_bytes().split(b"\n")[:-1]  # the last may be half written
        with printed.open("rb") as file:
            text = file.read(10_000).decode(errors="replace")
    if not lines:  # not the student's fault
        raise RuntimeError(f"{path} was not marked: its process did not start. {text[-500:]}")
    found = dict(zip(steps, map(json.loads, lines[1:]), strict=False))
    if len(found) < len(steps) and found.get(steps[0], "right") == "right":
        found[steps[len(found)]] = f"wrong - {failure}"
    return found, text


def _wait(process, verdict_file, printed):
    """Wait until the process ends or exceeds a limit. Returns what its last step did wrong."""
    size, last_change = 0, time.monotonic()
    while process.poll() is None:
        if verdict_file.stat().st_size > size:
            size, last_change = verdict_file.stat().st_size, time.monotonic()
        if time.monotonic() - last_change > (TIME_LIMIT if size else START_LIMIT):
            return f"It did not end within {TIME_LIMIT} s: is there an endless loop?"
        if printed.stat().st_size > PRINT_LIMIT * 1e6:
            return f"It prints more than {PRINT_LIMIT} MB: is there an endless loop?"
        time.sleep(0.02)
    if 0 <= (code := process.returncode) < 256:
        return f"It ends Python with exit code {code}: remove the call that does so."
    name = next((x.name for x in signal.Signals if x == -code), f"code {code}")
    return f"Python crashes ({name}): does it recurse endlessly, or fill the memory?"


def main(folder: str, path: str, file: str, *names: str) -> None:
    """Run in the fresh process: each step appends its verdict to the file "verdicts" in folder."""
    from nala_min.course import checks

    def write_verdict(verdict):
        with open(os.path.join(folder, "verdicts"), "a", encoding="utf-8") as output:
            output.write(json.dumps(verdict) + "\n")

    global _is_marking
    _is_marking, caller = True, os.dup(0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    # The read returns when the caller is gone.
    threading.Thread(target=lambda: os.read(caller, 1) or os._exit(1), daemon=True).start()
    with suppress(OSError):  # Linux: if memory runs out, kill this process, not the caller
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="utf-8")
    os.chdir(os.path.dirname(path))
    sys.argv, sys.path[0], sys.pycache_prefix = [path], os.path.dirname(path), folder
    sys.path.append(str(ROOT))
    module_name = re.sub(r"\W", "_", Path(path).stem)
    while module_name in sys.modules:  # such as torch.py
        module_name += "_"
    spec = util.spec_from_file_location(module_name, path)
    module = sys.modules[module_name] = util.module_from_spec(spec)
    torch.set_num_threads(1)
    write_verdict("ready")
    for step in (file, *names):
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        torch.manual_seed(0)
        verdict = "right"
        try:
            if step == file:
                spec.loader.exec_module(module)
                dtype = torch.get_default_dtype()  # the file may set its own
            else:
                checks.check_name(vars(module), step, dtype)
        except checks.NotDone as error:
            verdict = str(error)
        except checks.Wrong as error:
            trace = traceback.format_exception(error.__cause__) if error.__cause__ else []
            verdict = "\n".join([f"wrong - {error}", *trace])
        except BaseException as error:
            verdict = f"wrong - It raises {checks.describe(error, path)}"
        write_verdict(verdict)
        if step == file and verdict != "right":
            break
    os._exit(0)  # even if the file has left threads behind
