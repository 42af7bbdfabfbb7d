"""What the machine has, before a run asks for more, and what it computes in."""

from __future__ import annotations

import os
import platform
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch

from fathom.errors import FathomError, ParallelError
from fathom.model import ModelConfig
from fathom.parallel.building import Holding, holdings
from fathom.planning import training_memory
from fathom.planning.describe import gib
from fathom.runs.crew import Crew
from fathom.runs.layout import RunLayout

_CONTAINER_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def memory_of(device: torch.device) -> int | None:
    """Bytes of the device's memory, for a CPU also a container's limit; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        sizes = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    except (ValueError, OSError, AttributeError):
        return None
    for name in _CONTAINER_LIMITS:
        try:
            sizes.append(int(Path(name).read_text()))
        except (OSError, ValueError):  # no container, or no limit ("max")
            continue
    return min(sizes)


def check_memory(config: ModelConfig, device: torch.device) -> None:
    """Refuse a model whose weights, gradients and moments alone are more than the device has.

    What is needed beyond them depends on the batch and may or may not fit; that is not judged here.
    """
    needed = training_memory(config, seq_len=1, micro_batch=1)
    least = needed.weights + needed.gradients + needed.moments
    there = memory_of(device)
    if there is not None and least > there:
        raise FathomError(
            f"weights, gradients and moments of this model take {gib(least)} and this {device.type} has {gib(there)}; "
            f"take a smaller recipe or more memory (--dry-run says what each stage needs)"
        )


class _Rank(NamedTuple):
    """What a rank needs and what there is; ranks of one machine share a CPU's memory."""

    machine: str
    device: str
    least: int
    there: int | None


def _place(rank: _Rank) -> tuple[str, str]:
    return rank.machine, rank.device


def check_memory_of_ranks(layout: RunLayout, crew: Crew, device: torch.device) -> None:
    """The same for many processes: what the ranks of a device keep of weights, gradients and moments. All together.

    Raises `ParallelError`, the same on all ranks.
    """
    parallel = layout.recipe.parallel
    zero1, full_shard, mesh = parallel.zero1, parallel.full_shard, crew.mesh
    held = holdings(
        layout.recipe.model, layout.layout, layout.plan, zero1, full_shard, mesh.dp.place
    )
    least = least_memory(held[mesh.pp.place])
    told = crew.everyone(_Rank(platform.node(), str(device), least, memory_of(device)))
    spread = parallel.pp > 1 or parallel.full_shard
    remedy = "raise parallel.pp or parallel.ep" + (
        "" if spread else ", set parallel.full_shard = true"
    )
    for (machine, name), group in groupby(sorted(told, key=_place), _place):
        ranks = list(group)
        needed, there = sum(rank.least for rank in ranks), ranks[0].there
        if there is not None and needed > there:
            many = "one rank takes" if len(ranks) == 1 else f"{len(ranks)} ranks take"
            raise ParallelError(
                f"{many} {gib(needed)} for weights, gradients and moments, and {name} of {machine} has {gib(there)}; "
                f"{remedy}, or take more machines (`fathom plan` says what a rank needs)"
            )


def least_memory(held: Holding) -> int:
    """Bytes of a rank's float32 weights, their gradients, and AdamW's moments of what it updates."""
    return 4 * (2 * held.weights + 2 * held.updated)


def compute_dtype(wanted: str, device: torch.device) -> torch.dtype | None:
    """Dtype of products for [precision] compute; None is the weights' own float32."""
    if wanted == "bfloat16":
        return torch.bfloat16
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if wanted == "auto" and fast else None
