"""Signs of life: who has none is named, who has ended in good order is not."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest
import torch.distributed as dist

from fathom.parallel import watch
from fathom.parallel.watch import Watch
from tests.parallel.processes import run


def in_a_fork(function: str) -> None:
    """A store's thread must not be there when later tests fork."""
    assert run(with_a_store, 1, function) == [None]


def with_a_store(function: str) -> None:
    watch.TICK, watch.SILENCE, watch.SOON, watch.FOLLOW = 0.02, 0.4, 0.1, 0.2
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=20))
    globals()[function](dist.PrefixStore("start-0", store))


def nothing(*_: object) -> None:
    """What a test does not ask about."""


def one_is_silent(store: dist.Store) -> None:
    lost: list[list[int]] = []
    heard = threading.Event()

    def note(ranks: list[int]) -> None:
        lost.append(ranks)
        heard.set()

    first = Watch(store, 0, 3, note, nothing)
    second, third = (Watch(store, rank, 3, note, nothing) for rank in (1, 2))
    for one in (first, second, third):
        one.start()
    assert not heard.wait(1.0), lost
    second.end()  # in good order
    third._ended.set()  # as if stopped
    assert heard.wait(5.0) and lost == [[2]]
    assert first.silent() == [1, 2]


def reasons(store: dist.Store) -> None:
    first, second = (Watch(store, rank, 2, nothing, nothing) for rank in (0, 1))
    assert first.why(1) is None and not first.somebody_failed()
    second.failed("a full disk")
    assert first.why(1) == "a full disk" and first.somebody_failed()
    assert [second.first_to_tell(), first.first_to_tell()] == [True, False]


def others_follow(store: dist.Store) -> None:
    followed = threading.Event()
    first, second, third = (Watch(store, rank, 3, nothing, followed.set) for rank in range(3))
    for one in (first, second):
        one.start()
    third.start()
    third.end()  # in good order
    assert not followed.wait(1.0), "nobody has failed"
    first.failed("rank 2 hangs")
    assert followed.wait(5.0), "the second one has noticed nothing"


def two_lose_touch(store: dist.Store) -> None:
    """A third one is gone; the first of the two to notice ends before the other has asked who it was."""
    first, second = (Watch(store, rank, 3, nothing, nothing) for rank in (0, 1))
    assert first.silent() == [1, 2], "neither has ever been there"
    assert second.silent() == [2], "the first one has asked, so it was well"


@pytest.mark.parametrize("what", ["one_is_silent", "reasons", "others_follow", "two_lose_touch"])
def test_watch(what: str) -> None:
    in_a_fork(what)
