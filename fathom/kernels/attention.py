"""Attention over a compressed latent (report eqs 1-11): the expanded form and the absorbed form.

*Expanded*, for training and prefill: keys and values of every head are made from the latent
(k_i = [W_UK_i c ; k_R], v_i = W_UV_i c) and ordinary attention runs over them. Cheap when there are
many queries: T^2 (d_qk + d_v) per head instead of T^2 (2 C + R).

*Absorbed*, for decoding: q_i . (W_UK_i c) = (W_UK_i^T q_i) . c, so the query moves into the latent
space, the cache is attended as it is (one key of C + R numbers shared by all heads), and W_UV is
applied to what comes out. Nothing is expanded; with one query and a long context this is tens of
times less work.

Which is meant is the caller's choice (`fathom.model.attention`); which implementation of the
expanded form runs is decided in `expanded_attention`.

Shapes: B batch, T queries, S keys, H heads, P = nope dims, R rotary dims, V value dims, C latent
rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

from fathom.kernels.attention_cpu import attend_on_cpu
from fathom.kernels.expansion import Expansion
from fathom.kernels.recompute import keep, kept
from fathom.kernels.visible import spans

SCORES = 1 << 24
"""Scores that exist at a time in the absorbed form: 64 MiB in float32."""


def expanded_reference(
    q_BTHd: Tensor, k_BTHd: Tensor, v_BTHv: Tensor, scale: float, mask: Tensor | None = None
) -> Tensor:
    """Eq 10 word for word, softmax in float32: [B, T, H, V]."""
    scores = torch.einsum("bthd,bshd->bhts", q_BTHd, k_BTHd).float() * scale
    if mask is None:
        T = q_BTHd.shape[1]
        mask = torch.ones(T, T, dtype=torch.bool, device=q_BTHd.device).tril()
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1).to(v_BTHv.dtype)
    return torch.einsum("bhts,bshv->bthv", weights, v_BTHv)


class _Again(torch.autograd.Function):
    """Torch's own attention, run again in backward so that only raw projections are kept."""

    @staticmethod
    def forward(
        ctx: Any, q_raw: Tensor, kv_raw: Tensor, k_rope: Tensor, layout: Expansion
    ) -> Tensor:
        keep(ctx, q_raw, kv_raw, k_rope)
        ctx.layout = layout
        return _torch_attention(q_raw, kv_raw, k_rope, layout)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q_raw, kv_raw, k_rope = (tensor.detach().requires_grad_() for tensor in kept(ctx))
        with torch.enable_grad():
            out = _torch_attention(q_raw, kv_raw, k_rope, ctx.layout)
        return (*torch.autograd.grad(out, (q_raw, kv_raw, k_rope), grad_out), None)


def _torch_attention(q_raw: Tensor, kv_raw: Tensor, k_rope: Tensor, layout: Expansion) -> Tensor:
    """Expanded attention by torch's scaled_dot_product_attention, whatever back end it picks."""
    q, k, v = layout.operands(q_raw, kv_raw, k_rope)
    parts = []
    for rows, span in spans(q.shape[0], layout.visible):
        q_piece, k_piece, v_piece = (t[rows, span].transpose(1, 2) for t in (q, k, v))
        part = scaled_dot_product_attention(
            q_piece,
            k_piece,
            v_piece,
            attn_mask=layout.visible.mask,
            is_causal=layout.visible.mask is None,
            scale=layout.scale,
        )
        parts.append(layout.values(part.transpose(1, 2)))
    if layout.visible.segments is None:
        return parts[0].flatten(2)
    pieces = iter(parts)
    rows_out = [torch.cat([next(pieces) for _ in row], dim=1) for row in layout.visible.segments]
    return torch.cat(rows_out).flatten(2)


def expanded_attention(
    q_raw: Tensor,
    kv_raw: Tensor,
    k_rope_BTR: Tensor,
    layout: Expansion,
    recompute: bool = False,
) -> Tensor:
    """Causal attention of raw projections (eqs 4-5, 9-10) -> heads side by side [B, T, H*V].

    q_raw [B, T, H*(P+R)] and kv_raw [B, T, H*(P+V)] as the up-projections give them, `k_rope_BTR`
    already rotated. With `recompute`, back ends other than the CPU's run attention again instead of
    keeping its operands.
    """
    arguments = (q_raw, kv_raw, k_rope_BTR, layout)
    if q_raw.device.type == "cpu":
        return attend_on_cpu(*arguments)
    return _Again.apply(*arguments) if recompute else _torch_attention(*arguments)


def absorbed_attention(
    q_nope_BTHP: Tensor,
    q_rope_BTHR: Tensor,
    cache_BSX: Tensor,
    up_HXC: Tensor,
    nope: int,
    scale: float,
    mask: Tensor | None,
) -> Tensor:
    """Attention in the latent space -> heads side by side [B, T, H*V].

    `cache_BSX` holds [c ; k_R] per token (X = C + R), `up_HXC` is kv_b_proj's weight [H, P+V, C].
    `mask` is bool, broadcast to [B, T, S]; None is the causal rule, the queries being the last T of
    the S tokens. So many queries are taken at a time that `SCORES` scores exist, since a long text
    read behind a long context would have T x S x H of them.
    """
    B, T, H, _ = q_nope_BTHP.shape
    S = cache_BSX.shape[1]
    cache_BSX = cache_BSX.to(q_nope_BTHP.dtype)
    rows = max(1, SCORES // (B * H * S))
    parts = []
    for lo in range(0, T, rows):
        q_nope, q_rope = q_nope_BTHP[:, lo : lo + rows], q_rope_BTHR[:, lo : lo + rows]
        if mask is None:
            seen = _causal(S - T + lo, q_nope.shape[1], S, cache_BSX.device)
        else:
            seen = mask.expand(B, T, S)[:, lo : lo + rows]
        parts.append(_absorbed(q_nope, q_rope, cache_BSX, up_HXC, nope, scale, seen))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _causal(first: int, count: int, length: int, device: torch.device) -> Tensor | None:
    """Keys [1, count, length] that `count` queries from position `first` on see; None for all."""
    if first == length - 1:
        return None
    query = torch.arange(first, first + count, device=device)
    return (torch.arange(length, device=device) <= query[:, None])[None]


def _absorbed(
    q_nope_BTHP: Tensor,
    q_rope_BTHR: Tensor,
    cache_BSX: Tensor,
    up_HXC: Tensor,
    nope: int,
    scale: float,
    mask_BTS: Tensor | None,
) -> Tensor:
    """`absorbed_attention` of all its queries at once; without a mask every key is seen."""
    B, T, H, _ = q_nope_BTHP.shape
    C = up_HXC.shape[2]
    q_latent = torch.matmul(q_nope_BTHP.permute(2, 0, 1, 3).flatten(1, 2), up_HXC[:, :nope])
    q_latent = q_latent.view(H, B, T, C).permute(1, 2, 0, 3)
    q_BQX = torch.cat((q_latent, q_rope_BTHR), dim=-1).view(B, T * H, -1)
    scores = torch.bmm(q_BQX * scale, cache_BSX.transpose(1, 2)).float()
    if mask_BTS is not None:
        hidden = ~mask_BTS.expand(B, T, -1).repeat_interleave(H, dim=1)
        scores = scores.masked_fill(hidden, float("-inf"))
    weights = scores.softmax(-1).to(cache_BSX.dtype)
    attended = (weights @ cache_BSX)[..., :C]  # the whole row: C alone would be copied first
    latent = attended.view(B, T, H, C).permute(2, 0, 1, 3).flatten(1, 2)
    values = torch.matmul(latent, up_HXC[:, nope:].transpose(1, 2))
    return values.view(H, B, T, -1).permute(1, 2, 0, 3).flatten(2)
