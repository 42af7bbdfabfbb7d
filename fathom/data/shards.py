"""Tokens on the disk as one long array: memory-mapped shards, read across their borders.

A shard is two files: NAME.bin, the tokens (little-endian uint16 or uint32), and NAME.npy, one `encoding.ENTRY` per
document. Shards are mapped when they are first read and only so many at a time, so that thousands of them cost nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from fathom.data.pipeline.packing import ShardRecord
from fathom.errors import DataError
from fathom.files import sha256_of, write_whole

_VERIFIED = "verified.json"
_MAPPED = 64


class Tokens:
    """Documents one after the other, each with its end-of-sentence token.

    Like a one-dimensional array: `len`, slices, arrays of positions (of any shape), `np.asarray`.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        array: Callable[[int], np.ndarray],
        index: Callable[[int], np.ndarray],
        dtype: np.dtype,
    ) -> None:
        """lengths: tokens of each shard; array(i), index(i): the tokens and the document index of shard i."""
        self._array, self._index, self.dtype = array, index, dtype
        self._ends = np.cumsum([0, *lengths])

    @classmethod
    def of(cls, tokens: np.ndarray, starts: Sequence[int] = (0,)) -> Tokens:
        """An array in memory, documents beginning at `starts`."""
        index = np.zeros(len(starts), [("start", "<i8")])
        index["start"] = starts
        return cls([len(tokens)], lambda i: tokens, lambda i: index, tokens.dtype)

    @classmethod
    def joined(cls, parts: Sequence[Tokens], dtype: np.dtype) -> Tokens:
        """Several one after the other."""
        shards = [(part, i) for part in parts for i in range(len(part._ends) - 1)]
        return cls(
            [int(part._ends[i + 1] - part._ends[i]) for part, i in shards],
            lambda k: shards[k][0]._array(shards[k][1]),
            lambda k: shards[k][0]._index(shards[k][1]),
            dtype,
        )

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start ... stop - 1. Raises `DataError` for a range that is not within them."""
        if not 0 <= start <= stop <= len(self):
            raise DataError(f"tokens {start} to {stop} are asked for of {len(self)}")
        first, last = np.searchsorted(self._ends, (start, stop - 1), side="right") - 1
        parts = [
            self._array(i)[max(0, start - self._ends[i]) : stop - self._ends[i]]
            for i in range(first, last + 1 if start < stop else first)
        ]
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.empty(0, self.dtype)

    def __getitem__(self, key: int | slice | np.ndarray) -> np.ndarray:
        if isinstance(key, int):
            return self.read(key, key + 1)[0]
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            return self.read(start, max(start, stop))[::step]
        positions = np.asarray(key)
        if positions.size and not 0 <= positions.min() <= positions.max() < len(self):
            raise DataError(
                f"positions {positions.min()} to {positions.max()} are asked for of {len(self)} tokens"
            )
        shards = np.searchsorted(self._ends, positions, side="right") - 1
        found = np.empty(positions.shape, self.dtype)
        for i in np.unique(shards):
            chosen = shards == i
            found[chosen] = self._array(int(i))[positions[chosen] - self._ends[i]]
        return found

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.read(0, len(self)).astype(dtype or self.dtype, copy=False)

    @cached_property
    def documents(self) -> np.ndarray:
        """int64 [documents + 1]: the first token of each, and the end."""
        starts = [self._index(i)["start"] + end for i, end in enumerate(self._ends[:-1])]
        return np.concatenate([*starts, self._ends[-1:]]).astype(np.int64)

    def entry(self, document: int) -> np.void:
        """The `ENTRY` of a document (its `start` is within its shard)."""
        for i in range(len(self._ends) - 1):
            index = self._index(i)
            if document < len(index):
                return index[document]
            document -= len(index)
        raise DataError(f"there are {len(self.documents) - 1} documents, {document} is not one")


def open_shards(folder: Path, records: Sequence[ShardRecord], dtype: np.dtype) -> Tokens:
    """The shards of one source and side."""
    paths = [str(folder / record.file) for record in records]
    return Tokens(
        [record.tokens for record in records],
        lambda i: _map_tokens(paths[i], dtype.str),
        lambda i: _map_index(paths[i]),
        dtype,
    )


@lru_cache(_MAPPED)
def _map_tokens(path: str, dtype: str) -> np.ndarray:
    return np.memmap(f"{path}.bin", dtype, "r")


@lru_cache(_MAPPED)
def _map_index(path: str) -> np.ndarray:
    return np.load(f"{path}.npy", mmap_mode="r")


def verify(folder: Path, records: Sequence[ShardRecord], itemsize: int) -> None:
    """Raise `DataError` for a shard that is missing, cut short or altered.

    Hashing terabytes takes long: a file found sound is remembered, by its size and time of change, in a small file
    beside the manifest.
    """
    known = _read_known(folder)
    found: dict[str, list] = {}
    for record in records:
        size = record.tokens * itemsize
        found |= _check(folder, f"{record.file}.bin", record.sha256, size, known)
        found |= _check(folder, f"{record.file}.npy", record.index_sha256, None, known)
    if found != known:
        try:
            write_whole(folder / _VERIFIED, json.dumps(found).encode())
        except OSError:  # a folder that may only be read is verified each time
            return


def _check(
    folder: Path, name: str, sha256: str, size: int | None, known: dict[str, list]
) -> dict[str, list]:
    path, remedy = folder / name, f"remove {folder} and prepare it again"
    if not path.exists():
        raise DataError(f"{path} is missing; {remedy}")
    stat = path.stat()
    if size is not None and stat.st_size != size:
        raise DataError(f"{path} has {stat.st_size} bytes instead of {size}; {remedy}")
    mark = [sha256, stat.st_size, stat.st_mtime_ns]
    if known.get(name) != mark and sha256_of(path) != sha256:
        raise DataError(
            f"{path} was altered since it was prepared (its sha256 is not the manifest's); {remedy}"
        )
    return {name: mark}


def _read_known(folder: Path) -> dict[str, list]:
    try:
        return json.loads((folder / _VERIFIED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
