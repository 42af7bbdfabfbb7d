"""Formulas and traits of schedules against the lists themselves, run on paper."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.errors import ScheduleError
from fathom.parallel import SCHEDULES, Costs, Part, Schedule, schedule, simulate, singles
from fathom.parallel.schedules import bubble_by_formula, in_flight, traits

DURATIONS = st.integers(1, 16).map(lambda n: n / 8)
EACH = Costs(pair=2.5)
"""F, I and W take as long; a pair saves a sixth."""


def made(name: str, ranks: int, rounds: int = 3) -> Schedule:
    """So many micro-batches for each stage."""
    stages = traits(name).stages(ranks)
    return schedule(name, stages, rounds * stages)


@pytest.mark.parametrize("name", SCHEDULES)
def test_bubble(name: str) -> None:
    for ranks in (2, 4, 8):
        plan = made(name, ranks)
        found = max(simulate(plan, EACH).idle)
        assert found == pytest.approx(bubble_by_formula(name, plan.stages, EACH))


def test_bubble_at_16_stages() -> None:
    """F = 1, B = 2, W = 1 and an overlapped pair that costs 2.5; PP / 2 ranks for the schedules in a V."""
    found = {name: bubble_by_formula(name, 16, EACH) for name in SCHEDULES}
    assert found == {
        "GPipe": 45, "1F1B": 45, "ZB1P": 15, "ZBV": 7, "DualPipe": 10.5, "DualPipeV": 10.5,
    }  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(0, 6), DURATIONS, DURATIONS, DURATIONS)
def test_the_bubble_of_zbv(ranks: int, more: int, one: float, two: float, three: float) -> None:
    """Exact where I is the longest, and never above what the lists take."""
    plan = schedule("ZBV", 2 * ranks, 2 * ranks + more)
    weight, forward, inputs = one, two, three
    for longest in (False, True):
        if longest:
            weight, forward, inputs = sorted((one, two, three))
        costs = Costs(forward, inputs, weight)
        found, formula = (
            max(simulate(plan, costs).idle),
            bubble_by_formula("ZBV", plan.stages, costs),
        )
        assert found == pytest.approx(formula) if longest else found > formula - 1e-9


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_micro_batches_under_way(name: str, ranks: int) -> None:
    plan = made(name, ranks)
    peaks = simulate(plan).peak_activations
    for rank in range(ranks):
        stages = traits(name).held(rank, ranks)
        assert set(stages) == {part.stage for part in plan.placement[rank]}
        found = in_flight(name, ranks, rank, plan.microbatches)
        assert sum(found) == peaks[rank]
        assert found in under_way(plan, rank, stages)


def under_way(plan: Schedule, rank: int, stages: tuple[int, ...]) -> set[tuple[int, ...]]:
    """Micro-batches that a rank holds of each stage, between F and the end of B or W, at all times."""
    held, seen = dict.fromkeys(stages, 0), set()
    for step in plan.steps[rank]:
        for action in singles(step):
            held[action.stage] += {"F": 1, "B": -1, "I": 0, "W": -1}[action.kind]
            seen.add(tuple(held.values()))
    return seen


@pytest.mark.parametrize("name", SCHEDULES)
def test_traits(name: str) -> None:
    own, plan = traits(name), made(name, 4)
    assert plan.ranks == 4 and plan.copies == own.copies
    assert all(len(parts) == own.parts for parts in plan.placement)
    paired = any(len(singles(step)) == 2 for steps in plan.steps for step in steps)
    assert paired == own.overlaps
    schedule(name, plan.stages, own.least(4))
    assert plan.rank_of(Part(0)) == 0


def test_no_schedule_of_that_name() -> None:
    for asked in (
        lambda: traits("Dualpipe"),
        lambda: in_flight("Dualpipe", 4, 0, 8),
        lambda: schedule("Dualpipe", 4, 8),
    ):
        with pytest.raises(
            ScheduleError, match="no pipeline schedule 'Dualpipe'; did you mean 'DualPipe'"
        ):
            asked()
