"""MinHash signatures of texts: what near-duplicate removal compares before it looks at any two texts.

A text, lower-cased and with every run of blanks as one, is taken as the set of its character n-grams: of 8
characters, or of 4 where Chinese, Japanese or Korean is written. Characters rather than words, so that it works alike
for code, for Chinese and for misread letters. The n are long enough that unrelated texts share next to nothing
(measured in docs/experiments/007-data.md) and short enough that one edit in ten characters leaves about a quarter of
them: with a share s = 0.9^8 of n-grams untouched, the Jaccard similarity s / (2 - s) is 0.27. A signature is the
smallest value of each of 192 hash functions over the set; two signatures agree at a place with a probability of just
that similarity.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

from fathom.errors import DataError

PLACES = 192
"""Hash functions of a signature."""
_SEED = 1
_ALPHABETIC, _IDEOGRAPHIC = 8, 4
_IDEOGRAPHS = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af]")
_BATCH_CHARACTERS = 1_000_000
_FACTOR = 0x9E3779B97F4A7C15  # odd, so that nothing is lost modulo 2^64


def comparable(text: str) -> str:
    """What two texts are compared by: lower case, one blank for any run of blanks."""
    return " ".join(text.lower().split())


def library() -> str:
    """Name and version of what computes the signatures. Raises `DataError` where near-duplicates cannot be removed."""
    _rensa()
    return f"rensa {version('rensa')}"


def signatures(texts: Sequence[str]) -> np.ndarray:
    """uint32 [texts, PLACES]; equal texts give equal rows, whatever they are computed beside."""
    found = np.empty((len(texts), PLACES), np.uint32)
    for first, batch in _batches(texts):
        hashes = [_hashes(comparable(text)) for text in batch]
        bounds = np.cumsum([0, *map(len, hashes)], dtype=np.uint64)
        matrix = _rensa().RMinHash.digest_matrix_from_flat_token_hashes(
            np.concatenate(hashes), bounds, PLACES, _SEED
        )
        found[first : first + len(batch)] = matrix.to_rows()
    return found


def _batches(texts: Sequence[str]) -> Iterator[tuple[int, Sequence[str]]]:
    first = size = 0
    for i, text in enumerate(texts, 1):
        size += len(text)
        if size >= _BATCH_CHARACTERS or i == len(texts):
            yield first, texts[first:i]
            first, size = i, 0


def _hashes(text: str) -> np.ndarray:
    """uint64 hash of every n-gram, by doubling: the hash of 2k characters is made of two of k."""
    n = _IDEOGRAPHIC if len(_IDEOGRAPHS.findall(text)) > len(text) / 5 else _ALPHABETIC
    hashes = np.frombuffer(text.ljust(n).encode("utf-32-le"), np.uint32).astype(np.uint64)
    factor, length = _FACTOR, 1
    while length < n:
        hashes = hashes[:-length] * np.uint64(factor) + hashes[length:]
        factor, length = factor * factor % 2**64, 2 * length
    hashes ^= hashes >> np.uint64(32)
    hashes *= np.uint64(_FACTOR)
    return hashes ^ (hashes >> np.uint64(29))


def _rensa() -> Any:
    os.environ.setdefault("RAYON_NUM_THREADS", "1")  # the workers are processes
    try:
        import rapidfuzz  # noqa: F401 (what the texts are compared with afterwards)
        import rensa
    except ImportError as error:
        raise DataError(
            "near-duplicate removal needs rensa and rapidfuzz; pip install 'fathom[data]', or dedup='exact'"
        ) from error
    return rensa
