"""A rank that cannot write, or dies while a checkpoint is written: all hear of it, and the one before is whole."""

from __future__ import annotations

import os
import signal
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from fathom.errors import CheckpointError
from fathom.runs.saving import finish_saving, resume_run, save_run
from fathom.train import sharded
from fathom.train.checkpoint import problem_with
from tests.parallel.layouts_of_four import PIPE, PLAIN
from tests.parallel.processes import run
from tests.parallel.test_layouts import Case, start
from tests.train.test_checkpoint import files_up_to


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


def resumes(case: Case, directory: Path) -> tuple[int, list[str]]:
    trainer, said = start(case), list[str]()
    resume_run(trainer, directory, {}, said.append)
    return trainer.step, said


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


def test_a_damaged_one_is_passed_over_by_all(tmp_path: Path) -> None:
    """Every rank looks at a share of the files; the first one says what was found."""
    run(saves_twice, 2, PLAIN, tmp_path)
    spoilt = sorted((tmp_path / "step-2").glob("*.safetensors"))[-1]
    spoilt.write_bytes(spoilt.read_bytes()[:-1])
    first, second = run(resumes, 2, PLAIN, tmp_path)
    assert first[0] == second[0] == 1
    assert len(first[1]) == 1 and spoilt.name in first[1][0] and not second[1]
