"""RMSNorm as one autograd rule: y = w * x / sqrt(mean(x^2) + eps), computed in float32.

Statistics are per row over the last axis (D). With r = 1 / sqrt(mean(x^2) + eps) and h = w * dy the
input's gradient is r * h - x * r^3 * mean(h * x). Only x is kept; r is cheap to make again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fathom.kernels.fuse import fused
from fathom.kernels.recompute import remember


def rms_norm_reference(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """The definition, in the released order: normalise in float32, cast, then scale."""
    wide = x.float()
    normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (weight_D * normal.to(x.dtype)).to(x.dtype)


@fused
def _forward(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    return rms_norm_reference(x, weight_D, eps)


@fused
def _backward(grad: Tensor, x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide, grad = x.float(), grad.float()
    r = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    normal = wide * r
    h = grad * weight_D
    grad_x = r * (h - normal * (h * normal).mean(-1, keepdim=True))
    grad_weight = (grad * normal).flatten(0, -2).sum(0)
    return grad_x.to(x.dtype), grad_weight.to(weight_D.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight_D)
        ctx.eps = eps
        return _forward(x, weight_D, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight_D = ctx.saved_tensors
        return (*_backward(grad, x, weight_D, ctx.eps), None)


def rms_norm(x: Tensor, weight_D: Tensor, eps: float, recompute: bool = False) -> Tensor:
    """RMSNorm over the last axis of [..., D]; with `recompute` consumers keep x, not the result."""
    if not torch.is_grad_enabled():
        if x.dtype == weight_D.dtype == torch.float32:
            return torch.nn.functional.rms_norm(x, weight_D.shape, weight_D, eps)
        return _forward(x, weight_D, eps)
    y = _RMSNorm.apply(x, weight_D, eps)
    return remember(y, _forward, x, weight_D, eps) if recompute else y
