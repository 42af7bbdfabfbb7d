"""The simulator against the report's Table 2, against a slow twin, and by hand."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.errors import ScheduleError
from fathom.parallel import (
    Action,
    Costs,
    Pair,
    Schedule,
    Simulation,
    activations_in_table_2,
    bubble_in_table_2,
    schedule,
    simulate,
    singles,
)
from fathom.parallel.schedules.formulas import IN_TABLE_2
from tests.parallel.plans import plans

DURATIONS = st.integers(1, 16).map(lambda n: n / 8)


@pytest.mark.parametrize("stages", [4, 8, 16])
@pytest.mark.parametrize("name", IN_TABLE_2)
def test_table_2(name: str, stages: int) -> None:
    """Bubble and activations are the printed ones, with F = I = W and a pair that saves a sixth or nothing."""
    for costs in (Costs(pair=2.5), Costs(pair=3.0)):
        found = simulate(schedule(name, stages, max(20, 2 * stages)), costs)
        assert max(found.idle) == pytest.approx(bubble_in_table_2(name, stages, costs))
        assert max(found.peak_activations) == activations_in_table_2(name, stages)


def test_figures_at_16_stages() -> None:
    """F = 1, B = 2, W = 1: 45, 15 and, as the pair costs 2.5 or 3, 10.5 or 14."""
    figures = [bubble_in_table_2(name, 16, Costs(pair=2.5)) for name in IN_TABLE_2]
    assert figures == [45, 15, 10.5, 10.5]
    assert bubble_in_table_2("DualPipe", 16, Costs()) == 14
    assert bubble_in_table_2("ZB1P", 16, Costs(backward=2.5)) == 15 * 1.5
    assert [activations_in_table_2(name, 16) for name in IN_TABLE_2] == [16, 16, 17, 17]
    for formula in (
        lambda: bubble_in_table_2("ZBV", 16, Costs()),
        lambda: activations_in_table_2("GPipe", 16),
    ):
        with pytest.raises(ScheduleError, match=r"Table 2 has no row for (ZBV|GPipe)"):
            formula()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 8), st.integers(1, 20), DURATIONS, DURATIONS, DURATIONS)
def test_the_bubble_of_1f1b(stages: int, microbatches: int, f: float, i: float, w: float) -> None:
    """(P - 1)(F + B) whatever the costs and however few the micro-batches; GPipe's is the same."""
    costs = Costs(f, i, w)
    for name in ("1F1B", "GPipe"):
        found = simulate(schedule(name, stages, microbatches), costs)
        assert found.idle == pytest.approx([bubble_in_table_2("1F1B", stages, costs)] * stages)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 8), st.integers(0, 12), DURATIONS, DURATIONS, DURATIONS)
def test_the_bubble_of_zb1p(stages: int, more: int, f: float, i: float, w: float) -> None:
    """Table 2's where W is the shortest; a longer W has no gap to fit into, and max(F, I) per stage is left."""
    costs = Costs(f, i, w)
    found = simulate(schedule("ZB1P", stages, stages + more), costs)
    expected = (
        bubble_in_table_2("ZB1P", stages, costs) if w <= min(f, i) else (stages - 1) * max(f, i)
    )
    assert max(found.idle) == pytest.approx(expected)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(["DualPipe", "DualPipeV"]), st.integers(1, 4), st.integers(0, 3), st.data())
def test_the_bubble_of_dualpipe(name: str, half: int, more: int, data: st.DataObject) -> None:
    """Table 2's where I = F and W is no longer, whatever a pair saves of the forward."""
    f = data.draw(DURATIONS)
    w = f * data.draw(st.sampled_from([0.25, 0.5, 0.75, 1]))
    pair = f + w + f * data.draw(st.sampled_from([0, 0.25, 0.5, 1]))
    costs = Costs(f, f, w, pair=pair)
    found = simulate(schedule(name, 2 * half, 4 * half + 2 * more), costs)
    assert max(found.idle) == pytest.approx(bubble_in_table_2(name, 2 * half, costs))


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(["DualPipe", "DualPipeV"]), st.integers(1, 4), st.data())
def test_where_dualpipe_differs_from_table_2(name: str, half: int, data: st.DataObject) -> None:
    """With I below F the bubble has F where the formula has I = B - W; with W above I one W less is filled."""
    f, i, w = 1.0, data.draw(DURATIONS.filter(lambda n: n <= 1)), data.draw(DURATIONS)
    saved = data.draw(st.sampled_from([0, 0.125, 0.25, 0.5]))
    pair = max(f, i + w, f + i + w - saved)
    found = simulate(schedule(name, 2 * half, 4 * half), Costs(f, i, w, pair=pair))
    assert max(found.idle) == pytest.approx((half - 1) * (pair + f - w - min(i, w)))


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("more", [0, 1, 9])
def test_zbv_has_no_bubble_but_at_its_ends(ranks: int, more: int) -> None:
    """With F = I = W no rank waits in between, and all of them hold as much."""
    found = simulate(schedule("ZBV", 2 * ranks, 2 * ranks - 1 + more))
    for rank, spans in enumerate(found.timeline):
        assert (spans[0].start, found.makespan - spans[-1].end) == (rank, ranks - 1 - rank)
    assert found.idle == (ranks - 1,) * ranks
    assert found.peak_activations == (2 * ranks,) * ranks


@pytest.mark.parametrize("stages", [4, 8])
def test_more_micro_batches_change_neither_bubble_nor_memory(stages: int) -> None:
    for name in IN_TABLE_2:
        few, many = (simulate(schedule(name, stages, n * stages), Costs(pair=2.5)) for n in (2, 5))
        assert few.idle == pytest.approx(many.idle)
        assert few.peak_activations == many.peak_activations
        assert few.bubble_fraction > many.bubble_fraction


def slow_twin(found: Simulation) -> list[list[tuple[float, float]]]:
    """Start and end of every action, from the rules alone, by repeating until nothing moves."""
    plan, costs = found.schedule, found.costs
    times = {
        (a.kind, a.stage, a.microbatch): (0.0, 0.0)
        for steps in plan.steps
        for s in steps
        for a in singles(s)
    }
    b = costs.input_grad + costs.weight_grad if costs.backward is None else costs.backward
    by_kind = {"F": costs.forward, "B": b, "I": costs.input_grad, "W": costs.weight_grad}
    alone_usually = costs.forward + b

    def alone(action) -> float:  # type: ignore[no-untyped-def]
        return by_kind[action.kind] * (costs.stage_factors or [1.0] * 99)[action.stage]

    where = {part: rank for rank, parts in enumerate(plan.placement) for part in parts}

    def arrival(action, kinds: str, stage: int) -> float:  # type: ignore[no-untyped-def]
        here, there = (where[type(action.part)(s, action.copy)] for s in (action.stage, stage))
        ends = (times.get((kind, stage, action.microbatch)) for kind in kinds)
        return max(end[1] for end in ends if end) + (costs.transfer if here != there else 0.0)

    def starts(action) -> float:  # type: ignore[no-untyped-def]
        if action.kind == "F" and action.stage:
            return arrival(action, "F", action.stage - 1)
        if action.kind in "BI" and action.stage < plan.stages - 1:
            return arrival(action, "BI", action.stage + 1)
        return 0.0

    moved = True
    while moved:
        moved, result = False, []
        for steps in plan.steps:
            free, own = 0.0, []
            for step in steps:
                together = isinstance(step, Pair) and costs.pair is not None
                for group in [singles(step)] if together else [(a,) for a in singles(step)]:
                    start = max([free, *map(starts, group)])
                    free = start + (usual := sum(map(alone, group)))
                    if together:
                        free += usual * (costs.pair / alone_usually - 1)  # type: ignore[operator]
                    own.append((start, free))
                    for a in group:
                        moved |= abs(times[a.kind, a.stage, a.microbatch][1] - free) > 1e-9
                        times[a.kind, a.stage, a.microbatch] = (start, free)
            result.append(own)
    return result


@settings(max_examples=60, deadline=None)
@given(
    plans(most_stages=6),
    st.lists(DURATIONS, min_size=12, max_size=12),
    st.lists(st.booleans(), min_size=3),
)
def test_the_slow_twin(plan: Schedule, durations: list[float], has: list[bool]) -> None:
    f, i, w, b, pair, transfer, *factors = durations
    uneven = tuple(factors[: plan.stages]) if has[2] else ()
    costs = Costs(f, i, w, b if has[0] else None, pair if has[1] else None, transfer, uneven)
    found = simulate(plan, costs)
    for expected, spans in zip(slow_twin(found), found.timeline, strict=True):
        times = [time for span in spans for time in (span.start, span.end)]
        assert [time for span in expected for time in span] == pytest.approx(times)
    for idle, busy in zip(found.idle, found.busy, strict=True):
        assert idle + busy == pytest.approx(found.makespan) and idle > -1e-9


def test_uneven_stages() -> None:
    """A stage that takes twice as long sets the pace: 8 rounds of 3 on it, and the way to it and back."""
    found = simulate(schedule("1F1B", 2, 8), Costs(stage_factors=(1, 2)))
    assert found.makespan == 8 * 6 + 3 and found.busy == (24, 48)
    assert Costs(pair=2.5, stage_factors=(1, 2)).of(
        Pair(Action("F", 1, 1), Action("B", 0, 0))
    ) == pytest.approx(2.5 * 4 / 3)
    with pytest.raises(ScheduleError, match="3 stage_factors for the 2 stages of 1F1B"):
        simulate(schedule("1F1B", 2, 8), Costs(stage_factors=(1, 2, 3)))


def test_by_hand() -> None:
    """1F1B on two ranks, F 1, B 2, transfers a half: drawn on paper."""
    found = simulate(schedule("1F1B", 2, 2), Costs(transfer=0.5))
    times = [[(s.start, s.end) for s in spans] for spans in found.timeline]
    assert times == [
        [(0, 1), (1, 2), (5, 7), (8, 10)],
        [(1.5, 2.5), (2.5, 4.5), (4.5, 5.5), (5.5, 7.5)],
    ]
    assert (found.makespan, found.busy, found.idle) == (10, (6, 6), (4, 4))
    assert found.bubble_fraction == 0.4 and found.peak_activations == (2, 1)


def test_a_pair_that_is_not_overlapped_hands_its_forward_on_early() -> None:
    plan = schedule("DualPipeV", 2, 3)
    apart, together = simulate(plan), simulate(plan, Costs(pair=3.0))
    count = sum(isinstance(step, Pair) for step in plan.steps[0])
    assert count and len(apart.timeline[0]) == len(together.timeline[0]) + count


def test_what_is_held_until_the_weight_gradients() -> None:
    """ZB1P fills every rank up to P; without the put-off weight gradients rank r would hold P - r."""
    found = simulate(schedule("ZB1P", 4, 8))
    assert found.peak_activations == (4, 4, 4, 4)
    assert found.peak_before_input_grad == (4, 3, 2, 1)
    assert simulate(schedule("GPipe", 4, 8)).peak_activations == (8, 8, 8, 8)


def test_work_without_cost() -> None:
    found = simulate(schedule("1F1B", 2, 2), Costs(0, 0, 0))
    assert found.makespan == 0 and found.bubble_fraction == 0


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_costs_are_durations(value: float) -> None:
    with pytest.raises(ScheduleError, match=r"cost stage_factors\[1\] = "):
        Costs(stage_factors=(1.0, value))
    with pytest.raises(ScheduleError, match=r"cost transfer = .*: it must be a finite number"):
        Costs(transfer=value)
