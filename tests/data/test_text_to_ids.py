"""Prepared text with filling in the middle and split tokens: nothing is lost, and held-out text stays as it is."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from fathom.data import TokenData, prepare
from fathom.data.boundary import MergedTokens
from fathom.data.vocabulary import FIM_BEGIN, FIM_END, FIM_HOLE
from fathom.errors import DataError


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(300):
        lines = "".join(f"line {j} of number {i} ends here.\n\n" for j in range(1 + i % 7))
        (folder / f"{i:03}.txt").write_text(f"text {i} (a new one):\n{lines}")
    return folder


@pytest.fixture(scope="module")
def changed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> TokenData:
    rates = {"fim_rate": 0.4, "split_rate": 1.0}
    place = tmp_path_factory.mktemp("out") / "data"
    return prepare(place, [str(corpus)], "bpe", 400, held_out=0.2, seed=1, **rates)


def documents(data: TokenData, side: str) -> list[np.ndarray]:
    """Ids of each document, without the end of sentence."""
    tokens = data.tokens(side)
    starts = tokens.documents
    return [tokens.read(a, b - 1) for a, b in pairwise(starts)]


def original(data: TokenData, ids: np.ndarray) -> str:
    """The text of a document, put back in order where it was filled in the middle."""
    decode, control = data.tokenizer.decode, data.tokenizer.control_id
    if ids[0] != control(FIM_BEGIN):
        return decode(ids.tolist())
    hole, end = (int(np.flatnonzero(ids == control(t))[0]) for t in (FIM_HOLE, FIM_END))
    prefix, suffix, middle = ids[1:hole], ids[hole + 1 : end], ids[end + 1 :]
    return decode(prefix.tolist()) + decode(middle.tolist()) + decode(suffix.tolist())


def test_every_document_is_there_whatever_was_done_to_it(corpus: Path, changed: TokenData) -> None:
    found = [
        original(changed, ids) for side in ("train", "held_out") for ids in documents(changed, side)
    ]
    assert sorted(found) == sorted(path.read_text() for path in corpus.iterdir())


def test_about_the_share_asked_for_is_filled_in_the_middle_and_nothing_held_out(
    changed: TokenData,
) -> None:
    begin = changed.tokenizer.control_id(FIM_BEGIN)
    share = np.mean([begin in ids for ids in documents(changed, "train")])
    assert 0.28 < share < 0.52
    assert not (changed.tokens("held_out")[:] == begin).any()


def test_training_text_has_no_merged_token_left_and_held_out_text_has(changed: TokenData) -> None:
    merged = MergedTokens.of(changed.tokenizer).ids
    assert len(merged) > 1
    assert not np.isin(changed.tokens("train")[:], merged).any()
    assert np.isin(changed.tokens("held_out")[:], merged).sum() > 20


def test_neither_rate_changes_order_or_side(
    corpus: Path, changed: TokenData, tmp_path: Path
) -> None:
    plain = prepare(tmp_path / "data", [str(corpus)], "bpe", 400, held_out=0.2, seed=1)
    assert plain.tokenizer.fingerprint == changed.tokenizer.fingerprint
    assert np.array_equal(plain.held_out[:], changed.held_out[:])
    texts = [[original(d, ids) for ids in documents(d, "train")] for d in (plain, changed)]
    assert texts[0] == texts[1]


def test_workers_draw_the_same(corpus: Path, changed: TokenData, tmp_path: Path) -> None:
    rates = {"fim_rate": 0.4, "split_rate": 1.0}
    again = prepare(
        tmp_path / "data", [str(corpus)], "bpe", 400, held_out=0.2, seed=1, workers=2, **rates
    )
    assert again.fingerprint == changed.fingerprint


@pytest.mark.parametrize(
    ("rates", "tokenizer", "said"),
    [
        ({"fim_rate": 0.1}, "char", "set both to 0 or take tokenizer 'bpe'"),
        ({"split_rate": 0.1}, "char", "set both to 0"),
        ({"fim_rate": 1.5}, "bpe", r"fim_rate=1.5 is not a share"),
        ({"split_rate": -0.1}, "bpe", r"split_rate=-0.1 is not a share"),
    ],
)
def test_rates_that_cannot_be(
    rates: dict[str, float], tokenizer: str, said: str, corpus: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=said):
        prepare(tmp_path / "data", [str(corpus)], tokenizer, 400, **rates)
    assert not any(tmp_path.iterdir())
