import multiprocessing
import signal
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import pytest
import torch


def pytest_configure():
    """One thread: the models are small. Ctrl-C works, even if pytest runs in the background."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)


RUNS = pytest.StashKey()  # notebook runs by path


def pytest_collection_finish(session):
    """Start running the selected notebooks, one at a time, alongside the other tests."""
    name = "test_a_notebook_shows_what_is_committed"
    paths = [x.callspec.params["path"] for x in session.items if x.originalname == name]
    runs = session.config.stash[RUNS] = {}
    if paths and not session.config.option.collectonly:
        from notebooks import FOLDER, run  # these need Jupyter, which is optional

        pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        runs |= {path: pool.submit(run, path, FOLDER) for path in paths}
        session.config.add_cleanup(partial(pool.shutdown, wait=False, cancel_futures=True))


@pytest.fixture
def notebook_runs(request):
    """A future for each selected notebook, run from top to bottom."""
    return request.config.stash[RUNS]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
