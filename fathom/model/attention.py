"""Multi-head Latent Attention (report §2.1.1, eqs 1-11).

    c_Q = RMSNorm(W_DQ h)     (6)     q_i = [W_UQ_i c_Q ; RoPE(W_QR_i c_Q)]                (7-9)
    c   = RMSNorm(W_DKV h)    (1)     k_i = [W_UK_i c ; RoPE(W_KR h)]                      (2-4)
    v_i = W_UV_i c            (5)     u   = W_O [softmax(q_i k_i^T / sqrt(d)) v_i]         (10-11)

The projections keep their released names: q_a_proj (W_DQ), q_b_proj (W_UQ and W_QR by head),
kv_a_proj_with_mqa (W_DKV and W_KR), kv_b_proj (W_UK and W_UV by head), o_proj (W_O). Without
`q_lora_rank` one q_proj replaces the first two. Training and prefill expand the latent; decoding
absorbs W_UK and W_UV (see `fathom.kernels.attention`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fathom import kernels
from fathom.model.config import ModelConfig
from fathom.model.context import Context
from fathom.model.layers import LATENT_EPS, Linear, RMSNorm
from fathom.model.rope import softmax_scale


class Attention(nn.Module):
    """One layer's MLA."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.shape = kernels.HeadShape(
            config.num_attention_heads,
            config.qk_nope_head_dim,
            config.qk_rope_head_dim,
            config.v_head_dim,
        )
        D, H = config.hidden_size, config.num_attention_heads
        if config.q_lora_rank is None:
            self.q_proj = Linear(D, H * config.qk_head_dim)
        else:
            self.q_a_proj = Linear(D, config.q_lora_rank)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_EPS)
            self.q_b_proj = Linear(config.q_lora_rank, H * config.qk_head_dim)
        self.kv_a_proj_with_mqa = Linear(D, config.cache_dim)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, LATENT_EPS)
        self.kv_b_proj = Linear(
            config.kv_lora_rank, H * (config.qk_nope_head_dim + config.v_head_dim)
        )
        self.o_proj = Linear(H * config.v_head_dim, D)
        self.scale = softmax_scale(config)
        self.recompute = False

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        latent, k_rope = self._compress(x_BTD, context)
        q_raw = self._queries(x_BTD)
        if context.cache is None:
            heads = self.expanded(q_raw, latent, k_rope, context)
        else:
            heads = context.cache.attend(self, q_raw, latent, k_rope, context)
        return self.o_proj(heads)

    def _compress(self, x_BTD: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """Normed latent [B, T, C] (eq 1) and the shared rotated key [B, T, R] (eq 3)."""
        C, R = self.config.kv_lora_rank, self.config.qk_rope_head_dim
        latent, k_rope = self.kv_a_proj_with_mqa(x_BTD).split((C, R), dim=-1)
        k_rope = kernels.rotate(k_rope[:, :, None], context.rotation)
        return self.kv_a_layernorm(latent), k_rope[:, :, 0]

    def _queries(self, x_BTD: Tensor) -> Tensor:
        """Unrotated queries of all heads [B, T, H*(P+R)] (eqs 6-8)."""
        if self.config.q_lora_rank is None:
            return self.q_proj(x_BTD)
        latent = self.q_a_layernorm(self.q_a_proj(x_BTD))
        return self._up(self.q_b_proj, latent)

    def _up(self, projection: Linear, latent: Tensor) -> Tensor:
        """An up-projection, made again in the backward pass when recomputing (report §3.2.3)."""
        up = projection(latent)
        if self.recompute:
            kernels.remember(up, projection, latent)
        return up

    def expanded(self, q_raw: Tensor, latent: Tensor, k_rope: Tensor, context: Context) -> Tensor:
        """Heads [B, T, H*V] of tokens that see each other only (eqs 2-10)."""
        layout = kernels.Expansion(self.shape, context.rotation, self.scale, context.visible)
        kv_raw = self._up(self.kv_b_proj, latent)
        return kernels.expanded_attention(q_raw, kv_raw, k_rope, layout, self.recompute)

    def absorbed(self, q_raw: Tensor, entries_BSX: Tensor, context: Context) -> Tensor:
        """The same of the last T of S cached tokens, in the latent space."""
        s = self.shape
        q = q_raw.view(*q_raw.shape[:2], s.heads, s.qk)
        q_rope = kernels.rotate(q[..., s.nope :], context.rotation)
        mask = None if context.visible.mask is None else context.visible.mask[:, 0]
        return kernels.absorbed_attention(
            q[..., : s.nope],
            q_rope,
            entries_BSX,
            self.up_by_head(q.dtype),
            s.nope,
            self.scale,
            mask,
        )

    def up_by_head(self, dtype: torch.dtype) -> Tensor:
        """W_UK and W_UV of each head, [H, P+V, C]."""
        return self.kv_b_proj.weight.to(dtype).view(
            self.shape.heads, self.shape.nope + self.shape.value, -1
        )
