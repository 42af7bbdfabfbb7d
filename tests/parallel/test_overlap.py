"""The published order of an overlapped pair, what it must respect and what it hides."""

from __future__ import annotations

from itertools import permutations

import pytest

from fathom.errors import ScheduleError
from fathom.parallel import (
    OVERLAPPED_ORDER,
    POSTED_EARLY,
    check_overlapped_order,
    overlapped_time,
)
from fathom.parallel.schedules.overlap import COMMUNICATION, NEEDS, ONE_AFTER_THE_OTHER

ORDERS = [OVERLAPPED_ORDER, POSTED_EARLY, ONE_AFTER_THE_OTHER]


def costs(computation: float, communication: float) -> dict[tuple[str, str], float]:
    return {o: communication if o[1] in COMMUNICATION else computation for o in OVERLAPPED_ORDER}


def test_the_published_order() -> None:
    """As issued in the training trace of the profile-data repository."""
    assert [f"{what}({kind})" for kind, what in OVERLAPPED_ORDER] == [
        "combine(B)",
        "attention(F)",
        "mlp(B)",
        "dispatch(F)",
        "dispatch(B)",
        "mlp(W)",
        "mlp(F)",
        "attention(B)",
        "attention(W)",
        "combine(F)",
    ]


@pytest.mark.parametrize("order", ORDERS)
def test_orders_respect_what_they_need(order: tuple[tuple[str, str], ...]) -> None:
    check_overlapped_order(order)


def test_wrong_orders_are_refused() -> None:
    """Any two operations exchanged: refused exactly when one comes before what it needs."""
    refused = 0
    for a, b in permutations(range(10), 2):
        order = list(OVERLAPPED_ORDER)
        order[a], order[b] = order[b], order[a]
        fine = all(order.index(need) < order.index(o) for o, need in NEEDS.items())
        if fine:
            check_overlapped_order(order)
            continue
        refused += 1
        with pytest.raises(
            ScheduleError, match=r"\([FBW]\) stands before .*, whose result it needs"
        ):
            check_overlapped_order(order)
    assert 20 < refused < 90


@pytest.mark.parametrize(
    "change", [lambda o: o[:-1], lambda o: [*o, o[0]], lambda o: [*o[:-1], o[0]]]
)
def test_incomplete_orders_are_refused(change) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ScheduleError, match="ten operations, each once"):
        check_overlapped_order(change(list(OVERLAPPED_ORDER)))


@pytest.mark.parametrize("order", ORDERS)
def test_bounds_of_the_time(order: tuple[tuple[str, str], ...]) -> None:
    """Never less than the longer of the two, never more than both."""
    for communication in (0.0, 0.5, 1.0, 2.0):
        for host in (False, True):
            found = overlapped_time(order, costs(1.0, communication), layers=4, host_computes=host)
            assert (found.computing, found.communicating) == (24, 16 * communication)
            longer = max(found.computing, found.communicating)
            assert longer <= found.total <= found.computing + found.communicating
            assert 0 <= found.hidden <= 1


def test_one_layer_by_hand() -> None:
    """Communication twice a computation: the network is busy but for attention(F), and nothing else counts."""
    found = overlapped_time(OVERLAPPED_ORDER, costs(1.0, 2.0), layers=1)
    assert (found.total, found.hidden) == (8, 0.75)


def test_what_the_order_hides() -> None:
    """Communication as long as computation: nearly everything on a GPU; on a CPU if it is posted early."""
    equal = costs(1.0, 1.5)
    hidden = [
        [round(overlapped_time(order, equal, 4, host).hidden, 3) for host in (False, True)]
        for order in ORDERS
    ]
    assert hidden == [[0.979, 0.5], [0.979, 0.917], [0.167, 0.0]]
    assert overlapped_time(OVERLAPPED_ORDER, costs(1.0, 1.0), 4).hidden == 1
    assert overlapped_time(OVERLAPPED_ORDER, costs(1.0, 0.0), 4).hidden == 1
