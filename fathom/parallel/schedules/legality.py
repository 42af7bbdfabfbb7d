"""Would a schedule run, and compute what it should? A schedule is data, so this can be known before anything starts.

Three things are checked, each with an error that names rank and action:

1. *completeness*: on each rank, exactly one F and either one B or one I and one W for every micro-batch of every
   part it holds, and nothing else;
2. *order on a rank*: F before B or I, I before W;
3. *progress*: ranks that run their lists as they stand, waiting before a step for its inputs and for nothing else,
   never wait for each other in a circle. Both halves of a pair need their inputs before either starts, since an
   executor may interleave them.

Sends therefore must not block: with sends that wait for their receiver even 1F1B stops, two neighbours sending to
each other. And messages between two ranks do not always arrive in the order in which the receiver wants them: in the
V schedules and in DualPipe, activations of one kind and gradients of the other share a direction. `program` (in
`transfers.py`) therefore puts sends and receives into the lists, in one order on both sides.
"""

from __future__ import annotations

from collections import Counter, defaultdict

from fathom.errors import ScheduleError
from fathom.parallel.schedules.actions import Action, Pair, Part, Schedule, Step, Transfer, singles


def check(schedule: Schedule) -> None:
    """Raise `ScheduleError` when a schedule would not run, saying where and why."""
    order_of_running(schedule)


def order_of_running(schedule: Schedule) -> list[tuple[int, Step]]:
    """(rank, step) in an order in which all inputs exist when a step starts; each rank's list in its own order.

    The order is that of rounds: in each, every rank that does not have to wait runs one step. Raises `ScheduleError`
    for a schedule that is not complete, and when the ranks come to wait for each other.
    """
    _check_placement(schedule)
    for rank in range(schedule.ranks):
        _check_rank(schedule, rank)
    order: list[tuple[int, Step]] = []
    there: set[Transfer] = set()
    place = [0] * schedule.ranks
    while unfinished := [r for r in range(schedule.ranks) if place[r] < len(schedule.steps[r])]:
        now = [(r, schedule.steps[r][place[r]]) for r in unfinished]
        missing = {r: [t for t in inputs(schedule, step) if t not in there] for r, step in now}
        runs = [(r, step) for r, step in now if not missing[r]]
        if not runs:
            raise _deadlock(schedule, dict(now), {r: wanted[0] for r, wanted in missing.items()})
        for r, step in runs:
            there.update(outputs(schedule, step))
            place[r] += 1
        order += runs
    return order


def inputs(schedule: Schedule, step: Step) -> list[Transfer]:
    """What a step needs from other stages before it starts."""
    return [t for action in singles(step) if (t := schedule.receives(action)) is not None]


def outputs(schedule: Schedule, step: Step) -> list[Transfer]:
    """What a step leaves for other stages."""
    return [t for action in singles(step) if (t := schedule.sends(action)) is not None]


def _deadlock(schedule: Schedule, at: dict[int, Step], wants: dict[int, Transfer]) -> ScheduleError:
    """Follow who waits for whom until a rank comes again, and tell the circle."""
    rank, path = min(wants), []
    while rank not in path:
        path.append(rank)
        rank = wants[rank].from_rank
    circle = path[path.index(rank) :]
    told = [
        f"rank {r} is to run {at[r]} and waits for {wants[r]} from rank {wants[r].from_rank}"
        for r in circle
    ]
    return ScheduleError(f"{schedule.name} stops: {'; '.join(told)}; change the order of these")


def _check_placement(schedule: Schedule) -> None:
    if len(schedule.steps) != schedule.ranks:
        raise ScheduleError(
            f"{schedule.name} has {len(schedule.steps)} lists of steps for {schedule.ranks} ranks; "
            "every rank of the placement needs one"
        )
    held = Counter(part for parts in schedule.placement for part in parts)
    everything = [Part(s, c) for s in range(schedule.stages) for c in range(schedule.copies)]
    if wrong := [
        part for part in {*held, *everything} if held[part] != 1 or part not in everything
    ]:
        raise ScheduleError(
            f"{schedule.name}: copy {wrong[0].copy} of stage {wrong[0].stage} lies on {held[wrong[0]]} ranks; "
            f"each copy of the {schedule.stages} stages lies on one"
        )


def _check_rank(schedule: Schedule, rank: int) -> None:
    """Completeness, and order on the rank."""
    held = set(schedule.placement[rank])
    done: dict[tuple[Part, int], str] = defaultdict(str)
    for place, step in enumerate(schedule.steps[rank]):
        if isinstance(step, Pair):
            _check_pair(rank, place, step)
        for action in singles(step):
            key = (action.part, action.microbatch)
            _check_action(schedule, rank, place, action, held, done[key])
            done[key] += action.kind
    for part in schedule.placement[rank]:
        for i in schedule.microbatches_of(part.copy):
            _check_complete(schedule, rank, part, i, done[part, i])


def _check_pair(rank: int, place: int, pair: Pair) -> None:
    forward, backward = pair.forward, pair.backward
    if forward.kind != "F" or backward.kind != "B":
        raise _broken(rank, place, pair, "a pair is a forward and a whole backward")
    if (forward.part, forward.microbatch) == (backward.part, backward.microbatch):
        raise _broken(rank, place, pair, "one pair cannot hold both halves of one micro-batch")


def _check_action(
    schedule: Schedule, rank: int, place: int, action: Action, held: set[Part], before: str
) -> None:
    """`before`: kinds of the actions that the rank has done on the same micro-batch in the same part."""
    if action.part not in held:
        raise _broken(rank, place, action, "the rank does not hold that part")
    if action.microbatch not in schedule.microbatches_of(action.copy):
        raise _broken(rank, place, action, "the part has no such micro-batch")
    if action.kind in before or (action.kind in "BI" and set(before) & set("BI")):
        raise _broken(
            rank, place, action, f"it stands here after {', '.join(before)}, so it is done twice"
        )
    if action.kind in "BI" and "F" not in before:
        raise _broken(rank, place, action, "its forward comes later or never")
    if action.kind == "W" and "I" not in before:
        raise _broken(
            rank, place, action, "no gradient of the input (I) has left it a weight gradient to do"
        )


def _check_complete(schedule: Schedule, rank: int, part: Part, microbatch: int, done: str) -> None:
    if done in ("FB", "FIW"):
        return
    missing = {"": "F", "F": "B", "FI": "W"}[done]
    action = Action(missing, part.stage, microbatch, part.copy)  # type: ignore[arg-type]
    raise ScheduleError(f"rank {rank} never runs {action} in {schedule.name}; add it to the list")


def _broken(rank: int, place: int, step: Step, why: str) -> ScheduleError:
    return ScheduleError(f"rank {rank}, step {place}, {step}: {why}; move or remove it")
