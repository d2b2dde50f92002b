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
