"""The time left: of stages with longer sequences, and with the looks that are still to come."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fathom.planning import flops_per_token, forward_flops_per_token
from fathom.runs import execute, looking
from fathom.runs.pace import CHECKPOINTS, HELD_OUT, Pace
from fathom.runs.recipe import Recipe
from fathom.runs.setting import StepProgress
from fathom.train import loop
from tests.runs.tiny import SECOND_STAGE, STAGE, tiny_recipe, write_corpus

LONG = {**SECOND_STAGE, "name": "long", "seq_len": 64, "batch": 2}
NO_LOOKS = {"eval_every": 99, "sample_every": 99, "position_tokens": 0}
HELD_OUT_TOKENS = 600


def two_lengths(**changes: Any) -> Recipe:
    """12 steps of 4 × 32 tokens, then 4 steps of 2 × 64."""
    changes = {"checkpoint": {"every": 99}, "monitor": NO_LOOKS, **changes}
    return tiny_recipe(stages=[STAGE, LONG], **changes)


class Clock:
    """Stands still until told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def after(self, function: Callable[..., Any], seconds: Callable[..., float]) -> Any:
        """`function`, which takes `seconds` of its arguments."""

        def slow(*given: Any, **named: Any) -> Any:
            self.now += seconds(*given)
            return function(*given, **named)

        return slow


def test_a_stage_of_longer_sequences_takes_longer_by_its_attention() -> None:
    recipe = two_lengths()
    pace = Pace(recipe, HELD_OUT_TOKENS)
    pace.step(recipe.at(step=4), 1.0)
    pace.step(recipe.at(step=5), 3.0)
    short, long = (
        flops_per_token(recipe.model, stage.seq_len, mtp=True) for stage in recipe.stages
    )
    steps = 7 * 2.0 + 4 * 2.0 * long / short  # 128 tokens in each
    reading = sum(
        HELD_OUT_TOKENS * forward_flops_per_token(recipe.model, stage.seq_len) * 2.0 / (128 * short)
        for stage in recipe.stages
    )
    assert long > 1.04 * short
    assert pace.seconds_left(5) == pytest.approx(steps + reading)


def test_a_stage_goes_by_its_own_steps() -> None:
    recipe = two_lengths()
    pace = Pace(recipe, 2)
    for step in range(1, 13):
        pace.step(recipe.at(step=step), 1.0)
    pace.step(recipe.at(step=13), 50.0)
    assert pace.seconds_left(13) == pytest.approx(3 * 50.0, rel=0.02)


def test_looks_go_by_what_the_last_of_their_kind_took(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, clock = (
        two_lengths(monitor={**NO_LOOKS, "eval_every": 4, "eval_tokens": 300}),
        Clock(monkeypatch),
    )
    pace = Pace(recipe, HELD_OUT_TOKENS)
    pace.step(recipe.at(step=4), 1e-9)
    with pace.look(HELD_OUT, pace.evaluation(recipe.stages[0], 300)):
        clock.now += 10.0
    with pace.look(CHECKPOINTS):
        clock.now += 5.0
    longer = forward_flops_per_token(recipe.model, 64) / forward_flops_per_token(recipe.model, 32)
    # 8, all at 12; all at 16; a checkpoint at each stage's end
    expected = 10.0 + 20.0 + 20.0 * longer + 2 * 5.0
    assert pace.seconds_left(5) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_eta_is_what_it_then_takes(
    decay: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine whose time goes exactly by operations, from the first step on, evaluations and all."""
    recipe = tiny_recipe(
        write_corpus(tmp_path / "corpus.txt"), stages=[STAGE, LONG],
        ema={"decay": decay},
        monitor={"eval_every": 5, "eval_tokens": 40, "sample_every": 99, "position_tokens": 128},
    )  # fmt: skip
    clock = Clock(monkeypatch)

    def step_takes(model: Any, batch: Any, micro: int, moment: Any, *more: Any) -> float:
        tokens = moment.batch * moment.seq_len
        return tokens * flops_per_token(recipe.model, moment.seq_len, moment.mtp_weight > 0)

    def evaluation_takes(
        model: Any, data: Any, seq_len: int, rows: int, limit: int | None, mtp: bool
    ) -> float:
        whole = len(data.held_out)
        tokens = whole if limit is None else min(limit, whole)
        return tokens * forward_flops_per_token(recipe.model, seq_len, mtp)

    def positions_take(model: Any, data: Any, seq_len: int, limit: int) -> float:
        tokens = min(limit, len(data.held_out))
        return tokens * forward_flops_per_token(recipe.model, seq_len, False)

    patched = (
        (loop, "accumulate_gradients", step_takes),
        (looking, "evaluate", evaluation_takes),
        (looking, "loss_by_position", positions_take),
    )
    for module, name, takes in patched:
        monkeypatch.setattr(module, name, clock.after(getattr(module, name), takes))
    monkeypatch.setattr(execute, "matmul_rate", lambda *given: 1e9)
    monkeypatch.setattr(execute, "_report", lambda job: None)
    seen: list[tuple[float, float]] = []

    def show(progress: StepProgress) -> None:
        seen.append((clock.now, progress.eta_seconds))

    execute.run(recipe, tmp_path / "run", show=show)
    assert len(seen) == recipe.steps and seen[0][1] > 0
    for shown_at, eta in seen:
        assert eta == pytest.approx(clock.now - shown_at, rel=1e-9)
