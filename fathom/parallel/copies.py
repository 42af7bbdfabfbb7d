"""Rows copied to several places, and what came of the copies summed: each way the other's gradient.

The places that one row goes to are between none and K, so sums run over bags of different sizes.
`embedding_bag` is this sum, in the order of the bag and in one pass, so it is the same at every run.
(Where every row has exactly K places, `kernels.permute` does the same with less book-keeping.)

Shapes: N rows, L copies listed row by row, S the same copies in the order of where they go.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag

from fathom.kernels.recompute import keep, kept


def occurrences(numbers_L: Tensor, below: int) -> Tensor:
    """How often each of 0 … below - 1 occurs, int64. `bincount` would wait for a GPU to have found their range."""
    return numbers_L.new_zeros(below).index_add_(0, numbers_L, torch.ones_like(numbers_L))


@dataclass(frozen=True)
class Copies:
    """Where each of N rows goes. All int64."""

    source_S: Tensor
    """The row that copy s is of."""
    place_L: Tensor
    """Where the copies of row 0 are among the S, then those of row 1 and so on."""
    start_N: Tensor
    """Where each row's copies begin in `place_L`."""

    @classmethod
    def sort(cls, source_L: Tensor, key_L: Tensor, rows: int) -> Copies:
        """Copies listed row by row, put into the order of their keys; equal keys stay in the order of the rows."""
        order = key_L.argsort(stable=True)
        place_L = torch.empty_like(order)
        place_L[order] = torch.arange(order.shape[0], device=order.device)
        count_N = occurrences(source_L, rows)
        return cls(source_L[order], place_L, count_N.cumsum(0) - count_N)

    def make(self, x_ND: Tensor) -> Tensor:
        """The copies [S, D]."""
        return _Make.apply(x_ND, self)

    def sum(self, copies_SD: Tensor, weights_L: Tensor | None = None) -> Tensor:
        """Weighted sum of each row's copies [N, D]; a row without copies is zero."""
        return _Sum.apply(copies_SD, weights_L, self)


def _bag_sum(copies_SD: Tensor, weights_L: Tensor | None, copies: Copies) -> Tensor:
    if copies_SD.shape[0] == 0:
        return copies_SD.new_zeros(copies.start_N.shape[0], copies_SD.shape[1])
    weights = None if weights_L is None else weights_L.to(copies_SD.dtype)
    return embedding_bag(
        copies.place_L, copies_SD, copies.start_N, per_sample_weights=weights, mode="sum"
    )


class _Make(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, copies: Copies) -> Tensor:
        ctx.copies = copies
        return x_ND.index_select(0, copies.source_S)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SD: Tensor) -> tuple[Tensor, None]:
        return _bag_sum(grad_SD.contiguous(), None, ctx.copies), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, copies_SD: Tensor, weights_L: Tensor | None, copies: Copies) -> Tensor:
        ctx.copies, ctx.weighted = copies, weights_L is not None
        if weights_L is not None:
            keep(ctx, copies_SD, weights_L)
        return _bag_sum(copies_SD, weights_L, copies)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, Tensor | None, None]:
        copies = ctx.copies
        grad_SD = grad_ND.index_select(0, copies.source_S)
        if not ctx.weighted:
            return grad_SD, None, None
        copies_SD, weights_L = kept(ctx)
        dots_S = torch.einsum("sd,sd->s", grad_SD, copies_SD)
        weights_S = torch.empty_like(weights_L)
        weights_S[copies.place_L] = weights_L
        grad_weights = dots_S[copies.place_L].to(weights_L.dtype)
        return grad_SD.mul_(weights_S[:, None]), grad_weights, None
