"""Noticing that a rank is gone or hangs, and naming it.

Every rank adds one to a number of its own in the launcher's store, twice a second, in a thread; the first rank looks at
all of them and the others at the first one's. A stopped process, a machine that is off or a network that is cut stops
the number, and a rank whose number stands still for `SILENCE` is called lost. A killed process is noticed sooner, by
the messages that it broke off and by torchrun; then the numbers tell which rank it was.

A rank that has noted why it ends is followed by those who cannot notice: they may be waiting for a rank that hangs.

Silence is counted in this rank's own ticks and not by a clock: when the whole machine slept, nobody is lost.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import torch.distributed as dist

TICK, SILENCE, SOON, FOLLOW = 0.5, 30.0, 2.5, 5.0
"""Seconds between two signs of life; until a rank without any is lost; for finding out which one broke off; and until
one that has noticed nothing follows another that ends."""


class Watch:
    """One rank's signs of life, and its eye on others."""

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        world: int,
        lost: Callable[[list[int]], None],
        follow: Callable[[], None],
    ) -> None:
        """Called in a thread: `lost` with the ranks that have been silent for too long, `follow` when another one has
        noted why it ends and this one still goes on."""
        self.rank, self.world, self.lost, self.follow = rank, world, lost, follow
        # A connection of its own, since others may wait in theirs. Its stub does not know the method.
        self._store: dist.Store = store.clone()  # type: ignore[attr-defined]
        self._watched = [r for r in range(world) if r != rank] if rank == 0 else [0]
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._lock = threading.Lock()

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def end(self) -> None:
        """This rank is done, and nobody need wonder."""
        self._ended.set()
        self._add("done", self.rank, 1)

    def failed(self, why: str) -> None:
        """Note why this rank ends."""
        with self._lock:
            self._store.set(f"failed/{self.rank}", why)
        self._add("failures", 0, 1)
        self._ended.set()

    def why(self, rank: int) -> str | None:
        """What a rank has noted."""
        key = f"failed/{rank}"
        with self._lock:
            return self._store.get(key).decode() if self._store.check([key]) else None

    def somebody_failed(self) -> bool:
        """Whether some rank has noted why it ends."""
        return self._add("failures", 0, 0) > 0

    def silent(self) -> list[int]:
        """Ranks without a sign of life for `SOON`, but for those that ask the same and end."""
        self._add("asked", self.rank, 1)
        others = [rank for rank in range(self.world) if rank != self.rank]
        before = {rank: self._add("alive", rank, 0) for rank in others}
        time.sleep(SOON)
        still = [rank for rank in others if self._add("alive", rank, 0) == before[rank]]
        return [rank for rank in still if not self._add("asked", rank, 0)]

    def first_to_tell(self) -> bool:
        """Whether no other rank tells what happened."""
        return self._add("told", 0, 1) == 1

    def _add(self, what: str, rank: int, number: int) -> int:
        with self._lock:
            return self._store.add(f"{what}/{rank}", number)

    def _run(self) -> None:
        seen, ticks = dict.fromkeys(self._watched, 0), dict.fromkeys(self._watched, 0)
        failed = 0
        while not self._ended.wait(TICK):
            try:
                self._look(seen, ticks)
                failed += self.somebody_failed()
            except RuntimeError:  # the store is gone, and with it whoever kept it
                if not self._ended.wait(SOON):
                    self.lost([0])
                return
            gone = [rank for rank, count in ticks.items() if count * TICK >= SILENCE]
            if gone and not self._ended.is_set():
                self.lost(gone)
                return
            if failed * TICK >= FOLLOW and not self._ended.is_set():
                self.follow()
                return

    def _look(self, seen: dict[int, int], ticks: dict[int, int]) -> None:
        self._add("alive", self.rank, 1)
        for rank in seen:
            now = self._add("alive", rank, 0)
            moved = now != seen[rank] or self._add("done", rank, 0)
            seen[rank], ticks[rank] = now, 0 if moved else ticks[rank] + 1
