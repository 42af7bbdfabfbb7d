"""A run saved in one layout goes on in another as if nothing had happened, whatever happens to the ranks that save.

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

from fathom.runs.saving import finish_saving, resume_run, run_shards, save_run
from fathom.train.checkpoint import problem_with
from fathom.train.loop import StepRecord, Trainer, train_stage
from tests.parallel.processes import run
from tests.parallel.test_layouts import LOSSES, Case, distance, dp, pipe, plan, start

LAYERS = 4
"""Enough for two ranks of DualPipe, which have two stages each."""


def of_four_layers(case: Case) -> Case:
    return replace(case, layers=LAYERS, micro_batch=1)


ONE = of_four_layers(Case())
EXPERTS = of_four_layers(Case(dp(4, ep=2)))
DUAL = of_four_layers(pipe("DualPipe", 2, dp=2, ep=2))
PIPE = of_four_layers(pipe("1F1B", 2))
PLAIN = of_four_layers(Case(dp(2), zero1=False))
LAYOUTS = {"one": ONE, "dp4 ep2": EXPERTS, "DualPipe": DUAL, "1F1B": PIPE, "dp2 plain": PLAIN}
FAST = {("DualPipe", "dp4 ep2"), ("dp4 ep2", "one"), ("one", "DualPipe"), ("dp4 ep2", "dp2 plain")}
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
    assert train_stage(trainer, stage, [lambda trainer, record: records.append(record)])
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


@pytest.mark.parametrize("layout", ["DualPipe", pytest.param("dp4 ep2", marks=pytest.mark.slow)])
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
