"""Where a step's time goes: operators' own CPU time by kind, from torch's profiler."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile

PRODUCTS = (
    "aten::mm",
    "aten::addmm",
    "aten::addmm_",
    "aten::bmm",
    "aten::baddbmm",
    "aten::_grouped_mm",
    "mkldnn::_linear_pointwise",
)
ATTENTION = ("attention", "flash", "_blocks")
OPTIMIZER = ("optimizer.step", "adamw")


def shares(work: Callable[[], Any]) -> dict[str, float]:
    """Fractions of the operators' own time: matrix products, attention, optimizer, and each other operator.

    What runs inside an attention rule or kernel counts as attention, products included.
    """
    with profile(activities=[ProfilerActivity.CPU]) as record:
        work()
    times: dict[str, float] = defaultdict(float)
    for event in record.events() or ():
        times[_kind(event)] += event.self_cpu_time_total
    whole = sum(times.values())
    return {kind: t / whole for kind, t in sorted(times.items(), key=lambda item: -item[1])}


def _kind(event: Any) -> str:
    names = _ancestry(event)
    if any(word in name for name in names for word in ATTENTION):
        return "attention"
    if any(word in name for name in names for word in OPTIMIZER):
        return "optimizer"
    return "matrix products" if event.name in PRODUCTS else event.name


def _ancestry(event: Any) -> list[str]:
    names = []
    while event is not None:
        names.append(event.name.lower())
        event = event.cpu_parent
    return names
