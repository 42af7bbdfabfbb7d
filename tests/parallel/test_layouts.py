"""Every layout against one process: the same gradients, the same expert choices, the same twenty steps.

A tiny model with everything that could go wrong in it (MoE with groups and shared experts, MTP, balance loss, biases
that move, packed documents so that ranks have unequal numbers of targets, micro-batches) is trained once in one
process and once in each layout of `LAYOUTS`. A line of that table is a layout; what is compared stands in the tests.

Sums over ranks are made in another order than in one process. That is why the tolerance is not zero: in float64 the
difference is some 1e-15, a mistake would be 1e-3 and more, so the two cannot be confounded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fathom
from fathom.data.loader import Loader, Ring
from fathom.model.initial import outline
from fathom.model.moe import MoE
from fathom.parallel import Layout, Mesh, Parallel
from fathom.parallel.pipeline import Plan
from fathom.parallel.schedules import traits
from fathom.train.ema import EmaConfig
from fathom.train.guard import GuardConfig
from fathom.train.loop import (
    StagePlan,
    StepRecord,
    Trainer,
    Whole,
    accumulate_gradients,
    forget,
    train_stage,
)
from fathom.train.optimizer import OptimConfig
from fathom.train.schedule import Moment
from tests.model.tiny import tiny_config
from tests.parallel.processes import run

BATCH, SEQ_LEN, STEPS = 8, 12, 20
GRADIENTS = {torch.float64: 1e-12, torch.float32: 1e-5}
LOSSES = 1e-10


@dataclass(frozen=True)
class Case:
    """A layout and what is switched on in it."""

    layout: Layout = field(default_factory=Layout)
    zero1: bool = True
    full: bool = False
    mtp: int = 1
    micro_batch: int = 2
    dtype: torch.dtype = torch.float64
    tied: bool = False
    recompute: bool = False
    schedule: str = "1F1B"
    layers: int = 3

    @property
    def reference(self) -> Case:
        """The same in one process, without anything that should make no difference."""
        batch = BATCH if self.layout.pp == 1 else self.micro_batch
        return Case(
            mtp=self.mtp, micro_batch=batch, dtype=self.dtype, tied=self.tied, layers=self.layers
        )


def dp(ranks: int, **fields: Any) -> Layout:
    return Layout(dp=ranks, **fields)


def pipe(schedule: str, pp: int, dp: int = 1, ep: int = 1, **fields: Any) -> Case:
    """One sequence at a time, so that there are enough micro-batches, and a layer for each stage."""
    return Case(
        Layout(pp=pp, dp=dp, ep=ep), micro_batch=1, schedule=schedule,
        layers=traits(schedule).stages(pp), **fields,
    )  # fmt: skip


slow = pytest.mark.slow
LAYOUTS = [
    pytest.param(Case(dp(2)), id="dp2 zero1"),
    pytest.param(Case(dp(2, ep=2), zero1=False), id="dp2 ep2"),
    pytest.param(Case(dp(4, ep=2)), id="dp4 ep2 zero1"),
    pytest.param(Case(dp(4, ep=4, devices_per_node=2)), id="dp4 ep4 on two nodes, zero1"),
    pytest.param(Case(dp(4, ep=2), full=True), id="dp4 ep2 full"),
    pytest.param(pipe("1F1B", 2), id="pp2 1F1B zero1"),
    pytest.param(pipe("DualPipe", 2, dp=2, ep=2), id="pp2 dp2 ep2 DualPipe zero1"),
    pytest.param(pipe("DualPipeV", 2, dp=2, ep=2), id="pp2 dp2 ep2 DualPipeV zero1", marks=slow),
    pytest.param(pipe("GPipe", 2, zero1=False), id="pp2 GPipe", marks=slow),
    pytest.param(pipe("ZB1P", 4, tied=True), id="pp4 ZB1P zero1 tied", marks=slow),
    pytest.param(pipe("ZBV", 4, zero1=False), id="pp4 ZBV", marks=slow),
    pytest.param(pipe("ZBV", 2, dp=2, recompute=True), id="pp2 dp2 ZBV recomputed zero1", marks=slow),
    pytest.param(pipe("DualPipe", 4, mtp=2), id="pp4 DualPipe zero1 two MTP depths", marks=slow),
    pytest.param(pipe("DualPipe", 2, dp=2, ep=2, zero1=False), id="pp2 dp2 ep2 DualPipe", marks=slow),
    pytest.param(pipe("ZBV", 2, dp=4, ep=2), id="pp2 dp4 ep2 ZBV zero1", marks=slow),
    pytest.param(pipe("1F1B", 4, dp=2, ep=2, mtp=0), id="pp4 dp2 ep2 1F1B zero1 without MTP", marks=slow),
    pytest.param(Case(dp(2), zero1=False), id="dp2", marks=slow),
    pytest.param(Case(dp(2, ep=2)), id="dp2 ep2 zero1", marks=slow),
    pytest.param(Case(dp(4)), id="dp4 zero1", marks=slow),
    pytest.param(Case(dp(4, ep=2), zero1=False), id="dp4 ep2", marks=slow),
    pytest.param(Case(dp(4, ep=4)), id="dp4 ep4 zero1", marks=slow),
    pytest.param(Case(dp(2), full=True), id="dp2 full", marks=slow),
    pytest.param(Case(dp(4), full=True, tied=True, recompute=True), id="dp4 full tied recomputed", marks=slow),
    pytest.param(Case(dp(4), full=True, mtp=2, micro_batch=1), id="dp4 full two MTP depths accumulated", marks=slow),
    pytest.param(Case(dp(4, ep=4), full=True), id="dp4 ep4 full", marks=slow),
    pytest.param(Case(dp(8, ep=4, devices_per_node=2), full=True), id="dp8 ep4 on two nodes, full", marks=slow),
    pytest.param(Case(dp(8), full=True, mtp=0, micro_batch=1), id="dp8 full without MTP", marks=slow),
    pytest.param(Case(dp(4, ep=4), zero1=False, micro_batch=1), id="dp4 ep4", marks=slow),
    pytest.param(Case(dp(4, ep=2), mtp=0), id="dp4 ep2 zero1 without MTP", marks=slow),
    pytest.param(Case(dp(4, ep=4), mtp=2), id="dp4 ep4 zero1 two MTP depths", marks=slow),
    pytest.param(Case(dp(4, ep=2), tied=True, recompute=True), id="dp4 ep2 zero1 tied recomputed", marks=slow),
    pytest.param(Case(dp(8, ep=4, devices_per_node=2)), id="dp8 ep4 on two nodes, zero1", marks=slow),
    pytest.param(Case(dp(8, ep=8)), id="dp8 ep8 zero1", marks=slow),
]  # fmt: skip
LAYOUTS_IN_FLOAT32 = [
    pytest.param(Case(dp(2, ep=2), dtype=torch.float32), id="float32 dp2 ep2 zero1"),
    pytest.param(Case(dp(4, ep=4), False, dtype=torch.float32), id="float32 dp4 ep4", marks=slow),
    pytest.param(
        Case(dp(4, ep=2), full=True, dtype=torch.float32), id="float32 dp4 ep2 full", marks=slow
    ),
    pytest.param(Case(dp(8, ep=4), dtype=torch.float32), id="float32 dp8 ep4 zero1", marks=slow),
]


# --- what each rank does -------------------------------------------------------------------------


@dataclass
class Found:
    """What one rank brings back, by the tensors' and MoE blocks' names."""

    gradients: dict[str, Tensor]
    """Whole ones, as in one process; only the first rank of a stage brings them, and weights and average."""
    choices: dict[str, Tensor]
    """Of the first step, the experts of this rank's tokens and their weights, float64 [tokens, 2 K]."""
    records: list[StepRecord]
    weights: dict[str, Tensor]
    biases: dict[str, Tensor]
    average: dict[str, Tensor]
    """Of dense parameters, of router biases and of the first rank's experts."""


def trains(case: Case) -> Found:
    """Gradients of the first step, then `STEPS` steps of training, on one rank of the case's layout."""
    trainer = start(case)
    watched = watch_choices(trainer.model)
    gradients = first_gradients(trainer, case)
    choices = {name: torch.cat(seen) for name, seen in watched.items()}
    records: list[StepRecord] = []
    assert train_stage(trainer, plan(case), [lambda trainer, record: records.append(record)])
    weights = {name: weight.clone() for name, weight in trainer.parallel.whole_weights()}
    biases = {n: b for n, b in trainer.model.named_buffers() if n.endswith("correction_bias")}
    assert trainer.ema
    average = trainer.ema.tensors()
    gradients, weights, average = (
        {name: tensor for name, tensor in each.items() if brings(trainer.parallel, name)}
        for each in (gradients, weights, average)
    )
    return Found(gradients, choices, records, weights, biases, average)


def brings(parallel: Parallel, name: str) -> bool:
    """Whether this is the rank that brings what several hold, or have put together."""
    mesh, pipeline = parallel.mesh, parallel.pipeline
    first = pipeline is None or pipeline.plan.holders(name)[0] == mesh.pp.place
    return first and mesh.dp.place == 0


def start(case: Case) -> Trainer:
    torch.manual_seed(7)
    config = tiny_config(
        initializer_range=0.05,
        num_nextn_predict_layers=case.mtp,
        tie_word_embeddings=case.tied,
        num_hidden_layers=case.layers,
    )
    alone, pp = case.layout.world == 1, case.layout.pp
    model = (fathom.Transformer(config) if alone else outline(config)).to(case.dtype)
    model.set_recompute(case.recompute)
    mesh = None if alone else Mesh(case.layout)
    lies = Plan(config, pp, case.schedule) if pp > 1 else None
    cpu = None if alone else torch.device("cpu")
    parallel = Parallel(
        model,
        mesh,
        case.zero1,
        bucket_bytes=1 << 15,
        plan=lies,
        full_shard=case.full,
        outline_on=cpu,
    )
    return Trainer.start(model, OptimConfig(), GuardConfig(), EmaConfig(0.9), parallel)


def plan(case: Case) -> StagePlan:
    """Two steps of the twenty leave MTP out, so that its parameters have no gradient."""
    random = np.random.default_rng(0)
    tokens = (np.cumsum(random.choice([1, 1, 1, 5], size=2000)) % 101).astype(np.uint16)
    documents = np.cumsum(random.integers(2, 12, size=300))
    loader = Loader({"all": Ring(tokens, SEQ_LEN, seed=1, documents=documents)})
    return StagePlan(loader, case.micro_batch, lambda step: (step - 1) * BATCH, STEPS, moment)


def moment(step: int) -> Moment:
    return Moment(
        "test", step, step * BATCH * SEQ_LEN, lr=1e-2, batch=BATCH, seq_len=SEQ_LEN, gamma=1e-2,
        mtp_weight=0.0 if step in (5, 6) else 0.3, balance_alpha=1e-2, rope_scaling=None,
    )  # fmt: skip


def watch_choices(model: fathom.Transformer) -> dict[str, list[Tensor]]:
    """A list for every MoE block, to which each micro-batch adds its tokens' experts and their weights."""
    seen: dict[str, list[Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, MoE):
            seen[name] = []
            module.dispatcher = Watched(module.dispatcher, seen[name])
    return seen


class Watched:
    """A dispatcher that writes down what it is asked for."""

    def __init__(self, dispatcher: Any, seen: list[Tensor]) -> None:
        self.dispatcher, self.seen, self.combine = dispatcher, seen, dispatcher.combine

    def dispatch(self, x: Tensor, indices: Tensor, weights: Tensor, counts: Tensor) -> Any:
        self.seen.append(torch.cat((indices.double(), weights.detach().double()), dim=1))
        return self.dispatcher.dispatch(x, indices, weights, counts)


def first_gradients(trainer: Trainer, case: Case) -> dict[str, Tensor]:
    mine = trainer.parallel.rows(BATCH)
    batch = plan(case).loader.batch(mine.start, len(mine))
    whole = Whole(trainer.parallel.total(int(batch.targets().sum())), BATCH)
    assert (
        whole.targets % BATCH and whole.targets < BATCH * SEQ_LEN
    )  # not all sequences have as many
    found = accumulate_gradients(
        trainer.model, batch, case.micro_batch, moment(1), whole, trainer.parallel.pipeline
    )
    trainer.parallel.reduce(found)
    gradients = {name: g.clone() for name, g in trainer.parallel.whole_gradients()}
    forget(trainer)
    return gradients


# --- what is compared ----------------------------------------------------------------------------


@cache
def one_process(case: Case) -> Found:
    return trains(case)


@cache
def in_layout(case: Case) -> tuple[Found, ...]:
    return tuple(run(trains, case.layout.world, case, seconds=120))


def joined(ranks: tuple[Found, ...], what: str) -> dict[str, Tensor]:
    """What the ranks brought of some kind; of what several brought, rows in the order of the ranks."""
    found: dict[str, list[Tensor]] = {}
    for rank in ranks:
        for name, tensor in getattr(rank, what).items():
            found.setdefault(name, []).append(tensor)
    return {
        name: torch.cat(tensors) if len(tensors) > 1 else tensors[0]
        for name, tensors in found.items()
    }


def in_order(rows_NC: Tensor) -> Tensor:
    """Rows by their last number."""
    return rows_NC[rows_NC[:, -1].argsort()]


def distance(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||."""
    return ((a - b).norm() / b.norm()).item() if b.any() else a.norm().item()


@pytest.mark.parametrize("case", LAYOUTS + LAYOUTS_IN_FLOAT32)
def test_gradients_equal_one_process(case: Case) -> None:
    expected = one_process(case.reference).gradients
    found = joined(in_layout(case), "gradients")
    assert found.keys() == expected.keys()
    worst = max(found, key=lambda name: distance(found[name], expected[name]))
    assert distance(found[worst], expected[worst]) <= GRADIENTS[case.dtype], worst


@pytest.mark.parametrize("case", LAYOUTS + LAYOUTS_IN_FLOAT32)
def test_tokens_choose_the_same_experts(case: Case) -> None:
    """A near-tie could go either way, above all in float32; the message would tell it by equal weights.

    Tokens are told by their weights, since in a pipeline with two copies they do not come in the order of the ranks.
    """
    expected = one_process(case.reference).choices
    found = joined(in_layout(case), "choices")
    assert found.keys() == expected.keys()
    for block, one in expected.items():
        assert found[block].shape == one.shape
        (experts, weights), (expected_experts, expected_weights) = (
            in_order(both).chunk(2, dim=1) for both in (found[block], one)
        )
        differ = (experts != expected_experts).any(1)
        gap = (weights - expected_weights)[differ].abs()
        assert not differ.any(), f"{block}: {differ.sum()} tokens, whose weights differ by {gap}"


@pytest.mark.parametrize("case", LAYOUTS)
def test_twenty_steps_have_the_same_losses(case: Case) -> None:
    """And the same norms and loads, on every rank."""
    expected = one_process(case.reference).records
    assert len(expected) == STEPS and expected[0].loss - expected[-1].loss > 0.1
    for rank in in_layout(case):
        for one, record in zip(expected, rank.records, strict=True):
            step = one.moment.step
            for key in ("loss", "mtp_loss", "balance_loss", "grad_norm"):
                a, b = getattr(record, key), getattr(one, key)
                assert abs(a - b) <= LOSSES * abs(b), (step, key, a, b)
            assert torch.equal(record.expert_load, one.expert_load), step


@pytest.mark.slow
def test_the_same_layout_twice_is_equal_bit_for_bit() -> None:
    """What a resumed run is measured by: sums over ranks are made in the same order every time."""
    case = Case(dp(4, ep=2), dtype=torch.float32)
    once, again = (run(trains, 4, case, seconds=120) for _ in range(2))
    for one, other in zip(once, again, strict=True):
        for a, b in zip(one.records, other.records, strict=True):
            assert (a.loss, a.mtp_loss, a.grad_norm) == (b.loss, b.mtp_loss, b.grad_norm)
        assert all(torch.equal(weight, other.weights[name]) for name, weight in one.weights.items())


@pytest.mark.parametrize("case", LAYOUTS)
def test_twenty_steps_lead_to_the_same_weights(case: Case) -> None:
    """And the same average of them; the router biases are equal bit for bit."""
    expected, ranks = one_process(case.reference), in_layout(case)
    weights = joined(ranks, "weights")
    assert weights.keys() == expected.weights.keys()
    for name, weight in expected.weights.items():
        assert distance(weights[name], weight) <= 1e-9, name
    for rank in ranks:
        for name, bias in rank.biases.items():
            assert torch.equal(bias, expected.biases[name]), name
    average = joined(ranks, "average")
    assert average.keys() == expected.average.keys()
    for name, tensor in average.items():
        assert distance(tensor, expected.average[name][: len(tensor)]) <= 1e-6, name
