"""Blocks: counts add up, prefixes are found, neighbours stay together, the oldest goes first."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fathom.inference.blocks import NOBODY, BlockPool, digests
from fathom.inference.pages import runs_of


def test_digests_depend_on_all_that_went_before() -> None:
    one, two = digests([1, 2, 3, 4, 5], 2), digests([9, 2, 3, 4, 5], 2)
    assert len(one) == 2 and one[0] != two[0] and one[1] != two[1]
    assert digests([1, 2, 3, 4, 5, 6], 2, one)[:2] == one
    assert digests([1, 2, 3, 4, 5, 6], 2, one) == digests([1, 2, 3, 4, 5, 6], 2)


def test_texts_that_grow_side_by_side_keep_their_neighbours() -> None:
    pool = BlockPool(100, 4)
    held: dict[int, list[int]] = {text: [] for text in range(4)}
    for grown in range(20):
        for text, blocks in held.items():
            last = blocks[-1] if blocks else None
            blocks += pool.allocate(text, 1, last, 20 - grown)
    for blocks in held.values():
        assert blocks == list(range(blocks[0], blocks[0] + 20))


def test_a_place_is_given_away_under_pressure() -> None:
    pool = BlockPool(4, 4)
    first = pool.allocate(0, 1, None, 4)
    second = pool.allocate(1, 3, None, 3)
    assert sorted(first + second) == [0, 1, 2, 3] and not pool.can_allocate(1)
    pool.release(1, second)
    assert pool.free == 3


def test_what_was_unused_for_longest_is_forgotten_first_and_ends_before_begins() -> None:
    pool = BlockPool(4, 1)
    chains = {text: digests([text, text], 1) for text in (1, 2)}
    for text in (1, 2):
        blocks = pool.allocate(text, 2, None, 2)
        for block, digest in zip(blocks, chains[text], strict=True):
            pool.publish(block, digest)
        pool.release(text, blocks)
    assert pool.free == 4
    assert len(pool.known(chains[1])) == len(pool.known(chains[2])) == 2
    pool.allocate(3, 1, None, 1)
    assert len(pool.known(chains[1])) == 1 and len(pool.known(chains[2])) == 2


@given(
    st.lists(st.integers(0, 30), unique=True, min_size=1, max_size=12), st.integers(1, 5), st.data()
)
@settings(max_examples=100, deadline=None)
def test_runs_are_the_slots_in_order(blocks: list[int], size: int, data: st.DataObject) -> None:
    end = data.draw(st.integers(1, len(blocks) * size))
    first = data.draw(st.integers(0, end - 1))
    slots = [slot for lo, hi in runs_of(blocks, size, first, end) for slot in range(lo, hi)]
    assert slots == [blocks[i // size] * size + i % size for i in range(first, end)]
    runs = runs_of(blocks, size, first, end)
    assert all(a[1] != b[0] for a, b in pairwise(runs))


class Pool(RuleBasedStateMachine):
    """Random texts come, grow, share and go; the pool is compared with a plain account of who holds what."""

    @initialize(count=st.integers(1, 12))
    def start(self, count: int) -> None:
        self.pool = BlockPool(count, 2)
        self.held: dict[int, list[int]] = {}
        self.number = 0

    @rule(count=st.integers(1, 4), wanted=st.integers(1, 8))
    def come(self, count: int, wanted: int) -> None:
        if self.pool.can_allocate(count):
            self.held[self.number] = self.pool.allocate(self.number, count, None, wanted)
            self.number += 1

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def grow(self, data: st.DataObject) -> None:
        text = data.draw(st.sampled_from(sorted(self.held)))
        if self.pool.can_allocate(1):
            self.held[text] += self.pool.allocate(text, 1, self.held[text][-1], 3)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def publish_and_share(self, data: st.DataObject) -> None:
        text = data.draw(st.sampled_from(sorted(self.held)))
        chain = digests([text] * 2 * len(self.held[text]), 2)
        for block, digest in zip(self.held[text], chain, strict=True):
            self.pool.publish(block, digest)
        known = self.pool.known(chain)
        self.pool.hold(known)
        if known:
            self.held[self.number] = known
            self.number += 1

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def go(self, data: st.DataObject) -> None:
        text = data.draw(st.sampled_from(sorted(self.held)))
        self.pool.release(text, self.held.pop(text))

    @invariant()
    def the_account_agrees(self) -> None:
        if not hasattr(self, "pool"):
            return
        holders = np.zeros(self.pool.count, int)
        for blocks in self.held.values():
            assert len(set(blocks)) == len(blocks)
            np.add.at(holders, blocks, 1)
        assert (holders == self.pool._holders).all()
        assert self.pool.free == int((holders == 0).sum())
        for digest, block in self.pool._known.items():
            assert self.pool._digest[block] == digest
        gone = set(self.pool._place_of.tolist()) - set(self.held) - {NOBODY}
        assert not gone


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
