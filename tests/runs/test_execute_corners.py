"""Runs at the edge of what can be: hardly any text, and settings that only a later moment would find impossible."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import fathom
from fathom.errors import FathomError
from fathom.runs import execute
from fathom.runs.recipe import load_recipe
from fathom.runs.tables import to_toml
from tests.runs.tiny import MODEL, SECOND_STAGE, STAGE, logged, tiny_dict, tiny_recipe, write_corpus


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the report, which takes longer than the run."""
    monkeypatch.setattr(execute, "_report", lambda job: None)


def test_a_corpus_of_a_few_words(tmp_path: Path) -> None:
    """Held-out text of a handful of tokens, a prompt longer than a sequence, no MTP, a tied head."""
    corpus = write_corpus(tmp_path / "few.txt", lines=8)
    content = tiny_dict(corpus)
    content["stages"][0] |= {"steps": 2, "warmup_steps": 0, "seq_len": 8}
    content["model"] |= {"num_nextn_predict_layers": 0, "tie_word_embeddings": True}
    content["model"] |= {"max_position_embeddings": 8}
    content["monitor"] |= {"sample_prompt": "def " * 20, "sample_every": 1}
    (tmp_path / "few.toml").write_text(to_toml(content))
    run = execute.run(load_recipe(tmp_path / "few.toml"), tmp_path / "run")
    found = logged(run)
    assert len(found["metrics.jsonl"]) == 2 and found["evals.jsonl"][-1]["held_out_tokens"] >= 1
    assert len(found["samples.jsonl"]) == 2
    assert fathom.load(run / "model").config.tie_word_embeddings


def test_a_prompt_that_the_tokenizer_cannot_read_is_told_at_once(tmp_path: Path) -> None:
    """Not after the first two hundred steps."""
    content = tiny_dict(write_corpus(tmp_path / "text.txt"))
    content["data"] |= {"tokenizer": "char"}
    content["monitor"] |= {"sample_prompt": "Ω"}
    (tmp_path / "char.toml").write_text(to_toml(content))
    with pytest.raises(FathomError, match="Ω"):
        execute.run(load_recipe(tmp_path / "char.toml"), tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"stages": {"weights": {"fr": 1.0}}}, "stage anneal weighs a source 'fr'"),
        ({"stages": {"seq_len": 8192}}, "one sequence needs 8193"),
        ({"monitor": {"needle_lengths": [20]}}, "a length of 20 has no room"),
        ({"monitor": {"needle_lengths": [2**15]}}, "exceeds the model's max_position_embeddings"),
    ],
)
def test_what_a_later_stage_cannot_do_is_refused_at_once(
    changes: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    stages = [STAGE, {**SECOND_STAGE, **changes.get("stages", {})}]
    recipe = tiny_recipe(
        write_corpus(tmp_path / "corpus.txt"),
        model={**MODEL, "max_position_embeddings": 2**14},
        stages=stages,
        monitor=changes.get("monitor", {}),
    )
    with pytest.raises(FathomError, match=problem):
        execute.run(recipe, tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
