"""Processes, started by torchrun, that train one model. Without torchrun, there is one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


@contextmanager
def job() -> Iterator[None]:
    """Join the processes started by torchrun, if any, until the block ends."""
    if started := "TORCHELASTIC_RUN_ID" in os.environ:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=2))  # while one downloads
    yield
    if started:
        gather()  # a process that ends earlier would take the others with it
        dist.destroy_process_group()


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Index of this process; process 0 reports and writes."""
    return dist.get_rank() if world_size() > 1 else 0


def local_rank() -> int:
    """Index of this process among those on its machine."""
    return int(os.environ.get("LOCAL_RANK") or rank()) if world_size() > 1 else 0


@contextmanager
def local_rank_0_first() -> Iterator[None]:
    """Run the block in the first process of each machine, then in the others: one downloads."""
    if local_rank() > 0:
        gather()
    yield
    if local_rank() == 0:
        gather()


def gather(value: Any = None) -> list[Any]:
    """The value of each process, once all processes are here."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values
