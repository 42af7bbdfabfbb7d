"""Random numbers that belong to a document (report §4.1: what is done to a share of the documents or tokens).

A draw depends on the document's content, the seed and the purpose, on nothing else: not on the number of workers, the
order of reading or other documents. Each purpose has a stream of its own, so that the documents permuted for
fill-in-the-middle are not the ones whose tokens are split. The numbers come from the raw output of Philox, a counter
based generator whose stream numpy keeps stable; its distributions may change between versions and are not used.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np

from fathom.errors import DataError


def check_rate(name: str, rate: float) -> None:
    """Raise `DataError` for a rate outside [0, 1]."""
    if not 0 <= rate <= 1:
        raise DataError(f"{name}={rate} is not a share; use 0 to switch it off, or up to 1")


def key_of(text: str, seed: int) -> int:
    """A key of 64 bits for a document.

    Not a half of `Split.hash`, though that is a hash of the same text: blake2b takes its key and its length into what
    it computes, so neither is a part of the other, and to take one for both would change the order of all prepared
    data or the text that tokenizers are trained on. They are also meant to be independent: a choice of
    documents must not be one of sides.
    """
    digest = blake2b(text.encode(), digest_size=8, key=f"draws {seed}".encode()).digest()
    return int.from_bytes(digest)


def uniform(key: int, purpose: str, count: int) -> np.ndarray:
    """`count` numbers in [0, 1) as float64: the beginning of the stream of `key` (64 bits) and `purpose`."""
    bits = _stream(key, purpose).random_raw(count)
    return (bits >> np.uint64(11)) * 2.0**-53


def _stream(key: int, purpose: str) -> np.random.Philox:
    number = int.from_bytes(blake2b(purpose.encode(), digest_size=8).digest())
    return np.random.Philox(key=np.array([key, number], np.uint64))
