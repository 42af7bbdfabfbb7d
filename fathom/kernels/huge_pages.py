"""Memory in pages of 2 MiB for what is read once per token (Linux; elsewhere nothing is done).

With ordinary pages of 4 KiB a processor looks up an address for every 4,096 bytes of weights, and inside a
virtual machine each look-up is itself a walk through memory: reading stops at half of what the memory gives.
Measured on one core of a Zen 4 guest: 23 GB/s in ordinary pages, 43 in large ones (docs/experiments/012).

Nothing depends on it: where the system refuses, tensors stay as they are.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from functools import cache
from typing import Any

from torch import Tensor

from fathom.kernels.libc import libc

_SIZE = 2 << 20
_HUGEPAGE, _COLLAPSE = 14, 25  # of <linux/mman.h>

_WORTH = 4 * _SIZE
"""Bytes below which everything is near enough anyway."""


@cache
def _madvise() -> Any | None:
    function = libc("madvise")
    if function is not None:
        function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function


def prefer(tensor: Tensor) -> Tensor:
    """Let a large tensor that nothing was written to come to lie in large pages; the tensor."""
    madvise = _madvise()
    if madvise is not None and tensor.device.type == "cpu" and tensor.nbytes >= _WORTH:
        lo, hi = -(-tensor.data_ptr() // _SIZE), (tensor.data_ptr() + tensor.nbytes) // _SIZE
        madvise(lo * _SIZE, (hi - lo) * _SIZE, _HUGEPAGE)
    return tensor


def collapse(tensors: Iterable[Tensor]) -> None:
    """Move what tensors on the CPU hold into large pages where they are; about a second for each half GiB that moves.

    Their addresses and contents stay. What lies beside them in the same 2 MiB comes along. Processes that were forked
    and shared them have copies of their own afterwards.
    """
    madvise = _madvise()
    held = [(t.data_ptr(), t.nbytes) for t in tensors if t.device.type == "cpu"]
    if madvise is None or sum(nbytes for _, nbytes in held) < _WORTH:
        return
    pages = {page for at, nbytes in held for page in range(at // _SIZE, -(-(at + nbytes) // _SIZE))}
    for page in sorted(pages):
        if madvise(page * _SIZE, _SIZE, _HUGEPAGE) == 0:
            madvise(page * _SIZE, _SIZE, _COLLAPSE)
