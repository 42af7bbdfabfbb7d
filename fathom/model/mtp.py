"""Multi-token prediction (report §2.2, eqs 21-25).

Module k joins what is known at position i with the embedding of token i + k and runs one whole
block, so that it can predict token i + k + 1:

    h'_i = M_k [RMSNorm(h_i^{k-1}) ; RMSNorm(Emb(t_{i+k}))]   (21)      h^k = TRM_k(h')   (22)

Modules are sequential: module k reads module k - 1, so the causal chain stays whole. Its target is
one token beyond the last it has seen, so it cannot copy. Embedding and head are the main model's.

Two choices the report leaves open, or differs in from the released weights (docs/choices.md),
are settings: the order of the two halves (released: embedding first; eq 21 prints hidden first) and
whether h^{k-1} is taken after the norm that precedes the head (`post_norm`, what engines that run
the released weights do) or before it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fathom.model.block import Block
from fathom.model.config import ModelConfig
from fathom.model.context import Context
from fathom.model.layers import Linear, RMSNorm


class SharedHead(nn.Module):
    """The module's own norm before the output head that it shares with the main model."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class MTPModule(Block):
    """Prediction depth `depth` (1, 2, ...): norms, eh_proj, one block, the shared head's norm."""

    def __init__(self, config: ModelConfig, depth: int) -> None:
        super().__init__(config, config.num_hidden_layers + depth - 1)
        self.embedding_first = config.mtp_concat_order == "embedding_first"
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size)
        self.shared_head = SharedHead(config)

    def normed(self, h_BTD: Tensor) -> Tensor:
        """h^k as the shared output head reads it."""
        return self.shared_head.norm(h_BTD)

    def predict(self, h_BTD: Tensor, e_BTD: Tensor, context: Context) -> Tensor:
        """States h^{k-1} and the embeddings of the tokens k further on -> h^k (eqs 21-22).

        All are [B, T-k, D].
        """
        return self(self.join(h_BTD, e_BTD), context)

    def join(self, h: Tensor, e: Tensor) -> Tensor:
        """h' of eq 21, [..., D], of states and embeddings of that shape."""
        e, h = self.enorm(e), self.hnorm(h)
        return self.eh_proj(torch.cat((e, h) if self.embedding_first else (h, e), dim=-1))
