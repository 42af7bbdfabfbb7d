"""Work in step: what one rank does all have, what one rank meets is raised on all."""

from __future__ import annotations

import errno
from typing import Any

import pytest
import torch.distributed as dist

from fathom.errors import CheckpointError
from fathom.parallel import Layout, Mesh
from fathom.parallel.together import Together
from tests.parallel.processes import run


class Awkward(Exception):
    """One that does not come back from a pickle."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(one + two)


ERRORS = {
    "ours": CheckpointError("too old"),
    "the system's": OSError(errno.ENOSPC, "No space left on device"),
    "awkward": Awkward("a", "b"),
}


def together() -> Together:
    return Together(Mesh(Layout(dp=3)).beside("a test"))


def in_step() -> tuple[list[int], str]:
    ranks = together()
    return ranks.each(dist.get_rank), ranks.lead(lambda: f"rank {dist.get_rank()}")


def test_all_have_what_each_and_what_the_first_found() -> None:
    assert run(in_step, 3) == [([0, 1, 2], "rank 0")] * 3


def fails(kind: str) -> tuple[str, str, list[int]]:
    """The error, and whether the ranks are still in step."""
    ranks = together()

    def part() -> None:
        if dist.get_rank() == 1:
            raise ERRORS[kind]

    with pytest.raises(Exception) as error:
        ranks.each(part)
    return error.typename, str(error.value), ranks.each(dist.get_rank)


@pytest.mark.parametrize(
    ("kind", "name", "words"),
    [
        ("ours", "CheckpointError", "too old"),
        ("the system's", "OSError", "No space left on device (rank 1)"),
        ("awkward", "RuntimeError", "Awkward: ab"),
    ],
)
def test_an_error_of_one_is_everyones(kind: str, name: str, words: str) -> None:
    for typename, said, left in run(fails, 3, kind):
        assert (typename, left) == (name, [0, 1, 2]) and words in said


def groups() -> list[bool]:
    mesh = Mesh(Layout(dp=2))
    handles: list[Any] = [mesh.beside(use).handle for use in ("a", "b", "a")]
    return [handles[0] is handles[2], handles[0] is handles[1], handles[0] is dist.group.WORLD]


def test_each_use_has_a_group_of_its_own() -> None:
    assert run(groups, 2) == [[True, False, False]] * 2


def test_alone_it_is_a_call() -> None:
    ranks = Together(Mesh.alone().beside("a test"))
    assert ranks.leads and ranks.each(lambda: 5) == [5] and ranks.lead(lambda: 6) == 6
    with pytest.raises(CheckpointError):
        ranks.lead(lambda: (_ for _ in ()).throw(CheckpointError("no")))
