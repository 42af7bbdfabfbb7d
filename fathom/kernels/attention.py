"""Attention over a compressed latent (report eqs 1-11): the expanded form and the absorbed form.

*Expanded*, for training and prefill: keys and values of every head are made from the latent
(k_i = [W_UK_i c ; k_R], v_i = W_UV_i c) and ordinary attention runs over them. Cheap when there are many
queries: T^2 (d_qk + d_v) per head instead of T^2 (2 C + R).

*Absorbed*, for decoding: q_i . (W_UK_i c) = (W_UK_i^T q_i) . c, so the query moves into the latent space, the
cache is attended as it is (one key of C + R numbers shared by all heads), and W_UV is applied to what comes
out. Nothing is expanded; with one query and a long context this is tens of times less work.

Which is meant is the caller's choice (`fathom.model.attention`). Fast path on a CPU: torch's flash
kernel wants equal head sizes, and V3's values are narrower than its keys (128 < 192). Padding V costs a copy; but
kv_b_proj lays each head out as [k_nope | v], so the d_qk numbers that *end* with v are already there: the leading
ones are leftovers of k_nope, whose output columns are dropped and whose gradient is zero.

Shapes: B batch, T queries, S keys, H heads, P = nope dims, R rotary dims, V value dims, C latent rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad, scaled_dot_product_attention

from fathom.kernels.cpu_gemm import fast_products
from fathom.kernels.recompute import keep, kept


@dataclass(frozen=True)
class HeadShape:
    """Heads and their sizes: H heads of P + R query/key dimensions and V value dimensions."""

    heads: int
    nope: int
    rope: int
    value: int

    @property
    def qk(self) -> int:
        return self.nope + self.rope


@dataclass(frozen=True)
class Visible:
    """Which keys a query sees besides the causal rule: nothing more, whole documents, or an explicit mask.

    `segments`: per batch row the (start, end) of each document; `mask`: bool [B or 1, 1, T, S], causality included.
    """

    segments: tuple[tuple[tuple[int, int], ...], ...] | None = None
    mask: Tensor | None = None


ALL = Visible()


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


def turn_pairs(x: Tensor, cos: Tensor, sin: Tensor, interleave: bool) -> Tensor:
    """Rotate the last axis in place by (cos, sin); their negative-sine form undoes it."""
    if interleave:
        a, b = x[..., 0::2], x[..., 1::2]
    else:
        a, b = x.chunk(2, dim=-1)
    turned_a, turned_b = a * cos - b * sin, b * cos + a * sin
    a.copy_(turned_a)
    b.copy_(turned_b)
    return x


class Expansion:
    """The raw projections of one call laid out for attention: rotated queries, whole keys, widened values."""

    def __init__(self, shape: HeadShape, cos: Tensor, sin: Tensor, interleave: bool) -> None:
        self.shape, self.cos, self.sin, self.interleave = shape, cos, sin, interleave
        self.wide_values = shape.value <= shape.qk and shape.qk - shape.value <= shape.nope

    def queries(self, q_raw: Tensor) -> Tensor:
        """[B, T, H*(P+R)] -> [B, T, H, P+R], the last R dimensions rotated (eqs 7-9)."""
        s = self.shape
        q = q_raw.view(*q_raw.shape[:2], s.heads, s.qk).clone()
        turn_pairs(q[..., s.nope :], self.cos, self.sin, self.interleave)
        return pad(q, (0, s.value - s.qk)) if s.value > s.qk else q

    def queries_grad(self, grad_q: Tensor) -> Tensor:
        """The transpose of `queries`: turned back, heads flattened."""
        grad = grad_q[..., : self.shape.qk].clone(memory_format=torch.contiguous_format)
        turn_pairs(grad[..., self.shape.nope :], self.cos, -self.sin, self.interleave)
        return grad.flatten(2)

    def keys_values(self, kv_raw: Tensor, k_rope_BTR: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T, H*(P+V)] and the shared rotated key -> k [B, T, H, P+R], v [B, T, H, P+R] ending in the values."""
        s = self.shape
        kv = kv_raw.view(*kv_raw.shape[:2], s.heads, s.nope + s.value)
        k = kv.new_empty(*kv.shape[:3], s.qk)
        k[..., : s.nope] = kv[..., : s.nope]
        k[..., s.nope :] = k_rope_BTR[:, :, None]
        if self.wide_values:
            return k, kv[..., s.nope + s.value - s.qk :]
        narrow = s.qk - s.value
        v = kv[..., s.nope :]
        return (k, pad(v, (narrow, 0))) if narrow >= 0 else (pad(k, (0, -narrow)), v)

    def keys_values_grad(self, grad_k: Tensor, grad_v: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the raw key-value projection and of the shared rotated key."""
        s = self.shape
        grad_kv = grad_k.new_empty(*grad_k.shape[:3], s.nope + s.value)
        grad_kv[..., : s.nope] = grad_k[..., : s.nope]
        grad_kv[..., s.nope :] = grad_v[..., grad_v.shape[-1] - s.value :]
        return grad_kv.flatten(2), grad_k[..., s.nope : s.qk].sum(2)


def _flash_spans(batch: int, visible: Visible) -> list[tuple[slice, slice]]:
    """Pieces (rows, positions) that attend causally inside themselves only."""
    if visible.segments is None:
        return [(slice(0, batch), slice(None))]
    rows = enumerate(visible.segments)
    return [(slice(b, b + 1), slice(lo, hi)) for b, row in rows for lo, hi in row]


class _FlashCPU(torch.autograd.Function):
    """Expanded attention on torch's CPU flash kernel, from raw projections to heads side by side."""

    @staticmethod
    def forward(
        ctx: Any,
        q_raw: Tensor,
        kv_raw: Tensor,
        k_rope: Tensor,
        layout: Expansion,
        scale: float,
        visible: Visible,
    ) -> Tensor:
        q, (k, v) = layout.queries(q_raw), layout.keys_values(kv_raw, k_rope)
        s = layout.shape
        out = q.new_empty(*q.shape[:3], v.shape[-1])
        lse = q.new_empty(q.shape[0], q.shape[1], s.heads, dtype=torch.float32)
        for rows, span in _flash_spans(q.shape[0], visible):
            piece = (t[rows, span].transpose(1, 2) for t in (q, k, v))
            with fast_products(q.shape[1], q.device):
                part, part_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                    *piece, 0.0, visible.mask is None, attn_mask=_additive(visible, q), scale=scale
                )
            out[rows, span] = part.transpose(1, 2)
            lse[rows, span] = part_lse.transpose(1, 2)
        keep(ctx, q_raw, kv_raw, k_rope, out, lse)
        ctx.layout, ctx.scale, ctx.visible = layout, scale, visible
        return out[..., v.shape[-1] - s.value :].flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q_raw, kv_raw, k_rope, out, lse = kept(ctx)
        layout, visible = ctx.layout, ctx.visible
        q, (k, v) = layout.queries(q_raw), layout.keys_values(kv_raw, k_rope)
        s = layout.shape
        grad = grad_out.view(*q.shape[:3], s.value)
        grad = pad(grad, (v.shape[-1] - s.value, 0)).contiguous()
        grads = tuple(torch.empty_like(q) for _ in range(3))
        for rows, span in _flash_spans(q.shape[0], visible):
            pieces = [t[rows, span].transpose(1, 2) for t in (grad, q, k, v, out, lse)]
            with fast_products(q.shape[1], q.device):
                parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                    *pieces,
                    0.0,
                    visible.mask is None,
                    attn_mask=_additive(visible, q),
                    scale=ctx.scale,
                )
            for total, part in zip(grads, parts, strict=True):
                total[rows, span] = part.transpose(1, 2)
        grad_kv, grad_rope = layout.keys_values_grad(grads[1], grads[2])
        return layout.queries_grad(grads[0]), grad_kv, grad_rope, None, None, None


def _additive(visible: Visible, like: Tensor) -> Tensor | None:
    """The bool mask as the float mask that the CPU kernel takes."""
    if visible.mask is None:
        return None
    zero = torch.zeros(visible.mask.shape, dtype=like.dtype, device=like.device)
    return zero.masked_fill_(~visible.mask, float("-inf"))


class _Again(torch.autograd.Function):
    """Torch's own attention, run again in the backward pass so that only raw projections are kept."""

    @staticmethod
    def forward(
        ctx: Any,
        q_raw: Tensor,
        kv_raw: Tensor,
        k_rope: Tensor,
        layout: Expansion,
        scale: float,
        visible: Visible,
    ) -> Tensor:
        keep(ctx, q_raw, kv_raw, k_rope)
        ctx.rest = (layout, scale, visible)
        return _torch_attention(q_raw, kv_raw, k_rope, layout, scale, visible)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        inputs = [tensor.detach().requires_grad_() for tensor in kept(ctx)]
        with torch.enable_grad():
            out = _torch_attention(*inputs, *ctx.rest)
        return (*torch.autograd.grad(out, inputs, grad_out), None, None, None)


def _torch_attention(
    q_raw: Tensor,
    kv_raw: Tensor,
    k_rope: Tensor,
    layout: Expansion,
    scale: float,
    visible: Visible,
) -> Tensor:
    """Expanded attention through torch's scaled_dot_product_attention, whatever back end that picks."""
    q, (k, v) = layout.queries(q_raw), layout.keys_values(kv_raw, k_rope)
    width = layout.shape.value
    parts = []
    for rows, span in _flash_spans(q.shape[0], visible):
        piece = (t[rows, span].transpose(1, 2) for t in (q, k, v))
        part = scaled_dot_product_attention(
            *piece, attn_mask=visible.mask, is_causal=visible.mask is None, scale=scale
        )
        parts.append(part.transpose(1, 2)[..., v.shape[-1] - width :])
    if visible.segments is None:
        return parts[0].flatten(2)
    pieces = iter(parts)
    rows_out = [torch.cat([next(pieces) for _ in row], dim=1) for row in visible.segments]
    return torch.cat(rows_out).flatten(2)


def expanded_attention(
    q_raw: Tensor,
    kv_raw: Tensor,
    k_rope_BTR: Tensor,
    layout: Expansion,
    scale: float,
    visible: Visible = ALL,
    recompute: bool = False,
) -> Tensor:
    """Causal attention of raw projections (eqs 4-5, 9-10) -> heads side by side [B, T, H*V].

    q_raw [B, T, H*(P+R)] and kv_raw [B, T, H*(P+V)] as the up-projections give them, `k_rope_BTR` already
    rotated. With `recompute`, back ends other than the CPU's run attention again instead of keeping its operands.
    """
    arguments = (q_raw, kv_raw, k_rope_BTR, layout, scale, visible)
    if q_raw.device.type == "cpu":
        return _FlashCPU.apply(*arguments)
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

    `cache_BSX` holds [c ; k_R] per token (X = C + R), `up_HXC` is kv_b_proj's weight as [H, P+V, C]; `mask` bool,
    broadcast to [B, T, S], or None when every query sees every key (one query at the end).
    """
    B, T, H, _ = q_nope_BTHP.shape
    C = up_HXC.shape[2]
    q_latent = torch.matmul(q_nope_BTHP.permute(2, 0, 1, 3).flatten(1, 2), up_HXC[:, :nope])
    q_latent = q_latent.view(H, B, T, C).permute(1, 2, 0, 3)
    q_BQX = torch.cat((q_latent, q_rope_BTHR), dim=-1).view(B, T * H, -1)
    scores = torch.baddbmm(
        q_BQX.new_empty(1), q_BQX, cache_BSX.transpose(1, 2), beta=0, alpha=scale
    ).float()
    if mask is not None:
        hidden = ~mask.expand(B, T, -1).repeat_interleave(H, dim=1)
        scores = scores.masked_fill(hidden, float("-inf"))
    weights = scores.softmax(-1).to(cache_BSX.dtype)
    latent = (weights @ cache_BSX[..., :C]).view(B, T, H, C).permute(2, 0, 1, 3).flatten(1, 2)
    values = torch.matmul(latent, up_HXC[:, nope:].transpose(1, 2))
    return values.view(H, B, T, -1).permute(1, 2, 0, 3).flatten(2)
