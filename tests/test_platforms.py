"""What a machine may lack, and what the code must never do."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scripts import environment, flags_of

ROOT = Path(__file__).parent.parent
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in [*(ROOT / "nala_min").rglob("*.py"), *ROOT.glob("train_*.py")]
}


def run_python(*arguments, folder, **variables):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        env=os.environ | environment(folder) | {"PYTHONPATH": str(ROOT)} | variables,
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )


def test_imports_do_not_use_the_network(tmp_path):
    code = f"""
import socket, sys
def refuse(*arguments):
    raise SystemExit(f"network: {{arguments}}")
socket.socket.connect = socket.socket.bind = socket.getaddrinfo = refuse
for name in {list(MODULES)}:
    __import__(name)
"""
    result = run_python("-W", "error", "-c", code, folder=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")


def test_tests_can_connect_only_to_the_loopback():
    with socket.socket() as client, pytest.raises(OSError, match="a test wants to connect"):
        client.connect(("192.0.2.1", 80))


def test_a_run_does_not_depend_on_the_machine_s_encoding(tmp_path):
    """Every file is opened with encoding="utf-8": a default encoding is an error here."""
    (tmp_path / "text.txt").write_bytes("Zwölf Boxkämpfer, 5 €\n".encode() * 60)
    sizes = {"layers": 1, "heads": 2, "dim": 8, "block": 8, "batch": 2, "steps": 2}
    flags = [*flags_of(sizes), "--data", "text.txt", "--out", "übung"]
    strict = ("-X", "warn_default_encoding", "-W", "error::EncodingWarning:nala_min")
    script = ROOT / "train_shakespeare.py"
    latin = {"PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    result = run_python(*strict, script, *flags, folder=tmp_path, **latin)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "übung" / "card.json").exists()


@pytest.mark.skipif(os.name != "posix", reason="Windows has no pwd")
def test_a_user_without_a_home_or_a_name_can_train(tmp_path):
    """As in a container with an arbitrary user ID. It trains on the stand-in."""
    code = """
import os, pwd, runpy, sys
for name in os.environ.keys() & {"HOME", "USER", "LOGNAME", "XDG_CACHE_HOME", "MPLCONFIGDIR"}:
    del os.environ[name]
def unknown(user):
    raise KeyError(f"uid not found: {user}")
pwd.getpwuid = unknown
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    sizes = {"layers": 1, "heads": 2, "dim": 8, "block": 8, "batch": 2, "steps": 2}
    script = [ROOT / "train_shakespeare.py", *flags_of(sizes), "--out", "run"]
    (tmp_path / "tmp").mkdir()
    result = run_python("-c", code, *script, folder=tmp_path, TMPDIR=str(tmp_path / "tmp"))
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr and "stand-in" in result.stdout
    assert (tmp_path / "run" / "card.json").exists()


@pytest.mark.parametrize("path", MODULES.values(), ids=MODULES)
def test_no_source_forks_links_or_unpickles(path):
    source = path.read_text(encoding="utf-8")
    assert not re.search(r"\bos\.fork|symlink|import pickle|pickle\.load|(?<![.\w])eval\(", source)


def test_every_load_is_of_weights_only():
    sources = "".join(path.read_text(encoding="utf-8") for path in MODULES.values())
    assert sources.count("torch.load(") == sources.count("weights_only=True)") > 0


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_autocast_can_be_disabled_on_every_device(device):
    """As nala_attention does: without a warning, even if the device is missing."""
    with torch.autocast(device, enabled=False):
        assert not torch.is_autocast_enabled(device)
