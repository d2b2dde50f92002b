import pytest
import torch

import nala_min.model


@pytest.fixture
def model():
    """The module under proof. The bug zoo calls the same tests with a broken copy of it."""
    return nala_min.model


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def one_thread():
    """For models too small to share among cores, which may be busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
