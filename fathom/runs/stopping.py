"""Ctrl-C, and what ends a run of many processes: a flag that the loop reads after the step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fathom.data.progress import Say


@contextmanager
def asked_to_stop(flag: threading.Event, many: bool, say: Say) -> Iterator[None]:
    """The first Ctrl-C sets the flag, the second is as usual.

    So does, in one process of many, the SIGTERM with which torchrun ends them. After an error it is ignored there: when
    a rank is lost torchrun ends the others at once, which have yet to say who it was.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM) if many else (signal.SIGINT,)
    before = {number: signal.getsignal(number) for number in numbers}

    def first(number: int, frame: Any) -> None:
        signal.signal(number, before[signal.Signals(number)])
        flag.set()
        if number == signal.SIGINT:
            say("finishing this step and saving; Ctrl-C again leaves at once")

    for number in numbers:
        signal.signal(number, first)
    try:
        yield
    except Exception:
        if many:
            before[signal.SIGTERM] = signal.SIG_IGN
        raise
    finally:
        for number in numbers:
            signal.signal(number, before[number])
