"""Fill in the middle: nothing lost, the order PSM, the rate, and no dependence on anything but the key."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.data import Tokenizer
from fathom.data.draws import key_of
from fathom.data.fim import RATE, SHORTEST, FimTokens, Parts, cut, fim_ids
from fathom.errors import DataError

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=SHORTEST, max_size=80)
KEY = st.integers(0, 2**64 - 1)


@cache
def bpe() -> Tokenizer:
    return Tokenizer.train(["def f(x):\n    return x + 1\n" * 9, "今天天气很好。" * 9], 320)


@given(TEXT, KEY)
@settings(max_examples=200, deadline=None)
def test_the_parts_joined_are_the_document(text: str, key: int) -> None:
    parts = cut(text, 1.0, key)
    assert parts is not None and "".join(parts) == text and parts.middle
    assert cut(text, 1.0, key) == parts and cut(text, 0.0, key) is None


@given(TEXT, KEY)
@settings(max_examples=200, deadline=None)
def test_ids_are_begin_prefix_hole_suffix_end_middle(text: str, key: int) -> None:
    control = FimTokens.of(bpe())
    begin, *rest = fim_ids(bpe(), text, 1.0, key)
    hole, end = rest.index(control.hole), rest.index(control.end)
    found = Parts(rest[:hole], rest[end + 1 :], rest[hole + 1 : end])
    assert begin == control.begin and sum(map(len, found)) == len(rest) - 2
    assert not {control.begin, control.hole, control.end} & {i for part in found for i in part}
    assert Parts(*map(bpe().decode, found)) == cut(text, 1.0, key)


@given(TEXT, KEY, st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_a_higher_rate_permutes_the_same_documents_and_more(
    text: str, key: int, rate: float
) -> None:
    parts = cut(text, rate, key)
    assert parts is None or parts == cut(text, 1.0, key)
    if parts is None:
        assert fim_ids(bpe(), text, rate, key) == bpe().encode(text)


def test_the_share_is_the_rate_and_places_are_uniform() -> None:
    texts = [f"document {i:08}" for i in range(4000)]
    found = [parts for text in texts if (parts := cut(text, RATE, key_of(text, 0)))]
    assert RATE == 0.1 and abs(len(found) - 400) < 4 * np.sqrt(4000 * 0.1 * 0.9)
    everything = [cut(text, 1.0, key_of(text, 1)) for text in texts]
    pairs = [(len(p.prefix), len(p.prefix) + len(p.middle)) for p in everything if p]
    seen = np.zeros((18, 18), int)
    np.add.at(seen, tuple(np.transpose(pairs)), 1)
    expected = 4000 / (18 * 17 / 2)
    upper = seen[np.triu_indices(18, 1)]
    assert upper.sum() == 4000 and ((upper - expected) ** 2 / expected).sum() < 153 + 5 * 306**0.5


def test_short_documents_stay() -> None:
    short = "x" * (SHORTEST - 1)
    assert all(cut(text, 1.0, key) is None for text in ("", "x", short) for key in range(20))
    assert fim_ids(bpe(), short, 1.0, 0) == bpe().encode(short)


def test_what_cannot_be() -> None:
    with pytest.raises(DataError, match=r"fim_rate=1\.5"):
        cut("a document", 1.5, 0)
    characters = Tokenizer.train(["a document"], None, kind="char")
    with pytest.raises(DataError, match="fim_rate=0"):
        fim_ids(characters, "a document", 1.0, 0)
    assert fim_ids(characters, "a document", 0.0, 0) == characters.encode("a document")
