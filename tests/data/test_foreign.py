"""Tokenizers of other kinds than ours: all load; ids come from the text alone; control tokens do not come from text."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from unicodedata import normalize

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers

from fathom.data import Tokenizer
from fathom.data.definition import control_tokens
from fathom.errors import DataError
from tests.data import foreign

KINDS = [
    foreign.byte_bpe,
    foreign.sentence_bpe,
    foreign.whole_word_bpe,
    foreign.unigram,
    foreign.word_piece,
    foreign.with_dropout,
]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@cache
def made(kind: Callable[[], Tokenizer]) -> Tokenizer:
    return kind()


@pytest.mark.parametrize("kind", KINDS)
def test_they_load_save_and_stream(kind: Callable[[], Tokenizer], tmp_path: Path) -> None:
    tokenizer = made(kind)
    tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    text = "The cache holds the numbers\n name"
    ids = loaded.encode(text)
    assert ids == tokenizer.encode(text) and loaded.settings == tokenizer.settings
    assert len(ids) > 4, "neither cut off nor padded, nothing added in front"
    stream = loaded.stream()
    assert "".join(map(stream.push, ids)) + stream.flush() == loaded.decode(ids)
    assert list(loaded.stretches(text * 9, 10)) == [text * 9]


@pytest.mark.parametrize("kind", KINDS)
def test_text_never_becomes_a_control_token(kind: Callable[[], Tokenizer]) -> None:
    tokenizer = made(kind)
    controls = control_tokens(tokenizer._definition)
    unknown = {i for spelling, i in controls.items() if spelling.lower() in ("<unk>", "[unk]")}
    assert controls
    for spelling in controls:
        for text in (spelling, f"a{spelling}b", f"the {spelling} the", spelling * 2):
            assert not (set(controls.values()) - unknown) & set(tokenizer.encode(text))
            assert controls[spelling] in tokenizer.encode(text, allow_special=True)


def test_the_cut_inside_a_spelling_changes_no_other_text() -> None:
    tokenizer = made(foreign.unigram)
    assert tokenizer.encode("the") == [tokenizer._backend.token_to_id("▁the")]
    assert tokenizer.decode(tokenizer.encode("a/s>the")) == "a<unk>s<unk>the"


@pytest.mark.parametrize("kind", [foreign.byte_bpe, foreign.with_dropout, foreign.sentence_bpe])
@given(text=TEXT)
@settings(max_examples=100, deadline=None)
def test_identity_where_bytes_are_the_last_resort(kind: Callable[[], Tokenizer], text: str) -> None:
    tokenizer = made(kind)
    if kind is foreign.sentence_bpe:  # ▁ is what it writes for a blank
        text = text.replace("▁", "")
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(TEXT)
@settings(max_examples=100, deadline=None)
def test_a_normalizer_in_the_file_is_obeyed(text: str) -> None:
    tokenizer = made(_nfc)
    assert tokenizer.decode(tokenizer.encode(text)) == normalize("NFC", text)


def _nfc() -> Tokenizer:
    return foreign.byte_bpe(normalizers.NFC())


def test_dropout_is_off() -> None:
    text = "def greet(name)"
    assert {tuple(made(foreign.with_dropout).encode(text)) for _ in range(20)} == {
        tuple(made(foreign.byte_bpe).encode(text))
    }


def test_begin_and_end_are_those_of_the_settings() -> None:
    tokenizer = made(foreign.sentence_bpe)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert made(foreign.word_piece).sentence_ids() == {"bos_token_id": 2, "eos_token_id": 3}
    with pytest.raises(DataError, match="no bos_token"):
        _ = made(foreign.byte_bpe).bos_id


def test_pieces_of_other_kinds_are_what_their_files_say() -> None:
    tokenizer = foreign.splitting("[aeiou]")
    assert [piece for piece, _ in tokenizer.pieces("greet me")] == ["gr", "e", "e", "t m", "e"]
    ids = [i for _, part in made(foreign.word_piece).pieces("The cache") for i in part]
    assert ids == made(foreign.word_piece).encode("The cache")


def test_a_vocabulary_that_cannot_be_kept_from_control_tokens_is_refused() -> None:
    """Its only control token is one character long: there is nothing to cut."""
    content = json.loads(foreign.unigram([("☃", -1.0), (".", -4.0)])._definition)
    place = [piece for piece, _ in content["model"]["vocab"]].index("☃")
    content["added_tokens"].append(content["added_tokens"][0] | {"id": place, "content": "☃"})
    with pytest.raises(DataError, match="spells '☃'"):
        Tokenizer(json.dumps(content), {})
