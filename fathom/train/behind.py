"""Work that goes on behind the training, one piece at a time.

A checkpoint that is written so goes through the same lines as one that the training waits for, from the tensors to
the hashes, the manifest and the rename. `torch.distributed.checkpoint.async_save` has a thread of its own too, but
that one ends with the tensors, and the rest would have to be waited for.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class Behind:
    """A thread that is made when it is first needed, and what it is doing."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._thread: ThreadPoolExecutor | None = None
        self._running: Future[Any] | None = None

    def begin(self, work: Callable[[], Any]) -> None:
        """Start `work` once the piece before is done. Raises what that one raised."""
        self.wait()
        self._thread = self._thread or ThreadPoolExecutor(1, self._name)
        self._running = self._thread.submit(work)

    def wait(self) -> None:
        """Return once nothing is under way. Raises what the last piece raised, once."""
        running, self._running = self._running, None
        if running:
            running.result()
