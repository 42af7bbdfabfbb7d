"""How the next token is chosen from logits: greedily, or at random at a temperature within a nucleus (top-p).

Shapes: B batch, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fathom.errors import GenerationError


@dataclass(frozen=True)
class Sampling:
    """The choice of one request. Raises `GenerationError` for values outside their range."""

    temperature: float = 1.0
    """What logits are divided by; 0 takes the most likely token always."""
    top_p: float = 1.0
    """Only the most likely tokens that together have this probability can be drawn; 1 means all."""
    seed: int | None = None
    """Seed of the request's own generator; None draws one from the system."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise GenerationError(
                f"temperature={self.temperature} must be 0 (greedy) or a positive number"
            )
        if not 0 < self.top_p <= 1:
            raise GenerationError(
                f"top_p={self.top_p} must lie in (0, 1]; 1 samples from all tokens"
            )

    def generator(self) -> torch.Generator:
        """A generator in its first state; on the CPU, so that a seed means the same on every device."""
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed % 2**63)
        return generator


def probabilities(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """The distribution a token is drawn from, float64 [B, V]: softmax at the temperature, cut to the nucleus."""
    logits_BV = logits_BV.double()
    highest = logits_BV.max(dim=-1, keepdim=True)
    if sampling.temperature == 0:
        return torch.zeros_like(logits_BV).scatter_(-1, highest.indices, 1.0)
    chances_BV = torch.softmax((logits_BV - highest.values) / sampling.temperature, dim=-1)
    return chances_BV if sampling.top_p == 1 else _nucleus(chances_BV, sampling.top_p)


def _nucleus(chances_BV: Tensor, top_p: float) -> Tensor:
    """The smallest set of most likely tokens with at least `top_p` together, rescaled to one."""
    descending, order = chances_BV.sort(dim=-1, descending=True, stable=True)
    before = descending.cumsum(dim=-1) - descending
    kept = descending.masked_fill(before >= top_p, 0.0)
    return torch.zeros_like(chances_BV).scatter_(-1, order, kept / kept.sum(-1, keepdim=True))


def sample(logits_BV: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Token ids int64 [B] on the CPU. Raises `GenerationError` when a logit is not finite."""
    logits_BV = logits_BV.detach().cpu().double()
    if not logits_BV.isfinite().all():
        raise GenerationError(
            "the model's logits are not finite; its weights are damaged or overflow in this dtype"
        )
    if sampling.temperature == 0:
        return logits_BV.argmax(dim=-1)
    chances_BV = probabilities(logits_BV, sampling)
    return torch.multinomial(chances_BV, 1, generator=generator)[:, 0]
