"""What a schedule costs by formula: the report's Table 2, and as much for the schedules without a row there.

P is the number of stages, whatever the number of ranks. F, B, W and F&B are the durations of a forward chunk, of a
*whole* backward chunk (its weight gradients included), of its weight gradients alone, and of an overlapped pair.
The entry of ZB1P shows that B is the whole: its own paper (Qi et al. 2024) has (P - 1)(F + I - W), I being the
gradient of the input alone, and that is the table's (P - 1)(F + B - 2W) with B = I + W.
"""

from __future__ import annotations

from fathom.errors import ScheduleError
from fathom.parallel.schedules.making import traits
from fathom.parallel.schedules.simulation import Costs

IN_TABLE_2 = ("1F1B", "ZB1P", "DualPipe", "DualPipeV")
"""Schedules that the report's Table 2 has a row for; DualPipeV's is in DeepSeek's repository and equals DualPipe's."""


def bubble_in_table_2(name: str, stages: int, costs: Costs) -> float:
    """Idle time per rank by Table 2. Raises `ScheduleError` for a schedule without a row."""
    forward, weight = costs.forward, costs.weight_grad
    backward = costs.whole_backward
    pair = costs.pair if costs.pair is not None else forward + backward
    if name == "1F1B":
        return (stages - 1) * (forward + backward)
    if name == "ZB1P":
        return (stages - 1) * (forward + backward - 2 * weight)
    if name in ("DualPipe", "DualPipeV"):
        return (stages / 2 - 1) * (pair + backward - 3 * weight)
    raise ScheduleError(_no_row(name))


def bubble_by_formula(name: str, stages: int, costs: Costs) -> float:
    """Idle time per rank, before its first action and after its last too: by Table 2 where that has a row.

    GPipe's is 1F1B's (Huang et al. 2019). ZBV's is ours, since its paper counts what lies between a rank's first action
    and its last: exact where the gradient of the input takes no less than F and W, a lower bound elsewhere.

    >>> bubble_by_formula("DualPipe", 16, Costs(pair=2.5))
    10.5
    """
    if name == "ZBV":
        weight = costs.weight_grad
        inputs = costs.whole_backward - weight
        return (stages / 2 - 1) * max(costs.forward, inputs, 2 * (inputs - weight))
    return bubble_in_table_2("1F1B" if name == "GPipe" else name, stages, costs)


def activations_in_table_2(name: str, stages: int) -> int:
    """Micro-batches that the fullest rank holds by Table 2, in units of one stage's activations."""
    if name in ("1F1B", "ZB1P"):
        return stages
    if name in ("DualPipe", "DualPipeV"):
        return stages + 1
    raise ScheduleError(_no_row(name))


def in_flight(name: str, ranks: int, rank: int, microbatches: int) -> tuple[int, ...]:
    """Micro-batches of each stage (`Traits.held`) that a rank holds when it holds most, from F to the end of B or W.

    The largest sum of a rank is Table 2's. Raises `ScheduleError` for an unknown name.
    """
    traits(name)  # refuses a name that there is not
    counts = {
        "GPipe": (microbatches,),
        "1F1B": (ranks - rank,),
        "ZB1P": (ranks,),  # W is put off, so every rank holds as much as the first
        "ZBV": (2 * ranks - rank - 1, rank + 1),
        "DualPipe": (ranks - rank, rank + 1),
        "DualPipeV": (2 * ranks - rank, rank + 1),
    }
    return tuple(min(microbatches, count) for count in counts[name])


def _no_row(name: str) -> str:
    return f"Table 2 has no row for {name}; it has {', '.join(IN_TABLE_2)}; simulate the others"
