"""Expanded attention on a CPU, forward and backward by hand, from MLA's raw projections.

Two ways, by length. Torch's flash kernel never holds the T x T scores and is the right one for long
sequences; below about a thousand positions it works in tiles of 64 queries and reaches a third of
the machine's rate. There, blocks of 128 queries against all keys before them, as batched products
and one softmax, are 1.5 times as fast; scores of one block at a time exist, and the backward pass
makes them again.

Measured (float32, one Zen 5 core, 8 heads of 48/32, forward / backward): 8 x 512 positions 31 / 80
ms with flash, 22 / 57 in blocks; 1 x 1024 equal; 1 x 2048 31 / 76 against 34 / 84.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from fathom.kernels.cpu_gemm import fast_products
from fathom.kernels.expansion import Expansion
from fathom.kernels.recompute import keep, kept
from fathom.kernels.visible import Visible, longest_span, spans

FLASH_FROM = 1024
"""Positions from which torch's flash kernel is the faster of the two."""

BLOCK = 128
"""Queries at a time in the other one."""

SCORES = 1 << 19
"""About how many scores exist at a time there; what fits a core's own cache."""


def _additive(visible: Visible, like: Tensor) -> Tensor | None:
    """The bool mask as the float mask that the flash kernel takes."""
    if visible.mask is None:
        return None
    zero = torch.zeros(visible.mask.shape, dtype=like.dtype, device=like.device)
    return zero.masked_fill_(~visible.mask, float("-inf"))


class _Flash(torch.autograd.Function):
    """Torch's CPU flash kernel; values are widened to the keys' size (see `expansion`)."""

    @staticmethod
    def forward(
        ctx: Any, q_raw: Tensor, kv_raw: Tensor, k_rope: Tensor, layout: Expansion
    ) -> Tensor:
        q, k, v = layout.operands(q_raw, kv_raw, k_rope)
        out = q.new_empty(*q.shape[:3], v.shape[-1])
        lse = q.new_empty(*q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
        mask = _additive(layout.visible, q)
        for rows, span in spans(q.shape[0], layout.visible):
            piece = (t[rows, span].transpose(1, 2) for t in (q, k, v))
            with fast_products(q.shape[1], q.device):
                part, part_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                    *piece, 0.0, mask is None, attn_mask=mask, scale=layout.scale
                )
            out[rows, span] = part.transpose(1, 2)
            lse[rows, span] = part_lse.transpose(1, 2)
        keep(ctx, q_raw, kv_raw, k_rope, out, lse)
        ctx.layout = layout
        return layout.values(out).flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q_raw, kv_raw, k_rope, out, lse = kept(ctx)
        layout = ctx.layout
        q, k, v = layout.operands(q_raw, kv_raw, k_rope)
        width = layout.shape.value
        grad = pad(grad_out.view(*q.shape[:3], width), (v.shape[-1] - width, 0))
        grads = torch.empty_like(q), torch.empty_like(q), torch.empty_like(q)
        mask = _additive(layout.visible, q)
        for rows, span in spans(q.shape[0], layout.visible):
            pieces = [t[rows, span].transpose(1, 2) for t in (grad, q, k, v, out, lse)]
            with fast_products(q.shape[1], q.device):
                parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                    *pieces, 0.0, mask is None, attn_mask=mask, scale=layout.scale
                )
            for total, part in zip(grads, parts, strict=True):
                total[rows, span] = part.transpose(1, 2)
        return *layout.operands_grad(*grads), None


@cache
def _later(T: int) -> Tensor:
    """Which of T keys come after each of T queries, bool [T, T]."""
    with torch.inference_mode(False):
        return torch.ones(T, T, dtype=torch.bool).triu_(1)


def _probabilities(q_GTd: Tensor, k_GSd: Tensor, scale: float) -> Tensor:
    """Causal softmax [G, T, S] of the last T positions' queries against all S keys."""
    T, S = q_GTd.shape[1], k_GSd.shape[1]
    scores = torch.baddbmm(q_GTd.new_empty(1), q_GTd, k_GSd.transpose(1, 2), beta=0, alpha=scale)
    scores[:, :, S - T :].masked_fill_(_later(T), float("-inf"))
    return torch.softmax(scores, -1)


def _blocks(T: int) -> list[tuple[int, int]]:
    """(first, end) of each block of queries, the last block first."""
    return [(lo, min(lo + BLOCK, T)) for lo in reversed(range(0, T, BLOCK))]


def _blocks_forward(q_GTd: Tensor, k_GTd: Tensor, v_GTv: Tensor, scale: float) -> Tensor:
    """Causal attention of G independent sequences [G, T, ...] -> [G, T, V]."""
    parts = [
        torch.bmm(_probabilities(q_GTd[:, lo:hi], k_GTd[:, :hi], scale), v_GTv[:, :hi])
        for lo, hi in _blocks(q_GTd.shape[1])
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts[::-1], dim=1)


def _blocks_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `_blocks_forward`.

    With P the softmax, dV = P^T dO and dS = P * (dP - rowsum(dP * P)). The last block sees all
    keys, so what it gives is whole, and earlier blocks add to it.
    """
    grads_q: list[Tensor] = []
    total_k = total_v = None
    for lo, hi in _blocks(q.shape[1]):
        weights = _probabilities(q[:, lo:hi], k[:, :hi], scale)
        grad_p = torch.bmm(grad[:, lo:hi], v[:, :hi].transpose(1, 2))
        grad_s = torch._softmax_backward_data(grad_p, weights, -1, weights.dtype).mul_(scale)
        grads_q.append(torch.bmm(grad_s, k[:, :hi]))
        total_v = _added(total_v, torch.bmm(weights.transpose(1, 2), grad[:, lo:hi]))
        total_k = _added(total_k, torch.bmm(grad_s.transpose(1, 2), q[:, lo:hi]))
    grad_q = grads_q[0] if len(grads_q) == 1 else torch.cat(grads_q[::-1], dim=1)
    assert total_k is not None and total_v is not None  # there is at least one block
    return grad_q, total_k, total_v


def _added(total_GTd: Tensor | None, part_GSd: Tensor) -> Tensor:
    """`total` with the part added to its first S positions."""
    if total_GTd is None:
        return part_GSd
    total_GTd[:, : part_GSd.shape[1]] += part_GSd
    return total_GTd


def _groups(q_BTHd: Tensor, visible: Visible) -> list[tuple[slice, slice]]:
    """Pieces to work on at a time: as many rows as have `SCORES` scores in a block."""
    if visible.segments is not None:
        return spans(q_BTHd.shape[0], visible)
    B, T, H, _ = q_BTHd.shape
    rows = max(1, SCORES // (H * T * min(T, BLOCK)))
    return [(slice(start, start + rows), slice(None)) for start in range(0, B, rows)]


def _by_head(x_BTHd: Tensor) -> Tensor:
    """[B, T, H, d] -> [B*H, T, d], without a copy where it stands in memory head after head."""
    return x_BTHd.transpose(1, 2).flatten(0, 1)


class _Blocks(torch.autograd.Function):
    """Blocks of queries as batched products; for short sequences or documents."""

    @staticmethod
    def forward(
        ctx: Any, q_raw: Tensor, kv_raw: Tensor, k_rope: Tensor, layout: Expansion
    ) -> Tensor:
        q, k, v = layout.operands(q_raw, kv_raw, k_rope)
        v = layout.values(v)
        out = q.new_empty(*q.shape[:3], layout.shape.value)
        with fast_products(q.shape[1], q.device):
            for rows, span in _groups(q, layout.visible):
                qs, ks, vs = (_by_head(t[rows, span]) for t in (q, k, v))
                heads = _blocks_forward(qs, ks, vs, layout.scale)
                piece = out[rows, span].transpose(1, 2)
                piece.copy_(heads.view(piece.shape))
        keep(ctx, q_raw, kv_raw, k_rope)
        ctx.layout = layout
        return out.flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q_raw, kv_raw, k_rope = kept(ctx)
        layout = ctx.layout
        q, k, v = layout.operands(q_raw, kv_raw, k_rope)
        v = layout.values(v)
        grad = grad_out.view(*q.shape[:3], layout.shape.value)
        grads = (torch.empty_like(q), torch.empty_like(k), q.new_empty(v.shape))
        with fast_products(q.shape[1], q.device):
            for rows, span in _groups(q, layout.visible):
                do, qs, ks, vs = (_by_head(t[rows, span]) for t in (grad, q, k, v))
                parts = _blocks_backward(do, qs, ks, vs, layout.scale)
                for total, part in zip(grads, parts, strict=True):
                    piece = total[rows, span].transpose(1, 2)
                    piece.copy_(part.view(piece.shape))
        return *layout.operands_grad(*grads), None


def attend_on_cpu(q_raw: Tensor, kv_raw: Tensor, k_rope_BTR: Tensor, layout: Expansion) -> Tensor:
    """`expanded_attention` on a CPU: in blocks or through flash, by length."""
    T = q_raw.shape[1]
    visible = layout.visible
    short = visible.mask is None and longest_span(T, visible) < FLASH_FROM
    rule = _Blocks if short else _Flash
    return rule.apply(q_raw, kv_raw, k_rope_BTR, layout)
