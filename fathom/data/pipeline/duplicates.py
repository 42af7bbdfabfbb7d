"""Which documents repeat others: equal ones by their hash, near ones by MinHash, LSH and a look at the texts.

Three steps, each of them deterministic whatever the number of workers.

1. *Candidates.* LSH with bands of two places: documents that agree in a band are near each other in one sorted list
   per band. The list is sorted by the band's places and then by those that follow, so that within a crowd that
   agrees in two the likelier pairs stand side by side, and each document is paired with the next `NEIGHBOURS` of its
   crowd only: the work grows with the documents, not with their square (an LSH forest, Bawa et al. 2005, of 96 trees).
   Two texts of Jaccard similarity J agree in some band with probability 1 - (1 - J^2)^96: 0.999 at J = 0.27.
2. *Estimate.* A pair whose whole signatures agree in less than `LEAST_AGREEMENT` is dropped.
3. *Verification.* The Levenshtein similarity of the two texts must reach `SIMILAR`. A Jaccard similarity cannot
   tell a copy with an edit in every tenth character (0.27) from two programs under one long licence text (0.3 and
   more); the edit distance can: 0.9 against 0.5. Long texts are compared in pieces, so that the cost is linear.

Near documents form clusters (union-find); of each the first in reading order is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np

from fathom.data.pipeline.signatures import PLACES
from fathom.data.progress import Progress, Say, silent

ROWS = 2
"""Places in a band."""
NEIGHBOURS = 16
LEAST_AGREEMENT = 0.12
SIMILAR = 0.8
"""Smallest share of characters two near-duplicates have in common, in their order (our choice)."""
_DEPTH = 6  # places that the list of a band is sorted by
_PIECE = 20_000

Pairs = np.ndarray
"""int64 [pairs, 2], the earlier document first."""
Told = Callable[[int], None]
"""Hears how many more are done."""


def exact_duplicates(hashes: np.ndarray) -> np.ndarray:
    """int64 [documents]: the first document with the same 128-bit hash, itself where it is the first.

    hashes: uint64 [documents, 2] in reading order.
    """
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))  # stable, so that equal ones keep their order
    ordered = hashes[order]
    begins = np.ones(len(order), bool)
    begins[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    first = np.empty(len(order), np.int64)
    first[order] = order[begins][np.cumsum(begins) - 1]
    return first


def candidates(signatures: np.ndarray, show: Say = silent) -> Pairs:
    """Pairs worth verifying, sorted. signatures: uint32 [documents, PLACES], may be a memory map."""
    found = [np.empty((0, 2), np.int64)]
    progress = Progress("comparing signatures", PLACES // ROWS, show, "bands")
    for band in range(0, PLACES, ROWS):
        pairs = _pairs_of_band(signatures, band)
        found.append(pairs[_agreement(signatures, pairs) >= LEAST_AGREEMENT])
        progress.add(1)
    return np.unique(np.concatenate(found), axis=0)


def _pairs_of_band(signatures: np.ndarray, band: int) -> Pairs:
    columns = [signatures[:, (band + i) % PLACES] for i in range(_DEPTH)]
    order = np.lexsort(columns[::-1])
    crowd = np.stack([column[order] for column in columns[:ROWS]])
    found = [np.empty((0, 2), np.int64)]
    for step in range(1, min(NEIGHBOURS + 1, len(order))):
        at = np.flatnonzero((crowd[:, step:] == crowd[:, :-step]).all(axis=0))
        if not len(at):
            break  # a crowd without neighbours at this distance has none further away
        found.append(np.stack([order[at], order[at + step]], axis=1))
    return np.unique(np.sort(np.concatenate(found), axis=1), axis=0)


def _agreement(signatures: np.ndarray, pairs: Pairs, at_once: int = 65_536) -> np.ndarray:
    """float [pairs]: the share of places in which two signatures agree, an estimate of their Jaccard similarity."""
    parts = [
        (signatures[some[:, 0]] == signatures[some[:, 1]]).mean(axis=1)
        for some in (pairs[i : i + at_once] for i in range(0, len(pairs), at_once))
    ]
    return np.concatenate(parts) if parts else np.empty(0)


def near_duplicates(
    signatures: np.ndarray, verify: Callable[[Pairs, Told], np.ndarray], show: Say = silent
) -> tuple[np.ndarray, int]:
    """(int64 [documents]: the first document of each one's cluster, number of pairs verified).

    `verify` says of pairs whether they are similar, and tells its second argument of each few that it is through with;
    `show` hears how far all is. Every round asks for each document's likeliest pair that is still open; what the answer
    joins needs no further question, so that a cluster of m costs about m of them.
    """
    pairs = candidates(signatures, show)
    likeliest = np.lexsort((pairs[:, 0], -_agreement(signatures, pairs), pairs[:, 1]))
    pairs, clusters, asked = pairs[likeliest], Clusters(len(signatures)), 0
    progress = Progress("comparing texts", len(pairs), show, "pairs")
    while len(pairs):
        first_of_each = np.unique(pairs[:, 1], return_index=True)[1]
        chosen = pairs[first_of_each]
        asked += len(chosen)
        for one, other in chosen[verify(chosen, progress.add)].tolist():
            clusters.join(one, other)
        roots = clusters.roots()
        open_ = roots[pairs[:, 0]] != roots[pairs[:, 1]]
        open_[first_of_each] = False
        progress.add(len(pairs) - int(open_.sum()) - len(chosen))
        pairs = pairs[open_]
    return clusters.roots(), asked


class Clusters:
    """Union-find whose root is always the smallest member."""

    def __init__(self, count: int) -> None:
        self.parent = np.arange(count)

    def root(self, one: int) -> int:
        """The smallest member of the cluster of `one`."""
        while self.parent[one] != one:
            self.parent[one] = self.parent[self.parent[one]]
            one = int(self.parent[one])
        return one

    def join(self, one: int, other: int) -> None:
        """Make two clusters one."""
        low, high = sorted((self.root(one), self.root(other)))
        self.parent[high] = low

    def roots(self) -> np.ndarray:
        """int64 [count], the root of every member."""
        while True:
            above = self.parent[self.parent]
            if (above == self.parent).all():
                return above
            self.parent = above


def similar(one: str, other: str) -> bool:
    """Whether two comparable texts have `SIMILAR` of their characters in common: 1 - Levenshtein / length."""
    from rapidfuzz.distance import Levenshtein

    longer = max(len(one), len(other))
    most = round((1 - SIMILAR) * longer)
    if abs(len(one) - len(other)) > most:
        return False
    left = most
    for piece, against in _pieces(one, other):
        left -= Levenshtein.distance(piece, against, score_cutoff=max(left, 0))
        if left < 0:
            return False
    return True


def _pieces(one: str, other: str) -> Iterator[tuple[str, str]]:
    """Both texts cut at the same shares of their lengths. An edit distance by pieces is never below the true one."""
    count = -(-max(len(one), len(other), 1) // _PIECE)
    cuts = [(len(one) * i // count, len(other) * i // count) for i in range(count + 1)]
    for (a, b), (c, d) in pairwise(cuts):
        yield one[a:c], other[b:d]
