"""Packing (report §4.1): documents in a shuffled order, end-of-sentence after each, one file of tokens per side."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import numpy as np

from fathom.data.split import Piece
from fathom.data.tokenizer import Tokenizer
from fathom.data.vocabulary import stretches
from fathom.errors import DataError

SIDES = ("train", "held_out")
_BATCH_CHARACTERS = 2_000_000  # an encoding takes some 100 bytes per token while it is made


@dataclass
class Packed:
    """What was written: pieces, bytes of text, tokens and sha256 for each side, and how a token is stored."""

    dtype: str
    documents: dict[str, int] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    sha256: dict[str, str] = field(default_factory=dict)


@dataclass
class _Index:
    """Where the pieces of one side lie among the encoded tokens."""

    order: list[int] = field(default_factory=list)
    start: list[int] = field(default_factory=list)
    length: list[int] = field(default_factory=list)
    bytes: int = 0

    def add(self, piece: Piece, start: int, length: int) -> None:
        self.order.append(piece.order)
        self.start.append(start)
        self.length.append(length)
        self.bytes += len(piece.text.encode())


def pack(folder: Path, pieces: Iterable[Piece], tokenizer: Tokenizer, end_last: bool) -> Packed:
    """Write train.bin and held_out.bin into `folder`.

    Pieces are encoded as they come and put in order afterwards, so that memory never holds the corpus.
    `end_last`: whether the last piece ends a document too (not so when documents were cut in two).
    """
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    unordered = folder / "unordered.bin"
    index = _encode(unordered, pieces, tokenizer, dtype)
    tokens = (
        np.memmap(unordered, dtype=dtype, mode="r")
        if unordered.stat().st_size
        else np.empty(0, dtype)
    )
    packed = Packed(dtype.str)
    for side in SIDES:
        _write_side(folder, side, index[side], tokens, end_last, packed)
    del tokens
    unordered.unlink()
    return packed


def _encode(
    path: Path, pieces: Iterable[Piece], tokenizer: Tokenizer, dtype: np.dtype
) -> dict[str, _Index]:
    """Encode every piece, each with end-of-sentence behind it, in the order of reading."""
    index = {side: _Index() for side in SIDES}
    start = written = 0
    with open(path, "wb") as file:
        for batch in _batches(pieces):
            for (_, ended), ids in zip(
                batch, tokenizer.encode_batch([part for part, _ in batch]), strict=True
            ):
                ids = ids if ended is None else [*ids, tokenizer.eos_id]
                file.write(np.array(ids, dtype).tobytes())
                written += len(ids)
                if ended is not None:
                    index[SIDES[ended.held_out]].add(ended, start, written - start)
                    start = written
    return index


def _batches(pieces: Iterable[Piece]) -> Iterator[list[tuple[str, Piece | None]]]:
    """Parts of text of a bounded size together; the last part of a piece comes with the piece."""
    batch: list[tuple[str, Piece | None]] = []
    size = 0
    for piece in pieces:
        *parts, last = stretches(piece.text)
        for part, ended in [*((part, None) for part in parts), (last, piece)]:
            batch.append((part, ended))
            size += len(part)
            if size >= _BATCH_CHARACTERS:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _write_side(
    folder: Path, side: str, index: _Index, tokens: np.ndarray, end_last: bool, packed: Packed
) -> None:
    digest, count = sha256(), 0
    order = np.argsort(np.array(index.order, np.uint64), kind="stable")
    with open(folder / f"{side}.bin", "wb") as file:
        for rank, i in enumerate(order, 1):
            length = index.length[i] - (not end_last and rank == len(order))
            content = tokens[index.start[i] : index.start[i] + length].tobytes()
            digest.update(content)
            file.write(content)
            count += length
    if count < 2:
        raise DataError(
            f"the {side.replace('_', '-')} part has {count} tokens and at least 2 are needed; "
            f"give more text or another held_out"
        )
    packed.documents[side], packed.bytes[side] = len(order), index.bytes
    packed.tokens[side], packed.sha256[side] = count, digest.hexdigest()
