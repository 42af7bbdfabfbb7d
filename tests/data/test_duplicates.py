"""Equal and nearly equal documents: what was planted is found, what only looks alike is kept."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.data import prepare, progress
from fathom.data.pipeline.duplicates import (
    Clusters,
    Told,
    candidates,
    exact_duplicates,
    near_duplicates,
    similar,
)
from fathom.data.pipeline.signatures import PLACES, _hashes, comparable, signatures
from fathom.errors import DataError

HAN = [chr(0x4E00 + 37 * i) for i in range(500)]
LATIN = [
    "".join(random.Random(i).choices("etaoinshrdlucmfw", k=2 + i % 7)) + " " for i in range(900)
]


def text(words: list[str], seed: int, length: int = 150) -> str:
    return "".join(random.Random(seed).choices(words, k=length))


def edited(text: str, rate: float, draw: random.Random) -> str:
    """Characters replaced, left out or doubled."""
    alphabet = sorted(set(text))
    return "".join(
        draw.choice(("", draw.choice(alphabet), c + draw.choice(alphabet)))
        if draw.random() < rate
        else c
        for c in text
    )


def near(texts: list[str]) -> np.ndarray:
    shown = [comparable(t) for t in texts]
    return near_duplicates(
        signatures(texts),
        lambda pairs, _: np.array([similar(shown[a], shown[b]) for a, b in pairs]),
    )[0]


@pytest.mark.parametrize("words", [HAN, LATIN], ids=["Chinese", "Latin"])
def test_copies_with_an_edit_in_every_tenth_character_are_found(words: list[str]) -> None:
    draw = random.Random(0)
    originals = [text(words, i) for i in range(100)]
    found = near([*originals, *(edited(t, 0.1, draw) for t in originals)])
    assert (found[:100] == np.arange(100)).all(), "an original was taken for another"
    assert (found[100:] == np.arange(100)).sum() >= 97
    assert set(found[100:][found[100:] != np.arange(100)]) <= set(range(100, 200))


def test_half_of_a_text_in_common_is_no_duplicate() -> None:
    head = text(LATIN, 0, 300)
    found = near([head + text(LATIN, i, 300) for i in range(1, 40)])
    assert (found == np.arange(39)).all()


def test_a_crowd_of_copies_becomes_one_cluster_of_few_questions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And all of it is told, to the last pair."""
    monkeypatch.setattr(progress, "_SHOWN_EVERY", 0.0)
    shown_lines: list[str] = []
    draw, asked = random.Random(0), []
    texts = [edited(text(LATIN, 1), 0.02, draw) for _ in range(300)]
    shown = [comparable(t) for t in texts]

    def verify(pairs: np.ndarray, told: Told) -> np.ndarray:
        asked.extend(pairs)
        told(len(pairs))
        return np.array([similar(shown[a], shown[b]) for a, b in pairs])

    found, count = near_duplicates(signatures(texts), verify, shown_lines.append)
    assert (found == 0).all() and len(asked) == count < 900
    done, total = re.findall(
        "comparing texts: ([0-9,]+) of ([0-9,]+) pairs, .* left", shown_lines[-1]
    )[0]
    assert done == total and shown_lines[0] == "comparing signatures …"
    assert shown_lines[96].startswith("comparing signatures: 96 of 96 bands, ")


def test_candidates_are_those_that_share_a_band() -> None:
    rows = np.random.default_rng(0).integers(0, 2**32, (50, PLACES), dtype=np.uint32)
    rows[7] = rows[3]
    rows[7, ::2] += 1  # half of the places agree but no band of two
    rows[20, :30] = rows[11, :30]  # bands agree, and 0.16 of all places
    rows[40, :10] = rows[30, :10]  # a band agrees, but too few places
    assert candidates(rows).tolist() == [[11, 20]]


def test_signatures_estimate_the_jaccard_similarity() -> None:
    draw = random.Random(0)
    texts = [text(LATIN, i, 200) for i in range(60)]
    copies = [edited(t, 0.05, draw) for t in texts]
    sets = [[set(_hashes(comparable(t))) for t in pair] for pair in zip(texts, copies, strict=True)]
    true = np.array([len(a & b) / len(a | b) for a, b in sets])
    estimate = (signatures(texts) == signatures(copies)).mean(axis=1)
    assert abs((estimate - true).mean()) < 0.02 and np.abs(estimate - true).max() < 0.15


@given(st.lists(st.text(max_size=30), min_size=1, max_size=6))
@settings(max_examples=30, deadline=None)
def test_a_signature_depends_on_its_text_alone(texts: list[str]) -> None:
    together = signatures(texts)
    assert all((signatures([t]) == row).all() for t, row in zip(texts, together, strict=True))


@given(st.lists(st.integers(0, 5), max_size=40))
def test_exact_duplicates_point_to_the_first(values: list[int]) -> None:
    hashes = np.array([[value, 7] for value in values], np.uint64).reshape(-1, 2)
    assert exact_duplicates(hashes).tolist() == [values.index(value) for value in values]


@given(st.lists(st.tuples(st.integers(0, 19), st.integers(0, 19)), max_size=30))
def test_clusters_are_connected_components_named_by_their_first(pairs: list) -> None:
    clusters, groups = Clusters(20), {i: {i} for i in range(20)}
    for one, other in pairs:
        clusters.join(one, other)
        union = groups[one] | groups[other]
        groups.update(dict.fromkeys(union, union))
    assert clusters.roots().tolist() == [min(groups[i]) for i in range(20)]


def test_long_texts_are_compared_in_pieces() -> None:
    draw = random.Random(0)
    long = text(LATIN, 1, 12_000)
    assert similar(long, edited(long, 0.1, draw))
    assert not similar(long, long[:20_000] + text(LATIN, 2, 12_000)[20_000:])
    assert not similar(long, long[: len(long) * 3 // 4])
    assert similar("", "") and similar("a", "a") and not similar("a", "b")


def test_prepare_keeps_the_first_of_each_cluster_across_sources(tmp_path: Path) -> None:
    draw = random.Random(0)
    originals = [text(LATIN, i) for i in range(40)]
    copies = [edited(t, 0.05, draw) for t in originals[:10]]
    for name, some in (("a", originals), ("b", [*copies, originals[20], text(HAN, 1)])):
        lines = "".join(json.dumps({"text": t}) + "\n" for t in some)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    sources = [str(tmp_path / f"{name}.jsonl") for name in "ab"]
    kept = {}
    for dedup in ("none", "exact", "near"):
        data = prepare(tmp_path / dedup, sources, "bpe", 400, dedup=dedup)
        kept[dedup] = data.manifest["content_documents"]
        assert data.names == ("a", "b")
    assert kept == {"none": 52, "exact": 51, "near": 41}
    order: list[str] = []
    prepare(tmp_path / "again", sources, str(tmp_path / "near"), dedup="near", say=order.append)
    heads = [line.split(" ")[0] for line in order[:5]]
    assert heads == ["reading", "52", "looking", "near-duplicates:", "encoding"]
    lines = [json.loads(line) for line in (tmp_path / "near" / "rejects.jsonl").open()]
    assert [line["place"] for line in lines] == [f"b.jsonl:{i}" for i in range(1, 12)]
    assert lines[10]["kind"] == "exact duplicate" and lines[10]["reason"] == "repeats a/a.jsonl:21"
    assert [re.sub("[0-9]", "", line["kind"]) for line in lines[:10]] == ["near duplicate"] * 10


def test_a_source_that_only_repeats_another_is_an_error(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("the same text in both " * 20)
    sources = [str(tmp_path / f"{name}.txt") for name in "ab"]
    with pytest.raises(DataError, match="every document of b repeats one"):
        prepare(tmp_path / "out", sources, "bpe", 300, dedup="exact")
