"""tests/tools/faults.py in short: each fault once, with one script. No run loses anything."""

import random
import shutil
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
    """A folder with a run that was not broken, for both tests: without dropout."""
    folder = tmp_path_factory.mktemp(SCRIPT)
    faults.prepare(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(faults.FLAGS, SCRIPT, [*faults.FLAGS[SCRIPT], *map(str, faults.PLAIN)])
        code, text = faults.run(SCRIPT, folder, "whole")
        assert code == 0, text
        shutil.copytree(folder / "whole", folder / "one")
        yield folder


def assert_nothing_lost(lost):
    assert lost == [], "\n".join(lost)  # the whole output of a run that failed


def test_a_run_that_is_killed_stopped_and_out_of_disk_loses_nothing(folder):
    """One run after all of these faults, each resumed from the last."""
    rng, name = random.Random(1), "broken"
    for sent, phase, call in (("SIGKILL", "writing", 50), ("SIGINT", "training", 120_000)):
        code, text = faults.run(SCRIPT, folder, name, fault=(sent, phase, call, 0))
        assert "\nFAULT\n" in text and code == (-9 if sent == "SIGKILL" else 130), text
    _, lost = faults.fill_disk(SCRIPT, folder, name, rng, [])
    assert_nothing_lost(lost)
    code, text = faults.run(SCRIPT, folder, name)
    assert code == 0, text
    assert_nothing_lost(faults.differences(folder, "whole", name))


def test_two_processes_of_which_one_is_killed_match_one(folder):
    found = faults.killed_workers(SCRIPT, folder, 1, random.Random(1))
    assert_nothing_lost(found["lost"])
    assert 0 < found["difference"] < 1e-5
