"""Several processes: what they agree on, and one sequence over all of them."""

import os
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from scripts import ambient
from torch.testing import assert_close

from nala_min import distributed, nala_attention
from nala_min.flags import run_script

B, H, D, M = 2, 3, 4, 5
PIECES = (1, 20, 11)  # tokens of each process
OPTIONS = {
    "cosine": {},
    "cosine, every option": {"lam": 2.0, "tau": 1.0, "alpha": 3.0, "norm_scale": 2.0},
    "split": {"feature_map": "split"},
    "elu": {"feature_map": "elu"},
    "relu": {"feature_map": "relu"},
    "mask": {"key_mask": True},
    "learned": {"norm_scale": True},
}


def whole(name, dtype=torch.float64):
    """q, k, v and a gradient of the output, as each process makes them; and the options."""
    torch.manual_seed(1)
    q, k = torch.randn(2, B, H, 32, D, dtype=dtype)
    v, grad = torch.randn(2, B, H, 32, M, dtype=dtype)
    options = dict(OPTIONS[name])
    if options.get("key_mask"):
        options["key_mask"] = torch.rand(B, 32) < 0.7
    if options.get("norm_scale") is True:
        options["norm_scale"] = torch.rand(H, 1, 1, dtype=dtype) + 0.5
    return q, k, v, grad, options


def attend(attention, q, k, v, grad, options):
    """Output, and the gradients with respect to q, k, v and a learned norm_scale."""
    learned = [x for x in (options.get("norm_scale"),) if isinstance(x, torch.Tensor)]
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v, *learned)]
    if learned:
        options = options | {"norm_scale": leaves[3]}
    out = attention(*leaves[:3], **options)
    return [out, *torch.autograd.grad(out, leaves, grad)]


def attend_to_pieces(rank, world, folder):
    """The work of one process: its piece of the outputs and gradients, and what it sent."""
    start = sum(PIECES[:rank])
    piece = slice(start, start + PIECES[rank])
    sent, gather, result = [], dist.all_gather, {}

    def recorded_gather(parts, tensor, **more):
        sent.append(tuple(tensor.shape))
        gather(parts, tensor, **more)

    dist.all_gather = recorded_gather
    for name in OPTIONS:
        *tensors, options = whole(name)
        if "key_mask" in options:
            options["key_mask"] = options["key_mask"][:, piece]
        parts = [x[:, :, piece] for x in tensors]
        found = attend(distributed.sequence_parallel_attention, *parts, options)
        result[name] = {"found": found, "sent": list(sent)}
        sent.clear()
    torch.save(result, folder / f"{rank}.pt")


def agree(rank, world, folder):
    """What processes say to one another."""
    assert (distributed.world_size(), distributed.rank()) == (world, rank)
    assert distributed.mean(float(rank)) == (world - 1) / 2
    assert distributed.any_of(rank == 1) and not distributed.any_of(False)
    assert distributed.is_same({"lr": 0.1}) and not distributed.is_same(f"lr {rank == 0}")
    batch = torch.arange(6)
    assert distributed.shard(batch).tolist() == batch.view(world, -1)[rank].tolist()
    with distributed.local_rank_0_first():
        (folder / f"{rank}").touch()
        assert rank == 0 or (folder / "0").exists()
        assert rank > 0 or not (folder / "1").exists()


def differentiate_twice(rank, world, folder):
    """The second derivative through what travels, against that of all pieces in one process."""
    torch.manual_seed(1)
    pieces, factors = torch.randn(2, world, 5, dtype=torch.float64)
    whole, mine = (x.clone().requires_grad_() for x in (pieces, pieces[rank]))
    before = torch.stack([(whole[:r] ** 3).sum(dim=0) for r in range(world)])
    (first,) = torch.autograd.grad((before**2).sum(), whole, create_graph=True)
    (second,) = torch.autograd.grad((first * factors).sum(), whole)
    before = distributed._ExclusiveScan.apply(mine**3, None)
    (found,) = torch.autograd.grad((before**2).sum(), mine, create_graph=True)
    assert_close(found, first[rank])
    (found,) = torch.autograd.grad((found * factors[rank]).sum(), mine)
    assert_close(found, second[rank])
    assert rank == world - 1 or found.abs().min() > 0


def do_all(rank, world, folder):
    """In one start of the processes, which is slow."""
    for work in (agree, differentiate_twice, attend_to_pieces):
        work(rank, world, folder)


def die(rank, world, folder):
    """The last process ends without a word; the others notice, and say how to go on."""
    if rank == world - 1:
        os._exit(0)
    with pytest.raises(SystemExit) as exit, (folder / "err").open("w", encoding="utf-8") as err:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.stderr", err)
            run_script(distributed.barrier)
    assert exit.value.code == 1


def process(rank, world, folder, work, arguments):
    """One of world processes that meet in folder."""
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    meeting = f"file:///{(folder / 'meeting').as_posix().lstrip('/')}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
    work(rank, world, folder, *arguments)
    if work is not die:
        dist.barrier()
        dist.destroy_process_group()


def spawn(world, folder, work, *arguments):
    torch.multiprocessing.spawn(process, (world, folder, work, arguments), nprocs=world)


@pytest.fixture(scope="module")
def in_pieces(tmp_path_factory):
    """What each process found; none fails in agree and differentiate_twice."""
    folder = tmp_path_factory.mktemp("pieces")
    spawn(len(PIECES), folder, do_all)
    return [torch.load(folder / f"{rank}.pt") for rank in range(len(PIECES))]


@pytest.mark.parametrize("name", OPTIONS)
def test_a_sequence_in_pieces_is_the_whole_sequence(in_pieces, name):
    *tensors, options = whole(name)
    reference = partial(nala_attention, causal=True, mode="chunked")
    for i, want in enumerate(attend(reference, *tensors, options)):
        parts = [each[name]["found"][i] for each in in_pieces]
        found = sum(parts) if i == 4 else torch.cat(parts, dim=2)  # each process has norm_scale
        assert_close(found, want, rtol=1e-10, atol=1e-12)
    num_features = 2 * D if options.get("feature_map", "cosine") in ("cosine", "split") else D
    state = (B, H, num_features, M + 1)
    assert all(each[name]["sent"] == [state, state] for each in in_pieces)  # there and back


def test_a_lost_process_is_one_line_that_says_how_to_go_on(tmp_path):
    spawn(2, tmp_path, die)
    (line,) = (tmp_path / "err").read_text(encoding="utf-8").splitlines()
    assert "because another process ended: --resume continues from the last checkpoint" in line


def test_one_process_needs_no_other(tmp_path):
    with distributed.job(), distributed.local_rank_0_first():
        assert (distributed.world_size(), distributed.rank(), distributed.local_rank()) == (1, 0, 0)
        assert distributed.mean(3.5) == 3.5 and distributed.is_same(object())
        assert distributed.any_of(True) and not distributed.any_of(False)
        assert distributed.shard(batch := torch.arange(5)).equal(batch)
        distributed.barrier()
        distributed.exit_together()
    assert not distributed.is_lost_peer(RuntimeError("Connection closed by peer"))


def test_what_processes_say_does_not_depend_on_torch_s_defaults():
    with ambient(torch.bfloat16, "meta"):
        assert distributed.mean(0.1) == 0.1
        assert distributed.any_of(True) and not distributed.any_of(False)
        assert distributed.is_same("a")
