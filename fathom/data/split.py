"""Which text is trained on and which is held out (report §4.1 packs whole documents; the split is ours).

A document's side and its place in the training order are a hash of its content and the seed: they do not depend on
file names, on other documents or on the order of reading, and equal documents fall on the same side.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from math import ceil

import numpy as np

from fathom.errors import DataError

DOCUMENTS, TAIL = "documents", "tail"
_SEEDS = 10**50  # what a key of blake2b, 64 bytes, has room for


@dataclass(frozen=True)
class Piece:
    """A stretch of one document that lies on one side; `order` is its place in the shuffled corpus."""

    text: str
    held_out: bool
    order: int


@dataclass(frozen=True)
class Split:
    """How a corpus is divided.

    kind "documents": a document is held out as a whole, with probability `held_out`. kind "tail": of every document
    the last `held_out` of its characters.
    """

    kind: str
    held_out: float
    seed: int

    def __post_init__(self) -> None:
        if self.kind not in (DOCUMENTS, TAIL):
            raise DataError(
                f"held_out_kind={self.kind!r} is not known; use {DOCUMENTS!r} or {TAIL!r}"
            )
        if not 0 < self.held_out < 1:
            raise DataError(
                f"held_out={self.held_out} must lie between 0 and 1; 0.05 holds out a twentieth"
            )
        if abs(self.seed) >= _SEEDS:
            raise DataError(f"seed={self.seed} has more than 50 digits; choose a smaller one")

    def pieces(self, text: str) -> Iterator[Piece]:
        """The document, or its head and its tail."""
        side, order = self.hash(text)
        if self.kind == DOCUMENTS:
            yield Piece(text, side < self.held_out * 2**64, order)
            return
        cut = round(len(text) * (1 - self.held_out))
        if cut:
            yield Piece(text[:cut], False, order)
        if cut < len(text):
            yield Piece(text[cut:], True, order)

    def held_out_documents(self, sides: np.ndarray) -> np.ndarray:
        """bool [documents]: which are held out as a whole when documents are; sides as in `lopsided`."""
        return sides < np.uint64(ceil(self.held_out * 2**64))

    def hash(self, text: str) -> tuple[int, int]:
        """Two independent numbers of 64 bits: one decides the side, one the place in the order.

        `draws.key_of` is another hash, and says why.
        """
        digest = blake2b(text.encode(), digest_size=16, key=str(self.seed).encode()).digest()
        return int.from_bytes(digest[:8]), int.from_bytes(digest[8:])


def lopsided(sides: np.ndarray, sizes: np.ndarray, split: Split) -> bool:
    """Whether documents are too few or too unequal to divide: less than a quarter of the share asked for, or more
    than four times it, or over half of the corpus, would be held out.

    sides: uint64 [documents], the first half of each hash; sizes: their bytes of text.
    """
    share = sizes[split.held_out_documents(sides)].sum() / sizes.sum()
    return not split.held_out / 4 <= share <= max(min(4 * split.held_out, 0.5), split.held_out)
