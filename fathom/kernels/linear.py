"""The dense matrix product as one autograd rule.

With `kernels.grouped` this is the first seam of the model (docs/architecture.md, "The two seams"):
`Linear` and `Experts` call the two, and FP8, weight-only quantisation or a split backward replace
them from outside. `dtype` is the dtype of the product: operands are cast to it here, weights stay
as they are, gradients return in the dtype of what they belong to. There is no autocast anywhere.

Shapes: N rows, I in, O out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fathom.kernels import few_rows
from fathom.kernels.cpu_gemm import fast_products
from fathom.kernels.recompute import keep, kept


def _plain(x: Tensor, weight_OI: Tensor, dtype: torch.dtype) -> Tensor:
    with fast_products(x.shape[:-1].numel(), x.device):
        return torch.nn.functional.linear(x.to(dtype), weight_OI.to(dtype))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, dtype: torch.dtype) -> Tensor:
        keep(ctx, x, weight_OI)
        ctx.dtype = dtype
        return _plain(x, weight_OI, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight_OI = kept(ctx)
        grad_NO = grad.to(ctx.dtype).reshape(-1, grad.shape[-1])
        grad_x = grad_weight = None
        with fast_products(grad_NO.shape[0], grad.device):
            if ctx.needs_input_grad[0]:
                grad_x = (grad_NO @ weight_OI.to(ctx.dtype)).view(x.shape).to(x.dtype)
            if ctx.needs_input_grad[1]:
                x_NI = x.to(ctx.dtype).reshape(-1, x.shape[-1])
                grad_weight = (grad_NO.T @ x_NI).to(weight_OI.dtype)
        return grad_x, grad_weight, None


def linear(x: Tensor, weight_OI: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """x [..., I] times weight [O, I] transposed -> [..., O], in `dtype` (default: its own)."""
    dtype = dtype or weight_OI.dtype
    if torch.is_grad_enabled():
        return _Linear.apply(x, weight_OI, dtype)
    if dtype == torch.float32 and few_rows.can(x, weight_OI):
        return few_rows.product(x, weight_OI)
    return _plain(x, weight_OI, dtype)
