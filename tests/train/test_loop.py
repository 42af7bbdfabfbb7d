"""The training loop: what a step is does not depend on how it is cut up, and a broken one leaves no trace."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fathom
from fathom.data.loader import Batch, Loader
from fathom.errors import FathomError
from fathom.train import loop
from fathom.train.loop import StagePlan, StepRecord, Trainer, accumulate_gradients, train_stage
from fathom.train.optimizer import OptimConfig
from fathom.train.schedule import Moment
from tests.live_memory import live
from tests.model.tiny import TINY, tiny_config

BATCH, SEQ_LEN, LAST = 6, 16, 3


def moment(step: int, **changes: Any) -> Moment:
    values: dict[str, Any] = {
        "stage": "test",
        "step": step,
        "tokens": step * BATCH * SEQ_LEN,
        "lr": 1e-2,
        "batch": BATCH,
        "seq_len": SEQ_LEN,
        "gamma": 1e-2,
        "mtp_weight": 0.3,
        "balance_alpha": 1e-2,
        "rope_scaling": None,
    }
    return Moment(**{**values, **changes})


def build(seed: int = 0, **changes: Any) -> fathom.Transformer:
    torch.manual_seed(seed)
    return fathom.Transformer(tiny_config(initializer_range=0.05, **changes))


def tokens(count: int = 2000, vocab: int = TINY["vocab_size"]) -> np.ndarray:
    """A text in which each token follows from the one before, with a little noise."""
    random = np.random.default_rng(0)
    steps = random.choice([1, 1, 1, 5], size=count)
    return (np.cumsum(steps) % vocab).astype(np.uint16)


def plan(micro_batch: int = BATCH, last: int = LAST, **changes: Any) -> StagePlan:
    loader = Loader.of(tokens(), SEQ_LEN, seed=1)
    return StagePlan(
        loader,
        micro_batch,
        lambda step: (step - 1) * BATCH,
        last,
        lambda step: moment(step, **changes),
    )


def trained(model: fathom.Transformer, stage: StagePlan) -> tuple[Trainer, list[StepRecord]]:
    records: list[StepRecord] = []
    trainer = Trainer.start(model, OptimConfig())
    assert train_stage(trainer, stage, [lambda trainer, record: records.append(record)])
    return trainer, records


def biases(model: fathom.Transformer) -> Tensor:
    return torch.stack([model.state_dict()[name] for name in model.state_dict() if "bias" in name])


def whole_batch() -> Batch:
    return Loader.of(tokens(), SEQ_LEN, seed=1).batch(0, BATCH)


# --- accumulation --------------------------------------------------------------------------------


def short_documents(batch: Batch) -> Batch:
    """The batch in documents of 2, 3, ... tokens, other lengths in each row, so that rows differ in targets."""
    places = torch.arange(batch.tokens.shape[1])
    return Batch(batch.tokens, torch.stack([places // (2 + row) for row in range(BATCH)]))


@pytest.mark.parametrize("isolated", [False, True])
@pytest.mark.parametrize("micro_batch", [1, 2, 4])  # 4 leaves an unequal rest of 2
def test_parts_make_the_gradient_of_the_whole(micro_batch: int, isolated: bool) -> None:
    batch = short_documents(whole_batch()) if isolated else whole_batch()
    at_once, in_parts = build(), build()
    now = moment(1, balance_alpha=1.0)
    whole = accumulate_gradients(at_once, batch, BATCH, now)
    parts = accumulate_gradients(in_parts, batch, micro_batch, now)
    for (name, p), q in zip(at_once.named_parameters(), in_parts.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        assert (p.grad - q.grad).norm() <= 2e-6 * p.grad.norm() + 1e-9, name
    assert torch.equal(whole.expert_load, parts.expert_load)
    for key in ("main", "mtp", "balance", "total"):
        torch.testing.assert_close(getattr(whole, key), getattr(parts, key), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_weights_after_a_step_are_the_same_and_router_biases_exactly(micro_batch: int) -> None:
    """Adam's first step has the size lr wherever a gradient is not zero, its sign at least must be
    right; epsilon far above rounding takes its sharp edge."""
    models = []
    for size in (BATCH, micro_batch):
        trainer = Trainer.start(build(), OptimConfig(eps=1e-3))
        train_stage(trainer, plan(size, last=1), [])
        models.append(trainer.model)
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert torch.equal(biases(models[0]), biases(models[1]))
    assert biases(models[0]).abs().max().item() == pytest.approx(1e-2), "one step of gamma"


def test_the_bias_follows_the_load_of_the_whole_batch_only() -> None:
    """One move by gamma for the step, though its six parts were each computed alone."""
    _, (record,) = trained(model := build(), plan(1, last=1))
    load = record.expert_load.float()
    expected = 1e-2 * torch.sign(load.mean(1, keepdim=True) - load)
    assert torch.equal(biases(model), expected)
    per_token = TINY["num_experts_per_tok"]
    assert load[0].sum() == BATCH * SEQ_LEN * per_token
    assert load[-1].sum() == BATCH * (SEQ_LEN - 1) * per_token, "the MTP block, a position less"


def test_recomputation_changes_neither_weights_nor_counts() -> None:
    without, with_it = build(), build()
    with_it.set_recompute(True)
    (a, records_a), (b, records_b) = trained(without, plan(2)), trained(with_it, plan(2))
    for (name, p), q in zip(a.model.named_parameters(), b.model.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert torch.equal(biases(a.model), biases(b.model))
    for one, other in zip(records_a, records_b, strict=True):
        assert torch.equal(one.expert_load, other.expert_load)


# --- a stage -------------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", [False, True])
def test_memory_is_that_of_one_micro_batch(recompute: bool) -> None:
    """What recomputation starts from hangs on the graph, which must not outlive the micro-batch."""
    model = fathom.Transformer(tiny_config(max_position_embeddings=512))
    model.set_recompute(recompute)
    moment = Moment("long", 1, 1, 1e-3, 8, 500, 1e-3, 0.3, 1e-4, None)
    peaks = []
    for rows in (1, 1, 8):  # the first makes the gradients
        batch = Batch(torch.randint(TINY["vocab_size"], (rows, 501)))
        peaks.append(live(lambda b=batch: accumulate_gradients(model, b, 1, moment)).peak)  # type: ignore[misc]
    assert peaks[2] < 1.05 * peaks[1]


def test_loss_goes_down() -> None:
    _, records = trained(build(), plan(last=60, lr=5e-3))
    first, last = records[0], records[-1]
    assert first.loss == pytest.approx(np.log(TINY["vocab_size"]), rel=0.05)
    assert last.loss < 0.5 * first.loss and last.mtp_loss < 0.7 * first.mtp_loss


def test_a_record_tells_the_step() -> None:
    trainer, records = trained(build(), plan())
    assert (trainer.step, trainer.tokens) == (LAST, LAST * BATCH * SEQ_LEN)
    assert [record.moment.step for record in records] == [1, 2, 3]
    assert all(record.grad_norm > 0 and record.seconds > 0 for record in records)
    assert all(record.balance_loss > 0 for record in records)


def test_a_stage_goes_on_where_it_was() -> None:
    """Data and rates are functions of the step: two halves are the whole, bit for bit."""
    whole, _ = trained(build(), plan())
    halves = Trainer.start(build(), OptimConfig())
    train_stage(halves, plan(last=1), [])
    train_stage(halves, plan(), [])
    for p, q in zip(whole.model.parameters(), halves.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_stop_ends_it_after_the_step_and_not_at_its_end() -> None:
    trainer = Trainer.start(build(), OptimConfig())
    stage = plan()
    stage.stop = lambda: trainer.step >= 2
    assert not train_stage(trainer, stage, [])
    assert trainer.step == 2
    assert train_stage(trainer, stage, []), "stopped at the last step is finished"


def test_modules_without_a_weight_are_left_alone() -> None:
    model = build()
    before = {name: p.clone() for name, p in model.named_parameters()}
    trained(model, plan(mtp_weight=0.0, gamma=0.0))
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == name.startswith("model.mtp"), name
    assert biases(model).abs().sum() == 0


# --- what must not be learnt from ----------------------------------------------------------------


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_a_step_that_is_not_finite_stops_before_anything_changes(
    broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer.start(build(), OptimConfig())
    train_stage(trainer, plan(last=1), [])
    before = {name: t.clone() for name, t in trainer.model.state_dict().items()}
    if broken == "loss":
        measured = loop.accumulate_gradients

        def not_finite(*given: Any) -> Any:
            found = measured(*given)
            found.total = torch.tensor(float("nan"))
            return found

        monkeypatch.setattr(loop, "accumulate_gradients", not_finite)
    else:
        monkeypatch.setattr(
            loop, "clip", lambda model, largest, parallel: torch.tensor(float("inf"))
        )
    with pytest.raises(FathomError, match=r"not finite at step 2;.*learning rate"):
        train_stage(trainer, plan(), [])
    assert trainer.step == 1
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
