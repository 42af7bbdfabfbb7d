"""What the machine has, before a run asks for more, and what it computes in."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from fathom.errors import FathomError
from fathom.model import ModelConfig
from fathom.planning import training_memory
from fathom.planning.describe import gib

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


def compute_dtype(wanted: str, device: torch.device) -> torch.dtype | None:
    """Dtype of products for [precision] compute; None is the weights' own float32."""
    if wanted == "bfloat16":
        return torch.bfloat16
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if wanted == "auto" and fast else None
