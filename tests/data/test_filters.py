"""Filters and normalisations: each on a text it is for and one it must leave alone; and those a user adds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fathom.data import prepare
from fathom.data.filters import FILTERS, filter_marks, load_filters, why_dropped
from fathom.data.normalise import (
    DEFAULT_NORMALISATION,
    NORMALISATIONS,
    check_normalisations,
    normalised,
)
from fathom.errors import DataError

PROSE = (
    "The river rises in the hills north of the town and runs for forty miles to the sea.\n"
    "Mills stood along it until the middle of the last century, when the last of them closed.\n"
    "Today its banks are a park, and in spring the meadows below the weir are under water.\n"
)
CODE = """def mean(values):
    if not values:
        return 0.0
    return sum(values) / len(values)


print(mean([1, 2]))
"""
CHINESE = "这条河发源于城北的山中，向东流四十里入海。两岸从前有许多水磨，如今都成了公园，春天草地常被水淹没。"


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("too_short", "a few words"),
        ("too_long=1000", PROSE * 10),
        ("long_lines", "x" * 5000),
        ("mostly_symbols", "=-=-=-=-= 12 34 56 | 78 90 | ---- | 3.14 2.71 ab\n" * 5),
        ("repeated_lines", "buy now, buy here, buy cheap today\n" * 9),
        ("repeated_words", "click here to win a prize " * 30),
        ("repeated_words", "点击这里领取大奖现在就来" * 30),
        ("latin", CHINESE),
        ("han", PROSE),
    ],
)
def test_each_drops_what_it_is_for(name: str, bad: str) -> None:
    found = why_dropped(bad, load_filters([name]))
    assert found is not None and found[0] == name.split("=")[0]


@pytest.mark.parametrize("good", [PROSE, CODE, CHINESE], ids=["prose", "code", "Chinese"])
def test_ordinary_text_passes_all_but_the_other_script(good: str) -> None:
    script = "han" if good[0] > "\u4e00" else "latin"
    names = [name for name in FILTERS if name not in ("latin", "han", "too_short")]
    assert why_dropped(good, load_filters([*names, "too_short=40", script])) is None


@given(st.text())
def test_filters_take_any_text(text: str) -> None:
    for function in FILTERS.values():
        assert function(text) is None or isinstance(function(text), str)


def test_a_filter_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import re\n\ndef adverts(text):\n    return 'an advert' if re.search('buy', text) else None\n"
    )
    for name, text in (("a", PROSE), ("b", "come and buy " + PROSE), ("c", CODE * 3)):
        (tmp_path / f"{name}.txt").write_text(text)
    sources = [str(tmp_path / f"{name}.txt") for name in "abc"]
    mine = f"{tmp_path / 'mine.py'}:adverts"
    with pytest.raises(DataError, match=r"nothing to train on in .*b.txt: 1 dropped by adverts"):
        prepare(tmp_path / "out", sources, "bpe", 300, filters=[mine])
    folder = tmp_path / "all"
    folder.mkdir()
    for source in sources:
        Path(source).rename(folder / Path(source).name)
    data = prepare(tmp_path / "out", [str(folder)], "bpe", 300, filters=["too_short", mine])
    assert data.manifest["filters"] == {"adverts": 1}
    line = json.loads((tmp_path / "out" / "rejects.jsonl").read_text())
    assert (line["place"], line["kind"], line["reason"]) == ("b.txt", "filter adverts", "an advert")


def test_what_is_wrong_with_a_filter_is_said(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "fails.py").write_text("def f(text):\n    return text.missing\n")
    for specification, message in (
        ("nonsense", r"'nonsense' is not known; take of too_short"),
        ("to_short=9", r"filter 'to_short' is not known; did you mean 'too_short'\?, or give FILE"),
        ("too_short=many", r"'many' is not a number"),
        (f"{tmp_path}/none.py:f", r"no filter in .*none.py"),
        (f"{tmp_path}/broken.py:f", r"broken.py cannot be run \(SyntaxError"),
        (f"{tmp_path}/fails.py:g", r"has no function 'g'"),
    ):
        with pytest.raises(DataError, match=message):
            load_filters([specification])
    with pytest.raises(DataError, match=r"filter f failed on a text that begins 'abc'"):
        why_dropped("abc", load_filters([f"{tmp_path}/fails.py:f"]))


def test_a_changed_file_is_another_filter(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("def f(text): return None\n")
    before = filter_marks([f"{path}:f", "too_short"])
    path.write_text("def f(text): return 'no'\n")
    assert filter_marks([f"{path}:f", "too_short"]) != before and len(before) == 1


def test_by_default_nothing_of_source_code_changes() -> None:
    code = 'x = "e\u0301"\t \r\n\n\n\n\x0cclass A:  \n    pass\n'
    assert normalised(code, DEFAULT_NORMALISATION) == code
    assert normalised("\ufeff" + code + "\0", DEFAULT_NORMALISATION) == code


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("nfc", "e\u0301", "\u00e9"),
        ("line_ends", "a\r\nb\rc\n", "a\nb\nc\n"),
        ("trailing_blanks", "a \t\n b\r\n \nc  ", "a\n b\r\n\nc"),
        ("blank_lines", "a\n\n\n\nb\n\nc", "a\n\nb\n\nc"),
    ],
)
def test_each_normalisation(name: str, before: str, after: str) -> None:
    assert normalised(before, [name]) == after


@given(st.text())
def test_normalising_twice_is_normalising_once(text: str) -> None:
    for function in NORMALISATIONS.values():
        if function.__name__ != "mark":  # which takes one mark at a time
            assert function(function(text)) == function(text)


def test_an_unknown_normalisation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'lower' is not known; take of mark, zeros, nfc"):
        prepare(tmp_path / "out", ["stdlib"], "bpe", 300, normalise=["lower"])
    with pytest.raises(DataError, match=r"'line_end' is not known; did you mean 'line_ends'"):
        check_normalisations(["line_end"])
