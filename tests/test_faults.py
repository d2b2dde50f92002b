"""tests/tools/faults.py in short: each fault once, with one script, and nothing is lost."""

import random
import sys

import faults
import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full and /proc"),
]
SCRIPT = "train_shakespeare"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a run that was not broken."""
    folder = tmp_path_factory.mktemp(SCRIPT)
    faults.prepare(folder)
    code, text = faults.run(SCRIPT, folder, "whole")
    assert code == 0, text
    return folder


@pytest.mark.parametrize(
    "name", ["kill -9", "stop", "closed terminal", "broken pipe", "full disk", "two processes"]
)
def test_a_fault_loses_nothing(name, folder):
    found = faults.FAULTS[name](SCRIPT, folder, 1, random.Random(1))
    assert found["lost"] == [] and found["times"] >= 1
    assert found.get("difference", 0) < 1e-5


@pytest.mark.parametrize("how", ["SIGKILL", "a worker"])
def test_an_ended_study_saves_its_runs_and_leaves_no_process(how, tmp_path):
    assert faults.end_study(tmp_path, "study", how, random.Random(1)) == (True, [], 0)


def test_differences_are_detected(folder):
    """Between runs with different seeds."""
    code, text = faults.run(SCRIPT, folder, "seed2", "--seed", 2)
    assert code == 0, text
    differing = " ".join(faults.differences(folder, "whole", "seed2"))
    assert all(x in differing for x in ("history", "extra", "card", "head.weight"))
    assert faults.max_difference(folder, "whole", "seed2") > 1e-3
