"""When a run looks at the loss by position, and when it does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fathom.errors import RecipeError
from fathom.runs import looking as looks
from fathom.runs.folder import RunFolder
from fathom.runs.looking import LossByPosition
from fathom.runs.pace import Pace
from fathom.runs.sections import MonitorConfig
from fathom.runs.setting import Setting
from fathom.train.loop import Trainer
from fathom.train.optimizer import OptimConfig
from tests.model.tiny import tiny_model
from tests.runs.tiny import SECOND_STAGE, STAGE, tiny_recipe
from tests.train.test_evaluate import data


def looking(
    folder: Path, stage: int = 0, change: dict[str, Any] | None = None, **monitor: Any
) -> tuple[LossByPosition, Trainer]:
    """The callback of a stage of two, the second with a `change`, and a trainer at step 0."""
    stages = [STAGE, {**SECOND_STAGE, **(change or {})}]
    recipe = tiny_recipe(stages=stages, monitor=monitor)
    run = RunFolder(folder)
    run.path.mkdir(exist_ok=True)
    quiet = Setting(
        run, recipe, recipe.stages[stage], data(200), 1.0, lambda p: None, lambda t: None,
        lambda trainer: None, Pace(recipe, 200),
    )  # fmt: skip
    return LossByPosition(quiet), Trainer.start(tiny_model(), OptimConfig())


def lines(folder: Path) -> list[dict[str, Any]]:
    path = folder / "positions.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_before_is_written_once_and_at_the_stage_s_begin_alone(tmp_path: Path) -> None:
    first, trainer = looking(tmp_path)
    first.begin(trainer)
    first.begin(trainer)  # as after a resume right there
    second, _ = looking(tmp_path, stage=1)
    second.begin(trainer)  # at step 0, twelve before its first
    trainer.step = 12
    first.begin(trainer)
    second.begin(trainer)
    found = [(line["step"], line["stage"], line["when"]) for line in lines(tmp_path)]
    assert found == [(0, "pretrain", "before"), (12, "anneal", "before")]


YARN = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    ("change", "times"), [({}, 1), ({"seq_len": 16}, 2), ({"rope_scaling": YARN}, 2)]
)
def test_where_nothing_changes_between_two_stages_nothing_is_looked_at_twice(
    change: dict[str, Any], times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    real = looks.loss_by_position

    def counted(model: Any, data: Any, seq_len: int, limit: int, parallel: Any) -> Any:
        asked.append(seq_len)
        return real(model, data, seq_len, limit, parallel)

    monkeypatch.setattr(looks, "loss_by_position", counted)
    first, trainer = looking(tmp_path, change=change)
    second, _ = looking(tmp_path, stage=1, change=change)
    trainer.step = 12
    first._look(trainer, "after")
    second.begin(trainer)
    assert len(asked) == times
    after, before = lines(tmp_path)
    assert (before["step"], before["stage"], before["when"]) == (12, "anneal", "before")
    assert list(before) == list(after)
    if not change:
        assert before["loss"] == after["loss"] and before["edges"] == after["edges"]


def test_nothing_is_looked_at_when_switched_off(tmp_path: Path) -> None:
    callback, trainer = looking(tmp_path, position_tokens=0)
    callback.begin(trainer)
    assert lines(tmp_path) == []


def test_a_negative_number_is_refused() -> None:
    with pytest.raises(
        RecipeError, match=r"position_tokens = -1 must be at least 0; 0 leaves it out"
    ):
        MonitorConfig(position_tokens=-1)
