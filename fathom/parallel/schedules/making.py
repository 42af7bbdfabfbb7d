"""One door to all schedules: what is so of each whatever the numbers, what it asks of them, and its lists.

`Traits` are known without making the lists, so that a planner can weigh thousands of layouts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fathom.errors import ScheduleError, did_you_mean
from fathom.parallel.schedules.actions import Schedule
from fathom.parallel.schedules.dualpipe import dualpipe, dualpipev
from fathom.parallel.schedules.one_stage import gpipe, one_forward_one_backward, zb1p
from fathom.parallel.schedules.v_shape import zbv


@dataclass(frozen=True)
class Traits:
    """What is so of a schedule whatever the number of ranks and micro-batches."""

    make: Callable[[int, int], Schedule]
    """The lists for (stages, micro-batches)."""
    parts: int = 1
    """Parts on each rank; 2: a V, or two directions."""
    copies: int = 1
    """How often a stage exists along the pipeline; 2: two directions, half of the micro-batches for each."""
    overlaps: bool = False
    """Whether a forward and a backward of different micro-batches run into one another."""

    def stages(self, ranks: int) -> int:
        """How many pieces of the model so many ranks hold together."""
        return ranks * self.parts // self.copies

    def held(self, rank: int, ranks: int) -> tuple[int, ...]:
        """The stages of a rank: its own, and where it has two parts the mirror image's."""
        return (rank, self.stages(ranks) - 1 - rank)[: self.parts]

    def least(self, ranks: int) -> int:
        """Fewest micro-batches; the overlapping schedules want two for each rank (DeepSeek's repository)."""
        return 2 * ranks if self.overlaps else 1


TRAITS = {
    "GPipe": Traits(gpipe),
    "1F1B": Traits(one_forward_one_backward),
    "ZB1P": Traits(zb1p),
    "ZBV": Traits(zbv, parts=2),
    "DualPipe": Traits(dualpipe, parts=2, copies=2, overlaps=True),
    "DualPipeV": Traits(dualpipev, parts=2, overlaps=True),
}
SCHEDULES = tuple(TRAITS)
"""Names of all schedules."""


def traits(name: str) -> Traits:
    """What is so of the schedule of that name; `ScheduleError` where there is none.

    >>> traits("DualPipeV").held(rank=0, ranks=4)
    (0, 7)
    """
    if name not in TRAITS:
        remedy = did_you_mean(name, SCHEDULES)
        raise ScheduleError(f"there is no pipeline schedule {name!r}; {remedy}")
    return TRAITS[name]


def schedule(name: str, stages: int, microbatches: int) -> Schedule:
    """Every rank's list of steps for a model in `stages` pieces and a batch in `microbatches`.

    There are as many ranks as stages; half as many for ZBV and DualPipeV, which put two stages on each. Raises
    `ScheduleError` for an unknown name and for numbers that the schedule does not work with.

    >>> plan = schedule("1F1B", stages=2, microbatches=2)
    >>> [str(step) for step in plan.steps[1]][:2]
    ['F of micro-batch 0 in stage 1', 'B of micro-batch 0 in stage 1']
    """
    found = traits(name)
    _check_numbers(name, found, stages, microbatches)
    return found.make(stages, microbatches)


def _check_numbers(name: str, found: Traits, stages: int, microbatches: int) -> None:
    if stages < 1 or microbatches < 1:
        raise ScheduleError(
            f"{name} with {stages} stages and {microbatches} micro-batches: both must be at least 1"
        )
    if found.parts == 2 and stages % 2:
        why = "one from each end" if found.copies == 2 else "two on each rank"
        raise ScheduleError(
            f"{name} with {stages} stages: it pairs stages, {why}, so there must be an even number; "
            f"cut the model into {stages - 1 or 2} or {stages + 1}"
        )
    least = found.least(stages * found.copies // found.parts)
    if microbatches < least:
        raise ScheduleError(
            f"{name} with {microbatches} micro-batches and {stages} stages: it needs at least {least}; "
            "take more and smaller micro-batches, fewer stages, or 1F1B, ZB1P or ZBV"
        )
    if found.copies == 2 and microbatches % 2:
        raise ScheduleError(
            f"{name} with {microbatches} micro-batches: half of them come from each end, so there must be "
            f"an even number; take {microbatches - 1} or {microbatches + 1}"
        )
