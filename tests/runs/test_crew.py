"""What the processes of a run agree on, and what one of them tells the others."""

from __future__ import annotations

import pytest

from fathom.errors import CheckpointError
from fathom.parallel import Layout
from fathom.runs.crew import Crew
from tests.parallel.processes import run


def words() -> tuple[object, ...]:
    crew = Crew(Layout(dp=3))
    rank = crew.mesh.rank
    crew.wait()
    flags = [crew.any(flag) for flag in (False, True, rank == 2)]
    return crew.speaks, flags, crew.gather(rank / 2), crew.everyone(str(rank)), crew.size


def test_all_ranks_hear_the_same() -> None:
    for rank, (speaks, *heard) in enumerate(run(words, 3)):
        assert speaks == (rank == 0)
        assert heard == [[False, True, True], [0.0, 0.5, 1.0], ["0", "1", "2"], 3]


def first_fails() -> tuple[str, bool]:
    crew = Crew(Layout(dp=2))

    def do() -> int:
        if not crew.speaks:
            raise AssertionError("only the first rank does it")
        raise CheckpointError("no room")

    with pytest.raises(CheckpointError) as error:
        crew.first(do)
    return str(error.value), crew.first(lambda: crew.speaks)


def test_what_the_first_rank_meets_is_raised_on_all() -> None:
    assert run(first_fails, 2) == [("no room", True)] * 2


def test_alone_it_speaks_and_agrees_with_itself() -> None:
    crew = Crew.alone()
    crew.wait()
    assert (crew.speaks, crew.size, crew.whole) == (True, 1, True)
    assert [crew.any(flag) for flag in (False, True)] == [False, True]
    assert (crew.gather(2.5), crew.everyone("a"), crew.first(lambda: 4)) == ([2.5], ["a"], 4)
