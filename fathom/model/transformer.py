"""The whole model (report §2): embedding, blocks, final norm, output head, and the MTP modules.

Built for one device and without knowledge of processes, training or serving. Matrix products and
dispatch are the two seams through which precision and parallelism come in from outside.

Shapes: B batch, T positions, D hidden, V vocabulary, E experts, M MoE blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from fathom.model.attention import Attention
from fathom.model.block import Block
from fathom.model.cache import LatentCache
from fathom.model.config import ModelConfig
from fathom.model.context import Context, RouterRecord, build_context
from fathom.model.layers import MLP, Linear, RMSNorm
from fathom.model.moe import Experts
from fathom.model.mtp import MTPModule
from fathom.model.rope import RotaryTable, softmax_scale
from fathom.model.router import Router


@dataclass
class ModelOutput:
    """What a forward pass gives.

    logits [B, T, V]; mtp_logits: for depth k = 1..D a tensor [B, T-k, V] whose row i predicts token
    i + k + 1; expert_load: int64 [M, E], tokens sent to each expert of each MoE block (main blocks
    first, then MTP's).
    """

    logits: Tensor
    mtp_logits: list[Tensor]
    expert_load: Tensor


@dataclass
class Trunk:
    """Hidden states right before the output head, and the routers' records.

    hidden [B, T, D]; mtp_hidden: for depth k a tensor [B, T-k, D]; state [B, T, D]: h^0, what the
    first MTP module reads.
    """

    hidden: Tensor
    mtp_hidden: list[Tensor]
    routers: list[RouterRecord]
    state: Tensor


class Decoder(nn.Module):
    """Everything but the output head; called `model` so that tensors have their released names."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        depths = range(1, config.num_nextn_predict_layers + 1)
        self.mtp = nn.ModuleList(MTPModule(config, depth) for depth in depths)


class Transformer(nn.Module):
    """A model of the DeepSeek-V3 family, initialised as in report §4.2; meta device works too."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.rotary = RotaryTable(config)
        self.compute_dtype: torch.dtype | None = None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Normal weights of the configured deviation (report: 0.006), norms one, biases zero.

        `fathom.model.initial` draws the same numbers for parts of a model, in this order.
        """
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight  # type: ignore[assignment]
        for buffer in self.buffers():
            buffer.zero_()
        for parameter in self.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, self.config.initializer_range)

    def forward(
        self,
        tokens: Tensor,
        attention_mask: Tensor | None = None,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: LatentCache | None = None,
        mtp: bool = True,
    ) -> ModelOutput:
        """Logits of int64 tokens [B, T].

        attention_mask [B, S]: 0 on padding, over cached and new tokens. positions [B, T]: where
        each token stands, by default behind the cache. document_ids [B, T]: tokens see their own
        document only (runs of equal ids). With a cache the new tokens are appended to it and MTP is
        left out.
        """
        trunk = self.trunk(
            tokens, attention_mask, positions, document_ids, cache, mtp=mtp and cache is None
        )
        return ModelOutput(
            self.lm_head(trunk.hidden),
            [self.lm_head(hidden) for hidden in trunk.mtp_hidden],
            self.stack_loads(trunk.routers),
        )

    def trunk(
        self,
        tokens: Tensor,
        attention_mask: Tensor | None = None,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: LatentCache | None = None,
        mtp: bool = True,
        keep_scores: bool = False,
    ) -> Trunk:
        """The pass up to the output head, with `forward`'s arguments.

        `keep_scores` keeps the affinities, for the balance loss.
        """
        context = build_context(
            self.config,
            self.rotary,
            tokens,
            attention_mask,
            positions,
            document_ids,
            cache,
            keep_scores,
        )
        trunk = self.read(tokens, context, mtp)
        if cache is not None:
            cache.advance(tokens.shape[1])
        return trunk

    def read(self, tokens: Tensor, context: Context, mtp: bool = False) -> Trunk:
        """`trunk` within a context that is the caller's: positions, visibility, cache."""
        embedded = self.embed(tokens)
        raw = embedded
        for layer in self.model.layers:
            raw = layer(raw, context)
        return self.finish(raw, embedded if mtp else None, context)

    def finish(self, raw: Tensor, embedded: Tensor | None, context: Context) -> Trunk:
        """What comes behind the last block: the norm, and MTP.

        Of its output and, for MTP, the embeddings, both [B, T, D].
        """
        hidden = self.model.norm(raw)
        depths = (
            self._predict_further(raw, hidden, embedded, context) if embedded is not None else []
        )
        state = hidden if self.config.mtp_hidden == "post_norm" else raw
        return Trunk(hidden, depths, context.routers, state)

    def embed(self, tokens: Tensor) -> Tensor:
        """Embeddings in the compute dtype."""
        embedded = self.model.embed_tokens(tokens)
        return embedded if self.compute_dtype is None else embedded.to(self.compute_dtype)

    def _predict_further(
        self, raw: Tensor, hidden: Tensor, embedded: Tensor, context: Context
    ) -> list[Tensor]:
        """States of the MTP modules before the shared head (eqs 21-22).

        A short sequence has fewer depths.
        """
        post_norm = self.config.mtp_hidden == "post_norm"
        state, found = hidden if post_norm else raw, []
        for depth, mtp in enumerate(self.model.mtp, start=1):
            module = cast(MTPModule, mtp)
            length = embedded.shape[1] - depth
            if length < 1:
                break
            raw = module.predict(state[:, :length], embedded[:, depth:], context.shortened(length))
            found.append(module.normed(raw))
            state = found[-1] if post_norm else raw
        return found

    def stack_loads(self, routers: list[RouterRecord]) -> Tensor:
        """Loads of all MoE blocks, int64 [M, E]."""
        if not routers:
            device = next(self.parameters()).device
            return torch.zeros(0, self.config.n_routed_experts, dtype=torch.int64, device=device)
        return torch.stack([record.load_E for record in routers])

    def routers(self) -> list[Router]:
        """The router of every MoE block in the order of `expert_load`'s rows, MTP's last."""
        return [module for module in self.modules() if isinstance(module, Router)]

    def num_parameters(self) -> int:
        """Parameters, tied ones once; router biases are buffers and not counted."""
        return sum(parameter.numel() for parameter in self.parameters())

    def set_compute_dtype(self, dtype: torch.dtype | None) -> None:
        """Dtype of matrix products and of the residual stream; None: the weights' own.

        The weights themselves stay as they are.
        """
        self.compute_dtype = dtype
        for module in self.modules():
            if isinstance(module, Linear | Experts):
                module.compute_dtype = dtype

    def set_recompute(self, enabled: bool) -> None:
        """Make norms, MLA up-projections and SwiGLU again in backward (report §3.2.3)."""
        for module in self.modules():
            if isinstance(module, RMSNorm | MLP | Experts | Attention):
                module.recompute = enabled

    def set_rope_scaling(self, rope_scaling: dict | None) -> None:
        """Switch YaRN on, off or over between training stages (report §4.3).

        The weights are untouched.
        """
        self.config = self.config.replace(rope_scaling=rope_scaling)
        self.rotary = RotaryTable(self.config)
        for module in self.modules():
            if isinstance(module, Block):
                module.self_attn.config = self.config
                module.self_attn.scale = softmax_scale(self.config)
