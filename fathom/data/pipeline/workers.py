"""Tasks over worker processes.

A worker that is left alone when this process is killed leaves too; Ctrl-C is this process's affair alone, which then
ends its workers at once. What a task makes must therefore be right however suddenly it ends: see `work`.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from itertools import islice
from typing import Any


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Workers:
    """A pool of `count` processes; with one, tasks run in this process. A context: leaving it ends the processes."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._before = set(multiprocessing.active_children())
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if self._pool is None:
            return
        if error is not None:  # unfinished tasks are not worth waiting for
            for process in set(multiprocessing.active_children()) - self._before:
                process.terminate()
        self._pool.shutdown(cancel_futures=True)

    def map(
        self, function: Callable[..., Any], tasks: Iterable[tuple]
    ) -> Iterator[tuple[int, Any]]:
        """(number of the task, function(*task)) as they become ready; few tasks are under way at any time.

        Raises what a task raises, and `ChildProcessError` when a process is gone.
        """
        numbered = enumerate(tasks)
        if self.count == 1:
            yield from ((i, function(*task)) for i, task in numbered)
            return
        if self._pool is None:
            context = multiprocessing.get_context("spawn")  # a fork would copy the locks of threads
            self._pool = ProcessPoolExecutor(self.count, context, _begin)
        try:
            yield from _as_ready(self._pool, function, numbered, 2 * self.count)
        except BrokenProcessPool as error:
            raise ChildProcessError(
                "a worker process ended: out of memory, or prepare() is called in a script without "
                'if __name__ == "__main__"; take fewer workers, or workers=1'
            ) from error


def _as_ready(
    pool: ProcessPoolExecutor,
    function: Callable[..., Any],
    tasks: Iterator[tuple[int, tuple]],
    most: int,
) -> Iterator[tuple[int, Any]]:
    running: dict[Future, int] = {}
    while True:
        for i, task in islice(tasks, most - len(running)):
            running[pool.submit(function, *task)] = i
        if not running:
            return
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            yield running.pop(future), future.result()


def _begin() -> None:
    """In every worker: one thread (the processes are the parallelism), no Ctrl-C, no life after the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["RAYON_NUM_THREADS"] = "1"
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        with suppress(OSError):
            parent.join()
        os._exit(1)
