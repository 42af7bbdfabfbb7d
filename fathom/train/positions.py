"""Held-out loss by position in the window (report §4.3): does more context help, and up to where?

A model that uses its context predicts late positions better than early ones; one that was never
trained at some distance shows it as a loss that rises there. Positions are taken together between
powers of two, [0, 1), [1, 2), [2, 4), ... up to the window's length, so that every doubling of the
context is one number. Text is packed as in training, so a late position may have documents before
it that have nothing to do with it; that is the loss that training sees.

Each bucket's sum comes straight from the chunked head-and-loss rule. Whole logits, 32K positions
times the vocabulary, never exist.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fathom.data.loader import held_out_batches
from fathom.data.prepared import TokenData
from fathom.kernels import linear_cross_entropy
from fathom.model import Transformer
from fathom.model.objective import Rows
from fathom.model.transformer import Trunk
from fathom.parallel import Parallel
from fathom.train.evaluate import TOKENS_AT_A_TIME
from fathom.train.reading import summed


@dataclass(frozen=True)
class PositionLoss:
    """Mean cross-entropy in nats of positions edges[i] ... edges[i + 1] - 1, over `tokens` targets."""

    edges: tuple[int, ...]
    loss: tuple[float, ...]
    tokens: int


def doubling_edges(length: int) -> tuple[int, ...]:
    """0, 1, 2, 4, ... and `length` itself, which ends the last bucket."""
    powers = [1 << n for n in range(length.bit_length()) if 1 << n < length]
    return (0, *powers, length)


def loss_by_position(
    model: Transformer,
    data: TokenData,
    seq_len: int,
    limit_tokens: int,
    parallel: Parallel | None = None,
) -> PositionLoss:
    """Loss of the first `limit_tokens` held-out tokens, one whole window of `seq_len` at least.

    Whole windows only, unless the text is shorter than one: then its own length ends the buckets.
    The model's present rotary settings are used, and nothing of training is touched. `parallel`: of the ranks that
    hold the model; then all of them together, and all get the same.
    """
    windows = max(limit_tokens // seq_len, 1)
    rows = max(TOKENS_AT_A_TIME // seq_len, 1) * (parallel.mesh.dp.size if parallel else 1)
    text = held_out_batches(data.held_out, seq_len, rows, windows * seq_len + 1)
    length = min(seq_len, len(data.held_out) - 1)  # prepared text has a token to predict
    edges = doubling_edges(length)

    def measure(model: Transformer, trunk: Trunk, rows: Rows) -> Tensor:
        counted = torch.tensor([len(rows.tokens)], dtype=torch.float64)
        return torch.cat([_sums(model, trunk.hidden, rows.targets, edges), counted])

    whole = (tokens for tokens in text if tokens.shape[1] == length + 1)
    found = summed(model, whole, measure, len(edges), False, parallel)
    sums, counts = found[:-1], int(found[-1])
    widths = torch.tensor(edges[1:]) - torch.tensor(edges[:-1])
    return PositionLoss(edges, tuple((sums / (widths * counts)).tolist()), edges[-1] * counts)


def _sums(
    model: Transformer, hidden_BTD: Tensor, targets_BT: Tensor, edges: tuple[int, ...]
) -> Tensor:
    """Cross-entropy summed over rows and each bucket's positions, float64 [buckets]."""
    head = model.lm_head
    parts = [
        linear_cross_entropy(
            hidden_BTD[:, lo:hi].flatten(0, 1),
            head.weight,
            targets_BT[:, lo:hi].flatten(),
            head.compute_dtype,
        )
        for lo, hi in pairwise(edges)
    ]
    return torch.stack(parts).cpu().double()
