"""The processes of a run, seen from one of them: who speaks and writes, and what they agree on.

All ranks run the same code. The first one claims the folder, prepares the data, writes the logs and talks; the others
have `speaks` False. Whatever decides where the run goes is decided by one rank, or by all together, and told to all.

Words travel in a group of their own, over gloo also where tensors travel over NCCL. A rank waits there for as
long as the first one needs to prepare its data, which may be hours, and is told at once when that one ends.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from fathom.parallel import Layout, Mesh
from fathom.parallel.mesh import Group
from fathom.parallel.together import Together, lost_ranks

T = TypeVar("T")
PATIENCE = timedelta(days=7)
"""How long a rank waits for what the first one does alone."""


class Crew:
    """A run's processes. Alone, nothing here costs anything."""

    def __init__(self, layout: Layout | None = None, full_shard: bool = False) -> None:
        """Collective. `full_shard`: whether weights lie in shards.

        Raises `ParallelError` when there are not as many processes as the layout needs.
        """
        self.mesh, self.full_shard = Mesh(layout or Layout()), full_shard
        self.speaks = self.mesh.rank == 0
        world, words = self.mesh.world, None
        if world.size > 1:
            words = dist.new_group(backend="gloo", timeout=PATIENCE)
        self._together = Together(Group(world.ranks, world.place, words))

    @classmethod
    def alone(cls) -> Crew:
        """One process, whether or not others are there."""
        crew = cls.__new__(cls)
        crew.mesh, crew.speaks, crew._together = Mesh.alone(), True, Together()
        crew.full_shard = False
        return crew

    @property
    def size(self) -> int:
        """How many there are."""
        return self.mesh.world.size

    @property
    def whole(self) -> bool:
        """Whether every rank has the whole model."""
        return self.mesh.layout.pp == self.mesh.layout.ep == 1 and not self.full_shard

    def first(self, do: Callable[[], T]) -> T:
        """What the first rank's `do` gives; the others wait for it. All ranks together.

        What it raises there is raised on all.
        """
        return self._together.lead(do)

    def everyone(self, value: T) -> list[T]:
        """Each rank's value. All ranks together."""
        return self._together.each(lambda: value)

    def any(self, flag: bool) -> bool:
        """Whether it is so on any rank: one number, however many ranks there are. All ranks together."""
        with lost_ranks():
            return bool(self._together.group.sum(torch.tensor(int(flag))))

    def gather(self, number: float) -> list[float]:
        """Each rank's number, as `everyone`, without pickles. All ranks together."""
        numbers = torch.zeros(self.size, dtype=torch.float64)
        numbers[self.mesh.rank] = number
        with lost_ranks():
            return self._together.group.sum(numbers).tolist()

    def wait(self) -> None:
        """Until all ranks are here. All ranks together."""
        self.any(False)
