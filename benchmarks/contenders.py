"""The two sides of the comparisons as objects with the same methods, each to live in its own
process.

Both compute in float32 on the same tokens from the same weights; a step is forward, backward and a
fused AdamW, without clipping and without MTP on either side. `transformers` computes its own loss
(with the targets given as `shift_labels`, so that both sides have exactly T targets for T inputs).
"""

from __future__ import annotations

from typing import Any

import torch
from shapes import fathom_config, transformers_config
from torch import Tensor

from fathom.train.memory import keep_freed_memory


class Tokens:
    """Random rows of T + 1 tokens, the same ones on both sides: a fixed first batch and new ones.

    New ones at every step, because routing and so the experts' row counts change in real training.
    """

    def __init__(self, fields: dict[str, Any], batch: int, seq_len: int) -> None:
        self._generator = torch.Generator().manual_seed(1)
        self._shape, self._vocabulary = (batch, seq_len + 1), fields["vocab_size"]
        self.first = self.next()

    def next(self) -> Tensor:
        return torch.randint(0, self._vocabulary, self._shape, generator=self._generator)


def _adamw(model: torch.nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )


class FathomTraining:
    """One training step of ours, in a process set up as a run sets up its own."""

    def __init__(
        self, fields: dict[str, Any], batch: int, seq_len: int, compiled: bool = False
    ) -> None:
        import fathom
        from fathom.kernels import compile_elementwise
        from fathom.model.objective import losses

        torch.manual_seed(0)
        keep_freed_memory()
        compile_elementwise(compiled)
        self.losses = losses
        self.model = fathom.Transformer(fathom_config(fields))
        self.optimizer = _adamw(self.model)
        self.tokens = Tokens(fields, batch, seq_len)

    def load(self, path: str) -> None:
        self.model.load_state_dict(torch.load(path, mmap=True), strict=True)

    def loss(self) -> float:
        with torch.no_grad():
            return self.losses(self.model, self.tokens.first, balance_alpha=0.0).main.item()

    def step(self) -> None:
        self.losses(self.model, self.tokens.next(), balance_alpha=0.0).total.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def profile(self) -> dict[str, float]:
        """Share of one step's operator time by kind (see `profiling`)."""
        from profiling import shares

        return shares(self.step)


class TransformersTraining:
    """One training step of `transformers`' DeepseekV3ForCausalLM with the given back ends.

    `helped` gives it the two process settings that ours uses and its users do not have by default: float32 products
    by oneDNN, and freed memory kept.
    """

    def __init__(
        self,
        fields: dict[str, Any],
        batch: int,
        seq_len: int,
        experts: str,
        attention: str,
        helped: bool = False,
    ) -> None:
        from transformers import DeepseekV3ForCausalLM
        from transformers.utils import logging

        logging.set_verbosity_error()
        torch.manual_seed(0)
        if helped:
            help_process()
        config = transformers_config(fields)
        self.model = DeepseekV3ForCausalLM(config)
        self.model.set_experts_implementation(experts)
        self.model.set_attn_implementation(attention)
        self.optimizer = _adamw(self.model)
        self.tokens = Tokens(fields, batch, seq_len)

    def save(self, path: str) -> None:
        """The weights as they are, for the other side to begin with."""
        torch.save(self.model.state_dict(), path)

    def load(self, path: str) -> None:
        self.model.load_state_dict(torch.load(path, mmap=True), strict=True)

    def loss(self) -> float:
        with torch.no_grad():
            return self._loss(self.tokens.first).item()

    def step(self) -> None:
        self._loss(self.tokens.next()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _loss(self, tokens: Tensor) -> Tensor:
        inputs, targets = tokens[:, :-1], tokens[:, 1:].contiguous()
        return self.model(
            input_ids=inputs, labels=targets, shift_labels=targets, use_cache=False
        ).loss


def help_process() -> None:
    """Both process settings; the permission means float32 all the same where there is no AMX."""
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"  # type: ignore[attr-defined]
    keep_freed_memory()
