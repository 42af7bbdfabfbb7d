"""Joining a world as torchrun sets it up, leaving it, and joining again after one was killed."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fathom.errors import ParallelError
from fathom.parallel import launch
from tests.parallel.processes import run


def test_nobody_started_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert not launch.launched()
    with pytest.raises(ParallelError, match=r"the environment has no RANK.*use torchrun"):
        launch.join()


def test_notes_are_left_after_joining_only() -> None:
    with pytest.raises(ParallelError, match="has joined no others; call join first"):
        launch.store()


def joins(port: int) -> tuple[str, int]:
    rank, world = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    assert launch.launched()
    device = launch.join()
    total = torch.tensor(rank)
    dist.all_reduce(total)
    assert launch.store().add("noted", 0) == 0
    dist.barrier()  # the store ends with its process
    return str(device), int(total)


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="NCCL wants a GPU of its own for each process"
)
def test_processes_find_each_other_by_the_environment() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    assert run(joins, 3, port) == [("cpu", 3)] * 3


SCRIPT = """
import os, signal, torch, torch.distributed as dist
from datetime import timedelta
from fathom.parallel import Layout, Mesh, launch

torch.set_num_threads(1)
launch.join(timedelta(seconds=60))
mesh = Mesh(Layout(dp=2, ep=2))
again = os.environ["TORCHELASTIC_RESTART_COUNT"]
if again == "0" and mesh.rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
print(f"attempt {again}: {mesh.ep.sum(torch.tensor(mesh.rank + 1)).item()}", flush=True)
launch.leave()
"""


@pytest.mark.slow
@pytest.mark.skipif(
    torch.cuda.is_available(), reason="NCCL wants a GPU of its own for each process"
)
def test_torchrun_starts_again_after_a_kill(tmp_path: Path) -> None:
    script = tmp_path / "joins.py"
    script.write_text(SCRIPT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc-per-node=2", "--max-restarts=1", str(script)]
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert re.findall(r"attempt (\d): (\d)", done.stdout) == [("1", "3")] * 2
