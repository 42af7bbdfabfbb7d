"""Checkpoints of one process written behind the training: what the step held, whole or not there."""

from __future__ import annotations

import errno
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fathom
from fathom.errors import CheckpointError
from fathom.runs.saving import RANDOM, finish_saving, resume_run, run_shards, save_run
from fathom.train import checkpoint
from fathom.train.checkpoint import problem_with, read_state
from fathom.train.ema import EmaConfig
from fathom.train.guard import GuardConfig
from fathom.train.loop import Trainer, learn
from fathom.train.optimizer import OptimConfig
from tests.model.tiny import tiny_config
from tests.parallel.test_layouts import moment


def start() -> Trainer:
    torch.manual_seed(3)
    model = fathom.Transformer(tiny_config())
    return Trainer.start(model, OptimConfig(), GuardConfig(), EmaConfig(0.9))


def step(trainer: Trainer) -> None:
    """Gradients of one everywhere, and some random numbers drawn."""
    trainer.step += 1
    for parameter in trainer.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    learn(trainer, moment(trainer.step))
    torch.rand(3)


def state(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {shard.name: shard.tensor.clone() for shard in run_shards(trainer)}


def test_what_is_written_behind_is_the_step_that_it_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, real = threading.Event(), checkpoint._write_tensors

    def late(*given: Any) -> None:
        assert go.wait(20)
        real(*given)

    monkeypatch.setattr(checkpoint, "_write_tensors", late)
    trainer = start()
    step(trainer)
    expected = state(trainer)
    place = save_run(trainer, tmp_path, 2, {}, asynchronous=True)
    step(trainer)
    assert not place.exists()
    go.set()
    finish_saving(trainer)
    assert problem_with(place) is None
    again = start()
    assert resume_run(again, tmp_path, {}, print) and again.step == 1
    assert again.ema and trainer.ema and again.ema.updates == trainer.ema.updates - 1
    found = state(again)
    assert found.keys() == expected.keys() and RANDOM in found
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    step(again)
    for name, tensor in state(trainer).items():
        assert torch.equal(state(again)[name], tensor), name


def test_the_next_save_says_what_kept_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    trainer = start()
    step(trainer)
    save_run(trainer, tmp_path, 2, {}, asynchronous=True)
    step(trainer)
    finish_saving(trainer)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_write_tensors", full)
        save_run(trainer, tmp_path, 2, {}, asynchronous=True)
        with pytest.raises(CheckpointError, match=r"step-2.*No space left.*step-1"):
            save_run(trainer, tmp_path, 2, {}, asynchronous=True)
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
    assert save_run(trainer, tmp_path, 2, {}).exists()


def test_both_ways_write_the_same_files(tmp_path: Path) -> None:
    trainer = start()
    step(trainer)
    one, other = tmp_path / "one", tmp_path / "other"
    save_run(trainer, one, 1, {"text": "a"})
    save_run(trainer, other, 1, {"text": "a"}, asynchronous=True)
    finish_saving(trainer)
    names = sorted(path.name for path in (one / "step-1").iterdir())
    assert sorted(path.name for path in (other / "step-1").iterdir()) == names
    for name in (name for name in names if name.endswith(".safetensors")):
        expected, found = load_file(one / "step-1" / name), load_file(other / "step-1" / name)
        assert expected.keys() == found.keys()
        assert all(torch.equal(tensor, found[of]) for of, tensor in expected.items())
    assert read_state(one / "step-1") == read_state(other / "step-1")
