"""The machine's own limits, measured beside what is compared: matrix products and reading of
memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from fathom.kernels import huge_pages

SIZE = 1024


class Machine:
    """To be run as a contender: every call measures once."""

    def __init__(self) -> None:
        self.a, self.b = torch.randn(SIZE, SIZE), torch.randn(SIZE, SIZE)
        self.long = torch.ones(64 << 20)  # 256 MiB, beyond any cache
        self.in_large_pages = torch.ones(64 << 20)
        huge_pages.collapse([self.in_large_pages])

    def matmul(self) -> dict[str, float]:
        """FLOP/s of a float32 product of 1024^3 by library, best of eight.

        `default` is torch.mm as it comes, which on x86 is MKL; `onednn` the same product in the same precision by the
        other library inside torch. The roof is the better of the two.
        """
        rates = {"default": _rate(lambda: torch.mm(self.a, self.b))}
        if torch.backends.mkldnn.is_available():
            product = torch.ops.mkldnn._linear_pointwise
            rates["onednn"] = _rate(lambda: product(self.a, self.b, None, "none", [], ""))
        return rates

    def read(self) -> float:
        """Bytes per second of summing 256 MiB, best of four in ordinary pages and four in large ones."""
        times = [_seconds(long.sum) for _ in range(4) for long in (self.long, self.in_large_pages)]
        return self.long.nbytes / min(times)


def _rate(product: Callable[[], torch.Tensor]) -> float:
    product()
    return 2 * SIZE**3 / min(_seconds(product) for _ in range(8))


def _seconds(work: Callable[[], torch.Tensor]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
