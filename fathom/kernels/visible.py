"""Which keys a query sees: all before it, those of its own document, or what a mask says."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Visible:
    """What narrows the causal rule: nothing, documents, or an explicit mask.

    `segments`: per batch row the (start, end) of each document; `mask`: bool [B or 1, 1, T, S],
    causality included.
    """

    segments: tuple[tuple[tuple[int, int], ...], ...] | None = None
    mask: Tensor | None = None


ALL = Visible()


def spans(batch: int, visible: Visible) -> list[tuple[slice, slice]]:
    """Pieces (rows, positions) that attend causally inside themselves only."""
    if visible.segments is None:
        return [(slice(0, batch), slice(None))]
    rows = enumerate(visible.segments)
    return [(slice(b, b + 1), slice(lo, hi)) for b, row in rows for lo, hi in row]


def longest_span(length: int, visible: Visible) -> int:
    """Positions in the longest piece."""
    if visible.segments is None:
        return length
    return max(hi - lo for row in visible.segments for lo, hi in row)
