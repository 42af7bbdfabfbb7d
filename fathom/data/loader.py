"""Batches of tokens (report §4.1): packed documents cut into windows, in an order that is a pure function of the seed.

There is no state to save or to restore: sequence number n of a seed is the same whenever and wherever it is asked for,
on whichever of however many ranks. A rank reads every so-many-th row of the global batch, and a run goes on with the
same tokens on another number of ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fathom.data.mixture import Mixture
from fathom.errors import DataError


class TokenArray(Protocol):
    """What is read from: an array of tokens, in memory or mapped."""

    def __len__(self) -> int: ...

    def __getitem__(self, positions: Any) -> np.ndarray: ...


@dataclass(frozen=True)
class Batch:
    """Sequences of one step."""

    tokens: Tensor
    """int64 [B, T + 1]."""
    document_ids: Tensor | None = None
    """int64 [B, T + 1], where tokens are to see their own document only."""
    sources: dict[str, int] = field(default_factory=dict)
    """Sequences from each source."""

    def targets(self) -> Tensor:
        """Tokens of each sequence that are to be predicted, int64 [B]: all but the first of each document, or of the
        window where documents are not told apart."""
        if self.document_ids is None:
            return torch.full((len(self.tokens),), self.tokens.shape[1] - 1)
        return (self.document_ids[:, 1:] == self.document_ids[:, :-1]).sum(1)


class Ring:
    """Training windows of `tokens`, taken as a ring: each epoch cuts it at a random place into windows of `seq_len`
    targets and permutes them, so every epoch sees each target once, but for a rest shorter than a window that is
    another one in each epoch."""

    def __init__(
        self,
        tokens: TokenArray,
        seq_len: int,
        seed: int,
        number: int = 0,
        documents: np.ndarray | None = None,
    ) -> None:
        """`number` tells the rings of one seed apart; `documents`: where each begins, to tell them apart too.

        Raises `DataError` when `tokens` is shorter than one sequence of seq_len + 1.
        """
        if len(tokens) < seq_len + 1:
            raise DataError(
                f"the corpus has {len(tokens)} training tokens, one sequence needs {seq_len + 1}; "
                f"give more text or a shorter seq_len"
            )
        self.tokens, self.seq_len, self.seed = tokens, seq_len, seed
        self.number, self.documents = number, documents
        self.sequences_per_epoch = len(tokens) // seq_len
        self._cached: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def read(self, sequence: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Tokens [seq_len + 1] of a sequence, and the document that each belongs to."""
        positions = (self._start(sequence) + np.arange(self.seq_len + 1)) % len(self.tokens)
        tokens = np.asarray(self.tokens[positions]).astype(np.int64)
        if self.documents is None:
            return tokens, None
        return tokens, np.searchsorted(self.documents, positions, side="right")

    def _start(self, sequence: int) -> int:
        epoch, place = divmod(sequence, self.sequences_per_epoch)
        cached = self._cached
        if cached[0] != epoch:
            cached = self._cached = (epoch, self._starts(epoch))
        return int(cached[1][place])

    def _starts(self, epoch: int) -> np.ndarray:
        """Where the windows of an epoch begin, in the order in which they are trained on.

        From raw random bits and a stable sort: unlike numpy's shuffles these are the same in every version.
        """
        key = np.array([self.seed % 2**64, (self.number << 32) + epoch], np.uint64)
        bits = np.random.Philox(key=key)
        order = np.argsort(bits.random_raw(self.sequences_per_epoch), kind="stable")
        offset = int(bits.random_raw()) % len(self.tokens)
        return order * self.seq_len + offset


class Loader:
    """Sequences of one stage: one ring, or several mixed by weight."""

    def __init__(
        self,
        rings: Mapping[str, Ring],
        mixture: Mixture | None = None,
        begun: Mapping[str, int] | None = None,
    ) -> None:
        """`begun`: sequences of each ring that earlier stages have read, where this one goes on with them."""
        assert mixture is not None or len(rings) == 1
        self.rings, self.mixture, self.begun = dict(rings), mixture, dict(begun or {})

    @classmethod
    def of(cls, tokens: TokenArray, seq_len: int, seed: int) -> Loader:
        """All of one array."""
        return cls({"all": Ring(tokens, seq_len, seed)})

    def batch(self, first_sequence: int, count: int, rank: int = 0, ranks: int = 1) -> Batch:
        """Sequences first_sequence … first_sequence + count - 1 of the whole batch, of which this rank has every
        `ranks`-th. Raises `DataError` when there is none for it."""
        if rank >= count:
            raise DataError(
                f"a batch of {count} sequences leaves none for rank {rank} of {ranks}; "
                f"use a larger batch or fewer ranks"
            )
        places = [self._place(first_sequence + i) for i in range(rank, count, ranks)]
        read = [self.rings[name].read(number) for name, number in places]
        tokens = _stack([tokens for tokens, _ in read])
        ids = [documents for _, documents in read if documents is not None]
        sources = dict(Counter(name for name, _ in places))
        assert tokens is not None
        return Batch(tokens, _stack(ids) if ids else None, sources)

    def sources(self, first_sequence: int, count: int) -> dict[str, int]:
        """How many of the whole batch's sequences are from each source; nothing is read for it."""
        return dict(Counter(self._place(first_sequence + i)[0] for i in range(count)))

    def _place(self, sequence: int) -> tuple[str, int]:
        if self.mixture is None:
            name, number = next(iter(self.rings)), sequence
        else:
            name, number = self.mixture.place(sequence)
        return name, number + self.begun.get(name, 0)


def _stack(rows: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(rows))


class Ahead:
    """Reads the next batch in a thread while the model works on this one."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader
        self._thread = ThreadPoolExecutor(1, "reading-ahead")
        self._next: tuple[tuple[int, int], Future[Batch]] | None = None

    def batch(self, wanted: tuple[int, int], then: tuple[int, int] | None) -> Batch:
        """The batch `wanted` = (first sequence, count), and a beginning with the one `then`."""
        ready = self._next if self._next and self._next[0] == wanted else None
        batch = ready[1].result() if ready else self.loader.batch(*wanted)
        self._next = (then, self._thread.submit(self.loader.batch, *then)) if then else None
        return batch

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(cancel_futures=True)


def held_out_batches(
    tokens: TokenArray, seq_len: int, batch: int, limit_tokens: int | None = None
) -> Iterator[Tensor]:
    """int64 [<= batch, seq_len + 1] windows in which every token but the first is a target exactly once.

    What is left at the end comes as one shorter row. `limit_tokens` stops after the first that many tokens.
    """
    length = len(tokens) if limit_tokens is None else min(limit_tokens, len(tokens))
    targets = length - 1
    whole = max(targets, 0) // seq_len
    within = np.arange(seq_len + 1)
    for first in range(0, whole, batch):
        starts = np.arange(first, min(first + batch, whole)) * seq_len
        yield torch.from_numpy(np.asarray(tokens[starts[:, None] + within]).astype(np.int64))
    if whole * seq_len < targets:
        rest = np.arange(whole * seq_len, length)
        yield torch.from_numpy(np.asarray(tokens[rest[None]]).astype(np.int64))
