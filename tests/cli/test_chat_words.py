"""The small words of `fathom chat`."""

from __future__ import annotations

import sys
from itertools import pairwise

import pytest

from fathom.cli.chat_words import Answer, changed, settings_of
from fathom.errors import GenerationError
from fathom.inference import Sampling


def test_settings_are_changed_by_name() -> None:
    found = changed(changed(Sampling(), "temperature 0.5"), "top_k=7")
    assert found.temperature == 0.5 and found.top_k == 7
    assert changed(found, "") is found
    assert "temperature 0.5" in settings_of(found) and "top_k 7" in settings_of(found)


@pytest.mark.parametrize(
    "words", ["temperature", "colour 3", "top_k x", "top_k 1.5", "temperature -1"]
)
def test_settings_that_cannot_be(words: str) -> None:
    with pytest.raises(GenerationError):
        changed(Sampling(), words)


@pytest.mark.parametrize("cuts", [[], [1], [3, 9], [12, 15, 16], list(range(40))])
def test_reasoning_is_faint_wherever_tokens_cut_it(
    cuts: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "a <b> <think>why</think> so </thin k"
    bounds = [0, *[cut for cut in cuts if cut < len(text)], len(text)]
    parts = [text[a:b] for a, b in pairwise(bounds)]
    shown(parts)
    assert capsys.readouterr().out == f"{text} [stopped]\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    shown(parts)
    assert capsys.readouterr().out == "a <b> \x1b[2mwhy\x1b[22m so </thin k [stopped]\n"


def shown(parts: list[str]) -> None:
    answer = Answer()
    for part in parts:
        answer.show(part)
    answer.end(" [stopped]")
