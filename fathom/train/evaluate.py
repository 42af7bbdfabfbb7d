"""Loss on text that is never trained on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fathom.data.loader import held_out_batches
from fathom.data.prepared import TokenData
from fathom.model import Transformer, losses

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


@torch.no_grad()
def evaluate(
    model: Transformer,
    data: TokenData,
    seq_len: int,
    batch: int,
    limit_tokens: int | None = None,
    mtp: bool = True,
) -> HeldOut:
    """Held-out loss over windows of `seq_len`, of the first `limit_tokens` tokens or of all.

    `batch` windows at a time, more of them where they are short.
    """
    batch = max(batch, TOKENS_AT_A_TIME // seq_len)
    was_training = model.training
    model.eval()
    device = model.lm_head.weight.device
    loss = mtp_loss = 0.0
    tokens = 0
    for window in held_out_batches(data.held_out, seq_len, batch, limit_tokens):
        found = losses(model, window.to(device), mtp_weight=float(mtp), balance_alpha=0.0)
        count = window.shape[0] * (window.shape[1] - 1)
        loss += found.main.item() * count
        mtp_loss += found.mtp.item() * count
        tokens += count
    model.train(was_training)
    mean = loss / tokens
    per_byte = bits_per_byte(mean, data.bytes_per_token("held_out"))
    return HeldOut(mean, per_byte, mtp_loss / tokens, tokens)
