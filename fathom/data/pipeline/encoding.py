"""Third pass: from text to tokens, a stretch of documents at a time, each with end-of-sentence behind it.

A stretch gives one folder: for each side `SIDE.bin` (its tokens) and `SIDE.npy` (`ENTRY`), both in the order of
training, so that `fathom.data.pipeline.packing` has only to merge.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from fathom.data.pipeline.reading import read_texts
from fathom.data.pipeline.work import finishing
from fathom.data.split import Piece, Split
from fathom.data.text_to_ids import STRETCH, Encoder
from fathom.data.tokenizer import Tokenizer

SIDES = ("train", "held_out")
ENTRY = np.dtype(
    [
        ("start", "<i8"),  # first token, in the file beside the index
        ("bytes", "<i8"),  # of text
        ("hash", "<u8"),  # what the order of training goes by
        ("file", "<i4"),  # where it was found: the number of its file in files.json
        ("row", "<i8"),  # and its line or row there from 1, 0 for a whole file
    ]
)


@dataclass(frozen=True)
class EncodeJob:
    """How texts become tokens."""

    tokenizer: str
    """Folder of the tokenizer."""
    dtype: str
    fim_rate: float = 0.0
    split_rate: float = 0.0


def encode_stretch(
    job: EncodeJob, split: Split, unit: Path, entries: np.ndarray, piece: Path
) -> int:
    """Encode the documents `entries` (`reading.DOCUMENT`) of a unit into the folder `piece`; gives their bytes."""
    encoder, pieces = _encoder(job), _pieces(unit, entries, split)
    sides: dict[str, list[tuple[np.ndarray, tuple]]] = {side: [] for side in SIDES}
    for part, entry, ids in encoded(pieces, encoder):
        size = len(part.text.encode())
        where = (0, size, part.order, entry["file"], entry["row"])
        sides[SIDES[part.held_out]].append((ids, where))
    with finishing(piece) as folder:
        for side, found in sides.items():
            _write(folder, side, found, np.dtype(job.dtype))
    return int(entries["bytes"].sum())


@lru_cache(maxsize=1)
def _encoder(job: EncodeJob) -> Encoder:
    tokenizer = Tokenizer.load(job.tokenizer)
    return Encoder(tokenizer, np.dtype(job.dtype), job.fim_rate, job.split_rate)


def _pieces(unit: Path, entries: np.ndarray, split: Split) -> Iterator[tuple[Piece, np.void]]:
    for text, entry in zip(read_texts(unit, entries), entries, strict=True):
        for piece in split.pieces(text):
            yield piece, entry


def encoded(
    pieces: Iterator[tuple[Piece, np.void]], encoder: Encoder
) -> Iterator[tuple[Piece, np.void, np.ndarray]]:
    """Every piece with its ids, end-of-sentence behind them."""
    end = encoder.dtype.type(encoder.tokenizer.eos_id)
    for batch in _batches(pieces):
        found = encoder.ids([piece for piece, _ in batch])
        for (piece, entry), ids in zip(batch, found, strict=True):
            yield piece, entry, np.append(ids, end)


def _batches(
    pieces: Iterator[tuple[Piece, np.void]],
) -> Iterator[list[tuple[Piece, np.void]]]:
    """Pieces of a bounded size together."""
    batch: list[tuple[Piece, np.void]] = []
    size = 0
    for piece, entry in pieces:
        batch.append((piece, entry))
        size += len(piece.text)
        if size >= STRETCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _write(folder: Path, side: str, found: list[tuple[np.ndarray, tuple]], dtype: np.dtype) -> None:
    index = np.array([where for _, where in found], ENTRY)
    order = np.argsort(index["hash"], kind="stable")
    lengths = np.array([len(ids) for ids, _ in found], np.int64)[order]
    index = index[order]
    index["start"] = np.cumsum(lengths) - lengths
    np.save(folder / f"{side}.npy", index)
    with open(folder / f"{side}.bin", "wb") as file:
        for i in order:
            file.write(found[i][0].astype(dtype, copy=False).tobytes())
