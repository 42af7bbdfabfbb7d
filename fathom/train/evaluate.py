"""Loss on text that is never trained on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fathom.data.loader import held_out_batches
from fathom.data.prepared import TokenData
from fathom.model import Transformer
from fathom.model.objective import Rows, losses_of
from fathom.model.transformer import Trunk
from fathom.parallel import Parallel
from fathom.train.reading import summed

TOKENS_AT_A_TIME = 4096
"""At least so many, since small products are slow."""


@dataclass(frozen=True)
class HeldOut:
    """Mean cross-entropy per token in nats, bits per byte of text, and depth-averaged MTP loss."""

    loss: float
    bits_per_byte: float
    mtp_loss: float
    tokens: int


def bits_per_byte(loss: float, bytes_per_token: float) -> float:
    """Nats per token as bits per byte, which vocabularies of any size share."""
    return loss / math.log(2) / bytes_per_token


def evaluate(
    model: Transformer,
    data: TokenData,
    seq_len: int,
    batch: int,
    limit_tokens: int | None = None,
    mtp: bool = True,
    parallel: Parallel | None = None,
) -> HeldOut:
    """Held-out loss over windows of `seq_len`, of the first `limit_tokens` tokens or of all.

    `batch` windows at a time on each rank, more of them where they are short. `parallel`: of the ranks that hold the
    model; then all of them together, and all get the same.
    """
    batch = max(batch, TOKENS_AT_A_TIME // seq_len) * (parallel.mesh.dp.size if parallel else 1)
    windows = held_out_batches(data.held_out, seq_len, batch, limit_tokens)
    loss, mtp_loss, tokens = summed(model, windows, _losses, 3, mtp, parallel).tolist()
    mean = loss / tokens
    per_byte = bits_per_byte(mean, data.bytes_per_token("held_out"))
    return HeldOut(mean, per_byte, mtp_loss / tokens, round(tokens))


def _losses(model: Transformer, trunk: Trunk, rows: Rows) -> Tensor:
    """Both losses summed over targets, and how many these are; float64 [3]."""
    found = losses_of(model, trunk, rows, mtp_weight=1.0, balance_alpha=0.0)
    count = rows.targets.numel()
    main, mtp = found.main.item() * count, found.mtp.item() * count
    return torch.tensor([main, mtp, count], dtype=torch.float64)
