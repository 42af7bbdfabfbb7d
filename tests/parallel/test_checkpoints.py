"""A run saved in one layout goes on in another as if nothing had happened.

Three steps in one layout, a save, and three more steps of a fresh trainer in another layout: losses and weights are
those of six undisturbed steps in one process. A line of `WAYS` is a pair of layouts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fathom.errors import CheckpointError
from fathom.runs.saving import finish_saving, resume_run, run_shards, save_run
from fathom.train import checkpoint, sharded
from fathom.train.checkpoint import problem_with, read_tensors
from fathom.train.loop import StepRecord, Trainer, train_stage
from tests.parallel.layouts_of_four import EXPERTS, LAYOUTS, ONE, PLAIN
from tests.parallel.processes import run
from tests.parallel.test_layouts import LOSSES, Case, distance, plan, start

FAST = {
    ("DualPipe", "dp4 ep2"), ("dp4 ep2", "one"), ("one", "DualPipe"), ("dp4 ep2", "dp2 plain"), ("full", "dp2 plain"),
}  # fmt: skip
WAYS = [
    pytest.param(a, b, id=f"{a} to {b}", marks=() if (a, b) in FAST else pytest.mark.slow)
    for a in LAYOUTS
    for b in LAYOUTS
    if a != b
]


@dataclass
class Went:
    """What one rank brings back."""

    records: list[StepRecord]
    pieces: list[tuple[str, Tensor, torch.Size, int, bool]]
    """Its part of everything a checkpoint holds, after the last step."""


def goes(
    case: Case, directory: Path | None, last: int, save: bool = False, asynchronous: bool = False
) -> Went:
    """From the checkpoint in the directory, if there is one, to the last step; saved there if asked for."""
    trainer = start(case)
    if directory is not None:
        resume_run(trainer, directory, {}, print)
    records: list[StepRecord] = []
    stage = plan(case)
    stage.last_step = last

    def note(trainer: Trainer, record: StepRecord) -> None:
        records.append(record)
        torch.rand(1)  # so that the random state is another one after each step

    assert train_stage(trainer, stage, [note])
    if save and directory is not None:
        place = save_run(trainer, directory, 2, {"text": "a"}, asynchronous)
        finish_saving(trainer)
        assert place.exists()
    return Went(records, state_of(trainer))


def state_of(trainer: Trainer) -> list[tuple[str, Tensor, torch.Size, int, bool]]:
    return [(s.name, s.tensor.clone(), s.shape, s.offset, s.first) for s in run_shards(trainer)]


def in_ranks(case: Case, *arguments: Any) -> list[Went]:
    if case.layout.world == 1:
        return [goes(case, *arguments)]
    return run(goes, case.layout.world, case, *arguments)


@cache
def undisturbed(case: Case) -> tuple[Went, ...]:
    return tuple(in_ranks(case, None, 6))


def whole(ranks: list[Went] | tuple[Went, ...]) -> dict[str, Tensor]:
    """All parts that are to be written, put together."""
    found: dict[str, Tensor] = {}
    for rank in ranks:
        for name, tensor, shape, offset, first in rank.pieces:
            flat = found.setdefault(name, torch.zeros(shape, dtype=tensor.dtype)).view(-1)
            if first:
                flat[offset : offset + tensor.numel()] = tensor
    return found


@pytest.mark.parametrize(("saved", "resumed"), WAYS)
def test_another_layout_goes_on(saved: str, resumed: str, tmp_path: Path) -> None:
    in_ranks(LAYOUTS[saved], tmp_path, 3, True)
    assert problem_with(tmp_path / "step-3") is None
    ranks = in_ranks(LAYOUTS[resumed], tmp_path, 6)
    expected = undisturbed(ONE)[0]
    for rank in ranks:
        assert [record.moment.step for record in rank.records] == [4, 5, 6]
        for one, record in zip(expected.records[3:], rank.records, strict=True):
            for key in ("loss", "mtp_loss", "balance_loss", "grad_norm"):
                a, b = getattr(record, key), getattr(one, key)
                assert abs(a - b) <= LOSSES * abs(b), (record.moment.step, key, a, b)
            assert torch.equal(record.expert_load, one.expert_load)
    state, wanted = whole(ranks), whole([expected])
    assert state.keys() == wanted.keys()
    for name, tensor in wanted.items():
        if "correction_bias" in name or name == "random.cpu" or "step." in name:
            assert torch.equal(state[name], tensor), name
        else:
            close = 1e-6 if tensor.dtype == torch.float32 else 1e-9
            assert distance(state[name], tensor) <= close, name


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("dp4 ep2", "full")]


@pytest.mark.parametrize("layout", ["DualPipe", *SLOW])
def test_the_same_layout_goes_on_bit_for_bit(layout: str, tmp_path: Path) -> None:
    """Everything that a checkpoint holds, on every rank; written behind the training."""
    case = replace(LAYOUTS[layout], dtype=torch.float32)
    in_ranks(case, tmp_path, 3, True, True)
    for one, again in zip(undisturbed(case), in_ranks(case, tmp_path, 6), strict=True):
        for a, b in zip(one.records[3:], again.records, strict=True):
            assert (a.loss, a.mtp_loss, a.grad_norm) == (b.loss, b.mtp_loss, b.grad_norm)
        for before, after in zip(one.pieces, again.pieces, strict=True):
            assert before[0] == after[0] and before[2:] == after[2:]
            assert torch.equal(before[1], after[1]), before[0]


# --- what is written -----------------------------------------------------------------------------


def saved_and_whole(case: Case, directory: Path) -> Went:
    """A step, and a checkpoint in many small files."""
    checkpoint.FILE_BYTES = 1 << 12
    return goes(case, directory, 1, True)


def test_what_is_written_tells_nothing_of_the_layout(tmp_path: Path) -> None:
    """One process reads tensors by the names and in the shapes that it would have written itself."""
    ranks = run(saved_and_whole, 4, EXPERTS, tmp_path)
    stored = whole(ranks)
    mine = run_shards(start(ONE))
    assert stored.keys() == {shard.name for shard in mine}
    into = {shard.name: torch.zeros_like(shard.tensor).view(shard.shape) for shard in mine}
    read_tensors(tmp_path / "step-1", into)
    for name, tensor in into.items():
        assert torch.equal(tensor, stored[name]), name
    files = [path.name for path in (tmp_path / "step-1").iterdir()]
    assert len(files) > 10 and all(name.endswith((".safetensors", ".json")) for name in files)


def reads(case: Case, directory: Path) -> list[tuple[str, int]]:
    """Which tensors a rank reads, and how many numbers of each."""
    trainer = start(case)
    read: list[tuple[str, int]] = []
    real = sharded._Loading.resolve_tensor

    def noting(planner: Any, item: Any) -> Tensor:
        target = real(planner, item)
        read.append((item.storage_index.fqn, target.numel()))
        return target

    sharded._Loading.resolve_tensor = noting  # type: ignore[method-assign]
    assert resume_run(trainer, directory, {}, print)
    return read


def test_a_rank_reads_its_part_and_no_more(tmp_path: Path) -> None:
    goes(ONE, tmp_path, 1, True)
    total = sum(s.tensor.numel() for s in run_shards(start(ONE)) if "exp_avg." in s.name)
    ranks = run(reads, 4, EXPERTS, tmp_path)
    numbers = [sum(n for name, n in read if "exp_avg." in name) for read in ranks]
    assert sum(numbers) == total and max(numbers) < 0.35 * total


def test_another_models_checkpoint_is_refused_by_all(tmp_path: Path) -> None:
    goes(ONE, tmp_path, 1, True)
    for said in run(refused, 2, replace(PLAIN, mtp=2), tmp_path):
        assert "step-1 does not fit this model" in said and "mtp.1" in said
    for said in run(refused, 2, PLAIN, tmp_path, {"text": "b"}):
        assert "was trained on another text" in said


def refused(case: Case, directory: Path, data: dict[str, Any] | None = None) -> str:
    with pytest.raises(CheckpointError) as error:
        resume_run(start(case), directory, data or {}, print)
    return str(error.value)
