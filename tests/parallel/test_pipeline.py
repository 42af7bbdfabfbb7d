"""Every schedule, run by its ranks, against one process that takes the same micro-batches one after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fathom.errors import ParallelError
from fathom.model import Losses, Transformer, losses
from fathom.parallel import Layout, Mesh, schedule
from fathom.parallel.pipeline import MicroBatch, Pipeline, Plan, Weights, share_layers
from tests.model.tiny import tiny_config, tiny_model
from tests.parallel.processes import run

WEIGHTS = Weights(mtp=0.3, balance_alpha=0.01)
SHAPE = {"num_hidden_layers": 9, "first_k_dense_replace": 2}


def model_of(dtype: torch.dtype, changes: dict[str, Any]) -> Transformer:
    fields = {key: value for key, value in changes.items() if key != "recompute"}
    model = tiny_model(3, **{**SHAPE, **fields}).to(dtype).train()
    model.set_recompute(bool(changes.get("recompute")))
    return model


def micro_batches(count: int, documents: bool) -> list[MicroBatch]:
    """Of different numbers of rows, with as many targets as that leaves."""
    torch.manual_seed(1)
    found = []
    for number in range(count):
        tokens = torch.randint(0, 101, (1 + number % 2, 17))
        ids = torch.randint(0, 2, tokens.shape).sort(1).values if documents else None
        found.append((tokens, ids))
    rows = sum(len(tokens) for tokens, _ in found)
    return [MicroBatch(t, ids, len(t) / rows, len(t) / rows) for t, ids in found]


def alone(model: Transformer, batches: list[MicroBatch]) -> tuple[dict[str, Tensor], Losses]:
    """Gradients and losses of one process."""
    sums, loads = [], []
    for part in batches:
        found = losses(
            model, part.tokens, part.document_ids,
            mtp_weight=WEIGHTS.mtp, balance_alpha=WEIGHTS.balance_alpha,
        )  # fmt: skip
        predicted = found.main + WEIGHTS.mtp * found.mtp
        (predicted * part.targets + found.balance * part.sequences).backward()
        shares = (part.targets, part.targets, part.sequences)
        values = (found.main, found.mtp, found.balance)
        sums.append(torch.stack([v.detach() * s for v, s in zip(values, shares, strict=True)]))
        loads.append(found.expert_load)
    main, mtp, balance = torch.stack(sums).sum(0)
    load = torch.stack(loads).sum(0)
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return gradients, Losses(main, mtp, balance, main, (), load)


def one_rank(
    name: str, stages: int, count: int, dtype: torch.dtype, changes: dict[str, Any], steps: int
) -> tuple[dict[str, Tensor], list[Tensor], dict[str, Tensor]]:
    model = model_of(dtype, changes)
    plan = Plan(model.config, schedule(name, stages, count).ranks, name)
    pipeline = Pipeline(model, plan, Mesh(Layout(pp=plan.ranks)).pp)
    for _ in range(steps):
        model.zero_grad()
        seen = pipeline.run(micro_batches(count, True), WEIGHTS)
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    loads = {n: b for n, b in model.named_buffers() if n.endswith("expert_load")}
    return gradients, [seen.main, seen.mtp, seen.balance, seen.expert_load], loads


def compare(
    name: str, stages: int, count: int, dtype: torch.dtype, steps: int = 1, **changes: Any
) -> dict[str, float]:
    """Relative distance of each gradient; losses, loads and the routers' counts are compared here."""
    ranks = schedule(name, stages, count).ranks
    answers = run(one_rank, ranks, name, stages, count, dtype, changes, steps)
    model = model_of(dtype, changes)
    expected, found = alone(model, micro_batches(count, True))
    seen = [sum(answer[1][k] for answer in answers) for k in range(4)]
    close = 1e-12 if dtype == torch.float64 else 1e-6
    for ours, theirs in zip(seen[:3], (found.main, found.mtp, found.balance), strict=True):
        assert abs(float(ours) - float(theirs)) <= close * abs(float(theirs))
    assert torch.equal(seen[3], found.expert_load)
    for key, load in ((n, b) for n, b in model.named_buffers() if n.endswith("expert_load")):
        assert torch.equal(sum(a[2][key] for a in answers if key in a[2]), steps * load)
    assert {n for answer in answers for n in answer[0]} == set(expected)
    distances = {}
    for key, theirs in expected.items():
        ours = sum(answer[0][key] for answer in answers if key in answer[0])
        distances[key] = float((ours - theirs).norm() / theirs.norm())
    return distances


FOUR = [("1F1B", 2), ("ZB1P", 3), ("DualPipeV", 4), ("DualPipe", 2)]
OTHERS = [
    ("GPipe", 4),
    ("1F1B", 4),
    ("ZB1P", 4),
    ("ZBV", 4),
    ("ZBV", 8),
    ("DualPipeV", 8),
    ("DualPipe", 4),
]


@pytest.mark.parametrize(("name", "stages"), FOUR)
def test_gradients_equal_those_of_one_process(name: str, stages: int) -> None:
    distances = compare(name, stages, 8, torch.float64)
    assert max(distances.values()) <= 1e-12, distances


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "stages"), FOUR + OTHERS)
def test_all_schedules_in_both_dtypes(name: str, stages: int, dtype: torch.dtype) -> None:
    distances = compare(name, stages, 8, dtype, steps=2)
    assert max(distances.values()) <= (1e-12 if dtype == torch.float64 else 1e-5), distances


def test_products_rules_and_recomputation_go_with_a_backward_in_two() -> None:
    """W after everything else, with norms, up-projections and SwiGLU made again: still the same gradients."""
    distances = compare("ZB1P", 2, 4, torch.float64, recompute=True)
    assert max(distances.values()) <= 1e-12, distances


def sent(name: str, stages: int) -> int:
    """Bytes that a rank sends in a step of eight micro-batches, in float64."""
    model = model_of(torch.float64, {})
    plan = Plan(model.config, schedule(name, stages, 8).ranks, name)
    pipeline = Pipeline(model, plan, Mesh(Layout(pp=plan.ranks)).pp)
    pipeline.run(micro_batches(8, False), WEIGHTS)
    return pipeline.bytes_sent


@pytest.mark.parametrize(("name", "stages", "borders"), [("1F1B", 2, 1), ("ZBV", 4, 2)])
def test_bytes_between_stages_equal_the_formula(name: str, stages: int, borders: int) -> None:
    """Tokens times hidden size, once over each border of two ranks and once back; the turn of a V costs nothing."""
    tokens = sum(part.tokens[:, 1:].numel() for part in micro_batches(8, False))
    assert run(sent, 2, name, stages) == [borders * tokens * tiny_config().hidden_size * 8] * 2


def test_layers_are_shared_out_evenly_and_the_ends_get_the_smaller_shares() -> None:
    config = tiny_config(num_hidden_layers=11)
    assert [len(stage) for stage in share_layers(config, 4)] == [3, 3, 3, 2]
    assert [len(stage) for stage in share_layers(config, 8)] == [1, 1, 2, 2, 2, 1, 1, 1]
    assert share_layers(config, 3, (1, 9, 1)) == (range(1), range(1, 10), range(10, 11))


@pytest.mark.parametrize(
    ("stages", "counts", "said"),
    [(12, None, "12 stages are too many"), (2, (5, 5), "make 10"), (2, (11, 0), "at least 1")],
)
def test_stages_that_cannot_be(stages: int, counts: tuple[int, ...] | None, said: str) -> None:
    with pytest.raises(ParallelError, match=said):
        share_layers(tiny_config(num_hidden_layers=11), stages, counts)
