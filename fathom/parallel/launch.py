"""Joining the world that `torchrun` made, and leaving it.

Two traps are why this is not two calls of torch. After a restart by torchelastic a process may read
the addresses that its group had before (pytorch#135712); here everything is kept under a prefix of
its own for every restart. And gloo's threads may abort a process that ends in the ordinary way
(pytorch#190489), so a process that spoke through gloo flushes what it has to say and ends at once.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist

from fathom.errors import ParallelError

_joined: list[dist.Store] = []
WANTED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def launched() -> bool:
    """Whether `torchrun` started this process."""
    return all(name in os.environ for name in WANTED)


def join(timeout: timedelta = timedelta(minutes=10)) -> torch.device:
    """Join the other processes; the device that is this one's.

    NCCL between GPUs, gloo between CPUs. `timeout` is how long a collective of all ranks waits for another one. Raises
    `ParallelError` when torchrun did not start this process, or it has no GPU of its own.
    """
    if not launched():
        missing = next(name for name in WANTED if name not in os.environ)
        raise ParallelError(
            f"the environment has no {missing}, so nobody started the other processes; "
            f"use torchrun --nproc-per-node N -m fathom …"
        )
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = _device(int(os.environ.get("LOCAL_RANK", rank)))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    store = _store(rank, world, timeout)
    _joined[:] = [store]
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    return device


def store() -> dist.Store:
    """Where the ranks that have joined can leave each other notes.

    Raises `ParallelError` before `join`.
    """
    if not _joined:
        raise ParallelError("this process has joined no others; call join first")
    return _joined[0]


def leave(status: int = 0) -> NoReturn:
    """End this process with `status`; what it wrote is flushed. To be called by all ranks, or by one that failed."""
    if dist.is_initialized() and dist.get_backend() == "nccl" and status == 0:
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    there = torch.cuda.device_count()
    if local_rank >= there:
        raise ParallelError(
            f"process {local_rank} of this node has no GPU, there are {there}; "
            f"start torchrun with --nproc-per-node {there}"
        )
    return torch.device("cuda", local_rank)


def _store(rank: int, world: int, timeout: timedelta) -> dist.Store:
    """Where ranks find each other: the launcher's own store where it keeps one, else rank 0's."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(address, port, world, is_master=rank == 0 and not kept, timeout=timeout)
    return dist.PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
