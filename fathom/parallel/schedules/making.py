"""One door to all schedules, and what each of them asks of the numbers."""

from __future__ import annotations

from collections.abc import Callable

from fathom.errors import ScheduleError, did_you_mean
from fathom.parallel.schedules.actions import Schedule
from fathom.parallel.schedules.dualpipe import dualpipe, dualpipev
from fathom.parallel.schedules.one_stage import gpipe, one_forward_one_backward, zb1p
from fathom.parallel.schedules.v_shape import zbv

_MAKERS: dict[str, Callable[[int, int], Schedule]] = {
    "GPipe": gpipe,
    "1F1B": one_forward_one_backward,
    "ZB1P": zb1p,
    "ZBV": zbv,
    "DualPipeV": dualpipev,
    "DualPipe": dualpipe,
}
SCHEDULES = tuple(_MAKERS)
"""Names of all schedules."""
_TWO_STAGES_A_RANK = ("ZBV", "DualPipeV")


def schedule(name: str, stages: int, microbatches: int) -> Schedule:
    """Every rank's list of steps for a model in `stages` pieces and a batch in `microbatches`.

    There are as many ranks as stages; half as many for ZBV and DualPipeV, which put two stages on each. Raises
    `ScheduleError` for an unknown name and for numbers that the schedule does not work with.

    >>> plan = schedule("1F1B", stages=2, microbatches=2)
    >>> [str(step) for step in plan.steps[1]][:2]
    ['F of micro-batch 0 in stage 1', 'B of micro-batch 0 in stage 1']
    """
    if name not in _MAKERS:
        remedy = did_you_mean(name, SCHEDULES)
        raise ScheduleError(f"there is no pipeline schedule {name!r}; {remedy}")
    _check_numbers(name, stages, microbatches)
    return _MAKERS[name](stages, microbatches)


def stages_on(name: str, ranks: int) -> int:
    """How many pieces of the model so many ranks hold together."""
    return 2 * ranks if name in _TWO_STAGES_A_RANK else ranks


def _check_numbers(name: str, stages: int, microbatches: int) -> None:
    if stages < 1 or microbatches < 1:
        raise ScheduleError(
            f"{name} with {stages} stages and {microbatches} micro-batches: both must be at least 1"
        )
    if name in ("ZBV", "DualPipeV", "DualPipe") and stages % 2:
        why = "one from each end" if name == "DualPipe" else "two on each rank"
        raise ScheduleError(
            f"{name} with {stages} stages: it pairs stages, {why}, so there must be an even number; "
            f"cut the model into {stages - 1 or 2} or {stages + 1}"
        )
    least = {"DualPipeV": stages, "DualPipe": 2 * stages}.get(name, 1)
    if microbatches < least:
        raise ScheduleError(
            f"{name} with {microbatches} micro-batches and {stages} stages: it needs at least {least}; "
            "take more and smaller micro-batches, fewer stages, or 1F1B, ZB1P or ZBV"
        )
    if name == "DualPipe" and microbatches % 2:
        raise ScheduleError(
            f"DualPipe with {microbatches} micro-batches: half of them come from each end, so there must be "
            f"an even number; take {microbatches - 1} or {microbatches + 1}"
        )
