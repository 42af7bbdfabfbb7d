"""A recipe run on several processes: the numbers of one process, one who speaks, and ends that all share."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from fathom.errors import FathomError
from fathom.runs import execute, looking
from fathom.runs.recipe import Recipe, load_recipe
from fathom.runs.tables import to_toml
from fathom.train import loop
from tests.parallel.processes import run
from tests.runs.tiny import OF_THE_CLOCK, SECOND_STAGE, STAGE, tiny_dict, weights, write_corpus

CLOSE = 1e-5
"""Relative difference of losses in float32, summed in another order."""


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stages, an average, and an evaluation whose windows do not come out even."""
    folder = tmp_path_factory.mktemp("recipe")
    corpus = write_corpus(folder / "corpus.txt")
    stages = [{**STAGE, "steps": 6}, {**SECOND_STAGE, "steps": 2, "warmup_steps": 0}]
    content = tiny_dict(corpus, stages=stages, ema={"decay": 0.9})
    (folder / "tiny.toml").write_text(to_toml(content))
    return folder / "tiny.toml"


@pytest.fixture(scope="module")
def alone(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    folder = tmp_path_factory.mktemp("runs") / "alone"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(execute, "_report", lambda job: None)
        execute.run(load_recipe(recipe_file), folder)
    return folder


def run_here(recipe: Recipe, folder: Path) -> list[str]:
    """One rank's run without the report; what it said."""
    said: list[str] = []
    execute._report = lambda job: None
    try:
        execute.run(recipe, folder, say=said.append, show=lambda progress: said.append("shown"))
    except KeyboardInterrupt:
        said.append("interrupted")
    return said


def lines(log: Path) -> list[dict[str, Any]]:
    """A log, but for what a clock decides."""
    found = [json.loads(line) for line in log.read_text().splitlines()]
    clock = OF_THE_CLOCK | {"slowest_rank", "slowest_ratio"}
    return [{k: v for k, v in line.items() if k not in clock} for line in found]


def close(found: Any, expected: Any, where: str) -> None:
    """Equal, but for the last bits of what is no whole number."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            close(found[key], value, f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for number, value in enumerate(expected):
            close(found[number], value, f"{where}[{number}]")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=CLOSE), where
    else:
        assert found == expected, where


LAYOUTS = [
    (2, ("parallel.ep=2", "checkpoint.asynchronous=true")),
    (2, ("parallel.pp=2", "parallel.schedule=ZB1P")),
    (2, ("parallel.full_shard=true",)),
]


@pytest.mark.parametrize(("ranks", "changes"), LAYOUTS, ids=["dp2 ep2 zero1", "pp2", "dp2 full"])
def test_it_computes_what_one_process_computes(
    ranks: int, changes: tuple[str, ...], recipe_file: Path, alone: Path, tmp_path: Path
) -> None:
    recipe, folder = load_recipe(recipe_file, changes), tmp_path / "run"
    said = run(run_here, ranks, recipe, folder)
    assert said[0] and not said[1], "the first rank speaks, and only it"
    assert any("samples and needles are left out" in line for line in said[0])
    for log in ("metrics.jsonl", "evals.jsonl", "positions.jsonl", "load.jsonl"):
        found, expected = lines(folder / log), lines(alone / log)
        close(found, expected, log)


# --- stopped and resumed ---------------------------------------------------------------------------


def stopped_at(step: int, recipe: Recipe, folder: Path) -> list[str]:
    """One rank's run, of which the first rank alone gets a Ctrl-C in a step."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    real = loop.train_step

    def interrupted(trainer: Any, plan: Any, reader: Any, at: int) -> Any:
        if at == step and dist.get_rank() == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return real(trainer, plan, reader, at)

    loop.train_step = interrupted
    return run_here(recipe, folder)


def test_ctrl_c_on_one_rank_stops_all_and_the_same_command_goes_on(
    recipe_file: Path, tmp_path: Path
) -> None:
    recipe, whole, folder = load_recipe(recipe_file), tmp_path / "whole", tmp_path / "run"
    run(run_here, 2, recipe, whole)
    first, second = run(stopped_at, 2, 3, recipe, folder)
    assert first[-2:] == ["stopped; the same command goes on from step 3", "interrupted"]
    assert second == ["interrupted"]
    assert [line["step"] for line in lines(folder / "metrics.jsonl")] == [1, 2, 3]
    first, _ = run(run_here, 2, recipe, folder)
    assert any("checkpoint of step 3 found" in line for line in first)
    assert not any("to the last bit" in line for line in first)
    for log in ("metrics.jsonl", "evals.jsonl", "positions.jsonl", "samples.jsonl"):
        assert lines(folder / log) == lines(whole / log), log
    assert weights(folder) == weights(whole) and weights(whole)


def test_stopped_in_a_pipeline_it_goes_on_in_another_layout(
    recipe_file: Path, alone: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    run(stopped_at, 2, 3, load_recipe(recipe_file, ("parallel.pp=2",)), folder)
    first, _ = run(run_here, 2, load_recipe(recipe_file), folder)
    assert any("checkpoint of step 3 found" in line for line in first)
    assert any(
        "laid out otherwise than before (layout: pp2 dp1 ep1 1F1B → pp1 dp2 ep1" in line
        for line in first
    )
    for log in ("metrics.jsonl", "evals.jsonl"):
        close(lines(folder / log), lines(alone / log), log)
    assert load_recipe(folder / "recipe.toml").parallel.pp == 1


def test_another_layout_is_noted(recipe_file: Path, alone: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(alone, folder)
    said, _ = run(run_here, 2, load_recipe(recipe_file), folder)
    assert any(
        "laid out otherwise than before (layout: pp1 dp1 ep1 → pp1 dp2 ep1" in line for line in said
    )
    made = json.loads((folder / "environment.json").read_text())
    assert (made["processes"], made["layout"]) == (2, "pp1 dp2 ep1")


# --- refused ---------------------------------------------------------------------------------------


def refused(recipe: Recipe, folder: Path) -> str:
    try:
        execute.run(recipe, folder)
    except FathomError as error:
        return str(error)
    return ""


def test_what_the_first_rank_refuses_is_refused_on_all(recipe_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file, (f"data.sources=['{tmp_path}/nothing.txt']",))
    first, second = run(refused, 2, recipe, tmp_path / "run")
    assert first == second and "nothing.txt" in first


def test_a_layout_that_cannot_be_touches_nothing(recipe_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file, ("parallel.pp=3",))
    for said in run(refused, 2, recipe, tmp_path / "run"):
        assert "need 3 processes" in said
    assert not (tmp_path / "run").exists()


def test_held_out_text_is_read_as_many_rows_at_a_time_as_training_takes(
    recipe_file: Path, tmp_path: Path
) -> None:
    """A rank of many may not have the memory for a whole batch of the stage."""
    recipe = load_recipe(recipe_file)
    stages = [replace(stage, micro_batch=None) for stage in recipe.stages]
    recipe = replace(recipe, stages=type(recipe.stages)(stages))
    expected = [stage.batch // 2 for stage in recipe.stages]
    for rows in run(rows_of_evaluations, 2, recipe, tmp_path / "run"):
        assert sorted(set(rows)) == sorted(set(expected))


def rows_of_evaluations(recipe: Recipe, folder: Path) -> list[int]:
    real, rows = looking.evaluate, list[int]()

    def noting(*given: Any, **named: Any) -> Any:
        rows.append(given[3])
        return real(*given, **named)

    looking.evaluate = noting
    run_here(recipe, folder)
    return rows


def test_a_slow_rank_shows(recipe_file: Path, tmp_path: Path) -> None:
    run(with_a_slow_rank, 2, load_recipe(recipe_file), tmp_path / "run")
    found = [line for line in logs(tmp_path / "run") if "slowest_rank" in line]
    assert [line["step"] for line in found] == [3, 6, 8]
    assert {line["slowest_rank"] for line in found} == {1}
    assert (
        min(line["slowest_ratio"] for line in found) > 1.05
    )  # a busy machine makes all steps long


def with_a_slow_rank(recipe: Recipe, folder: Path) -> list[str]:
    real = loop.accumulate_gradients

    def slow(*given: Any) -> Any:
        time.sleep(0.5 if dist.get_rank() else 0.0)
        return real(*given)

    loop.accumulate_gradients = slow
    return run_here(recipe, folder)


def logs(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
