"""Which block of the cache belongs to whom: reference counts, the prefix cache, and neighbours.

The cache is cut into blocks of `size` tokens. A text holds a list of them; several texts may hold
the same one, when they begin alike. A full block is known by a digest of *all* tokens up to its end
(a hash chain: digest = H(digest of the block before, its own tokens)), so a new text finds what an
earlier one left behind. A block that nobody holds keeps what it knows until it is needed for
something else, the longest unused first, and of a text its end before its beginning.

On a CPU attention reads neighbouring blocks as one stretch of memory, so a text that begins is given
a place where it could grow to its full length, if there is one; the place is not reserved: under
pressure others get it.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

NOBODY = -1
_ROOT = b""


def chain(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Digest of a text that ends with a block of `tokens`; `parent` is that of the text before."""
    return blake2b(parent + np.asarray(tokens, np.int32).tobytes(), digest_size=16).digest()


def digests(ids: Sequence[int], size: int, known: Sequence[bytes] = ()) -> list[bytes]:
    """Digests of all full blocks of a text, going on behind those that are `known`."""
    found = list(known)
    for start in range(len(found) * size, len(ids) - size + 1, size):
        found.append(chain(found[-1] if found else _ROOT, ids[start : start + size]))
    return found


class BlockPool:
    """`count` blocks of `size` tokens."""

    def __init__(self, count: int, size: int) -> None:
        self.count, self.size, self.free = count, size, count
        self._holders = np.zeros(count, np.int64)
        self._place_of = np.full(count, NOBODY, np.int64)
        self._last_use = np.zeros(count, np.int64)
        self._clock = 0
        self._digest: list[bytes | None] = [None] * count
        self._known: dict[bytes, int] = {}

    def known(self, chain_of_digests: Sequence[bytes]) -> list[int]:
        """Blocks that hold the longest known beginning of a text."""
        found = []
        for digest in chain_of_digests:
            if digest not in self._known:
                break
            found.append(self._known[digest])
        return found

    def unheld(self, blocks: Sequence[int]) -> int:
        """How many of the blocks nobody holds: so many fewer are free once they are held."""
        return int((self._holders[list(blocks)] == 0).sum())

    def hold(self, blocks: Sequence[int]) -> None:
        """One more text holds each of these."""
        for block in blocks:
            self.free -= self._holders[block] == 0
            self._holders[block] += 1

    def can_allocate(self, count: int) -> bool:
        """Whether so many blocks can be had."""
        return count <= self.free

    def allocate(self, text: int, count: int, last: int | None, wanted: int) -> list[int]:
        """`count` blocks for the text numbered `text`, behind its block `last`; `can_allocate` comes first.

        `wanted` is how many it may come to need from here on.
        """
        taken: list[int] = []
        for done in range(count):
            block = self._next(text, last, max(wanted - done, 1))
            self._forget(block)
            self.hold([block])
            taken.append(block)
            last = block
        return taken

    def publish(self, block: int, digest: bytes) -> None:
        """Let later texts find what a full block holds."""
        if digest not in self._known and self._digest[block] is None:
            self._known[digest], self._digest[block] = block, digest

    def release(self, text: int, blocks: Sequence[int]) -> None:
        """A text lets go of its blocks and of its place."""
        for block in reversed(blocks):
            self._clock += 1
            self._last_use[block] = self._clock
            self._holders[block] -= 1
            self.free += self._holders[block] == 0
        self._place_of[self._place_of == text] = NOBODY

    def forget_all(self) -> None:
        """Nothing that blocks hold is known any more (the weights have changed)."""
        self._known.clear()
        self._digest = [None] * self.count

    def _forget(self, block: int) -> None:
        digest = self._digest[block]
        if digest is not None:
            del self._known[digest]
            self._digest[block] = None

    def _next(self, text: int, last: int | None, wanted: int) -> int:
        """The neighbour if it is free and nobody else's place, or the beginning of a new place."""
        if last is not None and last + 1 < self.count:
            mine = self._place_of[last + 1] in (NOBODY, text)
            if mine and self._holders[last + 1] == 0:
                return last + 1
        self._place_of[self._place_of == text] = NOBODY
        while wanted > 1:
            start = self._longest_unused(wanted)
            if start is not None:
                self._place_of[start : start + wanted] = text
                return start
            wanted //= 2
        return self._oldest()

    def _longest_unused(self, length: int) -> int | None:
        """Start of `length` free neighbours that are nobody's place, those unused for longest."""
        if length > self.count:
            return None
        taken = (self._holders > 0) | (self._place_of != NOBODY)
        between = np.cumsum(np.concatenate(([0], taken)))
        fits = between[length:] == between[:-length]
        if not fits.any():
            return None
        use = np.cumsum(np.concatenate(([0], self._last_use)))
        return int(np.where(fits, use[length:] - use[:-length], np.iinfo(np.int64).max).argmin())

    def _oldest(self) -> int:
        """The free block unused for longest, if possible one that is nobody's place."""
        free = self._holders == 0
        good = free & (self._place_of == NOBODY)
        usable = good if good.any() else free
        return int(np.where(usable, self._last_use, np.iinfo(np.int64).max).argmin())
