"""Work behind the training: one piece at a time, and its errors come when it is waited for."""

from __future__ import annotations

import threading

import pytest

from fathom.train.behind import Behind


def test_it_goes_on_beside_and_is_waited_for() -> None:
    behind, go, done = Behind("a test"), threading.Event(), []
    behind.begin(lambda: (go.wait(10), done.append(1)))
    assert not done
    go.set()
    behind.wait()
    assert done == [1]
    behind.wait()


def test_the_next_piece_comes_after_the_one_before() -> None:
    behind, order = Behind("a test"), []
    for number in range(5):
        behind.begin(lambda number=number: order.append(number))  # type: ignore[misc]
    behind.wait()
    assert order == [0, 1, 2, 3, 4]


def test_an_error_is_raised_once_by_whoever_waits() -> None:
    behind = Behind("a test")
    behind.begin(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        behind.begin(lambda: None)
    behind.wait()
