"""A run saved in one layout goes on in another as if nothing had happened, whatever happens to the ranks that save.

Three steps in one layout, a save, and three more steps of a fresh trainer in another layout: losses and weights are
those of six undisturbed steps in one process. A line of `WAYS` is a pair of layouts.
"""

from __future__ import annotations

import os
import signal
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

import fathom
from fathom.errors import CheckpointError
from fathom.parallel import export as exporting
from fathom.parallel.export import export
from fathom.runs.saving import finish_saving, resume_run, run_shards, save_run
from fathom.train import checkpoint, sharded
from fathom.train.checkpoint import problem_with, read_tensors
from fathom.train.loop import StepRecord, Trainer, train_stage
from tests.parallel.processes import run
from tests.parallel.test_layouts import LOSSES, Case, distance, dp, pipe, plan, start
from tests.train.test_checkpoint import files_up_to

LAYERS = 4
"""Enough for two ranks of DualPipe, which have two stages each."""


def of_four_layers(case: Case) -> Case:
    return replace(case, layers=LAYERS, micro_batch=1)


ONE = of_four_layers(Case())
EXPERTS = of_four_layers(Case(dp(4, ep=2)))
DUAL = of_four_layers(pipe("DualPipe", 2, dp=2, ep=2))
PIPE = of_four_layers(pipe("1F1B", 2))
PLAIN = of_four_layers(Case(dp(2), zero1=False))
FULL = of_four_layers(Case(dp(4, ep=2), full=True))
LAYOUTS = {
    "one": ONE,
    "dp4 ep2": EXPERTS,
    "DualPipe": DUAL,
    "1F1B": PIPE,
    "dp2 plain": PLAIN,
    "full": FULL,
}
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


def resumes(case: Case, directory: Path) -> tuple[int, list[str]]:
    trainer, said = start(case), list[str]()
    resume_run(trainer, directory, {}, said.append)
    return trainer.step, said


def test_a_damaged_one_is_passed_over_by_all(tmp_path: Path) -> None:
    """Every rank looks at a share of the files; the first one says what was found."""
    run(saves_twice, 2, PLAIN, tmp_path)
    spoilt = sorted((tmp_path / "step-2").glob("*.safetensors"))[-1]
    spoilt.write_bytes(spoilt.read_bytes()[:-1])
    first, second = run(resumes, 2, PLAIN, tmp_path)
    assert first[0] == second[0] == 1
    assert len(first[1]) == 1 and spoilt.name in first[1][0] and not second[1]


# --- a rank that fails or dies -------------------------------------------------------------------


def saves_twice(case: Case, directory: Path, spoil: str = "", asynchronous: bool = False) -> str:
    """Checkpoints of steps 1 and 2; what went wrong with the second, and then the same again undisturbed."""
    trainer = start(case)
    trainer.step = 1
    save_run(trainer, directory, 2, {})
    trainer.step = 2
    spoilt: AbstractContextManager[None] = nullcontext()
    if spoil == "full" and dist.get_rank() == 1:
        spoilt = files_up_to(2000)
    if spoil == "killed" and dist.get_rank() == 1:
        sharded._Writer.write_data = killed  # type: ignore[method-assign]
    said = ""
    with spoilt:
        try:
            save_run(trainer, directory, 2, {}, asynchronous)
            finish_saving(trainer)
        except CheckpointError as error:
            said = str(error)
    assert (directory / "step-2").exists() == (not said)
    if said:
        dist.barrier()
        save_run(trainer, directory, 2, {}, asynchronous)
        finish_saving(trainer)
    return said


def killed(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_on_one_rank_fails_on_all_and_loses_nothing(
    asynchronous: bool, tmp_path: Path
) -> None:
    for said in run(saves_twice, 2, PIPE, tmp_path, "full", asynchronous):
        assert "step-2" in said and "File too large (rank 1)" in said
        assert "last good checkpoint is step-1" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1", "step-2"]
    assert problem_with(tmp_path / "step-2") is None


def test_a_killed_rank_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    with pytest.raises(AssertionError) as met:
        run(saves_twice, 2, PIPE, tmp_path, "killed")
    assert "rank 1:\nended without a word" in str(met.value)
    assert "another rank was lost" in str(met.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".writing-2", "step-1"]
    assert [step for step, _ in run(resumes, 2, PIPE, tmp_path)] == [1, 1]
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


# --- export --------------------------------------------------------------------------------------


def exports(case: Case, directory: Path, settings: dict[str, Any]) -> None:
    trainer = start(case)
    stage = plan(case)
    stage.last_step = 1
    if case.layout.world > 1:
        resume_run(trainer, directory, {}, print)
    else:
        train_stage(trainer, stage, [])
        save_run(trainer, directory, 1, {})
    export(
        trainer.parallel, directory / f"of {case.layout.world}", max_shard_bytes=20_000, **settings
    )


EXPORTED = [
    pytest.param(DUAL, {}, id="DualPipe"),
    pytest.param(EXPERTS, {"dtype": torch.bfloat16}, id="dp4 ep2 in bfloat16"),
    pytest.param(replace(FULL, tied=True), {}, id="full tied"),
    pytest.param(replace(PIPE, tied=True), {}, id="1F1B tied", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("case", "settings"), EXPORTED)
def test_the_export_is_that_of_one_process(
    case: Case, settings: dict[str, Any], tmp_path: Path
) -> None:
    exports(replace(ONE, tied=case.tied), tmp_path, settings)
    run(exports, case.layout.world, case, tmp_path, settings)
    one, many = tmp_path / "of 1", tmp_path / f"of {case.layout.world}"
    names = sorted(path.name for path in one.iterdir())
    assert sorted(path.name for path in many.iterdir()) == names and len(names) > 6
    for name in names:
        if name.endswith(".safetensors"):
            expected, found = load_file(one / name), load_file(many / name)
            assert expected.keys() == found.keys()
            for tensor in expected:
                assert expected[tensor].dtype == found[tensor].dtype
                assert torch.equal(expected[tensor], found[tensor]), tensor
        else:
            assert (one / name).read_bytes() == (many / name).read_bytes(), name
    assert fathom.load(many).config.num_hidden_layers == LAYERS


def fetched(case: Case, directory: Path) -> list[int]:
    """Bytes that the first rank had from all for each file."""
    sizes: list[int] = []
    real = exporting._Asking.fetch

    def noting(asking: Any, *given: Any) -> dict[str, Tensor]:
        found = real(asking, *given)
        sizes.append(sum(tensor.nbytes for tensor in found.values()))
        return found

    exporting._Asking.fetch = noting  # type: ignore[method-assign]
    export(start(case).parallel, directory / "model", max_shard_bytes=60_000)
    return sizes


@pytest.mark.parametrize(
    "case", [pytest.param(PIPE, id="1F1B"), pytest.param(FULL, id="full", marks=pytest.mark.slow)]
)
def test_nobody_holds_more_than_a_file_besides(case: Case, tmp_path: Path) -> None:
    first, *others = run(fetched, case.layout.world, case, tmp_path)
    assert len(first) > 5 and max(first) <= 60_000 and not any(others)


def exports_to_a_file(case: Case, place: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        export(start(case).parallel, place)
    return str(error.value)


def test_an_export_that_cannot_be_fails_on_all(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for said in run(exports_to_a_file, 2, PIPE, tmp_path / "file"):
        assert "is a file" in said


def exports_without_room(case: Case, directory: Path, where: str) -> str:
    """Memory of the first rank ends in the middle of a file's tensors: of all, or of those that it has itself."""
    parallel = start(case).parallel
    made = [0]

    def short(real: Any) -> Any:
        def making(*given: Any, **named: Any) -> Tensor:
            made[0] += named.get("device") is None and parallel.mesh.rank == 0
            if made[0] == 2:
                raise RuntimeError("can't allocate memory")
            return real(*given, **named)

        return making

    module: Any = exporting
    if where == "all":
        module.torch = SimpleNamespace(**{**vars(torch), "empty": short(torch.empty)})
    else:
        module._part = short(module._part)
    with pytest.raises(RuntimeError, match="can't allocate") as error:
        export(parallel, directory / "model")
    return str(error.value)


@pytest.mark.parametrize("where", ["all", "its own"])
def test_a_first_rank_without_memory_leaves_nobody_waiting(where: str, tmp_path: Path) -> None:
    for said in run(exports_without_room, 2, PIPE, tmp_path, where, seconds=30):
        assert said == "can't allocate memory"
