"""The table and the pictures of all schedules come out, and say what Table 2 says."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

FILE = Path(__file__).parents[2] / "benchmarks" / "pipeline_schedules.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("pipeline_schedules", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "pipeline_schedules", module)
    spec.loader.exec_module(module)
    return module


def test_table_and_pictures(
    script: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(script, "STAGES", (4,))
    monkeypatch.setattr(script, "COSTS", dict(list(script.COSTS.items())[:2]))
    monkeypatch.setattr(script, "DRAWN_STAGES", 2)
    monkeypatch.setattr(script, "DRAWN_MICROBATCHES", 4)
    script.main(["--pictures", str(tmp_path), "--json", str(tmp_path / "found.json")])
    printed = capsys.readouterr().out
    assert "| 4 | 1F1B | 4 | 69 | 9 | 9 | 13.0 | 4 | 4 | 4 |" in printed
    assert "| 4 | DualPipe | 4 | 54 | 1.5 | 1.5 | 2.8 | 5 | 5 | 5 |" in printed
    assert "| 4 | DualPipeV | 54.5 | " in printed
    found = json.loads((tmp_path / "found.json").read_text())["stages"]
    assert len(found) == 12 and all(row["table_2"] in (None, row["idle_most"]) for row in found)
    assert len(list(tmp_path.glob("schedule-*.png"))) == 6
