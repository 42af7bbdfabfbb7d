"""The source "needles": every question can be answered from what stands before it."""

from __future__ import annotations

import re
from collections import Counter
from itertools import islice
from random import Random

import pytest

from fathom.data import Rejects, needles, read_documents
from fathom.errors import DataError

ITEM = re.compile(r"([=?])(.)(.) ")


def test_every_question_asks_what_was_stated_once_with_one_value() -> None:
    asked = 0
    for text in needles.documents("needles:60k"):
        values: dict[str, str] = {}
        for kind, key, value in ITEM.findall(text):
            if kind == needles.STATE:
                assert key not in values, "stated twice"
                values[key] = value
            else:
                asked += 1
                assert values[key] == value
    assert asked > 5000


def test_a_document_is_words_and_items_of_a_small_alphabet() -> None:
    (text,) = needles.documents("needles:1")
    assert needles.SHORTEST <= len(text) <= needles.LONGEST + 6
    rest = ITEM.sub("", text)
    assert set(ITEM.sub("", text)) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz ")
    assert {word[-2:] for word in rest.split()} <= {word[-2:] for word in needles.WORDS}
    assert any(value in rest for value in needles.VALUES), "values stand in filler too"


def test_questions_reach_back_near_and_far() -> None:
    octaves: Counter[int] = Counter()
    for text in needles.documents("needles:400k"):
        last: dict[str, int] = {}
        for found in ITEM.finditer(text):
            place, key = found.start(), found[2]
            if found[1] == needles.ASK:
                octaves[(place - last[key]).bit_length()] += 1
            last[key] = place
    shares = [octaves[bits] / octaves.total() for bits in range(3, 12)]  # 4 … 2047 characters back
    assert min(shares) > 0.02
    assert max(shares) < 0.25
    assert octaves[12] > 0.005 * octaves.total()


def test_the_name_alone_decides_the_text() -> None:
    def text(name: str) -> str:
        return "".join(needles.documents(name))

    assert text("needles:20k") == text("needles:20k") == text("needles:20000:0")
    assert text("needles:20k") != text("needles:20k:1")
    assert text("needles:40k").startswith(text("needles:20k"))
    assert 20_000 <= len(text("needles:20k")) < 20_000 + needles.LONGEST + 6


def test_a_key_can_be_left_out() -> None:
    key = needles.KEYS[5]
    for seed in range(20):
        items = list(islice(needles.items(Random(seed), without=key), 500))
        assert key not in "".join(items)


def test_it_is_a_source_like_any_other() -> None:
    rejects = Rejects()
    found = list(read_documents("needles:10k", rejects))
    assert [document.text for document in found] == list(needles.documents("needles:10k"))
    assert not rejects.total


@pytest.mark.parametrize("name", ["needles:", "needles:many", "needles:10G", "needles:1k:x"])
def test_a_name_that_says_nothing_is_refused(name: str) -> None:
    with pytest.raises(DataError, match="must look like needles:10M"):
        next(iter(read_documents(name, Rejects())))
