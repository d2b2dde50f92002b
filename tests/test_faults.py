"""tests/tools/faults.py in short: each fault once, with one script. No run loses anything."""

import random
import shutil
import sys

import faults
import pytest

from nala_min import runcard

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


def test_a_run_that_is_killed_stopped_unread_and_out_of_disk_loses_nothing(folder):
    """One run after all of these faults, each resumed from the last."""
    rng, name = random.Random(1), "broken"
    for sent, phase, call in (("SIGKILL", "writing", 50), ("SIGINT", "training", 120_000)):
        code, text = faults.run(SCRIPT, folder, name, fault=(sent, phase, call, 0))
        assert "\nFAULT\n" in text and code == (-9 if sent == "SIGKILL" else 130), text
    for fault in (faults.fill_disk, faults.break_pipe):
        _, lost = fault(SCRIPT, folder, name, rng, [])
        assert_nothing_lost(lost)
    code, text = faults.run(SCRIPT, folder, name)
    assert code == 0, text
    assert_nothing_lost(faults.differences(folder, "whole", name))
    card = runcard.read_json(folder / name / "card.json")
    card["results"]["validation_loss"] += 1e-15
    runcard.write_json(folder / name / "card.json", card)
    assert faults.differences(folder, "whole", name) == ["['card']['validation_loss']"]


def test_two_processes_of_which_one_is_killed_match_one(folder):
    found = faults.killed_workers(SCRIPT, folder, 1, random.Random(1))
    assert_nothing_lost(found["lost"])
    assert 0 < found["difference"] < 1e-5


@pytest.mark.parametrize("how", ["SIGKILL", "a worker"])  # test_compare.py has Ctrl-C
def test_an_ended_study_saves_its_runs_and_leaves_no_process(how, tmp_path):
    training, lost, left = faults.end_study(tmp_path, "study", how, random.Random(1))
    assert_nothing_lost(lost)
    assert (training, left) == (True, 0)
