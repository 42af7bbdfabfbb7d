"""Held-out loss and loss by position in every kind of layout: the numbers of one process, on all ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fathom
from fathom.parallel import Layout, Mesh, Parallel
from fathom.parallel.pipeline import Plan
from fathom.train.evaluate import evaluate
from fathom.train.positions import loss_by_position
from tests.model.tiny import tiny_config
from tests.parallel.processes import run
from tests.train.test_evaluate import data

SEQ_LEN = 16
LENGTHS = (17, 35, 150)
"""Held-out tokens: fewer windows than ranks, a rest of one target, and enough for several passes."""


def read(layout: Layout | None = None, schedule: str = "1F1B") -> list[Any]:
    """What a rank finds, in float64, and whether it left the model as it was."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(4)
    model = fathom.Transformer(tiny_config(num_hidden_layers=4, initializer_range=0.1))
    parallel = None
    if layout:
        plan = Plan(model.config, layout.pp, schedule) if layout.pp > 1 else None
        full = schedule == "full"
        parallel = Parallel(model, Mesh(layout), plan=plan, full_shard=full)
    found: list[Any] = []
    for length in LENGTHS:
        text = data(length)
        found.append(vars(evaluate(model, text, SEQ_LEN, 1, parallel=parallel)))
        seen = loss_by_position(model, text, SEQ_LEN, length, parallel=parallel)
        found.append({"edges": seen.edges, "loss": seen.loss, "tokens": seen.tokens})
    assert model.training and all(int(r.expert_load.sum()) == 0 for r in model.routers())
    return found


@pytest.fixture(scope="module")
def expected() -> list[Any]:
    (alone,) = run(read, 1)
    return alone


LAYOUTS = [
    (Layout(dp=4, ep=2), ""),
    (Layout(dp=2), "full"),
    (Layout(pp=2, dp=2, ep=2), "ZBV"),
    (Layout(pp=4), "DualPipe"),
]


@pytest.mark.parametrize(("layout", "schedule"), LAYOUTS, ids=str)
def test_every_rank_finds_what_one_process_finds(
    layout: Layout, schedule: str, expected: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fathom.train.evaluate.TOKENS_AT_A_TIME", SEQ_LEN)
    monkeypatch.setattr("fathom.train.positions.TOKENS_AT_A_TIME", SEQ_LEN)
    for rank in run(read, layout.world, layout, schedule):
        for found, wanted in zip(rank, expected, strict=True):
            assert found.keys() == wanted.keys()
            for key, value in wanted.items():
                assert found[key] == pytest.approx(value, rel=1e-12), key
