"""What tests/tools/faults.py does at length, with both scripts, is tried a few times."""

import random
import sys

import faults
import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full and /proc")
SCRIPT = "train_shakespeare"


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """A script and its folder, in which it has trained once without a fault."""
    folder = tmp_path_factory.mktemp(SCRIPT)
    faults.prepare(folder)
    code, text = faults.run(SCRIPT, folder, "--out", "whole")
    assert code == 0, text
    return SCRIPT, folder


@pytest.fixture
def dice(request):
    seed = random.randrange(10**6)
    print(f"seed {seed}")  # shown if the test fails
    return random.Random(seed)


def test_kill_9_loses_nothing(broken, dice):
    hit, lost = faults.kills(*broken, 2, dice)
    assert sum(hit.values()) >= 2
    assert lost == []


def test_ctrl_c_or_a_closed_terminal_loses_nothing(broken, dice):
    assert faults.stops(*broken, 1, dice, [dice.choice(["SIGINT", "SIGHUP"])]) == (1, [])


def test_a_reader_that_goes_away_loses_nothing(broken, dice):
    assert faults.broken_pipes(*broken, 1, dice) == (1, [])


@pytest.mark.parametrize("end", ["SIGKILL", "a worker"])
def test_a_study_that_is_ended_saves_its_runs_and_leaves_no_process(end, tmp_path, dice):
    assert faults.end_study(tmp_path, "study", end, dice) == (True, [], 0)


def test_a_full_disk_loses_nothing(broken, dice):
    assert faults.full_disk(*broken, 1, dice) == (1, [])  # the first checkpoint


def test_two_processes_are_as_good_as_one_and_may_be_killed(broken, dice):
    assert 0 < faults.processes(*broken, 1, dice) < 1e-5
    killed, lost, _ = faults.killed_workers(*broken, 1, dice)
    assert (killed, lost) == (1, [])


def test_what_differs_is_seen(broken):
    """The comparison can fail: another seed is another run."""
    script, folder = broken
    assert faults.run(script, folder, "--out", "seed2", "--seed", 2)[0] == 0
    found = faults.differences(folder, "whole", "seed2")
    assert {"history", "extra", "card", "/model/head.weight"} <= set(found)
    assert faults.furthest(folder, "whole", "seed2") > 1e-3


def test_what_cannot_be_written_is_told_before_the_work(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setattr("sys.argv", ["faults.py", "--out", str(tmp_path / "file" / "x")])
    monkeypatch.setattr(faults, "prepare", lambda folder: pytest.fail("worked"))
    with pytest.raises(SystemExit, match="2"):
        faults.main()
    assert "cannot be written" in capsys.readouterr().err
