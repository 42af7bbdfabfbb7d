"""What ranks do together and must fail together: writing a checkpoint, choosing one, exporting a model.

A rank that fails alone would leave the others waiting for its next message. So each part of such
work ends with everyone hearing how it went with everyone, and an error of one is raised on all.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist

from fathom.errors import ParallelError
from fathom.parallel.mesh import Group

T = TypeVar("T")


class _Outcome(NamedTuple):
    value: Any
    error: Exception | None


class Together:
    """Work of a group's ranks in step; by default one process, where it is an ordinary call."""

    def __init__(self, group: Group | None = None) -> None:
        """`group` speaks from CPU memory (`Mesh.beside`)."""
        self.group = group or Group((0,), 0)

    @property
    def leads(self) -> bool:
        """Whether this is the rank that does what one alone does."""
        return self.group.place == 0

    def each(self, part: Callable[[], T]) -> list[T]:
        """Every rank does its part; what all found, in the order of the ranks.

        Raises, on every rank, the error of the first that had one, and `ParallelError` when one is lost.
        """
        if self.group.handle is None:
            return [part()]
        mine = _outcome(part)
        found: list[Any] = [None] * self.group.size
        with lost_ranks():
            dist.all_gather_object(found, mine, group=self.group.handle)
        for place, outcome in enumerate(found):
            if outcome.error is not None:
                raise of_rank(outcome.error, self.group.ranks[place]) from mine.error
        return [outcome.value for outcome in found]

    def lead(self, part: Callable[[], T]) -> T:
        """The first rank does it, and all have what came of it; it waits for nobody.

        Raises its error on every rank, and `ParallelError` where one is lost that was to pass the word on.
        """
        if self.group.handle is None:
            return part()
        told: list[Any] = [_outcome(part) if self.leads else None]
        with lost_ranks():
            dist.broadcast_object_list(told, self.group.ranks[0], self.group.handle)
        if told[0].error is not None:
            raise of_rank(told[0].error, self.group.ranks[0])
        return told[0].value


@contextmanager
def lost_ranks() -> Iterator[None]:
    """Within are messages between ranks; those that fail say so as an error of ours."""
    try:
        yield
    except RuntimeError as error:
        raise ParallelError(
            f"another rank was lost or does not answer ({str(error).splitlines()[0]}); see what it said last, and "
            f"start all of them again"
        ) from error


def _outcome(part: Callable[[], Any]) -> _Outcome:
    try:
        return _Outcome(part(), None)
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            return _Outcome(None, RuntimeError(f"{type(error).__name__}: {error}"))
        return _Outcome(None, error)


def of_rank(error: Exception, rank: int) -> Exception:
    """An error that says which rank met it, where it is the system's: another machine's disk may be full."""
    if isinstance(error, OSError):
        return OSError(error.errno, f"{error.strerror or error} (rank {rank})")
    return error
