"""A run of a flattened tensor as boxes of the tensor itself.

ZeRO-1 cuts parameters at any number, while checkpoints (those of `torch.distributed.checkpoint` and
safetensors) know a part of a tensor as a box: where it begins along every axis and how far it
goes. A run that begins and ends inside rows is the end of one row, some whole rows, and the
beginning of another; a cut row is such a run itself, with one axis less. So a run of a
matrix is at most three boxes, and one of a stack of matrices at most five.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class Box:
    """Part of a tensor, whose numbers are consecutive in the flattened whole."""

    offsets: tuple[int, ...]
    """Where it begins along each axis."""
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Numbers in it."""
        return prod(self.sizes)


def boxes(shape: tuple[int, ...], begin: int, end: int) -> Iterator[Box]:
    """Numbers `begin` to `end` (without the last) of a flattened tensor, as boxes in the order of the numbers."""
    if begin >= end:
        return
    inner = prod(shape[1:])
    if not shape or (begin % inner == 0 and end % inner == 0):
        rows = ((begin // inner,), ((end - begin) // inner,)) if shape else ((), ())
        yield Box(rows[0] + (0,) * (len(shape) - 1), rows[1] + shape[1:])
        return
    row, last = begin // inner, end // inner
    if row == last or (row + 1 == last and end % inner == 0):  # within one row
        yield from _in_row(shape, row, begin - row * inner, end - row * inner)
        return
    whole = row + (begin % inner > 0)
    if whole > row:
        yield from _in_row(shape, row, begin - row * inner, inner)
    yield from boxes(shape, whole * inner, last * inner)
    yield from _in_row(shape, last, 0, end - last * inner)


def _in_row(shape: tuple[int, ...], row: int, begin: int, end: int) -> Iterator[Box]:
    for box in boxes(shape[1:], begin, end):
        yield Box((row, *box.offsets), (1, *box.sizes))
