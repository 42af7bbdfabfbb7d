"""Reasoning, content and calls, however the tokens cut the text."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.data import Tokenizer
from fathom.inference.stopping import Spoken
from fathom.serving.reader import Reader
from tests.serving.live import tokenizer
from tests.serving.talks import CALLS, TWO

BEGIN = CALLS[: CALLS.index("look_up")]


def read(
    reader: Reader,
    ids: Sequence[int],
    words: Tokenizer,
    stops: Sequence[str] = (),
    at_once: int = 1,
) -> tuple[str, str, list[tuple[str, str]]]:
    """Reasoning, content and calls of an answer that comes in steps of `at_once` tokens, as the engine gives it."""
    spoken = Spoken(words.stream(), stops)
    said = {"reasoning": "", "content": ""}
    calls: list[list[str]] = []
    for start in range(0, len(ids), at_once):
        step = ids[start : start + at_once]
        text = "".join(spoken.push(token) for token in step)
        last = start + at_once >= len(ids)
        pieces = reader.push(step, text + (spoken.end() if last else ""))
        for piece in pieces + (reader.end() if last else []):
            if piece.kind == "call":
                calls.append([piece.text, ""])
            elif piece.kind == "arguments":
                calls[-1][1] += piece.text
            else:
                said[piece.kind] += piece.text
    return said["reasoning"], said["content"], [(name, text) for name, text in calls]


@pytest.mark.parametrize("think", [False, True], ids=["tags are text", "tags are tokens"])
@pytest.mark.parametrize("at_once", [1, 2, 5, 1000])
def test_reasoning_ends_at_its_tag(think: bool, at_once: int) -> None:
    words = tokenizer(think=think)
    for text, thinking, expected in [
        (
            "I wonder < 3.\n</think>\n\nFour </think> it is",
            True,
            ("I wonder < 3.\n", "Four </think> it is"),
        ),
        ("<think>why</think>so", False, ("why", "so")),
        (" \n<think>why</think>so", False, ("why", "so")),
        ("never </thin", True, ("never </thin", "")),
        ("<think>never", False, ("never", "")),
        ("no <think>tags</think> first", False, ("", "no <think>tags</think> first")),
        ("<thinking", False, ("", "<thinking")),
        ("  plain", False, ("", "  plain")),
        ("", True, ("", "")),
    ]:
        ids = words.encode(text, allow_special=True)
        found = read(Reader(words, thinking), ids, words, at_once=at_once)
        assert found == (*expected, [])


def test_content_is_not_held_back() -> None:
    words = tokenizer()
    reader = Reader(words)
    for token in words.encode("Hello, sea!"):
        (piece,) = reader.push([token], words.decode([token]))
        assert piece.kind == "content" and piece.text == words.decode([token])


def test_reasoning_tokens_are_counted() -> None:
    words = tokenizer()
    before, after = words.encode("I think</think>"), words.encode("so it is")
    reader = Reader(words, thinking=True)
    read(reader, before + after, words, at_once=3)
    assert reader.reasoning_tokens == len(before)
    reader = Reader(words, thinking=True)
    read(reader, before[:-2], words)
    assert reader.reasoning_tokens == len(before) - 2
    reader = Reader(words)
    read(reader, after, words)
    assert reader.reasoning_tokens == 0


@pytest.mark.parametrize("at_once", [1, 2, 3, 7, 1000])
def test_calls_are_read(at_once: int) -> None:
    words = tokenizer()
    ids = [*words.encode("Let me look. " + CALLS, allow_special=True), words.eos_id]
    ids = ids[:-1]  # the end is a token but no text, as in the engine
    found = read(Reader(words, tools=True), ids, words, at_once=at_once)
    assert found == ("", "Let me look. ", TWO)
    assert all(json.loads(arguments) for _, arguments in found[2])


def test_calls_end_reasoning() -> None:
    words = tokenizer()
    ids = words.encode("I need it" + CALLS, allow_special=True)
    reader = Reader(words, thinking=True, tools=True)
    assert read(reader, ids, words) == ("I need it", "", TWO)
    assert reader.reasoning_tokens == len(words.encode("I need it")) + 1


def test_text_that_spells_a_call_is_text() -> None:
    """Somebody asks for the marks, the model says them letter by letter: nothing is called."""
    words = tokenizer()
    spelled = words.encode(CALLS)
    assert words.decode(spelled) == CALLS
    assert read(Reader(words, tools=True), spelled, words) == ("", CALLS, [])
    both = spelled + words.encode(CALLS, allow_special=True)
    assert read(Reader(words, tools=True), both, words, at_once=4) == ("", CALLS, TWO)


def test_without_tools_the_marks_are_text() -> None:
    words = tokenizer()
    ids = words.encode("a" + CALLS, allow_special=True)
    assert read(Reader(words), ids, words) == ("", "a" + CALLS, [])


def test_a_call_that_was_begun_in_the_prompt() -> None:
    words = tokenizer()
    rest = words.encode(
        '{"word": "sea"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>', allow_special=True
    )
    assert read(Reader(words, tools=True, begun="look_up"), rest, words)[2] == TWO[:1]
    named = words.encode("look_up\n```json\n") + rest
    assert read(Reader(words, tools=True, begun=""), named, words)[2] == TWO[:1]


@pytest.mark.parametrize(
    ("answer", "calls"),
    [
        (BEGIN + "add\n```json\n{\"a\": 1", [("add", '{"a": 1')]),
        (BEGIN + "add\n{\"a\": 1}<｜tool▁call▁end｜>", [("add", '\n{"a": 1}')]),
        (BEGIN + "add<｜tool▁call▁end｜>", [("add", "")]),
        ("<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>func", []),
        ("<｜tool▁sep｜><｜tool▁call▁end｜>", []),
    ],
)  # fmt: skip
def test_broken_calls_break_nothing(answer: str, calls: list[tuple[str, str]]) -> None:
    words = tokenizer()
    ids = words.encode(answer, allow_special=True)
    for at_once in (1, 1000):
        assert read(Reader(words, tools=True), ids, words, at_once=at_once)[2] == calls


PARTS = st.sampled_from(
    [*CALLS.split("\n"), "<think>", "</think>", "é", "🌊", "```", "\n", " a", "<", CALLS]
)


@given(st.lists(PARTS, max_size=12), st.integers(1, 9), st.booleans(), st.booleans(), st.booleans())
@settings(max_examples=150, deadline=None)
def test_steps_do_not_matter(
    parts: list[str], at_once: int, thinking: bool, special: bool, stop: bool
) -> None:
    """In one step or in many, held back for a stop text or not, an answer is read as the same."""
    words = tokenizer()
    ids = words.encode("".join(parts), allow_special=special)
    stops = ("<no｜",) if stop else ()
    whole = read(Reader(words, thinking, tools=True), ids, words, at_once=10_000)
    assert read(Reader(words, thinking, tools=True), ids, words, stops, at_once) == whole
