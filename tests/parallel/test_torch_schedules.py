"""Torch's own schedules as an oracle: the same lists, where torch has the schedule. Its private names may go away."""

from __future__ import annotations

from typing import Any

import pytest

from fathom.parallel import Pair, Schedule, Step, schedule

schedules: Any = pytest.importorskip("torch.distributed.pipelining.schedules")


def written(step: Step) -> list[str]:
    if isinstance(step, Pair):
        return ["overlap", *written(step.forward), *written(step.backward)]
    return [f"{step.stage}{step.kind}{step.microbatch}"]


def ours(plan: Schedule, rank: int) -> list[str]:
    return [word for step in plan.steps[rank] for word in written(step)]


def theirs(actions: list[Any]) -> list[str]:
    """Torch's list in the same words; its idle places and gradient reductions are not ours."""
    kinds = {"FORWARD": "F", "FULL_BACKWARD": "B", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W"}
    words = []
    for action in actions:
        if action is None or action.computation_type.name == "REDUCE_GRAD":
            continue
        if action.computation_type.name == "OVERLAP_F_B":
            words += ["overlap", *theirs(list(action.sub_actions))]
        else:
            kind = kinds[action.computation_type.name]
            words.append(f"{action.stage_index}{kind}{action.microbatch_index}")
    return words


def made_without_processes(name: str, **numbers: int) -> Any:
    """One of torch's schedules with nothing but the numbers that its list is made from."""
    kind = getattr(schedules, name, None)
    if kind is None:
        pytest.skip(f"this torch has no {name}")
    made = kind.__new__(kind)
    vars(made).update(numbers)
    return made


def lists_of(made: Any, method: str, *args: int) -> Any:
    try:
        return getattr(made, method)(*args)
    except AttributeError as error:
        pytest.skip(f"torch's schedules are made from other numbers in this version: {error}")


@pytest.mark.parametrize(
    ("name", "theirs_name"), [("GPipe", "ScheduleGPipe"), ("1F1B", "Schedule1F1B")]
)
@pytest.mark.parametrize(("stages", "microbatches"), [(2, 2), (4, 8), (8, 20)])
def test_one_stage_a_rank(name: str, theirs_name: str, stages: int, microbatches: int) -> None:
    """Torch's list of 1F1B numbers the last rank's forwards from 1 (2.13; what it runs is right): kinds only there."""
    made = made_without_processes(theirs_name, _num_stages=stages, _n_microbatches=microbatches)
    lists = lists_of(made, "_get_pipeline_order")
    plan = schedule(name, stages, microbatches)
    for rank in range(stages):
        mine, other = ours(plan, rank), theirs(lists[rank])
        if name == "1F1B" and rank == stages - 1:
            mine, other = ([word.rstrip("0123456789") for word in words] for words in (mine, other))
        assert mine == other


@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 4), (4, 8), (8, 20)])
def test_zb1p(ranks: int, microbatches: int) -> None:
    """Torch's interleaved zero-bubble schedule with one stage a rank is ZB1P."""
    made = made_without_processes(
        "ScheduleInterleavedZeroBubble",
        pp_group_size=ranks,
        n_local_stages=1,
        _n_microbatches=microbatches,
        microbatches_per_round=ranks,
        number_of_rounds=microbatches // ranks,
    )
    plan = schedule("ZB1P", ranks, microbatches)
    for rank in range(ranks):
        assert ours(plan, rank) == theirs(lists_of(made, "_calculate_single_rank_operations", rank))


@pytest.mark.parametrize(
    ("name", "theirs_name"),
    [("ZBV", "ScheduleZBVZeroBubble"), ("DualPipeV", "ScheduleDualPipeV")],
)
@pytest.mark.parametrize(("ranks", "microbatches"), [(1, 3), (2, 4), (3, 11), (4, 8), (8, 20)])
def test_in_a_v(name: str, theirs_name: str, ranks: int, microbatches: int) -> None:
    made = made_without_processes(
        theirs_name,
        pp_group_size=ranks,
        num_stages=2 * ranks,
        _num_stages=2 * ranks,
        _n_microbatches=microbatches,
    )
    plan = schedule(name, 2 * ranks, microbatches)
    for rank in range(ranks):
        assert ours(plan, rank) == theirs(lists_of(made, "_calculate_single_rank_operations", rank))


def test_zbv_with_few_micro_batches() -> None:
    """Below `stages` - 1 micro-batches both leave out what does not exist."""
    made = made_without_processes(
        "ScheduleZBVZeroBubble", pp_group_size=4, num_stages=8, _num_stages=8, _n_microbatches=3
    )
    plan = schedule("ZBV", 8, 3)
    for rank in range(4):
        assert ours(plan, rank) == theirs(lists_of(made, "_calculate_single_rank_operations", rank))
