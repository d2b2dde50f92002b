"""tests/tools/faults.py in short: a few tries of each fault, with one script."""

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
def trained(tmp_path_factory):
    """A script, and a folder with one of its runs, without a fault."""
    folder = tmp_path_factory.mktemp(SCRIPT)
    faults.prepare(folder)
    code, text = faults.run(SCRIPT, folder, "whole")
    assert code == 0, text
    return SCRIPT, folder


@pytest.fixture
def rng(request):
    seed = random.randrange(10**6)
    print(f"seed {seed}")  # shown if the test fails
    return random.Random(seed)


def test_kill_9_loses_nothing(trained, rng):
    hit, lost = faults.kills(*trained, 2, rng)
    assert sum(hit.values()) >= 2
    assert lost == []


def test_ctrl_c_or_a_closed_terminal_loses_nothing(trained, rng):
    assert faults.stops(*trained, 1, rng, [rng.choice(["SIGINT", "SIGHUP"])]) == (1, [])


def test_a_closed_output_pipe_loses_nothing(trained, rng):
    assert faults.broken_pipes(*trained, 1, rng) == (1, [])


@pytest.mark.parametrize("end", ["SIGKILL", "a worker"])
def test_an_ended_study_saves_its_runs_and_leaves_no_process(end, tmp_path, rng):
    assert faults.end_study(tmp_path, "study", end, rng) == (True, [], 0)


def test_a_full_disk_loses_nothing(trained, rng):
    assert faults.full_disk(*trained, 1, rng) == (1, [])  # the first checkpoint


def test_two_processes_match_one_and_resume_after_a_kill(trained, rng):
    assert 0 < faults.processes(*trained, 1, rng) < 1e-5
    killed, lost, _ = faults.killed_workers(*trained, 1, rng)
    assert (killed, lost) == (1, [])


def test_differences_are_detected(trained):
    """Between runs with different seeds."""
    script, folder = trained
    assert faults.run(script, folder, "seed2", "--seed", 2)[0] == 0
    differing = faults.differences(folder, "whole", "seed2")
    assert {"history", "extra", "card", "/model/head.weight"} <= set(differing)
    assert faults.max_difference(folder, "whole", "seed2") > 1e-3


def test_an_unwritable_output_is_an_error_before_the_work(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setattr("sys.argv", ["faults.py", "--out", str(tmp_path / "file" / "x")])
    monkeypatch.setattr(faults, "prepare", lambda folder: pytest.fail("ran"))
    with pytest.raises(SystemExit, match="2"):
        faults.main()
    assert "cannot be written" in capsys.readouterr().err
