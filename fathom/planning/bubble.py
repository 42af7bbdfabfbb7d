"""Idle time of pipeline schedules by formula (report Table 2; sources at each).

F, B and W are the times of one micro-batch in one stage: forward, whole backward, and the part of it that makes weight
gradients; `both` is a forward and a backward chunk that overlap each other, F&B of the report. B includes W (spec trap
19), which is why ZB1P reads F + B - 2W. PP counts stages, not devices: DualPipeV and ZBV put two on a device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fathom.errors import PlanError, did_you_mean
from fathom.parallel.schedules import bubble_in_table_2, simulation


@dataclass(frozen=True)
class Costs:
    """Seconds (or any unit) of one micro-batch in one stage."""

    forward: float
    backward: float
    """Whole backward, weight gradients included."""
    weight: float
    """Weight gradients alone."""
    both: float
    """A forward and a backward that run into one another."""


@dataclass(frozen=True)
class Schedule:
    """What the planner knows of a schedule."""

    stages_per_rank: int
    """2: a V or two directions."""
    copies: int
    """How often a stage's weights exist along the pipeline."""
    overlaps: bool
    """Whether forward and backward chunks of different micro-batches run into one another."""
    bubble: Callable[[int, Costs], float]
    """Idle time of a step for PP stages."""
    in_flight: Callable[[int, int, int], tuple[float, ...]]
    """Micro-batches that the stages of a rank hold at most, before the number of micro-batches limits them:
    (ranks, rank, micro-batches)."""


def _of_table_2(name: str) -> Callable[[int, Costs], float]:
    """The report's row, where the schedules have it."""

    def idle(stages: int, costs: Costs) -> float:
        chunks = simulation.Costs(
            forward=costs.forward,
            backward=costs.backward,
            weight_grad=costs.weight,
            pair=costs.both,
        )
        return bubble_in_table_2(name, stages, chunks)

    return idle


SCHEDULES = {
    # Huang et al. 2019: every forward, then every backward.
    "GPipe": Schedule(
        1, 1, False, lambda pp, c: (pp - 1) * (c.forward + c.backward), lambda p, r, m: (m,)
    ),
    # Report Table 2; the first rank holds one micro-batch for every stage.
    "1F1B": Schedule(1, 1, False, _of_table_2("1F1B"), lambda p, r, m: (p - r,)),
    # Report Table 2; ZB-H1 of Qi et al. 2023. It delays W, so every rank holds as much as the first.
    "ZB1P": Schedule(
        1,
        1,
        False,
        _of_table_2("ZB1P"),
        lambda p, r, m: (p,),
    ),
    # Qi et al. 2024: none where F = B - W = W. Elsewhere ours: what ZB-H2 of Qi et al. 2023 leaves, over PP / 2 ranks.
    "ZBV": Schedule(
        2,
        1,
        False,
        lambda pp, c: (pp // 2 - 1) * max(0.0, 2 * (c.forward + c.backward - 3 * c.weight)),
        lambda p, r, m: (2 * p - r - 1, r + 1),
    ),
    # Report Table 2: the rank's own stage, and its mirror's from the other end; PP + 1 micro-batches in all.
    "DualPipe": Schedule(
        2,
        2,
        True,
        _of_table_2("DualPipe"),
        lambda p, r, m: (p - r, r + 1),
    ),
    # DualPipe's repository: the same over PP stages on PP / 2 ranks.
    "DualPipeV": Schedule(
        2,
        1,
        True,
        _of_table_2("DualPipeV"),
        lambda p, r, m: (2 * p - r, r + 1),
    ),
}


def schedule(name: str) -> Schedule:
    """The schedule of that name; `PlanError` where there is none."""
    if name not in SCHEDULES:
        raise PlanError(f"no schedule is called {name!r}; {did_you_mean(name, SCHEDULES)}")
    return SCHEDULES[name]


def bubble(name: str, stages: int, costs: Costs) -> float:
    """Idle time of one step in a pipeline of so many stages.

    >>> bubble("DualPipe", 16, Costs(1, 2, 1, 2.5))
    10.5
    """
    return schedule(name).bubble(stages, costs)
