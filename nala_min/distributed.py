"""Several processes, started by torchrun on one machine or many. They train one model together, or
share the attention over one sequence that is too long for a single process.

Training is data parallel: each process has the whole model and takes its share of each batch.
Without torchrun, the training functions see one process and cost nothing.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from nala_min.arguments import FEATURE_MAPS, checked
from nala_min.model import key_features, nala_attention

TIMEOUT = timedelta(hours=2)  # for one process to download while the others wait


@contextmanager
def job() -> Iterator[None]:
    """Join the processes started by torchrun, if any, until the block ends."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=TIMEOUT)
    try:
        yield
    finally:
        dist.destroy_process_group()


def exit_together() -> None:
    """End this process once all others of the job are here: one that ends earlier would take the
    others with it. Exits with os._exit, because a PyTorch thread sometimes aborts a process that
    exits normally ("terminate called without an active exception")."""
    if world_size() > 1:
        barrier()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Index of this process; process 0 reports and writes."""
    return dist.get_rank() if world_size() > 1 else 0


def local_rank() -> int:
    """Index of this process among those on its machine."""
    return int(os.environ["LOCAL_RANK"]) if world_size() > 1 else 0


def local_size() -> int:
    """Number of processes on this machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if world_size() > 1 else 1


@contextmanager
def local_rank_0_first() -> Iterator[None]:
    """Run the block in the first process of each machine before the others, so that they find what
    it downloaded."""
    if local_rank() > 0:
        barrier()
    yield
    if local_rank() == 0:
        barrier()


def barrier() -> None:
    """Wait until every process is here."""
    any_of(False)


def any_of(flag: bool) -> bool:
    """Whether flag is true in at least one process."""
    return bool(_all_reduced(torch.tensor(float(flag), device="cpu"), "MAX"))


def mean(number: float) -> float:
    """The mean of number over all processes."""
    total = _all_reduced(torch.tensor(number, dtype=torch.float64, device="cpu"), "SUM")
    return total.item() / world_size()


def is_same(value: object) -> bool:
    """Whether value has the same repr in every process."""
    digest = list(hashlib.sha256(repr(value).encode("utf-8")).digest())
    digest = torch.tensor(digest, device="cpu")
    return torch.equal(_all_reduced(digest.clone(), "MIN"), _all_reduced(digest, "MAX"))


def _all_reduced(tensor: Tensor, operation: str) -> Tensor:
    if world_size() > 1:
        dist.all_reduce(tensor, getattr(dist.ReduceOp, operation))
    return tensor


def shard(batch: Tensor) -> Tensor:
    """This process's part of a batch; all parts have the same size."""
    return batch.chunk(world_size())[rank()]


def is_lost_peer(error: BaseException) -> bool:
    """Whether error means that another process of the job has ended."""
    messages = ("closed by peer", "reset by peer", "Broken pipe")
    return world_size() > 1 and (
        isinstance(error, dist.DistError) or any(x in str(error) for x in messages)
    )


# --- One sequence split over all processes --------------------------------------------------------


@checked(
    q="B H N D",
    k="B H N D",
    v="B H N M",
    feature_map=FEATURE_MAPS,
    norm_scale="... 1 1",
    key_mask="B N bool",
    group=object,
)
def sequence_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: str = "cosine",
    lam: float = 3.0,
    tau: float = 0.5,
    alpha: float = 20.0,
    norm_scale: float | Tensor = 1.0,
    key_mask: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Causal nala_attention over a sequence that is split over the processes of group.

    Takes the arguments of nala_attention for this process's tokens, which follow those of the
    previous process. Returns the output for these tokens. Processes exchange only the state of
    Eq. (14), F x (M + 1) numbers per head for parts of any length, and its gradient in the backward
    pass. All processes must call this function, and run its backward pass, equally often.
    """
    kernel = {"feature_map": feature_map, "lam": lam, "alpha": alpha}
    with torch.autocast(q.device.type, enabled=False):
        phi_k = key_features(k, **kernel)  # (B, H, N, F)
        if key_mask is not None:
            phi_k = phi_k.masked_fill(~key_mask[:, None, :, None], 0.0)
        values = F.pad(v.to(phi_k.dtype), (0, 1), value=1.0)  # (B, H, N, M + 1)
        state = _ExclusiveScan.apply(phi_k.mT @ values, group)  # (B, H, F, M + 1)
    kernel |= {"tau": tau, "norm_scale": norm_scale}
    return nala_attention(q, k, v, causal=True, key_mask=key_mask, state=state, **kernel)


class _ExclusiveScan(Function):
    """The sum over the processes before this one, or over those after it. Each sum gives the
    gradient of the other, so derivatives of any order work."""

    @staticmethod
    def forward(ctx, state, group, reverse=False):
        ctx.group, ctx.reverse = group, reverse
        rank = dist.get_rank(group)
        return _gather(state, group)[slice(rank + 1, None) if reverse else slice(rank)].sum(dim=0)

    @staticmethod
    def backward(ctx, grad):
        return _ExclusiveScan.apply(grad, ctx.group, not ctx.reverse), None, None


def _gather(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The tensor of every process, stacked."""
    tensor = tensor.contiguous()
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tensor, group=group)
    return torch.stack(parts)
