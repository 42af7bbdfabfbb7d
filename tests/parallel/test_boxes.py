"""Runs of flattened tensors as boxes: every number once, in order, and few of them."""

from __future__ import annotations

from math import prod

import torch
from hypothesis import given
from hypothesis import strategies as st

from fathom.parallel.boxes import Box, boxes


@st.composite
def runs(draw: st.DrawFn) -> tuple[tuple[int, ...], int, int]:
    shape = tuple(draw(st.lists(st.integers(1, 5), max_size=4)))
    begin = draw(st.integers(0, prod(shape)))
    return shape, begin, draw(st.integers(begin, prod(shape)))


@given(runs())
def test_a_run_is_its_boxes_one_after_the_other(run: tuple[tuple[int, ...], int, int]) -> None:
    shape, begin, end = run
    whole = torch.arange(prod(shape)).view(shape)
    found: list[int] = []
    count = 0
    for box in boxes(shape, begin, end):
        part = whole
        for axis, (start, size) in enumerate(zip(box.offsets, box.sizes, strict=True)):
            part = part.narrow(axis, start, size)
        assert part.numel() == box.numel > 0
        found += part.flatten().tolist()
        count += 1
    assert found == list(range(begin, end))
    assert count <= max(2 * len(shape) - 1, 1)


def test_whole_rows_are_one_box() -> None:
    assert list(boxes((4, 3, 2), 6, 18)) == [Box((1, 0, 0), (2, 3, 2))]
    assert list(boxes((), 0, 1)) == [Box((), ())]
    assert list(boxes((7,), 2, 5)) == [Box((2,), (3,))]
    assert list(boxes((4, 3), 1, 11)) == [
        Box((0, 1), (1, 2)),
        Box((1, 0), (2, 3)),
        Box((3, 0), (1, 2)),
    ]
