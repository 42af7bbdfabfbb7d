"""The small parts of every block: products with a replaceable `matmul`, RMSNorm, SwiGLU blocks.

`Linear.matmul` is the first seam of the model: by default `fathom.kernels.linear`,
replaced from outside by FP8 products, weight-only quantisation or a rule that puts the weight
gradient off. `compute_dtype` is the dtype of the product (None: the weight's own), so masters can
stay float32 while products run in BF16. `scales` belong to weights that are stored as whole numbers
(`fathom.precision.storage`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fathom import kernels
from fathom.model.config import ModelConfig

LATENT_EPS = 1e-6
"""Epsilon of the latents' norms, whatever `rms_norm_eps` says (as the released code has it)."""


class Linear(nn.Module):
    """y = x W^T without bias; weight [out, in]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.matmul: Callable[[Tensor, Tensor, torch.dtype | None], Tensor] = kernels.linear
        self.compute_dtype: torch.dtype | None = None
        self.scales: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return self.matmul(x, self.weight, self.compute_dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}"


class RMSNorm(nn.Module):
    """RMSNorm over the last axis, in float32; `recompute` makes its output again in backward."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps
        self.recompute = False

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> [..., size]."""
        return kernels.rms_norm(x, self.weight, self.eps, self.recompute)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class MLP(nn.Module):
    """A gated feed-forward block, down(silu(gate x) * up x): dense layers and shared experts."""

    def __init__(self, config: ModelConfig, width: int) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, width)
        self.up_proj = Linear(config.hidden_size, width)
        self.down_proj = Linear(width, config.hidden_size)
        self.recompute = False

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        hidden = kernels.swiglu_pair(self.gate_proj(x), self.up_proj(x), self.recompute)
        return self.down_proj(hidden)
