"""Moving token rows to their experts and back, each way the other's gradient.

Tokens N, choices per token K. Rows sorted by expert are `sorted[r] = x[token[r]]`; coming back,
`y[n] = sum_k w[n, k] * sorted[place[n, k]]`, where `place` is where choice k of token n went. Both
sums run over k in order, so they are the same at every run; scatter-adds are not used.
`embedding_bag` is exactly this weighted sum of gathered rows, in one pass without the [N, K, D]
tensor between.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag

from fathom.kernels.recompute import keep, kept


def _gather_sum(rows_RD: Tensor, place_NK: Tensor, weights_NK: Tensor | None) -> Tensor:
    if rows_RD.shape[0] == 0:
        return rows_RD.new_zeros(place_NK.shape[0], rows_RD.shape[1])
    weights = None if weights_NK is None else weights_NK.to(rows_RD.dtype)
    return embedding_bag(place_NK, rows_RD, per_sample_weights=weights, mode="sum")


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, token_R: Tensor, place_NK: Tensor) -> Tensor:
        ctx.save_for_backward(place_NK)
        return x_ND.index_select(0, token_R)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None]:
        (place_NK,) = ctx.saved_tensors
        return _gather_sum(grad_RD.contiguous(), place_NK, None), None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows_RD: Tensor, weights_NK: Tensor, token_R: Tensor, place_NK: Tensor
    ) -> Tensor:
        keep(ctx, rows_RD, weights_NK, token_R, place_NK)
        return _gather_sum(rows_RD, place_NK, weights_NK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rows_RD, weights_NK, token_R, place_NK = kept(ctx)
        grad_rows = grad_ND.index_select(0, token_R)
        dots_R = torch.einsum("rd,rd->r", grad_rows, rows_RD)
        grad_weights = dots_R[place_NK].to(weights_NK.dtype)
        weights_R = weights_NK.new_empty(token_R.shape[0])
        weights_R[place_NK.flatten()] = weights_NK.flatten()
        return grad_rows.mul_(weights_R[:, None]), grad_weights, None, None


def scatter_rows(x_ND: Tensor, token_R: Tensor, place_NK: Tensor) -> Tensor:
    """Rows [R, D] in expert order: row r is token `token_R[r]`."""
    return _Scatter.apply(x_ND, token_R, place_NK)


def gather_rows(rows_RD: Tensor, weights_NK: Tensor, token_R: Tensor, place_NK: Tensor) -> Tensor:
    """Weighted sum [N, D] of each token's K rows (eq 12's sum over routed experts)."""
    if not torch.is_grad_enabled():
        return _gather_sum(rows_RD, place_NK, weights_NK)
    return _Gather.apply(rows_RD, weights_NK, token_R, place_NK)
