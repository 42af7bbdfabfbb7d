"""Signals that end a run: a flag first, and after an error of one process of many nothing until it has spoken."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from fathom.runs.stopping import asked_to_stop


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Whatever a test leaves behind is undone."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_sets_the_flag_and_the_second_is_as_usual(number: signal.Signals) -> None:
    flag, said, usual = threading.Event(), list[str](), list[int]()
    signal.signal(number, lambda sent, frame: usual.append(sent))
    with asked_to_stop(flag, True, said.append):
        os.kill(os.getpid(), number)
        assert flag.is_set() and not usual
        assert len(said) == (number == signal.SIGINT)
        os.kill(os.getpid(), number)
        assert usual == [number]


@pytest.mark.parametrize("many", [False, True])
def test_after_an_error_of_one_of_many_torchrun_has_to_wait(many: bool) -> None:
    usual = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ValueError), asked_to_stop(threading.Event(), many, lambda line: None):
        raise ValueError
    assert signal.getsignal(signal.SIGTERM) == (signal.SIG_IGN if many else usual)
    with asked_to_stop(threading.Event(), many, lambda line: None):
        pass
