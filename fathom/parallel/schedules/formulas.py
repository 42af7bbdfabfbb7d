"""What the report says a schedule costs: its Table 2.

P is the number of stages, whatever the number of ranks. F, B, W and F&B are the durations of a forward chunk, of a
*whole* backward chunk (its weight gradients included), of its weight gradients alone, and of an overlapped pair.
The entry of ZB1P shows that B is the whole: its own paper (Qi et al. 2024) has (P - 1)(F + I - W), I being the
gradient of the input alone, and that is the table's (P - 1)(F + B - 2W) with B = I + W.
"""

from __future__ import annotations

from fathom.errors import ScheduleError
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


def activations_in_table_2(name: str, stages: int) -> int:
    """Micro-batches that the fullest rank holds by Table 2, in units of one stage's activations."""
    if name in ("1F1B", "ZB1P"):
        return stages
    if name in ("DualPipe", "DualPipeV"):
        return stages + 1
    raise ScheduleError(_no_row(name))


def _no_row(name: str) -> str:
    return f"Table 2 has no row for {name}; it has {', '.join(IN_TABLE_2)}; simulate the others"
