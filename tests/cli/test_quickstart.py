"""`fathom quickstart` with the training itself replaced by a run folder made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fathom.cli.quickstart import FOLDER
from tests.cli.calling import call


def test_it_trains_nano_and_says_what_to_type_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def instead(recipe: Any, out: Path, *rest: Any) -> Path:
        asked.append((recipe.name, out))
        out.mkdir(parents=True)
        metric = {"step": 9, "tokens": 5000, "loss": 2.5, "seconds": 1.0}
        (out / "metrics.jsonl").write_text(json.dumps(metric))
        sample = {"step": 9, "prompt": "def ", "text": "f(x):\n    return x"}
        (out / "samples.jsonl").write_text(json.dumps(sample))
        (out / "report.html").write_text("")
        return out

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fathom.runs.execute.run", instead)
    status, said, _ = call(capsys, "quickstart")
    assert status == 0 and asked == [("nano", FOLDER)]
    assert "    def f(x):\n        return x\n" in said
    assert "training loss" in said and "2.500" in said
    assert f"fathom generate {FOLDER}" in said and f"fathom chat {FOLDER}" in said
    assert (tmp_path / FOLDER / "report.html").as_uri() in said


def test_ctrl_c_is_130(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*rest: Any) -> Path:
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fathom.runs.execute.run", stopped)
    status, said, _ = call(capsys, "quickstart")
    assert status == 130 and "Next:" not in said
