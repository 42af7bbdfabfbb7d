"""Keeping freed memory in the process while training on a CPU.

A training step allocates and frees the same large tensors again and again. By default glibc hands every block of some
megabytes back to the kernel and gets zeroed pages for the next one, page fault by page fault: measured
here, a fresh 32 MB result cost ten times what computing it did. Telling the allocator to keep what is
freed makes the second step find the first one's memory. It is a setting of the whole process and
therefore made by whoever owns the process (a run, a benchmark), never by `import fathom`.
"""

from __future__ import annotations

from fathom.kernels.libc import libc

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_ONE_GIB = 1 << 30


def keep_freed_memory() -> bool:
    """Ask glibc to reuse freed blocks below 1 GiB; False where there is no glibc."""
    mallopt = libc("mallopt")
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _ONE_GIB) and mallopt(_M_TRIM_THRESHOLD, _ONE_GIB))
