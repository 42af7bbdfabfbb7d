"""Batches are a pure function of seed and sequence number, on any number of ranks, and epochs are permutations."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.data import Loader, held_out_batches
from fathom.data.loader import Ahead, Ring
from fathom.data.mixture import BLOCK, Mixture
from fathom.errors import DataError

SIZES = st.tuples(st.integers(2, 300), st.integers(1, 40)).filter(lambda s: s[0] > s[1])


@given(SIZES, st.integers(-5, 2**70), st.integers(0, 500), st.integers(1, 9))
@settings(max_examples=100, deadline=None)
def test_a_batch_depends_on_seed_and_number_only(
    sizes: tuple[int, int], seed: int, first: int, count: int
) -> None:
    tokens = np.arange(sizes[0], dtype=np.uint16)
    used = Loader.of(tokens, sizes[1], seed)
    used.batch(first + 1000, 3)
    batch = used.batch(first, count).tokens
    assert batch.shape == (count, sizes[1] + 1) and batch.dtype == torch.int64
    fresh = [Loader.of(tokens, sizes[1], seed).batch(first + i, 1).tokens for i in range(count)]
    assert torch.equal(batch, torch.cat(fresh))


@given(SIZES, st.integers(0, 99), st.integers(0, 7))
@settings(max_examples=100, deadline=None)
def test_an_epoch_covers_each_target_once(sizes: tuple[int, int], seed: int, epoch: int) -> None:
    length, seq_len = sizes
    ring = Ring(np.arange(length, dtype=np.uint32), seq_len, seed)
    n = ring.sequences_per_epoch
    rows = Loader({"all": ring}).batch(epoch * n, n).tokens
    targets = Counter(rows[:, 1:].flatten().tolist())
    assert max(targets.values()) == 1 and length - len(targets) < seq_len
    assert torch.equal(rows[:, 1:], (rows[:, :-1] + 1) % length)


def test_epochs_and_rings_differ_in_order_and_in_windows() -> None:
    tokens = np.arange(1000, dtype=np.uint16)
    loader = Loader.of(tokens, 10, seed=1)
    first = loader.batch(0, 100).tokens[:, 0]
    assert (first.diff() == 10).sum() < 10
    second = loader.batch(100, 100).tokens[:, 0]
    assert set(first.tolist()) != set(second.tolist())
    assert not torch.equal(first, Loader.of(tokens, 10, seed=2).batch(0, 100).tokens[:, 0])
    other = Loader({"b": Ring(tokens, 10, 1, number=1)}).batch(0, 100).tokens[:, 0]
    assert not torch.equal(first, other) and not torch.equal(second, other)


def test_the_order_is_the_same_in_every_version() -> None:
    loader = Loader.of(np.arange(100, dtype=np.uint16), 10, seed=0)
    assert loader.batch(0, 5).tokens[:, 0].tolist() == [82, 2, 72, 92, 62]
    mixture = Mixture({"a": 1.0, "b": 2.0}, seed=0)
    assert "".join(mixture.place(n)[0] for n in range(23)) == "babbbbaabbbbabbbbbbbbab"


def test_too_short_a_corpus() -> None:
    with pytest.raises(DataError, match="has 10 training tokens, one sequence needs 11"):
        Loader.of(np.zeros(10, np.uint16), 10, 0)
    assert Loader.of(np.arange(11, dtype=np.uint16), 10, 0).batch(5, 2).tokens.shape == (2, 11)


# --- sources -------------------------------------------------------------------------------------

WEIGHTS = st.dictionaries(st.sampled_from("abcde"), st.floats(0.01, 1.0), min_size=1)


@given(WEIGHTS, st.integers(0, 2**64), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_every_block_has_each_source_by_its_weight_and_numbers_run_on(
    weights: dict[str, float], seed: int, block: int
) -> None:
    mixture = Mixture(weights, seed)
    places = [mixture.place(block * BLOCK + n) for n in range(BLOCK)]
    found = Counter(name for name, _ in places)
    total = sum(weights.values())
    assert all(abs(found[name] - BLOCK * w / total) < 1 for name, w in weights.items())
    before, after = mixture.before(block * BLOCK), mixture.before((block + 1) * BLOCK)
    for name in weights:
        numbers = [number for other, number in places if other == name]
        assert numbers == list(range(before[name], after[name]))


@given(WEIGHTS, st.integers(0, 99), st.integers(0, 3 * BLOCK))
@settings(max_examples=60, deadline=None)
def test_what_was_read_before_a_sequence(weights: dict[str, float], seed: int, n: int) -> None:
    mixture = Mixture(weights, seed)
    counted = Counter(mixture.place(i)[0] for i in range(n))
    assert mixture.before(n) == {name: counted[name] for name in mixture.names}


def test_a_weight_of_nearly_nothing_is_refused_and_of_nothing_leaves_out() -> None:
    with pytest.raises(
        DataError, match=r"leave b less than one sequence in 1024.*leave the source out"
    ):
        Mixture({"a": 1.0, "b": 1e-6}, 0)
    assert Mixture({"a": 1.0, "b": 0.0}, 0).names == ("a",)


def mixed(seq_len: int = 7, documents: bool = False) -> Loader:
    """Three sources whose tokens tell where they are from."""
    rings = {}
    for number, (name, size) in enumerate({"a": 500, "b": 130, "c": 90}.items()):
        tokens = np.arange(size, dtype=np.uint16) + 1000 * number
        starts = np.arange(0, size + 1, 10) if documents else None
        rings[name] = Ring(tokens, seq_len, 5, number, starts)
    return Loader(rings, Mixture({"a": 0.5, "b": 0.3, "c": 0.2}, 5))


def test_a_batch_says_where_its_sequences_are_from() -> None:
    batch = mixed().batch(3, 200)
    found = Counter("abc"[int(token) // 1000] for token in batch.tokens[:, 0])
    assert batch.sources == found and min(found.values()) > 20
    assert mixed().sources(3, 200) == found  # known without reading


def test_a_stage_may_go_on_where_another_stopped() -> None:
    """The same ring, other weights: no window is read twice before the epoch is over."""
    first = mixed()
    begun = first.mixture.before(20) if first.mixture else {}
    second = Loader(first.rings, Mixture({"a": 1.0, "c": 1.0}, 9), begun)
    seen = [*first.batch(0, 20).tokens[:, 0].tolist(), *second.batch(0, 10).tokens[:, 0].tolist()]
    assert len(set(seen)) == 30


# --- ranks, documents, reading ahead -------------------------------------------------------------


@pytest.mark.parametrize("loader", [mixed(), Loader.of(np.arange(900, dtype=np.uint16), 7, 2)])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_the_same_tokens_in_the_same_order_for_any_number_of_ranks(
    loader: Loader, ranks: int
) -> None:
    whole = loader.batch(40, 24).tokens
    for rank in range(ranks):
        assert torch.equal(loader.batch(40, 24, rank, ranks).tokens, whole[rank::ranks])


def test_a_run_goes_on_with_the_same_tokens_on_another_number_of_ranks() -> None:
    """Three steps on 8 ranks, then on 3, then on 2, in the middle of an epoch and of a block."""
    loader, batch = mixed(), 24
    alone = [loader.batch(step * batch, batch).tokens for step in range(9)]
    for step, ranks in enumerate([8, 8, 8, 3, 3, 3, 2, 2, 2]):
        fresh = mixed()  # whoever goes on starts anew
        parts = [fresh.batch(step * batch, batch, rank, ranks).tokens for rank in range(ranks)]
        together = torch.empty_like(alone[step])
        for rank, part in enumerate(parts):
            together[rank::ranks] = part
        assert torch.equal(together, alone[step])


def test_a_rank_without_a_sequence_is_refused() -> None:
    with pytest.raises(DataError, match="batch of 2 sequences leaves none for rank 2 of 4"):
        mixed().batch(0, 2, rank=2, ranks=4)


def test_documents_are_told_apart_where_they_are_to_be() -> None:
    assert mixed().batch(0, 4).document_ids is None
    batch = mixed(documents=True).batch(0, 50)
    ids = batch.document_ids
    assert ids is not None
    borders = ids[:, 1:] != ids[:, :-1]
    assert torch.equal(borders, batch.tokens[:, 1:] % 1000 % 10 == 0)
    assert torch.equal(batch.targets(), 7 - borders.sum(1))
    assert mixed().batch(0, 3).targets().tolist() == [7, 7, 7]


def test_reading_ahead_changes_nothing() -> None:
    loader = mixed()
    reader = Ahead(loader)
    asked = [(0, 4), (4, 4), (100, 2), (8, 4)]  # the third is not the one announced
    announced = [(4, 4), (8, 4), (102, 2), None]
    for wanted, then in zip(asked, announced, strict=True):
        assert torch.equal(reader.batch(wanted, then).tokens, mixed().batch(*wanted).tokens)
    reader.close()


def test_what_goes_wrong_while_reading_ahead_is_told_when_it_is_asked_for() -> None:
    reader = Ahead(mixed())
    reader.batch((0, 2), then=(2, 0))
    with pytest.raises(DataError, match="batch of 0"):
        reader.batch((2, 0), then=None)
    reader.close()


# --- held-out windows ----------------------------------------------------------------------------


@given(
    st.integers(0, 200),
    st.integers(1, 30),
    st.integers(1, 5),
    st.one_of(st.none(), st.integers(0, 250)),
)
@settings(max_examples=150, deadline=None)
def test_held_out_batches_have_each_target_once(
    length: int, seq_len: int, batch: int, limit: int | None
) -> None:
    tokens = np.arange(length, dtype=np.uint16)
    batches = list(held_out_batches(tokens, seq_len, batch, limit))
    targets = [t for b in batches for t in b[:, 1:].flatten().tolist()]
    seen = length if limit is None else min(limit, length)
    assert targets == list(range(1, seen))
    assert all(len(b) <= batch and b.shape[1] <= seq_len + 1 for b in batches)
    assert all(torch.equal(b[:, 1:], b[:, :-1] + 1) for b in batches)
