"""A pipeline schedule as data: what each rank does, in order, and where its inputs come from (report §3.2.1).

The model is cut into `stages` pieces, numbered from the embedding (0) to the head. A *part* is one copy of one piece,
and a rank holds one part or two:

- one stage a rank (GPipe, 1F1B, ZB1P): rank r holds stage r;
- in a V (ZBV, DualPipeV): rank r of R holds stages r and 2R - 1 - r, so that the last rank holds two neighbours and
  the first one holds embedding and head;
- from both ends (DualPipe): there are two copies of every stage. Copy 0 of stage s lies on rank s, copy 1 on rank P
  - 1 - s. Micro-batches 0 … M/2 - 1 go through copy 0, from rank 0 to rank P - 1; the other half goes through copy
  1, from rank P - 1 to rank 0. Rank r therefore holds stages r and P - 1 - r, and the gradients of the two copies of
  a stage have to be added after the last action.

A rank's list has no sends and receives in it. They follow from the actions: `Schedule.receives` and `Schedule.sends`
give the same `Transfer` on both sides, so that an executor can use it as a key. Each list may be run as it stands:
receive before an action, send (without waiting) after it; `check` proves that for every list.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from fathom.errors import ScheduleError

Kind = Literal["F", "B", "I", "W"]
"""F forward · B whole backward · I gradient of the input alone · W gradient of the weights, after I. B is I and W."""


@dataclass(frozen=True, slots=True)
class Part:
    """One copy of one stage: what a module on a rank holds. Copy 1 exists in DualPipe only."""

    stage: int
    copy: int = 0


@dataclass(frozen=True, slots=True)
class Action:
    """One computation of one micro-batch in one part."""

    kind: Kind
    stage: int
    microbatch: int
    copy: int = 0

    @property
    def part(self) -> Part:
        return Part(self.stage, self.copy)

    def __str__(self) -> str:
        copy = f", copy {self.copy}" if self.copy else ""
        return f"{self.kind} of micro-batch {self.microbatch} in stage {self.stage}{copy}"


@dataclass(frozen=True, slots=True)
class Pair:
    """A forward of one micro-batch overlapped with the whole backward of another.

    Neither needs the other's result. An executor may interleave the two, so both inputs are there before it starts;
    it may as well run the forward and then the backward.
    """

    forward: Action
    backward: Action

    def __str__(self) -> str:
        return f"{self.forward} with {self.backward}"


Step = Action | Pair


def singles(step: Step) -> tuple[Action, ...]:
    """The actions in a step, in the order in which they run where they are not interleaved."""
    return (step.forward, step.backward) if isinstance(step, Pair) else (step,)


@dataclass(frozen=True, slots=True)
class Transfer:
    """What one action leaves for another: an activation (to the next stage) or a gradient (to the one before)."""

    content: Literal["activation", "gradient"]
    microbatch: int
    copy: int
    from_stage: int
    to_stage: int
    from_rank: int
    to_rank: int

    @property
    def local(self) -> bool:
        """Both stages are on one rank (the turn of a V): handed over in memory, never sent."""
        return self.from_rank == self.to_rank

    def __str__(self) -> str:
        return f"the {self.content} of micro-batch {self.microbatch} for stage {self.to_stage}"


@dataclass(frozen=True)
class Schedule:
    """Every rank's list of steps, and which parts it holds. Made by `schedule`; any other is data as well."""

    name: str
    stages: int
    microbatches: int
    placement: tuple[tuple[Part, ...], ...]
    """Parts by rank, in the order in which a micro-batch meets them first."""
    steps: tuple[tuple[Step, ...], ...]
    """Steps by rank."""

    @property
    def ranks(self) -> int:
        return len(self.placement)

    @property
    def copies(self) -> int:
        """How many copies of the parameters there are: 2 in DualPipe, otherwise 1."""
        return 1 + max(part.copy for parts in self.placement for part in parts)

    @cached_property
    def _rank_of(self) -> dict[Part, int]:
        return {part: rank for rank, parts in enumerate(self.placement) for part in parts}

    def rank_of(self, part: Part) -> int:
        """The rank that holds a part. Raises `ScheduleError` where none does."""
        if part not in self._rank_of:
            raise ScheduleError(
                f"no rank of this {self.name} holds copy {part.copy} of stage {part.stage}: "
                f"there are {self.stages} stages and copies 0 to {self.copies - 1}; take a part of `placement`"
            )
        return self._rank_of[part]

    def microbatches_of(self, copy: int) -> range:
        """The micro-batches that go through a copy: all, or one half each where there are two."""
        share = self.microbatches // self.copies
        return range(copy * share, (copy + 1) * share)

    def receives(self, action: Action) -> Transfer | None:
        """What an action needs from another stage; None for data (F of stage 0), the loss and every W."""
        if action.kind == "F" and action.stage > 0:
            return self._transfer(action, action.stage - 1, action.stage)
        if action.kind in "BI" and action.stage < self.stages - 1:
            return self._transfer(action, action.stage + 1, action.stage)
        return None

    def sends(self, action: Action) -> Transfer | None:
        """What an action leaves for another stage; None at the model's ends and for every W."""
        if action.kind == "F" and action.stage < self.stages - 1:
            return self._transfer(action, action.stage, action.stage + 1)
        if action.kind in "BI" and action.stage > 0:
            return self._transfer(action, action.stage, action.stage - 1)
        return None

    def _transfer(self, action: Action, source: int, target: int) -> Transfer:
        return Transfer(
            content="activation" if action.kind == "F" else "gradient",
            microbatch=action.microbatch,
            copy=action.copy,
            from_stage=source,
            to_stage=target,
            from_rank=self.rank_of(Part(source, action.copy)),
            to_rank=self.rank_of(Part(target, action.copy)),
        )
