"""The benchmark of de-duplication runs end to end at toy size and finds what it planted."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


def test_quality_script(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    spec = importlib.util.spec_from_file_location("data_quality", FOLDER / "data_quality.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "data_quality", module)
    spec.loader.exec_module(module)
    draw = random.Random(0)
    alphabets = {
        "en_a": "etaoinshrdlu",
        "code_b": "abcxyz_()=+",
        "zh_c": "山水天地人心春秋风花雪月",
    }
    for name, letters in alphabets.items():
        words = ["".join(draw.choices(letters, k=draw.randint(2, 7))) for _ in range(400)]
        texts = [" ".join(draw.choices(words, k=90)) for _ in range(20)]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    module.main([str(tmp_path), "--documents", "12"])
    out = capsys.readouterr().out
    assert "| exact                | 2 of 2 (100.0%) | 2 of 2 (100.0%) | 2 of 2 (100.0%) |" in out
    assert "| half                 | 0 of 2 (0.0%)" in out
    assert (
        "planted copies (100.00%)" in out and "4 of 4 told with place and reason, 0 others" in out
    )
    assert "= 76 of 76 lines" in out
