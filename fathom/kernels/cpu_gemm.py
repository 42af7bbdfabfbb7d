"""Float32 products at the full rate of a CPU that MKL serves badly.

Torch's float32 products on x86 go to MKL, which leaves AVX-512 unused on processors that are not
Intel's: half the rate of the same chip under oneDNN. Torch hands float32 products to oneDNN only
where a reduced precision is permitted ("bf16" for oneDNN's matmul); without AMX units oneDNN has no
reduced float32 kernel and computes in float32 all the same. So inside our rules, and only there,
the permission is given, on a processor with AVX-512 that is not Intel's and has no AMX, after a
product has shown to be as exact as before. Everywhere else nothing is touched.

The choice depends on the processor alone and never on a timing, so that a resumed run computes what
the first did. For a handful of rows (decoding) MKL is faster and stays.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path

import torch

LEAST_ROWS = 32
"""Rows of a product from which oneDNN is the faster of the two."""


def _vendor_is_intel() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return True


def _set(permission: str) -> None:
    torch.backends.mkldnn.matmul.fp32_precision = permission  # type: ignore[attr-defined]


@cache
def onednn_is_better() -> bool:
    """Whether oneDNN's float32 product is right, and faster than MKL's, on this processor."""
    if not torch.backends.mkldnn.is_available() or _vendor_is_intel():
        return False
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or torch.cpu._is_amx_tile_supported():
        return False
    if not hasattr(torch.backends.mkldnn, "matmul"):
        return False
    return _is_exact()


def _is_exact() -> bool:
    """Whether a product under the permission is as exact as float32 rounding lets it be."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(128, 256, generator=generator)
    b = torch.randn(256, 128, generator=generator)
    exact = a.double() @ b.double()
    with _Permission():
        error = (a @ b - exact).norm() / exact.norm()
    return bool(error < 1e-6)


class _Permission:
    """Within: torch may send float32 products to oneDNN."""

    def __enter__(self) -> None:
        self.before = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
        _set("bf16")

    def __exit__(self, *error: object) -> None:
        _set(self.before)


def fast_products(rows: int, device: torch.device) -> AbstractContextManager[None]:
    """Within: float32 products of at least `rows` rows go to the better of MKL and oneDNN."""
    if rows < LEAST_ROWS or device.type != "cpu" or not onednn_is_better():
        return _UNCHANGED
    return _Permission()


_UNCHANGED: AbstractContextManager[None] = nullcontext()
