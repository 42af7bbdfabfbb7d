"""The machine's own matrix-product rate, against which a run's FLOPs are reported (MFU)."""

from __future__ import annotations

import time

import torch

from fathom.kernels.cpu_gemm import fast_products

LEAST_TRIES, LEAST_SECONDS = 8, 0.3
"""A moment in which another program has a core should not decide."""


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Best of the square products of a third of a second in FLOP/s: 1024 on a CPU, 8192 on a GPU."""
    generator = torch.Generator().manual_seed(0)  # not the run's own random state
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, generator=generator).to(device, dtype)
    b = torch.randn(size, size, generator=generator).to(device, dtype)
    best, tries, begun = float("inf"), 0, time.perf_counter()
    while tries < LEAST_TRIES or time.perf_counter() - begun < LEAST_SECONDS:
        tries, started = tries + 1, time.perf_counter()
        with fast_products(size, device):
            torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best
