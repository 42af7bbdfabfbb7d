"""Two ranks on two cores, and a network between them that takes its time, for `overlap.py`.

A transfer's result counts as there only bytes / bandwidth seconds after it was posted. That time passes by itself:
whoever waits before sleeps, and the core is free. Bytes of a transfer: what a rank sends to the other or receives from
it, whichever is more.
"""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fathom.parallel.all_to_all import Route
from fathom.parallel.schedules.overlap import Operation

CARRIED: dict[str, Operation] = {
    "routing": ("F", "dispatch"),
    "dispatch": ("F", "dispatch"),
    "combine": ("F", "combine"),
    "combine gradient": ("B", "combine"),
    "dispatch gradient": ("B", "dispatch"),
}


@dataclass
class Network:
    """Delays what `Route.post` sends; counts what it sent by operation."""

    seconds_per_byte: float = 0.0
    queued: bool = False
    free: float = 0.0
    bytes: Counter[Operation] = field(default_factory=Counter)

    def ready(self, sent: int) -> float:
        """When something that is posted now will have come."""
        now = time.perf_counter()
        start = max(now, self.free) if self.queued else now
        self.free = start + sent * self.seconds_per_byte
        return self.free

    @contextmanager
    def between(self) -> Iterator[None]:
        """Within, this network is between the ranks."""
        post = Route.post

        def posted(route: Route, rows: Tensor, load: str) -> tuple[Tensor, Any]:
            here, row_bytes = route.group.place, rows[:1].nbytes
            moved = max(sum(counts) - counts[here] for counts in (route.out, route.back))
            ready = self.ready(moved * row_bytes)
            self.bytes[CARRIED[load]] += moved * row_bytes
            arriving, (work, kept) = post(route, rows, load)
            return arriving, (Delayed(work, ready), kept)

        Route.post = posted  # type: ignore[assignment, method-assign]
        try:
            yield
        finally:
            Route.post = post  # type: ignore[method-assign]


@dataclass
class Delayed:
    """A transfer that is done when it is done and its time has come."""

    work: dist.Work
    ready: float

    def wait(self) -> None:
        self.work.wait()
        left = self.ready - time.perf_counter()
        if left > 0:
            time.sleep(left)


def on_two_ranks(function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Of both ranks. Raises the traceback of the first that failed."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    fork, children = multiprocessing.get_context("fork"), []
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        raise SystemExit("error: there is one core for two ranks; run this where there are two")
    for rank, core in enumerate(cores):
        reader, writer = fork.Pipe(duplex=False)
        target = (writer, store.port, rank, core, function, arguments)
        child = fork.Process(target=one_rank, args=target, daemon=True)
        child.start()
        writer.close()
        children.append((child, reader))
    answers = [reader.recv() for _, reader in children]
    for child, _ in children:
        child.join()
    for answer in answers:
        if isinstance(answer, str):
            raise SystemExit(answer)
    return answers


def one_rank(
    writer: Connection,
    port: int,
    rank: int,
    core: int,
    function: Callable[..., Any],
    arguments: Any,
) -> None:
    os.sched_setaffinity(0, {core})  # before gloo's threads are there, so that they stay here too
    torch.set_num_threads(1)
    try:
        store = dist.TCPStore("127.0.0.1", port, is_master=False)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
        writer.send(function(*arguments))
    except BaseException:
        writer.send(traceback.format_exc())
    writer.close()
    os._exit(0)
