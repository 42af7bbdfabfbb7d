"""A recipe run on several processes: the numbers of one process, one who speaks, and ends that all share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fathom.runs import execute
from fathom.runs.recipe import Recipe, load_recipe
from fathom.runs.tables import to_toml
from tests.parallel.processes import run
from tests.runs.tiny import OF_THE_CLOCK, SECOND_STAGE, STAGE, tiny_dict, write_corpus

PLAIN = ("parallel.zero1=false",)
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


def run_here(recipe: Recipe, folder: Path, saves: bool = True) -> list[str]:
    """One rank's run without the report; what it said."""
    said: list[str] = []
    execute._report = lambda job: None
    if not saves:
        execute.save_run = execute.export_run = lambda *given: None  # type: ignore[assignment]
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
    (2, ("parallel.zero1=false",), True),
    (2, ("parallel.pp=2", "parallel.schedule=ZB1P"), False),
]


@pytest.mark.parametrize(("ranks", "changes", "saves"), LAYOUTS, ids=["dp2", "pp2"])
def test_it_computes_what_one_process_computes(
    ranks: int,
    changes: tuple[str, ...],
    saves: bool,
    recipe_file: Path,
    alone: Path,
    tmp_path: Path,
) -> None:
    recipe, folder = load_recipe(recipe_file, changes), tmp_path / "run"
    said = run(run_here, ranks, recipe, folder, saves)
    assert said[0] and not said[1], "the first rank speaks, and only it"
    for log in ("metrics.jsonl", "evals.jsonl", "positions.jsonl", "load.jsonl"):
        found, expected = lines(folder / log), lines(alone / log)
        close(found, expected, log)
