"""Report Table 2, and the arithmetic of the spec for PP = 16."""

from __future__ import annotations

import pytest

from fathom.errors import PlanError
from fathom.planning.bubble import Costs, bubble, schedule


@pytest.mark.parametrize(
    ("name", "both", "expected"),
    [
        ("1F1B", 3, 45),
        ("ZB1P", 3, 15),
        ("DualPipe", 2.5, 10.5),
        ("DualPipe", 3, 14),
        ("DualPipeV", 2.5, 10.5),
        ("GPipe", 3, 45),
        ("ZBV", 3, 0),
    ],
)
def test_table_2(name: str, both: float, expected: float) -> None:
    """PP = 16, F = 1, B = 2, W = 1: B is the whole backward, W in it."""
    assert bubble(name, 16, Costs(1, 2, 1, both)) == expected


def test_micro_batches_under_way() -> None:
    """Table 2: PP for 1F1B and ZB1P, PP + 1 for DualPipe on every rank; all of them for GPipe."""
    for rank in range(8):
        assert sum(schedule("DualPipe").in_flight(8, rank, 40)) == 9
        assert sum(schedule("DualPipeV").in_flight(8, rank, 40)) == 17  # of 16 stages on 8 ranks
        assert schedule("1F1B").in_flight(8, rank, 40) == (8 - rank,)
    assert schedule("ZB1P").in_flight(8, 3, 40) == (8,)
    assert schedule("GPipe").in_flight(8, 3, 40) == (40,)


def test_an_unknown_schedule() -> None:
    with pytest.raises(PlanError, match="did you mean 'DualPipe'"):
        schedule("Dualpipe")
