"""Random splitting: the same text, the rate, and no dependence on anything but the key."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.data import Tokenizer
from fathom.data.boundary import MergedTokens
from fathom.errors import DataError
from tests.data.foreign import unigram

CODE = "def f(x):\n    return g(x);\n\nEnd.\n\nNext 。\n\n[1,\n2]\n" * 20
TEXT = st.lists(
    st.sampled_from(
        ["x", "):\n", ";\n\n", "End.\n\n", " ", "\n", ".", "\r\n", "。\n\n", "é", " {\n"]
    ),
    max_size=40,
).map("".join)
KEY = st.integers(0, 2**64 - 1)


@cache
def bpe() -> Tokenizer:
    return Tokenizer.train([CODE], 330)


@cache
def merged() -> MergedTokens:
    return MergedTokens.of(bpe())


def encoded(text: str) -> np.ndarray:
    return np.array(bpe().encode(text), np.uint16)


def test_what_is_split_and_into_what() -> None:
    table = {
        bpe().decode([i]): [
            bpe().decode([part])
            for part in merged().parts[merged().start[i] :][: merged().length[i]]
        ]
        for i in merged().ids
    }
    assert (
        table.items() >= {"):\n": ["):", "\n"], ".\n\n": [".", "\n\n"], ",\n": [",", "\n"]}.items()
    )
    assert not any(text.strip("\r\n")[-1].isalnum() or text[0] in "\r\n" for text in table)


@given(TEXT, KEY, st.floats(0, 1))
@settings(max_examples=300, deadline=None)
def test_the_text_and_the_dtype_stay(text: str, key: int, rate: float) -> None:
    ids = encoded(text)
    split = merged().split(ids, rate, key)
    assert bpe().decode(split.tolist()) == text and split.dtype == ids.dtype
    np.testing.assert_array_equal(split, merged().split(ids.copy(), rate, key))


@given(TEXT, KEY)
@settings(max_examples=200, deadline=None)
def test_rate_0_changes_nothing_and_rate_1_leaves_none(text: str, key: int) -> None:
    ids = encoded(text)
    np.testing.assert_array_equal(merged().split(ids, 0.0, key), ids)
    split = merged().split(ids, 1.0, key)
    assert not np.isin(split, merged().ids).any()
    expected = [j for i in ids for j in slow_parts(int(i))]
    np.testing.assert_array_equal(split, expected)


def slow_parts(token: int) -> list[int]:
    """The parts by the definition: tokens of the text without its line ends, and of these."""
    text = bpe().decode([token])
    if token not in merged().ids:
        return [token]
    head = text.rstrip("\r\n")
    return bpe().encode(head) + bpe().encode(text[len(head) :])


def test_the_share_is_the_rate_for_many_and_for_each_alone() -> None:
    ids = np.full(5000, merged().ids[0])
    added = int(merged().length[ids[0]]) - 1
    many = (len(merged().split(ids, 0.1, 11)) - 5000) / added
    each = sum(len(merged().split(ids[:1], 0.1, key)) > 1 for key in range(5000))
    for split in (many, each):
        assert abs(split - 500) < 4 * np.sqrt(5000 * 0.1 * 0.9)


def test_what_cannot_be() -> None:
    with pytest.raises(DataError, match="split_rate=-1"):
        merged().split(encoded("a"), -1, 0)
    nothing = MergedTokens.of(Tokenizer.train(["a.\nb"], None, kind="char"))
    assert len(nothing.ids) == 0
    with pytest.raises(DataError, match="set split_rate=0"):
        nothing.split(np.array([2, 3]), 0.1, 0)
    np.testing.assert_array_equal(nothing.split(np.array([2, 3]), 0.0, 0), [2, 3])


def test_tokens_that_hold_a_words_beginning_are_left_alone() -> None:
    """With such a tokenizer the parts would bring a blank into the text."""
    assert len(MergedTokens.of(unigram([(".\n", -1.0), (".", -2.0), ("\n", -2.0)])).ids) == 0


def test_the_released_tokenizer_loses_no_text(released: Tokenizer) -> None:
    tokens = MergedTokens.of(released)
    assert len(tokens.ids) == 797
    for token in tokens.ids:
        parts = tokens.split(np.array([token]), 1.0, 0)
        assert released.decode(parts.tolist()) == released.decode([int(token)])
