"""Several processes: what they exchange, and that they train one model."""

import torch
import torch.distributed as dist
import torch.multiprocessing
from scripts import ambient
from test_train import loss, small_model, train_small

from nala_min import distributed, runcard

WORLD = 2


def exchange(rank, folder):
    """Test what the processes exchange."""
    assert (distributed.world_size(), distributed.rank(), distributed.local_rank()) == (
        2,
        rank,
        rank,
    )
    assert distributed.gather({"rank": rank}) == [{"rank": 0}, {"rank": 1}]
    with distributed.local_rank_0_first():
        (folder / f"{rank}").touch()
        assert rank == 0 or (folder / "0").exists()
        assert rank > 0 or not (folder / "1").exists()
    card = runcard.run_card({}, {}, torch.device("cpu"), 1.0, {})
    assert card["hardware"]["processes"] == 2
    assert card["command"].startswith("torchrun --nproc_per_node=2 ")


def fit(rank, folder):
    """Train the same model in both processes, each on its half of a batch."""
    drawn = []

    def drawing(model, inputs, targets):
        drawn.append(torch.rand(()).item())
        assert len(inputs) == 1
        return loss(model, inputs, targets)

    model = small_model()
    history, _ = train_small(model, folder / "parts.pt", loss=drawing)
    torch.save({"model": model.state_dict(), "drawn": drawn}, folder / f"{rank}.pt")
    assert rank == 0 or history == []


def process(rank, folder, works):
    """Do works in one of the processes, which rendezvous through a file in folder."""
    torch.set_num_threads(1)
    init_method = f"file:///{(folder / 'meeting').as_posix().lstrip('/')}"
    dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=WORLD)
    for work in works:
        work(rank, folder)
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_train_one_model_as_one_process_does(tmp_path):
    (tmp_path / "runs").mkdir()
    torch.multiprocessing.spawn(process, (tmp_path / "runs", (exchange, fit)), nprocs=WORLD)
    first, second = (torch.load(tmp_path / "runs" / f"{rank}.pt") for rank in range(WORLD))
    whole = small_model()
    train_small(whole, tmp_path / "whole.pt")
    for name, weight in whole.state_dict().items():
        assert torch.equal(first["model"][name], second["model"][name]), name
        torch.testing.assert_close(first["model"][name], weight, rtol=1e-4, atol=1e-5)
    assert len({*first["drawn"], *second["drawn"]}) == 14  # dropout differs between processes


def test_one_process_needs_no_other():
    with distributed.job(), distributed.local_rank_0_first():
        assert (distributed.world_size(), distributed.rank(), distributed.local_rank()) == (1, 0, 0)
        with ambient(torch.bfloat16, "meta"):
            assert distributed.gather(0.1) == [0.1]
