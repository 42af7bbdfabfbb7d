"""Broken schedules are refused, with the rank and the action: by mutation, against an independent judge."""

from __future__ import annotations

from dataclasses import replace
from graphlib import CycleError, TopologicalSorter

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fathom.errors import ScheduleError
from fathom.parallel import Action, Pair, Part, Schedule, Step, check, schedule, simulate, singles
from tests.parallel.plans import plans


def with_steps(plan: Schedule, rank: int, steps: list[Step]) -> Schedule:
    lists = list(plan.steps)
    lists[rank] = tuple(steps)
    return replace(plan, steps=tuple(lists))


def would_run(plan: Schedule) -> bool:
    """The judge: the graph of what needs what, by kind, stage and micro-batch alone, has no circle."""
    graph: TopologicalSorter[object] = TopologicalSorter()
    done_by: dict[tuple[str, int, int], tuple[int, int]] = {}
    for rank, steps in enumerate(plan.steps):
        for place, step in enumerate(steps):
            graph.add((rank, place), *([(rank, place - 1)] if place else []))
            for a in singles(step):
                for kind in "IW" if a.kind == "B" else a.kind:
                    done_by[kind, a.stage, a.microbatch] = (rank, place)
    for (kind, stage, i), node in done_by.items():
        needs = {
            "F": [("F", stage - 1)],
            "I": [("F", stage), ("I", stage + 1)],
            "W": [("I", stage)],
        }
        for other, where in needs[kind]:
            needed = done_by.get((other, where, i))
            if needed is not None and not (kind == "W" and needed == node):
                graph.add(node, needed)
    try:
        graph.prepare()
    except CycleError:
        return False
    return True


@settings(max_examples=250, deadline=None)
@given(plans(most_stages=6), st.data())
def test_two_steps_swapped(plan: Schedule, data: st.DataObject) -> None:
    """Refused exactly when the swap makes a circle, and the rank at fault is named."""
    rank = data.draw(st.integers(0, plan.ranks - 1))
    steps = list(plan.steps[rank])
    a, b = data.draw(st.lists(st.integers(0, len(steps) - 1), min_size=2, max_size=2))
    steps[a], steps[b] = steps[b], steps[a]
    broken = with_steps(plan, rank, steps)
    if would_run(broken):
        check(broken)
    else:
        with pytest.raises(ScheduleError, match=rf"rank {rank}\b.* of micro-batch \d+ "):
            check(broken)


@settings(max_examples=100, deadline=None)
@given(plans(most_stages=6), st.data())
def test_a_step_missing_or_twice(plan: Schedule, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, plan.ranks - 1))
    steps = list(plan.steps[rank])
    place = data.draw(st.integers(0, len(steps) - 1))
    if data.draw(st.booleans()):
        steps.insert(data.draw(st.integers(0, len(steps))), steps[place])
    else:
        del steps[place]
    with pytest.raises(ScheduleError, match=rf"rank {rank}\b.* of micro-batch \d+ in stage \d+"):
        simulate(with_steps(plan, rank, steps))


@settings(max_examples=150, deadline=None)
@given(plans(most_stages=6), st.data())
def test_an_action_turned_into_another(plan: Schedule, data: st.DataObject) -> None:
    """Another kind, stage, micro-batch or copy, alone or in a pair: the rank's list is no longer complete."""
    rank = data.draw(st.integers(0, plan.ranks - 1))
    steps = list(plan.steps[rank])
    place = data.draw(st.integers(0, len(steps) - 1))
    change = data.draw(
        st.sampled_from([{"kind": k} for k in "FBIW"])
        | st.integers(-1, plan.stages).map(lambda s: {"stage": s})
        | st.integers(-1, plan.microbatches).map(lambda i: {"microbatch": i})
        | st.integers(0, 2).map(lambda c: {"copy": c})
    )
    step = steps[place]
    if isinstance(step, Pair):
        half = data.draw(st.sampled_from(["forward", "backward"]))
        steps[place] = replace(step, **{half: replace(getattr(step, half), **change)})
    else:
        steps[place] = replace(step, **change)
    assume(steps[place] != step)
    with pytest.raises(ScheduleError, match=rf"rank {rank}\b.* of micro-batch -?\d+ in stage"):
        check(with_steps(plan, rank, steps))


@settings(max_examples=50, deadline=None)
@given(plans(most_stages=6), st.data())
def test_a_step_on_another_rank(plan: Schedule, data: st.DataObject) -> None:
    assume(plan.ranks > 1)
    source, target = data.draw(st.permutations(range(plan.ranks)))[:2]
    taken, given_to = list(plan.steps[source]), list(plan.steps[target])
    step = taken.pop(data.draw(st.integers(0, len(taken) - 1)))
    given_to.insert(data.draw(st.integers(0, len(given_to))), step)
    broken = with_steps(with_steps(plan, source, taken), target, given_to)
    with pytest.raises(ScheduleError, match=rf"rank ({source}|{target})\b"):
        check(broken)


TWO = schedule("1F1B", 2, 2)
F0, F1, B0, B1 = (Action(kind, 0, i) for kind in ("F", "B") for i in (0, 1))  # type: ignore[arg-type]
LAST = [Action(kind, 1, i) for i in (0, 1) for kind in ("F", "B")]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rank", "steps", "why"),
    [
        (0, [F0, F1, B0, B0, B1], "rank 0, step 3, B of micro-batch 0 in stage 0: .* done twice"),
        (0, [F0, F1, B0], "rank 0 never runs B of micro-batch 1 in stage 0"),
        (
            0,
            [F0, B1, F1, B0],
            "rank 0, step 1, B of micro-batch 1 .*: its forward comes later or never",
        ),
        (
            0,
            [F0, F1, *LAST],
            "rank 0, step 2, F of micro-batch 0 in stage 1: the rank does not hold",
        ),
        (0, [F0, F1, B0, replace(B1, microbatch=2)], "the part has no such micro-batch"),
        (0, [F0, F1, B0, replace(B1, kind="W")], "no gradient of the input"),
        (0, [F0, F1, B0, replace(B1, kind="I")], "rank 0 never runs W of micro-batch 1"),
        (0, [F1, Pair(F0, B0), B1], "one pair cannot hold both halves"),
        (0, [F0, Pair(B0, F1), B1], "a pair is a forward and a whole backward"),
        (0, [F0, B0, F1, B1], None),
        (1, [LAST[2], LAST[0], LAST[1], LAST[3]], None),
    ],
)
def test_what_is_said(rank: int, steps: list[Step], why: str | None) -> None:
    broken = with_steps(TWO, rank, steps)
    if why is None:
        check(broken)
    else:
        with pytest.raises(ScheduleError, match=why):
            check(broken)


def test_a_circle_is_told() -> None:
    """Rank 0 wants the first backward before the second forward, rank 1 both forwards first."""
    broken = with_steps(
        with_steps(TWO, 0, [F0, B0, F1, B1]), 1, [LAST[0], LAST[2], LAST[1], LAST[3]]
    )
    with pytest.raises(ScheduleError) as refused:
        simulate(broken)
    assert str(refused.value) == (
        "1F1B stops: rank 0 is to run B of micro-batch 0 in stage 0 and waits for the gradient of micro-batch 0 "
        "for stage 0 from rank 1; rank 1 is to run F of micro-batch 1 in stage 1 and waits for the activation of "
        "micro-batch 1 for stage 1 from rank 0; change the order of these"
    )


def test_a_pair_needs_both_inputs_before_it_starts() -> None:
    """Forward then backward would run; interleaved, the two ranks' pairs would wait for each other."""
    first = [F0, Pair(F1, B0), B1]
    last: list[Step] = [LAST[0], Pair(LAST[2], LAST[1]), LAST[3]]
    broken = with_steps(with_steps(TWO, 0, first), 1, last)
    with pytest.raises(
        ScheduleError, match=r"rank 0 is to run F of micro-batch 1 .* with B of micro-batch 0"
    ):
        check(broken)


def test_a_list_for_every_rank() -> None:
    with pytest.raises(ScheduleError, match="1 lists of steps for 2 ranks"):
        check(replace(TWO, steps=TWO.steps[:1]))


@pytest.mark.parametrize("parts", [(Part(0),), (Part(0), Part(1)), (Part(2),)])
def test_every_part_lies_on_one_rank(parts: tuple[Part, ...]) -> None:
    with pytest.raises(ScheduleError, match=r"copy 0 of stage \d lies on \d ranks"):
        check(replace(TWO, placement=(TWO.placement[0], parts)))
