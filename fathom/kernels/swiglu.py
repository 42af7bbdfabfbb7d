"""SwiGLU: silu(gate) * up (eq 12's FFN), with gate and up side by side in one tensor, or apart.

With s = sigmoid(gate): d_up = dy * gate * s, d_gate = dy * up * s * (1 + gate * (1 - s)).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fathom.kernels.fuse import fused
from fathom.kernels.recompute import remember


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """The definition, with torch's own gradient."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


@fused
def _forward(gate_up: Tensor) -> Tensor:
    return swiglu_reference(gate_up)


@fused
def _backward_pair(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.aten.silu_backward(grad * up, gate), grad * torch.nn.functional.silu(gate)


@fused
def _forward_pair(gate: Tensor, up: Tensor) -> Tensor:
    return torch.nn.functional.silu(gate) * up


def _backward_whole(grad: Tensor, gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    s = gate.sigmoid()
    act = gate * s
    return torch.cat((grad * up * (s + act * (1 - s)), grad * act), dim=-1)


def _backward_halves(grad: Tensor, gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    out = torch.empty_like(gate_up)
    grad_gate, grad_up = out.chunk(2, dim=-1)
    torch.mul(grad, torch.nn.functional.silu(gate), out=grad_up)
    torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
    return out


_backward = fused(_backward_whole, _backward_halves)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return _forward(gate_up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _backward(grad, *ctx.saved_tensors)


def swiglu(gate_up: Tensor, recompute: bool = False) -> Tensor:
    """silu(gate) * up of [..., 2I] -> [..., I]; `recompute`: the next product keeps the input."""
    if not torch.is_grad_enabled():
        return _forward(gate_up)
    y = _SwiGLU.apply(gate_up)
    return remember(y, _forward, gate_up) if recompute else y


class _SwiGLUPair(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _forward_pair(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return _backward_pair(grad, *ctx.saved_tensors)


def swiglu_pair(gate: Tensor, up: Tensor, recompute: bool = False) -> Tensor:
    """silu(gate) * up of two tensors [..., I]; `recompute`: the next product keeps the two."""
    if not torch.is_grad_enabled():
        return _forward_pair(gate, up)
    y = _SwiGLUPair.apply(gate, up)
    return remember(y, _forward_pair, gate, up) if recompute else y
