"""The V3 shape on Tiny Shakespeare trained through `transformers`: the plain script that ours is
compared with.

What a careful user would write: AdamW with the published settings, warm-up and cosine, clipping,
the same windows in the same order as ours. `transformers` has no bias update, so its routers are
left to themselves.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fathom.data import Loader, TokenData, held_out_batches

BATCH, SEQ_LEN, LEARNING_RATE, BETAS = 12, 64, 1e-3, (0.9, 0.99)
WATCHED = 100
"""Last steps over which expert load is averaged."""


def warm_up(steps: int) -> int:
    """Steps in which the rate rises: 100, fewer in a short trial."""
    return min(100, steps // 10)


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to a tenth; `step` counts from 0."""
    rising = warm_up(steps)
    if step < rising:
        return LEARNING_RATE * (step + 1) / rising
    progress = (step + 1 - rising) / max(1, steps - rising)
    return LEARNING_RATE * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


class Plain:
    """The model, its optimiser and its data; to live in a worker."""

    def __init__(self, data: str, fields: dict[str, Any], experts: str) -> None:
        self.data, self.fields, self.experts = TokenData.open(Path(data)), fields, experts

    def train(self, seed: int, steps: int) -> None:
        """The whole training, from new weights."""
        self._build(seed)
        self.loads: list[float] = []
        loader = Loader.of(self.data.train, SEQ_LEN, seed)
        for step in range(steps):
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(step, steps)
            self._watch(step >= steps - WATCHED)
            self._loss(loader.batch(step * BATCH, BATCH).tokens).backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            if self.counts:
                self.loads.append(max(float(c.max() / c.mean()) for c in self.counts))

    def result(self) -> dict[str, float]:
        """Held-out loss in nats per character, and the worst layer's max/mean load, mean of the last steps."""
        return {"held_out_loss": self._held_out_loss(), "load": float(np.mean(self.loads))}

    def _build(self, seed: int) -> None:
        from shapes import transformers_config
        from transformers import DeepseekV3ForCausalLM
        from transformers.utils import logging

        logging.set_verbosity_error()
        torch.manual_seed(seed)
        self.model = DeepseekV3ForCausalLM(transformers_config(self.fields))
        self.model.set_experts_implementation(self.experts)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), betas=BETAS, weight_decay=0.1, fused=True
        )
        self._watch(False)
        dense = self.fields["first_k_dense_replace"]
        for layer in self.model.model.layers[dense:]:
            layer.mlp.gate.register_forward_hook(self._count)

    def _watch(self, watching: bool) -> None:
        self.watching = watching
        self.counts: list[Tensor] = []

    def _count(self, _module: object, _inputs: object, output: tuple[Tensor, ...]) -> None:
        if self.watching:
            experts = self.fields["n_routed_experts"]
            self.counts.append(torch.bincount(output[2].flatten(), minlength=experts).float())

    def _loss(self, tokens: Tensor) -> Tensor:
        targets = tokens[:, 1:].contiguous()
        return self.model(
            input_ids=tokens[:, :-1], labels=targets, shift_labels=targets, use_cache=False
        ).loss

    @torch.no_grad()
    def _held_out_loss(self) -> float:
        self._watch(False)
        self.model.eval()
        total, count = 0.0, 0
        for tokens in held_out_batches(self.data.held_out, SEQ_LEN, 64):
            targets = tokens[:, 1:].numel()
            total += self._loss(tokens).item() * targets
            count += targets
        self.model.train()
        return total / count
