"""From documents to ids (report §4.1): encoded, some filled in the middle, some tokens split again.

Only what is trained on is changed so. Held-out text stays as it is: its loss and bits per byte are those of the text.
What is drawn for a document depends on its content and the seed (`Piece.order`), so neither on workers nor on the order
of reading.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from fathom.data.boundary import MergedTokens
from fathom.data.fim import FimTokens, Parts, cut
from fathom.data.split import Piece
from fathom.data.tokenizer import Tokenizer

STRETCH = 1_000_000  # characters; an encoding takes some 100 bytes per token while it is made


class Encoder:
    """Pieces to ids, without end-of-sentence."""

    def __init__(
        self, tokenizer: Tokenizer, dtype: np.dtype, fim_rate: float = 0.0, split_rate: float = 0.0
    ) -> None:
        """Raises `DataError` for a rate that this tokenizer cannot follow."""
        self.tokenizer, self.dtype = tokenizer, dtype
        self.fim_rate, self.split_rate = fim_rate, split_rate
        self._fim = FimTokens.of(tokenizer) if fim_rate else None
        self._merged = MergedTokens.of(tokenizer) if split_rate else None
        if self._merged:
            self._merged.check(split_rate)

    def ids(self, pieces: Sequence[Piece]) -> list[np.ndarray]:
        """The ids of each piece."""
        cuts = [self._cut(piece) for piece in pieces]
        texts = [parts or (piece.text,) for piece, parts in zip(pieces, cuts, strict=True)]
        encoded = self._encoded(text for some in texts for text in some)
        found = [self._arranged(parts, encoded) for parts in cuts]
        return [self._split(piece, ids) for piece, ids in zip(pieces, found, strict=True)]

    def _cut(self, piece: Piece) -> Parts | None:
        return None if piece.held_out else cut(piece.text, self.fim_rate, piece.order)

    def _encoded(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        parts = [list(self.tokenizer.stretches(text, STRETCH)) for text in texts]
        ids = iter(self.tokenizer.encode_batch([part for text in parts for part in text]))
        return (np.concatenate([np.array(next(ids), self.dtype) for _ in text]) for text in parts)

    def _arranged(self, parts: Parts | None, encoded: Iterator[np.ndarray]) -> np.ndarray:
        if parts is None or self._fim is None:
            return next(encoded)
        prefix, middle, suffix = (next(encoded).tolist() for _ in parts)
        return np.array(self._fim.arranged(prefix, middle, suffix), self.dtype)

    def _split(self, piece: Piece, ids: np.ndarray) -> np.ndarray:
        if self._merged is None or piece.held_out:
            return ids
        return self._merged.split(ids, self.split_rate, piece.order)
