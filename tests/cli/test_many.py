"""What a rank says when it ends, by what it met and what has become of the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist

from fathom.cli.many import BROKEN, _say_why, lost_touch
from fathom.errors import ParallelError

CLOSED = RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer\nand more")


def after(cause: Exception | None) -> ParallelError:
    """An error of ours that comes of another."""
    error = ParallelError("another rank was lost; start all of them again")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (CLOSED, True),
        (dist.DistStoreError("wait timeout after 10000ms"), True),
        (dist.DistBackendError("unhandled system error"), True),
        (after(CLOSED), True),
        (after(None), False),
        (RuntimeError("the shape cannot be restored"), False),
        (ValueError("a connection in the text"), False),
    ],
)
def test_which_errors_are_those_of_a_broken_conversation(error: Exception, lost: bool) -> None:
    assert lost_touch(error) is lost


class Others:
    """What a watch sees of them."""

    def __init__(self, gone: list[int], failed: bool = False, told: bool = False) -> None:
        self.gone, self.failed, self.told = gone, failed, told

    def silent(self) -> list[int]:
        return self.gone

    def somebody_failed(self) -> bool:
        return self.failed

    def first_to_tell(self) -> bool:
        return not self.told


class NoStore(Others):
    """Their store has gone with them."""

    def silent(self) -> list[int]:
        raise dist.DistNetworkError("broken pipe")


LOST_TOUCH = "error: rank 3 has lost touch with the others ([gloo/transport/tcp/pair.cc:534]"


@pytest.mark.parametrize(
    ("others", "said"),
    [
        (Others([1, 2]), "error: ranks 1, 2 are gone without a word; the last checkpoint"),
        (Others([1], failed=True), ""),
        (Others([1], told=True), ""),
        (Others([]), LOST_TOUCH),
        (Others([], failed=True), ""),
        (NoStore([]), LOST_TOUCH),
    ],
)
def test_a_rank_that_loses_touch_says_who_is_gone_or_what_it_met(
    others: Any, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """An error is never kept back: when all others are well, it is this rank's own."""
    assert _say_why(CLOSED, 3, others) == BROKEN
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    assert lines[-1].startswith(said) if said else not lines
