"""Where a graph is cut in two, so that its halves can be differentiated at different times.

The graph before a seam ends at an edge, the graph behind it begins with the same numbers without a
history. The backward pass of the second leaves its gradient in the seam, and that of the first begins
with it. A leaf would do this too, but it copies its gradient, and it keeps its numbers as long as the graph lives,
which undoes recomputation. A seam keeps neither the tensor that ended nor the one that began.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge, get_gradient_edge

from fathom.kernels.recompute import same


class Seam:
    """One tensor between two graphs."""

    def __init__(self) -> None:
        self.edge: GradientEdge | None = None
        self.gradient: Tensor | None = None

    def end(self, tensor: Tensor) -> Tensor:
        """The graph before ends here: the tensor without its history."""
        self.edge = get_gradient_edge(tensor) if tensor.requires_grad else None
        return tensor.detach()

    def cut(self, tensor: Tensor) -> Tensor:
        """Both: the tensor as the beginning of another graph."""
        return same(_Begin.apply(_anchor(), self.end(tensor), self), tensor)

    def take(self) -> Tensor:
        """The gradient, which is gone then."""
        assert self.gradient is not None
        gradient, self.gradient = self.gradient, None
        return gradient


def differentiate(*seams: Seam) -> None:
    """Backward through the graphs that ended at the seams, in one pass; graphs and gradients are gone then."""
    edges = [seam.edge for seam in seams]
    torch.autograd.backward(edges, [seam.take() for seam in seams])  # type: ignore[arg-type]
    for seam in seams:
        seam.edge = None


def _anchor() -> Tensor:
    """Something that wants a gradient, without which a rule's output would have no graph."""
    return torch.empty(0, requires_grad=True)


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, tensor: Tensor, seam: Seam) -> Tensor:
        ctx.seam = seam
        return tensor.view_as(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        ctx.seam.gradient = gradient
        return None, None, None
