import multiprocessing
import re
import socket
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch

import nala_min.model

LEDGER = Path(__file__).parents[1] / "notebooks" / "README.md"
QUICK = ("test_relatives", "test_ledger", "test_readme", "test_results")


def pytest_configure():
    """One thread: the models are small, and another process runs the notebooks."""
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """Marks what `-m quick` runs: the ledger's proofs of the equations, and some whole files."""
    proofs = set(re.findall(r"`(test_\w+)`", LEDGER.read_text(encoding="utf-8")))
    for item in items:
        if item.module.__name__ in QUICK or item.function.__name__ in proofs:
            item.add_marker(pytest.mark.quick)
    items.sort(key=lambda item: item.module.__name__ == "test_notebooks")  # last: see fresh


RUNS = pytest.StashKey()  # of notebooks, by their path


def pytest_collection_finish(session):
    """Begin to run the notebooks that are asked for, one after another beside all other tests."""
    name = "test_a_notebook_shows_what_is_committed"
    asked = [x.callspec.params["path"] for x in session.items if x.originalname == name]
    runs = session.config.stash[RUNS] = {}
    if asked and not session.config.option.collectonly:
        from notebooks import FOLDER, run  # which need what not every installation has

        pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        runs |= {path: pool.submit(run, path, FOLDER) for path in asked}
        session.config.add_cleanup(partial(pool.shutdown, wait=False, cancel_futures=True))


@pytest.fixture
def fresh(request):
    """Every notebook that is asked for, run from top to bottom."""
    return request.config.stash[RUNS]


@pytest.fixture
def model():
    """The module under proof. The bug zoo calls the same tests with a broken copy of it."""
    return nala_min.model


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def loopback_only(monkeypatch):
    """No test asks anything of the network."""
    connect = socket.socket.connect

    def guarded(self, address):
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"a test wants to connect to {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)
