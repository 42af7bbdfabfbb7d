"""How long this rank has waited for others: what tells a slow rank from those that wait for it.

Every rank's step takes as long as the slowest one's, since all of them meet in it; but the slow one waits least. Time
counts where a message is waited for on the CPU, as gloo does; NCCL waits on the GPU, and nothing of it is seen here.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

_waited = [0.0]


@contextmanager
def waiting() -> Iterator[None]:
    """Within, this rank waits."""
    began = time.perf_counter()
    try:
        yield
    finally:
        _waited[0] += time.perf_counter() - began


def waited() -> float:
    """Seconds so far."""
    return _waited[0]
