"""Batches of tokens (report §4.1): packed documents cut into windows, in an order that is a pure function of the seed.

There is no state to save or to restore: sequence number n of a seed is the same whenever and wherever it is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from fathom.data.shards import Tokens
from fathom.errors import DataError


class Loader:
    """Training windows of `tokens`, taken as a ring: each epoch cuts it at a random place into windows of `seq_len`
    targets and permutes them, so every epoch sees each target once, but for a rest shorter than a window that is
    another one in each epoch."""

    def __init__(self, tokens: np.ndarray | Tokens, seq_len: int, seed: int) -> None:
        """Raises `DataError` when `tokens` is shorter than one sequence of seq_len + 1."""
        if len(tokens) < seq_len + 1:
            raise DataError(
                f"the corpus has {len(tokens)} training tokens, one sequence needs {seq_len + 1}; "
                f"give more text or a shorter seq_len"
            )
        self.tokens, self.seq_len, self.seed = tokens, seq_len, seed
        self.sequences_per_epoch = len(tokens) // seq_len
        self._cached: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def batch(self, first_sequence: int, count: int) -> Tensor:
        """Sequences first_sequence ... first_sequence + count - 1, int64 [count, seq_len + 1]."""
        starts = [self._start(first_sequence + i) for i in range(count)]
        positions = (np.array(starts)[:, None] + np.arange(self.seq_len + 1)) % len(self.tokens)
        return torch.from_numpy(self.tokens[positions].astype(np.int64))

    def _start(self, sequence: int) -> int:
        epoch, place = divmod(sequence, self.sequences_per_epoch)
        if self._cached[0] != epoch:
            self._cached = (epoch, self._starts(epoch))
        return int(self._cached[1][place])

    def _starts(self, epoch: int) -> np.ndarray:
        """Where the windows of an epoch begin, in the order in which they are trained on.

        From raw random bits and a stable sort: unlike numpy's shuffles these are the same in every version.
        """
        bits = np.random.Philox(key=np.array([self.seed % 2**64, epoch], np.uint64))
        order = np.argsort(bits.random_raw(self.sequences_per_epoch), kind="stable")
        offset = int(bits.random_raw()) % len(self.tokens)
        return order * self.seq_len + offset


def held_out_batches(
    tokens: np.ndarray | Tokens, seq_len: int, batch: int, limit_tokens: int | None = None
) -> Iterator[Tensor]:
    """int64 [<= batch, seq_len + 1] windows in which every token but the first is a target exactly once.

    What is left at the end comes as one shorter row. `limit_tokens` stops after the first that many tokens.
    """
    tokens = tokens[:limit_tokens]
    targets = len(tokens) - 1
    whole = max(targets, 0) // seq_len
    within = np.arange(seq_len + 1)
    for first in range(0, whole, batch):
        starts = np.arange(first, min(first + batch, whole)) * seq_len
        yield torch.from_numpy(tokens[starts[:, None] + within].astype(np.int64))
    if whole * seq_len < targets:
        yield torch.from_numpy(tokens[None, whole * seq_len :].astype(np.int64))
