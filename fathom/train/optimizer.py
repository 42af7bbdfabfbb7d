"""AdamW as in the report (§4.2: betas 0.9 and 0.95, weight decay 0.1, clipping at 1.0).

Left open there and our choice: epsilon 1e-8, and decay on matrices only (norms are spared). The router's
bias is no parameter; it moves by `fathom.update_bias`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fathom.errors import RecipeError
from fathom.parallel import Parallel


@dataclass(frozen=True)
class OptimConfig:
    """Table [optim] of a recipe."""

    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment (our choice)."""
    weight_decay: float = 0.1
    """Decoupled decay of all matrices; norms have none (our choice)."""
    clip_norm: float = 1.0
    """Largest norm of the whole gradient."""

    def __post_init__(self) -> None:
        for key in ("beta1", "beta2"):
            if not 0 <= getattr(self, key) < 1:
                raise RecipeError(
                    f"optim.{key} = {getattr(self, key)} must lie in [0, 1); 0.9 and 0.95 are usual"
                )
        for key in ("eps", "clip_norm"):
            if not getattr(self, key) > 0:
                raise RecipeError(f"optim.{key} = {getattr(self, key)} must be positive; raise it")
        if self.weight_decay < 0:
            raise RecipeError(
                f"optim.weight_decay = {self.weight_decay} must be at least 0; raise it"
            )


def build_adamw(
    model: nn.Module, config: OptimConfig, parallel: Parallel | None = None
) -> torch.optim.AdamW:
    """One parameter group with decay for matrices, one without for norms; the fused form.

    With `parallel` it has the pieces of the parameters that this rank updates.
    """
    pairs = [(p, p) for p in model.parameters()]
    if parallel:
        pairs = [(piece.of.parameter, piece.part) for piece in parallel.pieces]
    groups = [
        {"params": [p for of, p in pairs if of.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for of, p in pairs if of.dim() == 1], "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=config.eps, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Use `lr` from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def clip(model: nn.Module, largest: float, parallel: Parallel | None = None) -> Tensor:
    """Scale the gradient down to norm `largest` if it is longer; its norm before that.

    With `parallel` it is the norm over all ranks.
    """
    if parallel:
        parameters, norm = parallel.trained(), parallel.gradient_norm()
    else:
        parameters = [p for p in model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if norm > largest:  # multiplying all of it by one takes as long as the optimiser's step
        nn.utils.clip_grads_with_norm_(parameters, largest, norm)
    return norm
