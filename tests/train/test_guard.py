"""The guard: what it calls a spike, that a skipped step leaves no trace, that it decides the same after a kill."""

from __future__ import annotations

import json
import math
import re
import statistics
from typing import Any

import numpy as np
import pytest
import torch

from fathom.errors import FathomError, RecipeError
from fathom.train import loop
from fathom.train.ema import EmaConfig
from fathom.train.guard import Guard, GuardConfig, Tally, Verdict, robust_z
from fathom.train.loop import RollBack, StepRecord, Trainer, train_stage
from fathom.train.optimizer import OptimConfig
from tests.train.test_loop import BATCH, build, moment, plan

WARM = 20


def guard(clip_norm: float = 1.0, **changes: Any) -> Guard:
    return Guard(GuardConfig(**{"window": 32, "warmup": WARM, **changes}), clip_norm)


def ordinary(step: int) -> tuple[float, float]:
    """Loss and gradient norm of a quiet run."""
    random = np.random.default_rng(step)
    return 3.0 + 0.05 * random.standard_normal(), 0.5 * math.exp(0.1 * random.standard_normal())


def judge(watch: Guard, step: int, loss: float, norm: float) -> Verdict:
    return watch.judge(moment(step), loss, loss, norm)


def warmed(watch: Guard, steps: int = WARM) -> Guard:
    for step in range(1, steps + 1):
        assert judge(watch, step, *ordinary(step)).action == "accept"
    return watch


# --- what is a spike -----------------------------------------------------------------------------


def test_z_is_the_distance_in_deviations_and_no_outlier_widens_them() -> None:
    window = np.random.default_rng(0).normal(2.0, 0.3, 4001).tolist()
    assert robust_z(2.0 + 6 * 0.3, window, floor=0.0) == pytest.approx(6.0, rel=0.05)
    spoilt = [*window[:3200], *[50.0] * 800]
    assert robust_z(3.8, spoilt, floor=0.0) > 4
    assert (3.8 - statistics.mean(spoilt)) / statistics.stdev(spoilt) < 0, (
        "as mean and deviation do"
    )
    assert robust_z(2.1, [2.0] * 9, floor=0.05) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("loss", "norm", "clip_norm", "action", "words"),
    [
        (3.0, 0.5, 1.0, "accept", None),
        (1.0, 0.01, 1.0, "accept", None),  # downwards is no harm
        (6.0, 0.5, 1.0, "skip", "loss 6.000 lies .* deviations above"),
        (3.0, 5.0, 1.0, "record", "gradient norm 5 lies .* clipped to 1"),
        (3.0, 5.0, 100.0, "skip", "gradient norm 5 lies"),
        (math.nan, 0.5, 1.0, "skip", "loss nan and gradient norm 0.5 are not finite"),
        (3.0, math.inf, 1.0, "skip", "norm inf are not finite"),
    ],
)
def test_verdicts(
    loss: float, norm: float, clip_norm: float, action: str, words: str | None
) -> None:
    watch = warmed(guard(clip_norm))
    before = list(watch.losses)
    verdict = judge(watch, WARM + 1, loss, norm)
    assert verdict.action == action
    assert re.search(words, verdict.reason or "") if words else verdict.reason is None
    assert verdict.learns == (action in ("accept", "record"))
    assert watch.losses == ([*before, loss] if verdict.learns else before)
    assert watch.tally.spikes == (words is not None)


def test_a_clipped_gradient_can_be_acted_on() -> None:
    assert judge(warmed(guard(clipped_gradients="act")), WARM + 1, 3.0, 5.0).action == "skip"


def test_before_the_warm_up_only_what_is_not_finite_counts() -> None:
    watch = warmed(guard(), WARM - 1)
    assert judge(watch, WARM, 9.0, 90.0) == Verdict("accept", None, None, None)
    assert judge(guard(), 1, math.nan, 1.0).action == "skip"


def test_a_stage_begins_with_an_empty_window_and_a_larger_batch_does_not() -> None:
    watch = warmed(guard())
    watch.judge(moment(WARM + 1, batch=2 * BATCH), 3.0, 3.0, 0.5)
    assert len(watch.losses) == WARM + 1
    for changes in ({"stage": "next"}, {"stage": "next", "seq_len": 99}):
        assert watch.judge(moment(WARM + 2, **changes), 9.0, 9.0, 5.0).action == "accept"
        assert watch.losses == [9.0]


@pytest.mark.parametrize("seed", range(4))
def test_a_falling_curve_with_noisy_gradients_is_no_spike(seed: int) -> None:
    """From ln V down as runs do, learning-rate warm-up included, losses of small batches."""
    random, watch = np.random.default_rng(seed), guard(window=128, warmup=64)
    for step in range(1, 800):
        loss = 2.0 + 7.0 * math.exp(-step / 60) + 0.15 * random.standard_normal()
        norm = (0.4 + 3.0 * math.exp(-step / 30)) * math.exp(0.25 * random.standard_normal())
        assert judge(watch, step, loss, norm).action == "accept", step


# --- a skipped step ------------------------------------------------------------------------------


def everything(trainer: Trainer) -> dict[str, torch.Tensor]:
    """All that a step may change, copied."""
    assert trainer.ema
    tensors = dict(trainer.model.state_dict())
    tensors |= {s.name: s.tensor for s in trainer.parallel.optimizer_shards(trainer.optimizer)}
    tensors |= {f"ema.{name}": t for name, t in trainer.ema.tensors().items()}
    tensors |= {f"load.{i}": r.expert_load for i, r in enumerate(trainer.model.routers())}
    return {name: tensor.clone() for name, tensor in tensors.items()}


def spoil(monkeypatch: pytest.MonkeyPatch, steps: set[int], kind: str = "gradient") -> None:
    """Plant a NaN into one gradient of these steps, or a huge loss."""
    real = loop.accumulate_gradients

    def spoilt(model: Any, batch: Any, micro_batch: int, at: Any, *more: Any) -> Any:
        found = real(model, batch, micro_batch, at, *more)
        if at.step in steps and kind == "gradient":
            next(model.parameters()).grad[0, 0] = math.nan
        if at.step in steps and kind == "loss":
            found.main = found.main + 50
        return found

    monkeypatch.setattr(loop, "accumulate_gradients", spoilt)


def start(**changes: Any) -> Trainer:
    config = GuardConfig(**{"window": 8, "warmup": 4, **changes})
    return Trainer.start(build(), OptimConfig(), config, EmaConfig(decay=0.9))


@pytest.mark.parametrize("kind", ["gradient", "loss"])
def test_a_skipped_step_touches_no_tensor_and_goes_on(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, {6}, kind)
    trainer, records = start(), list[StepRecord]()
    train_stage(trainer, plan(last=5), [])
    before, seen = everything(trainer), trainer.optimizer.param_groups[0]["lr"]
    train_stage(trainer, plan(last=6), [lambda t, record: records.append(record)])
    after = everything(trainer)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(p.grad is None for p in trainer.model.parameters())
    assert (trainer.step, trainer.tokens) == (6, moment(6).tokens), "data and schedule go on"
    assert records[0].skipped and records[0].first_sequence == 5 * BATCH
    assert trainer.optimizer.param_groups[0]["lr"] == seen
    train_stage(trainer, plan(last=7), [lambda t, record: records.append(record)])
    assert records[1].skipped is None and records[1].first_sequence == 6 * BATCH
    load = records[1].expert_load.float()
    router = next(iter(trainer.model.routers()))
    assert router.e_score_correction_bias is not None
    moved = (
        router.e_score_correction_bias - before["model.layers.1.mlp.gate.e_score_correction_bias"]
    )
    expected = 1e-2 * torch.sign(load[0].mean() - load[0])
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-8)


def test_too_many_in_a_row_end_the_run_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, {3, 4, 6, 7, 8})
    trainer = start(max_skipped=2)
    with pytest.raises(FathomError, match=r"step 8 would be number 3 .*not finite.*learning rate"):
        train_stage(trainer, plan(last=9), [])
    assert trainer.step == 7


@pytest.mark.parametrize("action", ["off", "record"])
def test_without_skipping_what_is_not_finite_ends_the_run(
    action: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, {2})
    with pytest.raises(FathomError, match="not finite at step 2; the last checkpoint is unharmed"):
        train_stage(start(action=action), plan(), [])


def test_recording_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, {6}, "loss")
    weights = []
    for action in ("off", "record"):
        trainer, records = start(action=action), list[StepRecord]()
        train_stage(trainer, plan(last=7), [lambda t, r, seen=records: seen.append(r)])
        weights.append(trainer.model.state_dict())
        assert [r.verdict.action for r in records][5] == (
            "record" if action == "record" else "accept"
        )
    assert all(torch.equal(t, weights[1][name]) for name, t in weights[0].items())


# --- rolling back and resuming ---------------------------------------------------------------------


def test_a_roll_back_leaves_before_the_step_and_knows_what_was_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spoil(monkeypatch, {6})
    trainer = start(action="rollback")
    with pytest.raises(RollBack, match="not finite") as left:
        train_stage(trainer, plan(last=9), [])
    assert trainer.step == 5 and all(p.grad is None for p in trainer.model.parameters())
    assert left.value.sequences_since(4) == 2 * BATCH, "steps 5 and 6"
    assert left.value.sequences_since(0) == 6 * BATCH


def test_roll_backs_to_one_checkpoint_come_to_an_end() -> None:
    watch = guard(action="rollback", max_rollbacks=2)
    watch.rolled_back(Tally(spikes=1), 100)
    watch.rolled_back(watch.tally, 100)
    with pytest.raises(FathomError, match=r"2 roll-backs to step 100 .*step-100"):
        watch.rolled_back(watch.tally, 100)
    watch.rolled_back(watch.tally, 200)
    assert watch.tally == Tally(spikes=1, rolled_back_to=200, rollbacks=1)


@pytest.mark.parametrize("stop", [7, WARM, WARM + 3, 40])
def test_a_guard_that_was_put_away_decides_the_same(stop: int) -> None:
    def numbers(step: int) -> tuple[float, float]:
        loss, norm = ordinary(step)
        return loss + 2 * (step % 13 == 0), norm * (9 if step % 17 == 0 else 1)

    whole, first = guard(), guard()
    expected = [judge(whole, step, *numbers(step)) for step in range(1, 60)]
    found = [judge(first, step, *numbers(step)) for step in range(1, stop)]
    again = guard()
    again.restore(json.loads(json.dumps(first.state())))
    found += [judge(again, step, *numbers(step)) for step in range(stop, 60)]
    assert found == expected and again.state() == whole.state()
    assert {v.action for v in expected} == {"accept", "skip", "record"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"action": "pray"}, r"guard\.action = 'pray' must be one of skip, rollback"),
        ({"clipped_gradients": "x"}, r"guard\.clipped_gradients = 'x' must be one of"),
        ({"threshold_z": 0.0}, r"guard\.threshold_z = 0.0 must be positive"),
        ({"window": 10, "warmup": 11}, r"guard\.warmup = 11 exceeds window = 10"),
        ({"max_skipped": 0}, r"guard\.max_skipped = 0 must be at least 1"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        GuardConfig(**settings)
