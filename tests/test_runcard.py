"""A run card has all that repeats a result, and a file is written completely or not at all."""

import datetime
import os
import platform
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from training import noting

from nala_min import runcard
from nala_min.flags import UsageError


def test_a_file_is_written_completely_or_not_at_all(tmp_path, monkeypatch):
    """It is on the disk before it replaces the old one: a power failure leaves one of them."""
    path, seen, fsync = tmp_path / "file", [], os.fsync
    note = lambda file: seen.append((os.fstat(file).st_size, path.read_bytes()))  # noqa: E731
    monkeypatch.setattr(os, "fsync", noting(note, fsync))
    path.write_bytes(b"old and longer")
    with pytest.raises(TypeError):
        runcard.write_atomically(path, lambda file: file.write(b"ne") and file.write(None))
    assert path.read_bytes() == b"old and longer" and list(tmp_path.iterdir()) == [path]
    runcard.write_atomically(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]
    assert seen == [(3, b"old and longer")]


def test_json_takes_numpy_numbers_tensors_and_paths(tmp_path):
    path = str(tmp_path / "card.json")
    value = {"a": [np.float32(1.5), np.int64(3), np.arange(2)], "ü": torch.ones(1), "c": Path("x")}
    runcard.write_json(path, value)
    assert runcard.read_json(path) == {"a": [1.5, 3, [0, 1]], "ü": [1.0], "c": "x"}
    with pytest.raises(TypeError):
        runcard.write_json(path, {"object": object()})


def test_a_writable_path_gets_its_folder_and_any_other_is_one_line_with_the_flag(
    tmp_path, monkeypatch
):
    """A file may stand where a folder should be, or a folder where the file should be."""
    path = tmp_path / "new" / "folder" / "card.json"
    runcard.check_writable(path)
    assert list(path.parent.iterdir()) == []
    path.write_bytes(b"old")
    runcard.check_writable(str(path))
    assert list(path.parent.iterdir()) == [path] and path.read_bytes() == b"old"
    for wrong in (path / "card.json", path.parent):
        with pytest.raises(UsageError, match=r"^--out: .* cannot be written .*$"):
            runcard.check_writable(path, wrong)
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda dir: os.listdir(dir / "read-only"))
    with pytest.raises(UsageError, match="folder/read-only"):
        runcard.check_writable(path)


def test_a_run_card_describes_the_run(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/somewhere/script.py", "--prompt", "a b", "--steps", "3"])
    card = runcard.run_card({"dim": 16}, {"name": "x"}, torch.device("cpu"), 1.26, {"loss": 0.1})
    date = datetime.date.fromisoformat(card.pop("date"))
    assert abs((datetime.date.today() - date).days) <= 1
    cpus, name = Path("/proc/cpuinfo"), card["hardware"].pop("device")
    described = cpus.read_text(encoding="utf-8") if cpus.exists() else ""
    assert f"model name\t: {name}\n" in described or ("model name" not in described and name)
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    assert card == {
        "command": "python script.py --prompt 'a b' --steps 3",
        "config": {"dim": 16},
        "code": runcard.code_sha256(),
        "data": {"name": "x"},
        "versions": versions | {"numpy": np.__version__},
        "hardware": {"threads": torch.get_num_threads(), "processes": 1},
        "seconds": 1.3,
        "results": {"loss": 0.1},
    }


def test_a_run_knows_the_code_that_it_depends_on(tmp_path, monkeypatch):
    """The method, the training, the data and the measurements, but not comments."""
    names = [f"{x}.py" for x in ("model", "fast", "relatives", "train", "data", "measure")]
    for name in names:
        shutil.copy(Path(runcard.__file__).with_name(name), tmp_path)
    names.append("program.py")  # which was started
    shutil.copy(tmp_path / "data.py", tmp_path / "program.py")
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(tmp_path / "program.py"))
    monkeypatch.setattr(runcard, "__file__", str(tmp_path / "runcard.py"))
    hash_now = runcard.code_sha256.__wrapped__
    before = hash_now()
    for path in map(tmp_path.joinpath, names):
        text = path.read_text(encoding="utf-8")
        path.write_text(text + "\n# a comment\n", encoding="utf-8")
        assert hash_now() == before
        path.write_text(text + "\nx = 1\n", encoding="utf-8")
        assert hash_now() != before
        path.write_text(text, encoding="utf-8")
