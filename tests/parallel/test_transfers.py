"""Lists with sends and receives run on the strictest transport: one channel for two ranks, one message at a time."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings

from fathom.parallel import SCHEDULES, Receive, Schedule, Send, Transfer, program, schedule, singles
from fathom.parallel.schedules.transfers import Item
from tests.parallel.plans import plans


def run_with_rendezvous(plan: Schedule, lists: tuple[tuple[Item, ...], ...]) -> int:
    """Interpret `lists`; a message moves when it is the next of its pair of ranks on both sides.

    Returns how many items were not reached. Ranks wait before a step for its inputs, and nowhere else.
    """
    place = [0] * plan.ranks
    posted: dict[tuple[int, int], list[Transfer]] = {}  # (rank, other) -> not yet moved, in order
    there: set[Transfer] = set()
    moved = True
    while moved:
        moved = False
        for rank, items in enumerate(lists):
            while place[rank] < len(items):
                item = items[place[rank]]
                if isinstance(item, Send | Receive):
                    ends = {item.transfer.from_rank, item.transfer.to_rank}
                    posted.setdefault((rank, (ends - {rank}).pop()), []).append(item.transfer)
                else:
                    wanted = [t for a in singles(item) if (t := plan.receives(a))]
                    if not there.issuperset(wanted):
                        break
                    there.update(t for a in singles(item) if (t := plan.sends(a)) and t.local)
                place[rank] += 1
                moved = True
        for (rank, other), queue in posted.items():
            opposite = posted.get((other, rank), [])
            while queue and opposite and queue[0] == opposite[0]:
                there.add(queue.pop(0))
                opposite.pop(0)
                moved = True
    return sum(len(items) - at for items, at in zip(lists, place, strict=True))


@settings(max_examples=60, deadline=None)
@given(plans())
def test_programs_run(plan: Schedule) -> None:
    assert run_with_rendezvous(plan, program(plan)) == 0


@pytest.mark.parametrize("name", SCHEDULES)
def test_programs_run_at_size(name: str) -> None:
    plan = schedule(name, 16, 32)
    lists = program(plan)
    assert run_with_rendezvous(plan, lists) == 0
    steps = tuple(tuple(i for i in items if not isinstance(i, Send | Receive)) for items in lists)
    assert steps == plan.steps
    sent = Counter(i.transfer for items in lists for i in items if isinstance(i, Send))
    received = Counter(i.transfer for items in lists for i in items if isinstance(i, Receive))
    assert sent == received and not any(transfer.local for transfer in sent)


def test_the_judge_sees_a_wrong_order() -> None:
    """Two receives exchanged on one side stop the run: the test above could fail."""
    plan = schedule("1F1B", 2, 4)
    first, last = program(plan)
    receives = [i for i, item in enumerate(last) if isinstance(item, Receive)]
    swapped = list(last)
    a, b = receives[:2]
    swapped[a], swapped[b] = swapped[b], swapped[a]
    assert run_with_rendezvous(plan, (first, tuple(swapped))) > 0


def test_receives_are_posted_near_their_use() -> None:
    """At no moment are more receives open on a rank than the pipeline is deep."""
    for name in SCHEDULES:
        plan = schedule(name, 8, 20)
        for items in program(plan):
            open_now: set[Transfer] = set()
            for item in items:
                if isinstance(item, Receive):
                    open_now.add(item.transfer)
                elif not isinstance(item, Send):
                    open_now -= {t for a in singles(item) if (t := plan.receives(a))}
                assert len(open_now) <= 8
