"""A command as one of many processes that torchrun started: one of them speaks, and all end together.

A rank that fails says so in one line, with its number, and ends; torchrun then ends the others, or starts all anew
(--max-restarts). What every rank refuses alike is said once. A rank that loses touch with another one finds out which.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

from fathom.errors import FathomError, ParallelError
from fathom.parallel import launch
from fathom.parallel.watch import SILENCE, Watch

WRONG, BROKEN, INTERRUPTED = 2, 1, 130
ALIKE, SPEAKS = 1.0, 30.0
"""Seconds that a rank gives the first one to say what both have met; and to start and say what all refuse."""


def as_one_of_many(
    check: Callable[[int], None], work: Callable[[torch.device, bool], None]
) -> NoReturn:
    """Join, work and leave. `check(processes)` refuses before anybody joins; `work(device, speaks)`."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    watch: Watch | None = None
    try:
        _refused_by_all(check, rank, world)
        device = launch.join()
        watch = _watching(rank, world)
        work(device, rank == 0)
        watch.end()
    except KeyboardInterrupt:
        launch.leave(INTERRUPTED)
    except BaseException as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, before all is said
        launch.leave(_say_why(error, rank, watch))
    launch.leave()


def _refused_by_all(check: Callable[[int], None], rank: int, world: int) -> None:
    try:
        check(world)
    except FathomError as error:
        if rank == 0:
            _say(str(error))
        else:
            time.sleep(SPEAKS)  # torchrun ends this rank when the first one has spoken and left
        launch.leave(WRONG)


def _say_why(error: BaseException, rank: int, watch: Watch | None) -> int:
    """One line, or the traceback of a fault of ours; the exit status."""
    if watch is None:
        if not isinstance(error, FathomError):
            traceback.print_exception(error)
        _say(f"rank {rank}: {error}")
    elif lost_touch(error):
        _say_who(watch, error, rank)
        return BROKEN
    elif isinstance(error, FathomError):
        watch.failed(str(error))
        if rank == 0 or not _said_by_first(watch, str(error)):
            _say(f"rank {rank}: {error}" if rank else str(error))
    else:
        watch.failed(f"{type(error).__name__}: {error}")
        traceback.print_exception(error)
        _say(f"rank {rank}: {type(error).__name__}: {error}")
        return BROKEN
    return WRONG


def _said_by_first(watch: Watch, message: str) -> bool:
    until = time.monotonic() + ALIKE
    while time.monotonic() < until:
        if watch.why(0) is not None:
            return watch.why(0) == message
        time.sleep(0.05)
    return False


def lost_touch(error: BaseException | None) -> bool:
    """Whether an error is that of a conversation that another rank broke off, or comes of one."""
    if isinstance(error, ParallelError):
        return lost_touch(error.__cause__)
    if isinstance(error, dist.DistError):
        return True
    signs = ("gloo", "nccl", "connection", "socket")
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in signs)


def _say_who(watch: Watch, error: BaseException, rank: int) -> None:
    """Name who is gone, unless somebody has said why it ends; when nobody is, the error is this rank's own."""
    met = f"rank {rank} has lost touch with the others ({_first_line(error)}); {_REMEDY}"
    try:
        gone = watch.silent()
        if watch.somebody_failed() or not watch.first_to_tell():
            return
        if not gone:
            traceback.print_exception(error)
        _say(f"{_named(gone)} without a word; {_REMEDY}" if gone else met)
    except RuntimeError:  # the store is gone too
        _say(met)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


_REMEDY = (
    "the last checkpoint is unharmed. The same command goes on from it; with torchrun --max-restarts N it does so by "
    "itself"
)


def _named(ranks: list[int]) -> str:
    many = len(ranks) > 1
    return f"rank{'s' if many else ''} {', '.join(map(str, ranks))} {'are' if many else 'is'} gone"


def _watching(rank: int, world: int) -> Watch:
    """The rank's watch, begun. What it calls finds the rank waiting for others perhaps: nothing but an end helps."""

    def leave_them(lost: list[int]) -> None:
        message = f"{_named(lost)}: no sign of life for {SILENCE:.0f} s, as rank {rank} sees it; {_REMEDY}"
        with suppress(RuntimeError):  # the store is gone too
            watch.failed(message)
            if not watch.first_to_tell():
                launch.leave(BROKEN)
        _say(message)
        launch.leave(BROKEN)

    watch = Watch(launch.store(), rank, world, leave_them, lambda: launch.leave(BROKEN))
    watch.start()
    return watch


def _say(message: str) -> None:
    """On one line; and once more where torchrun looks for it, whose long report comes last."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        told = {"message": message, "extraInfo": {"timestamp": int(time.time())}}
        with suppress(OSError):
            Path(file).write_text(json.dumps({"message": told}))
