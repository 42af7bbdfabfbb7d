"""Which source each sequence comes from, as a pure function of the seed (report §4.1; it publishes no shares).

Sequences come in blocks of `BLOCK`. Every block has the same number of each source, as near to its weight as whole
sequences allow, in an order of its own. So the share is exact after every block, and the place of a sequence within
its source is known without looking at those before its block.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import numpy as np

from fathom.errors import DataError

BLOCK = 1024
"""Sequences in a block: weights are met to a thousandth."""


class Mixture:
    """The order of sources for given weights and seed."""

    def __init__(self, weights: Mapping[str, float], seed: int) -> None:
        """Raises `DataError` for a weight so small that not one sequence of a block is left for it."""
        self.names = tuple(name for name, weight in weights.items() if weight > 0)
        self.counts = _apportion([weights[name] for name in self.names])
        lost = [name for name, count in zip(self.names, self.counts, strict=True) if not count]
        if lost or not self.names:
            raise DataError(
                f"weights {dict(weights)} leave {', '.join(lost) or 'every source'} less than one sequence in {BLOCK}; "
                f"raise that weight or leave the source out"
            )
        self._block = lru_cache(maxsize=8)(lambda number: self._shuffled(seed, number))

    def place(self, sequence: int) -> tuple[str, int]:
        """The source of a sequence and its number within that source."""
        block, within = divmod(sequence, BLOCK)
        sources, ranks = self._block(block)
        source = int(sources[within])
        return self.names[source], block * int(self.counts[source]) + int(ranks[within])

    def before(self, sequence: int) -> dict[str, int]:
        """Sequences of each source among the first `sequence`."""
        block, within = divmod(sequence, BLOCK)
        begun = np.bincount(self._block(block)[0][:within], minlength=len(self.names))
        return {
            name: block * int(count) + int(more)
            for name, count, more in zip(self.names, self.counts, begun, strict=True)
        }

    def _shuffled(self, seed: int, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Source of each sequence of a block and its rank among that source's, from raw bits and a stable sort."""
        key = np.array([seed % 2**64, 2**63 + number], np.uint64)  # apart from any ring's
        order = np.argsort(np.random.Philox(key=key).random_raw(BLOCK), kind="stable")
        sources = np.repeat(np.arange(len(self.names)), self.counts)[order]
        ranks = np.empty(BLOCK, np.int64)
        for source, count in enumerate(self.counts):
            ranks[sources == source] = np.arange(count)
        return sources, ranks


def _apportion(weights: list[float]) -> np.ndarray:
    """`BLOCK` sequences by weight: the whole parts, then one more for the largest remainders."""
    total = sum(weights) or 1.0
    exact = np.array([BLOCK * weight / total for weight in weights])
    counts = np.floor(exact).astype(np.int64)
    if len(counts):
        most_lacking = np.argsort(counts - exact, kind="stable")
        counts[most_lacking[: BLOCK - int(counts.sum())]] += 1
    return counts
