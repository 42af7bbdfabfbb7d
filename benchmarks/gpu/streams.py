"""Which of a profile's streams were busy at the same time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def beside(events: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Of a Chrome trace: milliseconds in which streams other than the busiest ran something, and the busiest too."""
    kinds = ("kernel", "gpu_memcpy", "gpu_memset")
    ran = [one for one in events if one.get("cat") in kinds and one.get("ph") == "X"]
    streams: dict[int, list[tuple[float, float]]] = {}
    for one in ran:
        begin = float(one["ts"])
        streams.setdefault(one["args"]["stream"], []).append((begin, begin + float(one["dur"])))
    busiest = max(streams, key=lambda stream: sum(b - a for a, b in streams[stream]))
    computing = _union(streams.pop(busiest))
    network = _union([span for spans in streams.values() for span in spans])
    both = sum(
        max(0.0, min(end, other_end) - max(begin, other_begin))
        for begin, end in network
        for other_begin, other_end in computing
    )
    busy = sum(end - begin for begin, end in network)
    return {"network_ms": busy / 1000, "both_ms": both / 1000, "share": both / max(busy, 1e-9)}


def _union(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The same time in spans that do not overlap."""
    found: list[tuple[float, float]] = []
    for begin, end in sorted(spans):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((begin, end))
    return found
