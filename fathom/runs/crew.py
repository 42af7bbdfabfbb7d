"""The processes of a run, seen from one of them: who speaks and writes, and what they agree on.

All ranks run the same code. The first one claims the folder, prepares the data, writes the logs and talks; the others
have `speaks` False. Whatever decides where the run goes is decided by one rank, or by all together, and told to all.

Words travel in a group of their own, over gloo also where tensors travel over NCCL. A rank waits there for as
long as the first one needs to prepare its data, which may be hours, and is told at once when that one ends.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from fathom.errors import FathomError
from fathom.parallel import Layout, Mesh

T = TypeVar("T")
PATIENCE = timedelta(days=7)
"""How long a rank waits for what the first one does alone."""


class Crew:
    """A run's processes. Alone, nothing here costs anything."""

    def __init__(self, layout: Layout | None = None) -> None:
        """Collective. Raises `ParallelError` when there are not as many processes as the layout needs."""
        self.mesh = Mesh(layout or Layout())
        self.speaks = self.mesh.rank == 0
        alone = self.mesh.world.size == 1
        self._words = None if alone else dist.new_group(backend="gloo", timeout=PATIENCE)

    @classmethod
    def alone(cls) -> Crew:
        """One process, whether or not others are there."""
        crew = cls.__new__(cls)
        crew.mesh, crew.speaks, crew._words = Mesh.alone(), True, None
        return crew

    @property
    def size(self) -> int:
        """How many there are."""
        return self.mesh.world.size

    @property
    def whole(self) -> bool:
        """Whether every rank has the whole model."""
        return self.mesh.layout.pp == self.mesh.layout.ep == 1

    def first(self, do: Callable[[], T]) -> T:
        """What the first rank's `do` gives; the others wait for it. All ranks together.

        What the first one refuses (`FathomError`) is raised on all.
        """
        if self._words is None:
            return do()
        told: list[Any] = [None, None]
        if self.speaks:
            try:
                told[0] = do()
            except FathomError as error:
                told[1] = error
        dist.broadcast_object_list(told, src=0, group=self._words)
        if told[1] is not None:
            raise told[1]
        return told[0]

    def any(self, flag: bool) -> bool:
        """Whether it is so on any rank. All ranks together."""
        return max(self.gather(float(flag))) > 0

    def gather(self, number: float) -> list[float]:
        """Each rank's number. All ranks together."""
        if self._words is None:
            return [number]
        numbers = torch.zeros(self.size, dtype=torch.float64)
        numbers[self.mesh.rank] = number
        dist.all_reduce(numbers, group=self._words)
        return numbers.tolist()

    def everyone(self, value: T) -> list[T]:
        """Each rank's value. All ranks together."""
        if self._words is None:
            return [value]
        told: list[Any] = [None] * self.size
        dist.all_gather_object(told, value, group=self._words)
        return told

    def wait(self) -> None:
        """Until all ranks are here."""
        self.gather(0.0)
