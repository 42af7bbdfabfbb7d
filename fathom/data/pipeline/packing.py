"""Packing (report §4.1): documents in a shuffled order, end-of-sentence after each, in shards of a bounded size.

The order is that of the documents' hashes, which makes it a bucket sort: a bucket is a range of hashes, its part of
every encoded stretch lies together there, and sorted in memory it is a shard. How many buckets there are depends on the
number of tokens alone.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from hashlib import sha256
from itertools import pairwise
from pathlib import Path

import numpy as np

from fathom.data.pipeline.encoding import ENTRY
from fathom.data.pipeline.work import finishing
from fathom.files import sha256_of

SHARD_BYTES = 128_000_000
"""About how large a shard may become."""


@dataclass(frozen=True)
class ShardRecord:
    """One shard as the manifest has it: `file`.bin holds tokens, `file`.npy the documents' index."""

    file: str
    tokens: int
    documents: int
    bytes: int
    sha256: str
    index_sha256: str


@dataclass(frozen=True)
class Bucket:
    """The hashes from low to high (excluded) of one side, which become one shard."""

    side: str
    low: int
    high: int
    last: bool
    """Whether no document comes after it."""


def buckets(side: str, pieces: list[Path], size: int = SHARD_BYTES) -> list[Bucket]:
    """The buckets of one side of a source that hold any document."""
    hashes = [np.load(piece / f"{side}.npy", mmap_mode="r")["hash"] for piece in pieces]
    whole = sum((piece / f"{side}.bin").stat().st_size for piece in pieces)
    count = 1
    while whole > size * count:
        count *= 2
    edges = [2**64 * i // count for i in range(count + 1)]
    filled = [
        (low, high) for low, high in pairwise(edges) if any(_between(h, low, high) for h in hashes)
    ]
    return [Bucket(side, *edge, last=edge == filled[-1]) for edge in filled]


def _between(hashes: np.ndarray, low: int, high: int) -> bool:
    first, last = _range(hashes, low, high)
    return first < last


def _range(hashes: np.ndarray, low: int, high: int) -> tuple[int, int]:
    """Where the hashes of a bucket begin and end in a sorted array."""
    first = int(np.searchsorted(hashes, np.uint64(low)))
    last = len(hashes) if high == 2**64 else int(np.searchsorted(hashes, np.uint64(high)))
    return first, last


def pack_bucket(
    bucket: Bucket, pieces: list[Path], dtype: str, end_last: bool, name: str, piece: Path
) -> int:
    """Merge a bucket into the folder `piece`: the shard `name` and record.json, its `ShardRecord`.

    Gives the bytes of its tokens.

    end_last: whether the last document of all ends with its end-of-sentence too (not where documents were cut in two).
    """
    parts = [_part(path, bucket, np.dtype(dtype)) for path in pieces]
    index = np.concatenate([np.empty(0, ENTRY), *(entries for entries, _ in parts)])
    documents = [ids for _, texts in parts for ids in texts]
    order = np.argsort(index["hash"], kind="stable")
    lengths = np.array([len(ids) for ids in documents], np.int64)[order]
    index = index[order]
    index["start"] = np.cumsum(lengths) - lengths
    tokens = np.concatenate([documents[i] for i in order])
    if bucket.last and not end_last:
        tokens = tokens[:-1]
    with finishing(piece) as folder:
        record = _write(folder, name, tokens, index)
        (folder / "record.json").write_text(json.dumps(asdict(record)), encoding="utf-8")
    return tokens.nbytes


def _part(piece: Path, bucket: Bucket, dtype: np.dtype) -> tuple[np.ndarray, list[np.ndarray]]:
    """The bucket's entries and documents of one encoded stretch."""
    index = np.load(piece / f"{bucket.side}.npy")
    first, last = _range(index["hash"], bucket.low, bucket.high)
    if first == last:
        return index[:0], []
    path = piece / f"{bucket.side}.bin"
    end = int(index["start"][last]) if last < len(index) else path.stat().st_size // dtype.itemsize
    begin = int(index["start"][first])
    tokens = np.fromfile(path, dtype, end - begin, offset=begin * dtype.itemsize)
    return index[first:last], np.split(tokens, index["start"][first + 1 : last] - begin)


def _write(folder: Path, name: str, tokens: np.ndarray, index: np.ndarray) -> ShardRecord:
    tokens.tofile(folder / f"{name}.bin")
    np.save(folder / f"{name}.npy", index)
    return ShardRecord(
        file=name,
        tokens=len(tokens),
        documents=len(index),
        bytes=int(index["bytes"].sum()),
        sha256=sha256(tokens.data).hexdigest(),
        index_sha256=sha256_of(folder / f"{name}.npy"),
    )


def read_record(piece: Path) -> ShardRecord:
    """What `pack_bucket` left."""
    return ShardRecord(**json.loads((piece / "record.json").read_text(encoding="utf-8")))
