"""`fathom eval needle` on runs that have learnt nothing, and the grid that a run makes itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fathom.cli import eval_needle
from fathom.runs import execute, looking
from tests.cli.calling import call
from tests.runs.tiny import MODEL, MONITOR, STAGE, tiny_recipe, write_corpus

NEEDLES = {"needle_lengths": [40, 64], "needle_depths": 3, "needle_trials": 2}


class Counted:
    """A function, and how often it was called."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.calls = function, 0

    def __call__(self, *given: Any) -> Any:
        self.calls += 1
        return self.function(*given)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two runs: `pairs` of the source "needles", `text` of words, without a report."""
    folder = tmp_path_factory.mktemp("runs")
    stages = [{**STAGE, "steps": 3}, {**STAGE, "name": "more", "steps": 3}]
    monitor = {
        **MONITOR,
        **NEEDLES,
        "needle_format": "pairs",
        "sample_prompt": "the",
        "sample_every": 9,
    }
    pairs = tiny_recipe(
        model={**MODEL, "vocab_size": 448},
        data={"sources": ["needles:50k"], "tokenizer": "char", "held_out": 0.2},
        stages=stages,
        monitor=monitor,
    )
    text = tiny_recipe(write_corpus(folder / "corpus.txt"), stages=stages[:1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(execute, "_report", lambda job: None)
        patch.setattr(looking, "needle_grid", counted := Counted(looking.needle_grid))
        execute.run(pairs, folder / "pairs")
        execute.run(text, folder / "text")
    (folder / "grids").write_text(str(counted.calls))
    return folder


def test_a_run_looks_for_needles_before_and_after_each_stage(runs: Path) -> None:
    lines = [
        json.loads(line) for line in (runs / "pairs" / "needle.jsonl").read_text().splitlines()
    ]
    assert [(line["step"], line["stage"], line["when"]) for line in lines] == [
        (3, "pretrain", "after"),
        (3, "more", "before"),
        (6, "more", "after"),
    ]
    assert lines[0]["found"] == lines[1]["found"], "the same model, the same rotary settings"
    assert (runs / "grids").read_text() == "2", "and therefore not looked for twice"
    assert lines[0]["lengths"] == [40, 64] and lines[0]["depths"] == [0.0, 0.5, 1.0]
    assert lines[0]["trials"] == 2
    assert [len(row) for row in lines[0]["found"]] == [3, 3]
    assert not (runs / "text" / "needle.jsonl").exists(), "off by default"


def test_the_command_finds_what_the_run_found(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = json.loads((runs / "pairs" / "needle.jsonl").read_text().splitlines()[-1])
    asked = ("--format", "pairs", "--lengths", "40,64", "--depths", "3", "--trials", "2", "--json")
    status, out, err = call(capsys, "eval", "needle", runs / "pairs", *asked)
    assert status == 0, err
    said = json.loads(out)
    assert {key: said[key] for key in ("lengths", "depths", "found", "trials")} == {
        key: last[key] for key in ("lengths", "depths", "found", "trials")
    }


def test_a_heat_map_on_the_terminal_and_as_a_picture(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "map.svg"
    status, out, err = call(
        capsys, "eval", "needle", runs / "text", "--depths", "0,0.25", "--lengths", "64",
        "--trials", "1", "--out", picture,
    )  # fmt: skip
    assert status == 2 and "ask for at least" in err, "needle and question alone are longer"
    status, out, err = call(
        capsys, "eval", "needle", runs / "pairs", "--format", "pairs", "--depths", "0,0.25",
        "--trials", "2", "--out", picture,
    )  # fmt: skip
    assert status == 0, err
    assert "25%" in out and "64" in out
    assert out.rstrip().endswith("% of 4 needles")
    assert "<svg" in picture.read_text()


def test_a_picture_that_cannot_be_is_refused_before_anything_is_read(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[object] = []
    monkeypatch.setattr(eval_needle, "open_model", lambda *given, **named: opened.append(given))
    status, _, err = call(capsys, "eval", "needle", runs / "pairs", "--out", "x.foo")
    assert status == 2 and "x.foo could not be drawn (.foo is no format of pictures here)" in err
    assert not opened


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("pairs", "--format", "verse"), "'verse' is not known"),
        (("pairs", "--format", "pass-key"), "does not know the characters"),
        (("text", "--format", "pairs", "--lengths", "999"), "exceeds the model's max_position"),
        (("pairs", "--lengths", "long"), "must be numbers"),
        (("text", "--filler", "nowhere.txt"), "cannot be read as text"),
        (("text/model",), "give one with --filler"),
        (("pairs", "--format", "pairs", "--trials", "1", "--out", "map.doc"), "name a .png"),
        (("pairs", "--format", "pairs", "--out", "nowhere/map.png"), "there is no folder nowhere"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    runs: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    status, _, err = call(capsys, "eval", "needle", runs / arguments[0], *arguments[1:])
    assert status == 2
    assert message in err and err.count("\n") == 1, err
