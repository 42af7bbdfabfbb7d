"""The property benchmark of the engine runs end to end with a few requests, and would tell of a difference."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    spec = importlib.util.spec_from_file_location("engine_property", FOLDER / "engine_property.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "engine_property", module)
    spec.loader.exec_module(module)
    return module


def test_property_script(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script.main(["--requests", "12", "--per-model", "6", "--json", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    counts = [
        sum(shape.get(kind, 0) for shape in found["shapes"].values()) for kind in ("equal", "close")
    ]
    assert sum(counts) == 12 and "| all " in capsys.readouterr().out


def test_property_script_tells_of_differences(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    honest = script.questions

    def falsified(*args: object) -> object:
        return [
            script.Question(
                q.prompt, q.most, script.Expected([(q.expected.tokens[0] + 1) % 101], [1.0])
            )
            for q in honest(*args)
        ]

    monkeypatch.setattr(script, "questions", falsified)
    with pytest.raises(SystemExit, match="answers differ"):
        script.main(["--requests", "3", "--per-model", "3", "--aborts", "0"])
    assert "seed 0 (" in capsys.readouterr().out
