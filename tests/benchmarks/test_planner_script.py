"""The planner's memory benchmark end to end: what it measures is what the planner says, also at a tiny shape."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from fathom.runs.tables import to_toml
from tests.runs.tiny import MODEL, STAGE, tiny_dict

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    spec = importlib.util.spec_from_file_location("planner_memory", FOLDER / "planner_memory.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "planner_memory", module)
    spec.loader.exec_module(module)
    return module


def test_a_step_holds_what_the_planner_says(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Wide enough that what every block has once does not count; in this process, one is enough here."""
    recipe = tiny_dict(
        model={**MODEL, "hidden_size": 128, "moe_intermediate_size": 64},
        stages=[{**STAGE, "seq_len": 64, "batch": 8, "micro_batch": 4}],
    )
    (tmp_path / "tiny.toml").write_text(to_toml(recipe))
    monkeypatch.setattr(script, "alone", lambda name, recompute, _: script.compare(name, recompute))
    monkeypatch.setattr(script, "limit_threads", lambda threads: None)
    script.main(["--recipes", str(tmp_path / "tiny.toml"), "--json", str(tmp_path / "found.json")])
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert len(rows) == 12 and "| activations |" in capsys.readouterr().out
    for row in rows:
        bound = 0.001 if row["what"] in ("weights", "gradients", "moments") else 0.15
        assert abs(row["error"]) <= bound, row
