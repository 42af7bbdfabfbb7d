"""A row of [[stages]]: what one stage of a run trains on, for how long, and with which rates (report §4.2, 4.3)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from fathom.errors import RecipeError
from fathom.runs.checks import check_choice, check_positive, check_weights
from fathom.train.ramp import Batches
from fathom.train.schedule import learning_rate

KINDS = ("pretrain",)


@dataclass(frozen=True)
class Stage:
    """One row of [[stages]]."""

    name: str
    """What the stage is called; `--set stages.NAME.key=…` reaches it."""
    seq_len: int
    """Tokens in a sequence."""
    batch: int
    """Sequences in an optimiser step, once it has grown to its full size."""
    lr: float
    """Learning rate after the warm-up."""
    kind: str = "pretrain"
    """What is done: "pretrain"."""
    steps: int | None = None
    """Optimiser steps; this or `tokens`."""
    tokens: int | None = None
    """Tokens to train on; the last step ends at this mark or a little behind it. This or `steps`."""
    batch_start: int | None = None
    """Sequences in the first step; None: the full batch from the beginning."""
    batch_ramp_tokens: int | None = None
    """Tokens over which the batch grows from `batch_start`, linearly (our choice; report §4.2: "gradually")."""
    batch_multiple: int | None = None
    """The batch grows by whole multiples of so many sequences at a time; None: by single ones."""
    micro_batch: int | None = None
    """Sequences computed at a time; gradients are accumulated over the batch. None: the whole batch."""
    lr_end: float = 0.0
    """Learning rate at the end of the cosine."""
    warmup_steps: int = 0
    """Steps in which the rate rises from 0."""
    decay_steps: int = 0
    """Last steps of the stage in which the rate falls along a cosine; this or `decay_tokens`."""
    decay_tokens: int | None = None
    """The same in tokens."""
    gamma: float = 1e-3
    """Speed of the router biases (report §4.2: 0.001, later 0)."""
    mtp_weight: float = 0.3
    """Weight λ of the MTP loss (report §4.2: 0.3, later 0.1)."""
    balance_alpha: float = 1e-4
    """Weight α of the sequence-wise balance loss (report §4.2: 0.0001)."""
    rope_scaling: dict[str, Any] | None = None
    """YaRN settings of this stage (report §4.3); None takes the model's own."""
    weights: dict[str, float] = field(default_factory=dict)
    """Share of each source of the data in this stage; empty takes data.weights."""

    def __post_init__(self) -> None:
        path = f"stages.{self.name}"
        check_choice(f"{path}.kind", self.kind, KINDS)
        if (self.steps is None) == (self.tokens is None):
            given = "neither is given" if self.steps is None else "both are given"
            raise RecipeError(f"{path} needs either steps or tokens, and {given}; give one of them")
        counts = ("steps", "tokens", "seq_len", "batch", "micro_batch", "batch_start")
        check_positive(self, path, (*counts, "batch_ramp_tokens", "batch_multiple", "decay_tokens"))
        self._check_batch(path)
        self._check_rates(path)
        check_weights(f"{path}.weights", self.weights)
        self._check_fits(path)

    def _check_batch(self, path: str) -> None:
        if self.micro_batch is not None and self.micro_batch > self.batch:
            raise RecipeError(
                f"{path}.micro_batch = {self.micro_batch} exceeds batch = {self.batch}; lower it"
            )
        if (self.batch_start is None) != (self.batch_ramp_tokens is None):
            raise RecipeError(
                f"{path}.batch_start = {self.batch_start} and batch_ramp_tokens = {self.batch_ramp_tokens} say "
                f"together how the batch grows; give both or none"
            )
        if self.batch_multiple and self.batch_start is None:
            raise RecipeError(
                f"{path}.batch_multiple = {self.batch_multiple} does nothing without batch_start and "
                f"batch_ramp_tokens; give them or leave it out"
            )
        if self.batch_start is not None and self.batch_start > self.batch:
            raise RecipeError(
                f"{path}.batch_start = {self.batch_start} exceeds batch = {self.batch}; a batch only grows"
            )

    def _check_fits(self, path: str) -> None:
        """Warm-up and cosine into the stage."""
        if self.decay_steps and self.decay_tokens:
            raise RecipeError(
                f"{path} has decay_steps = {self.decay_steps} and decay_tokens = {self.decay_tokens}; give one of them"
            )
        if self.warmup_steps + self._decay <= self._length:
            return
        decay = f"decay_tokens = {self.decay_tokens}" if self.decay_tokens else ""
        raise RecipeError(
            f"{path}: warmup_steps = {self.warmup_steps} and {decay or f'decay_steps = {self.decay_steps}'} do "
            f"not fit into {math.ceil(self._length)} steps; lower them or train longer"
        )

    def _check_rates(self, path: str) -> None:
        if not self.lr > 0:
            raise RecipeError(f"{path}.lr = {self.lr} must be positive; 3e-4 is a usual value")
        if self.lr_end > self.lr:
            raise RecipeError(f"{path}.lr_end = {self.lr_end} exceeds lr = {self.lr}; lower it")
        rates = ("lr_end", "gamma", "mtp_weight", "balance_alpha")
        for key in (*rates, "warmup_steps", "decay_steps"):
            if getattr(self, key) < 0:
                raise RecipeError(
                    f"{path}.{key} = {getattr(self, key)} must be at least 0; raise it"
                )

    @cached_property
    def batches(self) -> Batches:
        """Sequences in each of the stage's steps."""
        if self.batch_start is None or self.batch_ramp_tokens is None:
            return Batches(self.batch, self.batch)
        ramp = self.batch_ramp_tokens / self.seq_len
        return Batches(self.batch, self.batch_start, ramp, self.batch_multiple or 1)

    @property
    def tokens_asked(self) -> int:
        """Tokens that the recipe gives the stage; whole steps may take a little more."""
        if self.tokens is not None:
            return self.tokens
        assert self.steps is not None
        return round(self.batches.before(self.steps)) * self.seq_len

    def lr_at(self, tokens: float) -> float:
        """Learning rate once `tokens` tokens of the stage are trained on."""
        position = self._steps(tokens)
        return learning_rate(
            position, self._length, self.lr, self.lr_end, self.warmup_steps, self._decay
        )

    def _steps(self, tokens: float) -> float:
        return self.batches.steps(tokens / self.seq_len)

    @cached_property
    def _length(self) -> float:
        """Steps of the stage, the last perhaps in part."""
        return self._steps(self.tokens_asked)

    @cached_property
    def _decay(self) -> float:
        """Steps of the cosine."""
        if self.decay_tokens is None:
            return self.decay_steps
        return self._length - self._steps(max(self.tokens_asked - self.decay_tokens, 0))
