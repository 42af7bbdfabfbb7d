"""The report of a run in several stages: what was set, read, skipped, and how far the model sees."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from fathom.runs.report import write_report
from fathom.runs.report.context import position_panels
from fathom.runs.report.data import RunData
from fathom.runs.report.page import headline
from fathom.runs.report.schedules import schedules_as_run, tokens_asked, tokens_by_source
from fathom.runs.report.sections import context, data_seen, schedules, spikes
from tests.runs.staged_run import SPIKES, STAGES, write_staged_run
from tests.runs.test_report import outline, step_line, write_jsonl, write_run

HEADINGS = ["Learning", "Spikes", "Schedules", "Data seen", "Context", "Load of the experts"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_staged_run(tmp_path_factory.mktemp("runs") / "staged")


@pytest.fixture(scope="module")
def text(folder: Path) -> str:
    return write_report(folder).read_text(encoding="utf-8")


@pytest.fixture
def run(folder: Path) -> RunData:
    return RunData.read(folder)


def test_sections_in_their_order_and_nothing_unclosed(folder: Path, text: str) -> None:
    assert re.findall("<h2>([^<]+)</h2>", text)[: len(HEADINGS)] == HEADINGS
    found = outline(folder / "report.html")
    assert found.tags.count("svg") == 10
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert not re.search(r"#0[1-6]0[1-6]0[1-6]\b", text), "a stand-in colour was left in a figure"


def test_older_runs_have_a_report_without_the_new_sections(tmp_path: Path) -> None:
    text = write_report(write_run(tmp_path / "old")).read_text(encoding="utf-8")
    assert re.findall("<h2>([^<]+)</h2>", text)[:3] == [
        "Learning",
        "Schedules",
        "Load of the experts",
    ]
    assert "Spikes" not in text and "Data seen" not in text and "Context" not in text


def test_schedules_are_what_was_logged(run: RunData) -> None:
    found = schedules_as_run(run)
    assert found is not None
    assert [name for _, name in found.axis.stages] == [stage[0] for stage in STAGES]
    at = dict(zip(found.tokens, found.values["tokens_per_step"], strict=True))
    for line in run.metrics:
        assert at[line["tokens"]] == line["batch"] * line["seq_len"]
    for (begin, name), before in zip(found.axis.stages[1:], STAGES, strict=False):
        last = [line for line in run.metrics if line["stage"] == before[0]][-1]
        assert begin == last["tokens"], f"{name} begins where {before[0]} ends"


def test_only_what_changed_is_drawn(text: str, tmp_path: Path) -> None:
    for label in (
        "learning rate",
        "sequences in a step",
        "tokens in a sequence",
        "γ, speed",
        "λ, w",
    ):
        assert label in text
    folder = write_run(tmp_path / "steady", steps=5, batch=4, seq_len=250, gamma=0.01)
    steady = schedules(RunData.read(folder))
    assert "learning rate" in steady and "sequences in a step" not in steady
    assert (
        "Unchanged throughout: batch = 4, seq_len = 250, gamma = 0.01, tokens_per_step = 1000."
        in steady
    )


def test_spikes_are_counted_told_and_escaped(run: RunData, text: str) -> None:
    assert "1 skipped, 1 rolled back, 1 only remarked on" in text
    assert "sequences 1,190 to 1,199: 7 en, 3 code" in text and "not finite" in text
    assert "7.9 (+12.4)" in text and "3.5 (+2.0)" in text
    assert "&lt;loss&gt; 12.4 above 8" in text
    assert "rollback to step 220, 100 sequences passed over" in text
    assert ("steps not learnt from", "2", "skipped or rolled back") in headline(run)


def test_many_spikes_are_folded_and_cut(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "wild")
    write_jsonl(folder / "spikes.jsonl", [SPIKES[0] | {"step": step} for step in range(1, 251)])
    text = spikes(RunData.read(folder))
    assert "the last 200 of 250" in text and "250 skipped" in text
    assert "<td>51</td>" in text and "<td>50</td>" not in text
    assert "<details><summary>Steps" in text


def test_the_mixture_is_in_tokens_and_beside_the_weights(run: RunData, text: str) -> None:
    seen, asked = tokens_by_source(run), tokens_asked(run)
    whole = run.metrics[-1]["tokens"]
    assert sum(seen.values()) == whole == pytest.approx(sum(asked.values()))
    early = sum(
        line["batch"] * 256 for line in run.metrics if line["stage"] in ("constant", "cosine")
    )
    assert asked["en"] == pytest.approx(0.75 * early + 0.5 * (whole - early))
    assert f"<td>{100 * asked['en'] / whole:.2f} %</td>" in text


def test_sources_without_weights_are_by_size(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "sized")
    lines = [step_line(s, seq_len=8, sources={"a": 3, "b": 1}) for s in (1, 2)]
    write_jsonl(folder / "metrics.jsonl", lines)
    text = data_seen(RunData.read(folder))
    assert "<td>a</td><td>48</td><td>75.00 %</td><td>by size</td>" in text


def test_untrained_weights_are_left_out(run: RunData) -> None:
    panels = dict(position_panels(run))
    assert list(panels) == [stage[0] for stage in STAGES]
    assert [line["when"] for line in panels["constant"]] == ["after"]
    assert [line["when"] for line in panels["extend-8k"]] == ["before", "after"]


def test_needle_grids_tell_length_depth_and_share(text: str) -> None:
    for expected in ("after lowest, 48 % found", "after extend-2k, 99 % found", "4K", "depth"):
        assert expected in text


def test_what_is_not_a_number_in_a_grid_is_left_blank(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "half")
    grid = {"lengths": [64, 128], "depths": [0.0, 1.0], "found": [[1.0, 0.5], [float("nan"), 0.0]]}
    (folder / "needle.jsonl").write_text(json.dumps({"step": 30, "when": "after", **grid}) + "\n")
    assert "after, 50 % found" in context(RunData.read(folder))
