"""Schedules with one stage on each rank: GPipe, 1F1B and ZB1P. Pure functions from numbers to lists.

GPipe runs all forwards and then all backwards, so that a rank holds the activations of every micro-batch. 1F1B lets
rank r run only as many forwards ahead as there are stages behind it, and then one backward for each forward: the
bubble is the same, (P - 1)(F + B), and a rank holds at most P micro-batches. ZB1P (ZB-H1 in its paper) splits the
backward: the gradient of the input, for which the stage before is waiting, comes at once, and the gradient of the
weights, for which nobody waits, fills what would be idle. Rank r runs 1F1B's order with I for B and stays r
weight gradients behind: then every rank holds P micro-batches, as many as rank 0 of 1F1B does, and the r that
are left over at the end are done while the gradients run through the stages before it.
"""

from __future__ import annotations

from fathom.parallel.schedules.actions import Action, Kind, Part, Schedule, Step


def gpipe(stages: int, microbatches: int) -> Schedule:
    """All forwards, then all backwards."""

    def steps(rank: int) -> list[Step]:
        return [Action(kind, rank, i) for kind in _FB for i in range(microbatches)]

    return _one_stage_a_rank("GPipe", stages, microbatches, [steps(r) for r in range(stages)])


def one_forward_one_backward(stages: int, microbatches: int) -> Schedule:
    """1F1B: rank r begins with P - 1 - r forwards and then alternates."""

    def steps(rank: int) -> list[Step]:
        order = _alternating(stages - 1 - rank, microbatches)
        return [Action("F" if forward else "B", rank, i) for forward, i in order]

    return _one_stage_a_rank("1F1B", stages, microbatches, [steps(r) for r in range(stages)])


def zb1p(stages: int, microbatches: int) -> Schedule:
    """ZB1P: the order of 1F1B with the backward split and rank r's weight gradients r micro-batches behind."""

    def steps(rank: int) -> list[Step]:
        result: list[Step] = []
        for forward, i in _alternating(stages - 1 - rank, microbatches):
            result.append(Action("F" if forward else "I", rank, i))
            if not forward and i >= rank:
                result.append(Action("W", rank, i - rank))
        left = range(max(0, microbatches - rank), microbatches)
        return result + [Action("W", rank, i) for i in left]

    return _one_stage_a_rank("ZB1P", stages, microbatches, [steps(r) for r in range(stages)])


_FB: tuple[Kind, Kind] = ("F", "B")


def _alternating(ahead: int, microbatches: int) -> list[tuple[bool, int]]:
    """(is it a forward?, micro-batch): `ahead` forwards, then one and one, then the backwards that are left."""
    ahead = min(ahead, microbatches)
    order = [(True, i) for i in range(ahead)]
    for i in range(microbatches):
        order += [(True, i + ahead)] if i + ahead < microbatches else []
        order += [(False, i)]
    return order


def _one_stage_a_rank(
    name: str, stages: int, microbatches: int, steps: list[list[Step]]
) -> Schedule:
    placement = tuple((Part(rank),) for rank in range(stages))
    return Schedule(name, stages, microbatches, placement, tuple(map(tuple, steps)))
