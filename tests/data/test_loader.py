"""Batches are a pure function of seed and sequence number, and epochs are permutations of windows."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.data import Loader, held_out_batches
from fathom.errors import DataError

SIZES = st.tuples(st.integers(2, 300), st.integers(1, 40)).filter(lambda s: s[0] > s[1])


@given(SIZES, st.integers(-5, 2**70), st.integers(0, 500), st.integers(1, 9))
@settings(max_examples=100, deadline=None)
def test_a_batch_depends_on_seed_and_number_only(
    sizes: tuple[int, int], seed: int, first: int, count: int
) -> None:
    tokens = np.arange(sizes[0], dtype=np.uint16)
    used = Loader(tokens, sizes[1], seed)
    used.batch(first + 1000, 3)
    batch = used.batch(first, count)
    assert batch.shape == (count, sizes[1] + 1) and batch.dtype == torch.int64
    one_by_one = [Loader(tokens, sizes[1], seed).batch(first + i, 1) for i in range(count)]
    assert torch.equal(batch, torch.cat(one_by_one))


@given(SIZES, st.integers(0, 99), st.integers(0, 7))
@settings(max_examples=100, deadline=None)
def test_an_epoch_covers_each_target_once(sizes: tuple[int, int], seed: int, epoch: int) -> None:
    length, seq_len = sizes
    loader = Loader(np.arange(length, dtype=np.uint32), seq_len, seed)
    n = loader.sequences_per_epoch
    rows = loader.batch(epoch * n, n)
    targets = Counter(rows[:, 1:].flatten().tolist())
    assert max(targets.values()) == 1 and length - len(targets) < seq_len
    assert torch.equal(rows[:, 1:], (rows[:, :-1] + 1) % length)


def test_epochs_differ_in_order_and_in_windows() -> None:
    loader = Loader(np.arange(1000, dtype=np.uint16), 10, seed=1)
    first, second = loader.batch(0, 100)[:, 0], loader.batch(100, 100)[:, 0]
    assert set(first.tolist()) != set(second.tolist())
    assert (first.diff() == 10).sum() < 10
    assert not torch.equal(first, Loader(loader.tokens, 10, seed=2).batch(0, 100)[:, 0])


def test_the_order_is_the_same_in_every_version() -> None:
    loader = Loader(np.arange(100, dtype=np.uint16), 10, seed=0)
    assert loader.batch(0, 5)[:, 0].tolist() == [82, 2, 72, 92, 62]


def test_too_short_a_corpus() -> None:
    with pytest.raises(DataError, match="has 10 training tokens, one sequence needs 11"):
        Loader(np.zeros(10, np.uint16), 10, 0)
    assert Loader(np.arange(11, dtype=np.uint16), 10, 0).batch(5, 2).shape == (2, 11)


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
