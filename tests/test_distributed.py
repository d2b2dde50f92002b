"""Multiple processes: what they exchange, and one sequence split between them."""

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


def make_inputs(name, dtype=torch.float64):
    """q, k, v, a gradient of the output, and options: the same in every process."""
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
    """The output and the gradients with respect to q, k, v and a learned norm_scale."""
    learned = [x for x in (options.get("norm_scale"),) if isinstance(x, torch.Tensor)]
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v, *learned)]
    if learned:
        options = options | {"norm_scale": leaves[3]}
    out = attention(*leaves[:3], **options)
    return [out, *torch.autograd.grad(out, leaves, grad)]


def attend_to_pieces(rank, world, folder):
    """Save this process's piece of the outputs and gradients, and the shapes that it sent."""
    start = sum(PIECES[:rank])
    piece = slice(start, start + PIECES[rank])
    sent, gather, results = [], dist.all_gather, {}

    def recorded_gather(parts, tensor, **options):
        sent.append(tuple(tensor.shape))
        gather(parts, tensor, **options)

    dist.all_gather = recorded_gather
    for name in OPTIONS:
        *tensors, options = make_inputs(name)
        if "key_mask" in options:
            options["key_mask"] = options["key_mask"][:, piece]
        parts = [x[:, :, piece] for x in tensors]
        tensors = attend(distributed.sequence_parallel_attention, *parts, options)
        results[name] = {"tensors": tensors, "sent": list(sent)}
        sent.clear()
    torch.save(results, folder / f"{rank}.pt")


def exchange(rank, world, folder):
    """Test what the processes exchange."""
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
    """Compare the scan's second derivative with that of all pieces in one process."""
    torch.manual_seed(1)
    pieces, factors = torch.randn(2, world, 5, dtype=torch.float64)
    all_pieces, piece = (x.clone().requires_grad_() for x in (pieces, pieces[rank]))
    before = torch.stack([(all_pieces[:r] ** 3).sum(dim=0) for r in range(world)])
    (first,) = torch.autograd.grad((before**2).sum(), all_pieces, create_graph=True)
    (second,) = torch.autograd.grad((first * factors).sum(), all_pieces)
    before = distributed._ExclusiveScan.apply(piece**3, None)
    (grad,) = torch.autograd.grad((before**2).sum(), piece, create_graph=True)
    assert_close(grad, first[rank])
    (grad,) = torch.autograd.grad((grad * factors[rank]).sum(), piece)
    assert_close(grad, second[rank])
    assert rank == world - 1 or grad.abs().min() > 0


def do_all(rank, world, folder):
    """Run all checks with one start of the processes, because starting is slow."""
    for work in (exchange, differentiate_twice, attend_to_pieces):
        work(rank, world, folder)


def die(rank, world, folder):
    """The last process dies; the others detect this and say how to continue."""
    if rank == world - 1:
        os._exit(0)
    with pytest.raises(SystemExit) as exit, (folder / "err").open("w", encoding="utf-8") as err:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.stderr", err)
            run_script(distributed.barrier)
    assert exit.value.code == 1


def process(rank, world, folder, work, arguments):
    """Run work in one of world processes, which rendezvous through a file in folder."""
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    init_method = f"file:///{(folder / 'meeting').as_posix().lstrip('/')}"
    dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=world)
    work(rank, world, folder, *arguments)
    if work is not die:
        dist.barrier()
        dist.destroy_process_group()


def spawn(world, folder, work, *arguments):
    torch.multiprocessing.spawn(process, (world, folder, work, arguments), nprocs=world)


@pytest.fixture(scope="module")
def in_pieces(tmp_path_factory):
    """The results of attend_to_pieces in each process, after the other checks in do_all."""
    folder = tmp_path_factory.mktemp("pieces")
    spawn(len(PIECES), folder, do_all)
    return [torch.load(folder / f"{rank}.pt") for rank in range(len(PIECES))]


@pytest.mark.parametrize("name", OPTIONS)
def test_a_split_sequence_equals_the_whole(in_pieces, name):
    *tensors, options = make_inputs(name)
    reference = partial(nala_attention, causal=True, mode="chunked")
    for i, want in enumerate(attend(reference, *tensors, options)):
        parts = [results[name]["tensors"][i] for results in in_pieces]
        got = sum(parts) if i == 4 else torch.cat(parts, dim=2)  # norm_scale is in every process
        assert_close(got, want, rtol=1e-10, atol=1e-12)
    num_features = 2 * D if options.get("feature_map", "cosine") in ("cosine", "split") else D
    state = (B, H, num_features, M + 1)
    assert all(results[name]["sent"] == [state, state] for results in in_pieces)  # both passes


def test_a_lost_process_is_reported_in_one_line(tmp_path):
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


def test_exchanges_do_not_depend_on_torch_s_defaults():
    with ambient(torch.bfloat16, "meta"):
        assert distributed.mean(0.1) == 0.1
        assert distributed.any_of(True) and not distributed.any_of(False)
        assert distributed.is_same("a")
