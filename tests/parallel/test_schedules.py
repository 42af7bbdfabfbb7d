"""The lists of all schedules: what the papers say of them, and what an executor relies on."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from hypothesis import given, settings

from fathom.errors import FathomError, ScheduleError
from fathom.parallel import SCHEDULES, Action, Pair, Part, Schedule, check, schedule, singles
from tests.parallel.plans import plans


def kinds(plan: Schedule, rank: int) -> str:
    """A rank's list in short: F0, B1 … with the rank's part behind the kind, + in overlapped pairs."""
    index = {part: str(i) for i, part in enumerate(plan.placement[rank])}
    return " ".join(
        "+".join(a.kind + index[a.part] for a in singles(step)) for step in plan.steps[rank]
    )


@settings(max_examples=150, deadline=None)
@given(plans(most_stages=10))
def test_every_schedule_is_legal(plan: Schedule) -> None:
    check(plan)


@settings(max_examples=60, deadline=None)
@given(plans())
def test_every_micro_batch_runs_once_in_every_stage(plan: Schedule) -> None:
    done: Counter[tuple[str, int, int]] = Counter()
    for steps in plan.steps:
        for action in (action for step in steps for action in singles(step)):
            for kind in "IW" if action.kind == "B" else action.kind:
                done[kind, action.stage, action.microbatch] += 1
    everything = (
        (k, s, m) for k in "FIW" for s in range(plan.stages) for m in range(plan.microbatches)
    )
    assert done == Counter(everything)


@settings(max_examples=60, deadline=None)
@given(plans())
def test_what_is_sent_is_what_is_received(plan: Schedule) -> None:
    """Both sides name the same transfer, from and to the ranks that hold the stages."""
    actions = [a for steps in plan.steps for step in steps for a in singles(step)]
    sent = Counter(t for a in actions if (t := plan.sends(a)))
    received = Counter(t for a in actions if (t := plan.receives(a)))
    assert sent == received and set(sent.values()) <= {1}
    for transfer in sent:
        assert Part(transfer.from_stage, transfer.copy) in plan.placement[transfer.from_rank]
        assert Part(transfer.to_stage, transfer.copy) in plan.placement[transfer.to_rank]
        assert transfer.to_stage - transfer.from_stage == (
            1 if transfer.content == "activation" else -1
        )
        assert transfer.local == (transfer.from_rank == transfer.to_rank)
        assert abs(transfer.from_rank - transfer.to_rank) <= 1


def test_placement_of_a_v() -> None:
    """The last rank holds two neighbours, the first one both ends; the turn is not sent."""
    plan = schedule("DualPipeV", 8, 8)
    assert plan.placement == tuple((Part(r), Part(7 - r)) for r in range(4))
    turn = plan.sends(Action("F", 3, 0))
    assert turn is not None and turn.local and turn.from_rank == 3
    assert not any(t.local for s in (2, 4, 5) if (t := plan.sends(Action("F", s, 0))) is not None)


def test_placement_of_dualpipe() -> None:
    """Two copies: the second one's micro-batches run from the last rank to the first."""
    plan = schedule("DualPipe", 4, 8)
    assert [set(parts) for parts in plan.placement] == [
        {Part(0, 0), Part(3, 1)},
        {Part(1, 0), Part(2, 1)},
        {Part(2, 0), Part(1, 1)},
        {Part(3, 0), Part(0, 1)},
    ]
    assert plan.copies == 2 and [plan.rank_of(Part(1, copy)) for copy in (0, 1)] == [1, 2]
    assert (plan.microbatches_of(0), plan.microbatches_of(1)) == (range(4), range(4, 8))
    there, back = plan.sends(Action("F", 0, 5, copy=1)), plan.receives(Action("I", 0, 5, copy=1))
    assert there is not None and (there.from_rank, there.to_rank) == (3, 2)
    assert back is not None and (back.from_rank, back.to_rank, back.content) == (2, 3, "gradient")
    first, last = Action("F", 0, 5, copy=1), Action("B", 3, 5, copy=1)
    assert plan.receives(first) is None and plan.receives(last) is None
    assert plan.sends(Action("F", 3, 5, copy=1)) is None and plan.sends(Action("B", 0, 0)) is None


def test_a_part_that_nobody_holds() -> None:
    plan = schedule("1F1B", 4, 8)
    assert plan.copies == 1 and plan.rank_of(Part(2)) == 2
    with pytest.raises(ScheduleError, match="no rank of this 1F1B holds copy 1 of stage 2"):
        plan.rank_of(Part(2, 1))


def test_short_lists_by_hand() -> None:
    """From the drawings in the papers."""
    assert kinds(schedule("GPipe", 2, 3), 0) == "F0 F0 F0 B0 B0 B0"
    assert kinds(schedule("1F1B", 3, 4), 0) == "F0 F0 F0 B0 F0 B0 B0 B0"
    assert kinds(schedule("1F1B", 3, 4), 2) == "F0 B0 F0 B0 F0 B0 F0 B0"
    assert kinds(schedule("ZB1P", 3, 4), 0) == "F0 F0 F0 I0 W0 F0 I0 W0 I0 W0 I0 W0"
    assert kinds(schedule("ZB1P", 3, 4), 2) == "F0 I0 F0 I0 F0 I0 W0 F0 I0 W0 W0 W0"
    last = "F0 F1 F0 F1 I1 W1 F0 I0 W0 F1 I1 W1 I0 I1 I0 W0 W1 W0"
    assert kinds(schedule("ZBV", 4, 3), 1) == last


@pytest.mark.parametrize("stages", [4, 8, 16])
def test_the_eight_steps_of_dualpipe(stages: int) -> None:
    """Counts as in DeepSeek's repository, for every rank; n micro-batches from each end."""
    half, n = stages // 2, stages + 4
    plan = schedule("DualPipe", stages, 2 * n)
    for rank in range(stages):
        near = min(rank, stages - 1 - rank)
        behind, mixed = half - near - 1, near + 1
        main = ["F0+B1 F1+B0"] * (n - stages + near + 1)
        if behind == 0:
            main[0] = "F0 B1 F1+B0"
        ending = ["B1", "B0"] * mixed
        ending = [b if i < mixed else b.replace("B", "I") for i, b in enumerate(ending)]
        expected = ["F0"] * 2 * behind + ["F0 F1"] * mixed + ["I1 W1 F1"] * behind + main
        expected += ["B1 F1+B0"] * behind + ending + ["W I0"] * behind + ["W"] * mixed
        before, after = kinds(plan, rank), " ".join(expected)
        cut = len(" ".join([*expected[: -behind - mixed]]))
        assert before[:cut] == after[:cut]
        assert re.sub(r"W\d", "W", before[cut:]) == after[cut:]


def test_the_two_ends_of_dualpipe_mirror_each_other() -> None:
    """Rank P - 1 - r does what rank r does, with the other half of the micro-batches."""
    plan = schedule("DualPipe", 8, 20)

    def mirrored(action: Action) -> Action:
        other = 1 - action.copy
        return Action(action.kind, action.stage, (action.microbatch + 10) % 20, other)

    for rank in range(8):
        steps = tuple(
            Pair(mirrored(s.forward), mirrored(s.backward)) if isinstance(s, Pair) else mirrored(s)
            for s in plan.steps[rank]
        )
        assert steps == plan.steps[7 - rank]


def test_dualpipev_is_half_of_dualpipe() -> None:
    """The same kinds in the same order, rank by rank ("cut in half")."""
    whole, half = schedule("DualPipe", 8, 40), schedule("DualPipeV", 8, 20)
    assert [kinds(whole, r) for r in range(4)] == [kinds(half, r) for r in range(4)]


@pytest.mark.parametrize(
    ("name", "stages", "microbatches", "why"),
    [
        ("DualPipes", 8, 20, "did you mean 'DualPipe'"),
        ("1f1b", 8, 20, "did you mean '1F1B'"),
        ("chimera", 8, 20, "known are GPipe, 1F1B"),
        ("1F1B", 0, 20, "both must be at least 1"),
        ("GPipe", 2, 0, "both must be at least 1"),
        ("ZBV", 7, 20, "two on each rank.*cut the model into 6 or 8"),
        ("DualPipe", 7, 20, "one from each end"),
        ("DualPipe", 8, 14, "needs at least 16"),
        ("DualPipe", 8, 17, "take 16 or 18"),
        ("DualPipeV", 8, 7, "needs at least 8"),
    ],
)
def test_numbers_that_do_not_work(name: str, stages: int, microbatches: int, why: str) -> None:
    with pytest.raises(FathomError, match=why):
        schedule(name, stages, microbatches)


def test_smallest_numbers() -> None:
    """One stage is one process; ZBV does with fewer micro-batches than it fills the pipeline with."""
    for name in SCHEDULES:
        least = {"DualPipeV": 2, "DualPipe": 4}.get(name, 1)
        check(schedule(name, 2, least))
    assert kinds(schedule("1F1B", 1, 2), 0) == "F0 B0 F0 B0"
