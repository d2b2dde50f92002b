"""Several processes: how each knows its place, and that torchrun's two train one model as one
process would."""

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from training import loss, noting, small_model, train_small

from nala_min import distributed, train
from nala_min.flags import run_script

ROOT = Path(__file__).parent.parent


def test_a_job_joins_torchrun_s_processes_until_it_ends(monkeypatch):
    """Here, the only one of them. Without torchrun, nothing happens."""
    with distributed.job(), distributed.local_rank_0_first(), torch.device("meta"):
        assert not dist.is_initialized() and distributed.gather(0.1) == [0.1]
        assert (distributed.world_size(), distributed.rank(), distributed.local_rank()) == (1, 0, 0)
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}
    for name, value in (meeting | {"TORCHELASTIC_RUN_ID": "none"}).items():
        monkeypatch.setenv(name, value)
    seen, start = [], dist.init_process_group
    starting = lambda *args, **options: (seen.append((args, options)), start(*args, **options))  # noqa: E731
    monkeypatch.setattr(dist, "init_process_group", starting)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(distributed, "gather", lambda: seen.append("all are here"))
    with distributed.job():
        assert dist.is_initialized()
    assert seen == [(("gloo",), {"timeout": timedelta(hours=2)}), "all are here"]
    assert not dist.is_initialized()


def test_processes_know_their_place_and_the_first_of_a_machine_goes_first(monkeypatch):
    """The second process of two, alone on its machine or not."""
    events = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "all_gather_object", lambda *_: events.append("gather"))
    for variable, local in (("", 1), ("1", 1), ("0", 0)):
        monkeypatch.setenv("LOCAL_RANK", variable)
        place = distributed.world_size(), distributed.rank(), distributed.local_rank()
        assert place == (2, 1, local)
        with distributed.local_rank_0_first():
            events.append("block")
    assert events == ["gather", "block", "gather", "block", "block", "gather"]


def child(folder):
    """One of two processes."""
    rank, drawn, model = distributed.rank(), [], small_model()
    assert distributed.gather({"rank": rank}) == [{"rank": 0}, {"rank": 1}]
    model.unused = torch.nn.Parameter(torch.ones(2))  # as a class attention may have
    drawing = noting(lambda *_: drawn.append(torch.rand(()).item()), loss)
    train_small(model, folder / "parts.pt", loss=drawing)
    torch.save({"model": model.state_dict(), "drawn": drawn}, folder / f"{rank}.pt")
    print("finished")


@pytest.mark.slow
def test_two_processes_train_one_model_as_one_process_does(tmp_path):
    launch = ["torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    variables |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONUTF8": "1"}
    variables |= {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    log = tmp_path / "log.txt"
    try:
        with log.open("wb") as out:
            command = [sys.executable, "-m", *launch, "--nproc_per_node=2", __file__, tmp_path]
            subprocess.run(command, env=variables, stdout=out, stderr=out, timeout=300, check=True)
    finally:
        print(text := log.read_text(encoding="utf-8"))  # pytest shows it on failure
    assert text.count("finished") == 1  # only the first process prints
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    history, _ = train_small(whole := small_model(), tmp_path / "whole.pt")
    for name, weight in whole.state_dict().items():
        assert torch.equal(first["model"][name], second["model"][name]), name
        torch.testing.assert_close(first["model"][name], weight, rtol=1e-4, atol=1e-5)
    points = train.load_checkpoint(tmp_path / "parts.pt")["history"]
    assert points == [pytest.approx(point, rel=1e-4) for point in history]
    assert len({*first["drawn"], *second["drawn"]}) == 14  # dropout differs between processes


if __name__ == "__main__":
    run_script(lambda: child(Path(sys.argv[1])))
