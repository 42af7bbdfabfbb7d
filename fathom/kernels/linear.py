"""The dense matrix product as one autograd rule.

With `kernels.grouped` this is the first seam of the model (docs/architecture.md, "The two seams"):
`Linear` and `Experts` call the two, and FP8, weight-only quantisation or a split backward replace
them from outside. `dtype` is the dtype of the product: operands are cast to it here, weights stay
as they are, gradients return in the dtype of what they belong to. There is no autocast anywhere.

Shapes: N rows, I in, O out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fathom.kernels import few_rows
from fathom.kernels.cpu_gemm import fast_products
from fathom.kernels.put_off import PutOff
from fathom.kernels.recompute import keep, kept_later


def _plain(x: Tensor, weight_OI: Tensor, dtype: torch.dtype) -> Tensor:
    with fast_products(x.shape[:-1].numel(), x.device):
        return torch.nn.functional.linear(x.to(dtype), weight_OI.to(dtype))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_OI: Tensor, dtype: torch.dtype, put_off: PutOff | None
    ) -> Tensor:
        keep(ctx, x, weight_OI)
        ctx.dtype, ctx.put_off = dtype, put_off
        ctx.x_dtype, ctx.weight_dtype = x.dtype, weight_OI.dtype
        return _plain(x, weight_OI, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        get_x, get_weight = kept_later(ctx)
        weight_OI = get_weight()
        grad_NO = grad.to(ctx.dtype).reshape(-1, grad.shape[-1])
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            with fast_products(grad_NO.shape[0], grad.device):
                grad_x = grad_NO @ weight_OI.to(ctx.dtype)
            grad_x = grad_x.view(*grad.shape[:-1], -1).to(ctx.x_dtype)
        if ctx.needs_input_grad[1]:
            make = partial(_weight_gradient, get_x, grad_NO, ctx.weight_dtype)
            grad_weight = make() if ctx.put_off is None else ctx.put_off.gradient(weight_OI, make)
        return grad_x, grad_weight, None, None


def _weight_gradient(
    get_x: Callable[[], Tensor], grad_NO: Tensor, weight_dtype: torch.dtype
) -> Tensor:
    x = get_x().to(grad_NO.dtype)
    x_NI = x.reshape(-1, x.shape[-1])
    with fast_products(grad_NO.shape[0], grad_NO.device):
        return (grad_NO.T @ x_NI).to(weight_dtype)


def linear(
    x: Tensor,
    weight_OI: Tensor,
    dtype: torch.dtype | None = None,
    put_off: PutOff | None = None,
) -> Tensor:
    """x [..., I] times weight [O, I] transposed -> [..., O], in `dtype` (default: its own).

    `put_off`: who may take the weight's gradient for later.
    """
    dtype = dtype or weight_OI.dtype
    if torch.is_grad_enabled():
        return _Linear.apply(x, weight_OI, dtype, put_off)
    if dtype == torch.float32 and few_rows.can(x, weight_OI):
        return few_rows.product(x, weight_OI)
    return _plain(x, weight_OI, dtype)
