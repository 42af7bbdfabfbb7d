"""The source "needles": every question can be answered from what stands before it."""

from __future__ import annotations

import re
from collections import Counter
from itertools import islice
from random import Random

import pytest

from fathom.data import Rejects, needles, read_documents
from fathom.errors import DataError

QUESTION = re.compile(r"([ㄱ-ㅎ])(.)")
SYLLABLE = re.compile(r"[가-힣]")
KEY_OF = {needles.syllable(key, value): key for key in needles.KEYS for value in range(21)}


def documents(source: str) -> list[str]:
    """All but the alphabet."""
    return list(needles.documents(source))[1:]


def test_every_question_has_the_one_answer_that_stood_before() -> None:
    asked = 0
    for text in documents("needles:100k"):
        said: dict[str, str] = {}
        for found in re.finditer("[ㄱ-ㅎ]?[가-힣]", text):
            *key, answer = found[0]
            if key:
                assert said[key[0]] == answer
                asked += 1
            else:
                assert KEY_OF[answer] not in said, "said without a question once only"
                said[KEY_OF[answer]] = answer
        assert len(QUESTION.findall(text)) + len(said) == len(SYLLABLE.findall(text))
    assert asked > 5000


def test_values_differ_between_documents() -> None:
    found = Counter(
        ord(one) // 28 % 21
        for text in documents("needles:300k")
        for one in set(SYLLABLE.findall(text))
    )
    assert len(found) == needles.VALUES
    assert max(found.values()) < 3 * min(found.values())


def test_the_alphabet_is_all_there_is() -> None:
    first, *others = needles.documents("needles:100k")
    assert len(first) == len(set(first)) == 19 * 21 + 19 + len(set("".join(needles.WORDS))) + 1
    assert set("".join(others)) <= set(first)


def test_syllables_are_what_unicode_makes_of_their_letters() -> None:
    assert needles.syllable("ㄱ", 8) == "고" and needles.syllable("ㅎ", 0) == "하"
    assert len(KEY_OF) == 19 * 21


def test_a_document_is_words_and_keys() -> None:
    _, text = needles.documents("needles:1")
    assert needles.SHORTEST <= len(text) <= needles.LONGEST + 4
    words = SYLLABLE.sub("", QUESTION.sub("", text)).split()
    assert words and set(words) <= set(needles.WORDS)


def test_answers_stand_near_and_far() -> None:
    octaves: Counter[int] = Counter()
    for text in documents("needles:600k"):
        last: dict[str, int] = {}
        for found in SYLLABLE.finditer(text):
            key, place = KEY_OF[found[0]], found.start()
            if key in last:
                octaves[(place - 1 - last[key]).bit_length()] += 1
            last[key] = place
    assert min(octaves[bits] for bits in range(1, 9)) > 0.01 * octaves.total()  # 1 … 255 back
    assert octaves[10] > 100 and octaves[11] > 30 and octaves[12] > 5  # to 4095


def test_the_name_alone_decides_the_text() -> None:
    def text(name: str) -> str:
        return "".join(needles.documents(name))

    assert text("needles:20k") == text("needles:20k") == text("needles:20000:0")
    assert text("needles:20k") != text("needles:20k:1")
    assert text("needles:40k").startswith(text("needles:20k"))
    assert 20_000 <= sum(map(len, documents("needles:20k"))) < 20_000 + needles.LONGEST + 4


def test_a_key_can_be_left_out() -> None:
    key = needles.KEYS[5]
    for seed in range(20):
        text = "".join(islice(needles.items(Random(seed), without=key), 500))
        assert key not in text
        assert key not in {KEY_OF[one] for one in SYLLABLE.findall(text)}


def test_it_is_a_source_like_any_other() -> None:
    rejects = Rejects()
    found = list(read_documents("needles:10k", rejects))
    assert [document.text for document in found] == list(needles.documents("needles:10k"))
    assert not rejects.total


@pytest.mark.parametrize("name", ["needles:", "needles:many", "needles:10G", "needles:1k:x"])
def test_a_name_that_says_nothing_is_refused(name: str) -> None:
    with pytest.raises(DataError, match="must look like needles:10M"):
        next(iter(read_documents(name, Rejects())))
