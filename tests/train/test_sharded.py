"""Tensors cut anywhere: what one rank of a group of one writes in pieces is read in other pieces."""

from __future__ import annotations

import tempfile
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fathom.errors import CheckpointError
from fathom.parallel import Layout, Mesh
from fathom.parallel.pieces import Shard
from fathom.parallel.together import Together
from fathom.train import checkpoint
from fathom.train.sharded import read_shards, write_shards
from tests.parallel.processes import run

SHAPES = {"stack": (3, 4, 5), "matrix": (7, 6), "row": (11,), "scalar": ()}
TYPES = {"stack": torch.float32, "matrix": torch.bfloat16, "row": torch.float64}


def whole(name: str) -> Tensor:
    shape, kind = torch.Size(SHAPES[name]), TYPES.get(name, torch.uint8)
    return torch.arange(1, shape.numel() + 1, dtype=torch.float64).view(shape).to(kind)


def shards(cuts: dict[str, list[int]], place: int, places: int) -> list[Shard]:
    """The runs between the cuts, in turn one to each rank."""
    found = []
    for name, at in cuts.items():
        flat = whole(name).view(-1)
        ends = [0, *sorted({*at} - {0, len(flat)}), len(flat)]
        for number, (begin, end) in enumerate(pairwise(ends)):
            if number % places == place:
                shape = torch.Size(SHAPES[name])
                found.append(Shard(name, flat[begin:end].clone(), shape, begin, True))
    return found


@st.composite
def cuts(draw: st.DrawFn) -> dict[str, list[int]]:
    """At most one cut of each tensor, since a rank has one run of it."""
    return {
        name: draw(st.lists(st.integers(0, torch.Size(shape).numel()), max_size=1))
        for name, shape in SHAPES.items()
    }


def write(directory: Path, made: list[dict[str, list[int]]]) -> None:
    checkpoint.FILE_BYTES = 100
    mesh = Mesh(Layout(dp=2))
    ranks = Together(mesh.beside("a test"))
    for number, at in enumerate(made):
        folder = directory / str(number)
        folder.mkdir(exist_ok=True)
        files = write_shards(folder, shards(at, mesh.rank, 2), ranks)
        assert all(ranks.each(lambda files=files: all(path.exists() for path in files)))  # type: ignore[misc]
        there = {path.name for path in folder.glob("*.safetensors")}
        assert there == {path.name for found in ranks.each(lambda f=files: f) for path in found}  # type: ignore[misc]


@settings(max_examples=3, deadline=None)
@given(st.lists(st.tuples(cuts(), cuts()), min_size=8, max_size=8))
def test_written_in_some_pieces_and_read_in_others(
    pairs: list[tuple[dict[str, list[int]], dict[str, list[int]]]],
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run(write, 2, Path(folder), [pair[0] for pair in pairs])
        for number, (_, at) in enumerate(pairs):
            for place in (0, 1):
                wanted = shards(at, place, 2)
                found = shards(at, place, 2)
                for shard in found:
                    shard.tensor.zero_()
                read_shards(Path(folder) / str(number), found)
                for one, other in zip(wanted, found, strict=True):
                    assert torch.equal(one.tensor, other.tensor), one.name


def refused(directory: Path, kind: str) -> str:
    """What is said when two ranks write the same numbers, or some are missing."""
    mesh = Mesh(Layout(dp=2))
    flat = torch.arange(12.0)
    begin, end = {"twice": (0, 8), "never": (0, 4)}[kind] if mesh.rank == 0 else (7, 12)
    mine = Shard("matrix", flat[begin:end], torch.Size((4, 3)), begin, True)
    with pytest.raises(Exception) as error:
        write_shards(directory, [mine], Together(mesh.beside("a test")))
    return str(error.value)


@pytest.mark.parametrize(("kind", "words"), [("twice", "overlapping"), ("never", "invalid fill")])
def test_numbers_that_come_twice_or_never_are_refused(
    kind: str, words: str, tmp_path: Path
) -> None:
    for said in run(refused, 2, tmp_path, kind):
        assert "Failed to validate global plan" in said
        assert words in said or said.endswith("plan")  # torch 2.11 says no more


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    run(write, 2, tmp_path, [{name: [] for name in SHAPES}])
    for shape, name, words in (
        ((7, 7), "matrix", "matrix is [7, 6] there and [7, 7] here"),
        ((7, 6), "other", "other is not in it"),
    ):
        shard = Shard(name, torch.zeros(6), torch.Size(shape), 0, True)
        with pytest.raises(CheckpointError, match="does not fit this model") as error:
            read_shards(tmp_path / "0", [shard])
        assert words in str(error.value)
