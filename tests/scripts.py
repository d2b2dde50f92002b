"""Helpers that run the scripts as a user would, offline and on one thread, or change defaults."""

import io
import itertools
import urllib.request
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from types import SimpleNamespace

import matplotlib
import pytest
import torch

from nala_min.flags import run_script

FONTS = matplotlib.get_cachedir()  # before XDG_CACHE_HOME changes: indexing fonts is slow
HERE = ["--preset", "cpu", "--device", "cpu"]


def environment(folder):
    """Variables for an empty cache, no network and one thread: the cores may be busy."""
    variables = dict.fromkeys(("https_proxy", "HTTPS_PROXY"), "http://127.0.0.1:9")
    variables |= {"XDG_CACHE_HOME": str(folder / "cache"), "MPLCONFIGDIR": FONTS}
    return variables | {"OMP_NUM_THREADS": "1"}


def flags_of(sizes):
    """The flags for a dict of sizes, on the CPU."""
    flags = ((f"--{name.replace('_', '-')}", str(size)) for name, size in sizes.items())
    return [*HERE, *itertools.chain(*flags)]


def run_here(script, folder, *flags):
    """Run script, a module, with flags, from folder; in this process, where monkeypatch works."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="") for _ in range(2))
    code = 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(folder)
        patch.setattr("sys.argv", [script.__file__, *map(str, flags)])
        for name, value in environment(folder).items():
            patch.setenv(name, value)
        urllib.request.install_opener(None)  # it remembers the proxies of its first use
        try:
            run_script(script.main)
        except SystemExit as exit:
            code = exit.code
        finally:
            urllib.request.install_opener(None)
    for stream in (out, err):
        stream.seek(0)
    return SimpleNamespace(returncode=code, stdout=out.read(), stderr=err.read())


@contextmanager
def ambient(dtype, device):
    """PyTorch's default dtype and device inside the block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def files_below(folder):
    """The bytes of every file below folder, by path."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_mistake(result, script, named):
    """stderr is one line that names the mistake, and the exit code is 2."""
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1 and result.stderr.endswith("\n")
    assert result.stderr.startswith(f"{script.__name__}.py: error: ")
    assert named in result.stderr
