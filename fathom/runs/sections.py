"""The tables of a recipe, one dataclass each, one docstring per key; checks that need no other table.

Values that the report does not publish are our choice. [model] is `fathom.ModelConfig`, [optim] is
`fathom.train.optimizer.OptimConfig`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from fathom.errors import RecipeError
from fathom.train.schedule import learning_rate

KINDS = ("pretrain",)


@dataclass(frozen=True)
class DataConfig:
    """Table [data]: what is read and how it becomes tokens."""

    sources: tuple[str, ...] = ("stdlib",)
    """Files and folders, or "stdlib": this Python's own standard library."""
    tokenizer: str = "bpe"
    """"bpe" or "char" trains one of the model's vocabulary size on the text; anything else is the path of one."""
    held_out: float = 0.02
    """Share of the text that is never trained on."""
    held_out_kind: str = "documents"
    """Hold out whole "documents", or the "tail" of each."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise RecipeError("data.sources = [] is empty; name a file, a folder or 'stdlib'")
        if not 0 < self.held_out < 1:
            raise RecipeError(
                f"data.held_out = {self.held_out} must lie between 0 and 1; 0.02 is usual"
            )
        _check_choice("data.held_out_kind", self.held_out_kind, ("documents", "tail"))


@dataclass(frozen=True)
class PrecisionConfig:
    """Table [precision]: how products are computed and what is kept for the backward pass."""

    compute: str = "auto"
    """Dtype of matrix products: "float32", "bfloat16", or "auto": bfloat16 on a GPU that has it, else float32."""
    recompute: bool = False
    """Make norms, MLA up-projections and SwiGLU again in backward instead of keeping them (report §3.2.3)."""
    compile: bool = False
    """Compile the elementwise functions inside the rules; pays in long runs where a C++ compiler or GPU is at hand."""

    def __post_init__(self) -> None:
        _check_choice("precision.compute", self.compute, ("auto", "float32", "bfloat16"))


@dataclass(frozen=True)
class CheckpointConfig:
    """Table [checkpoint]."""

    every: int = 100
    """Steps between checkpoints; the end of a stage always has one."""
    keep: int = 2
    """How many of the last are kept; with 1 a damaged one leaves nothing to go on from."""

    def __post_init__(self) -> None:
        _check_positive(self, "checkpoint")


@dataclass(frozen=True)
class MonitorConfig:
    """Table [monitor]: what is looked at while the run goes on; nothing here changes what is learnt."""

    eval_every: int = 100
    """Steps between evaluations on held-out text; the end of a stage always has one."""
    eval_tokens: int = 32768
    """Held-out tokens that each looks at; the last one of a stage takes all."""
    sample_every: int = 200
    """Steps between sample texts."""
    sample_prompt: str = "def "
    """How samples begin."""
    sample_tokens: int = 80
    """Tokens in a sample."""
    load_every: int = 10
    """Steps between whole expert-load matrices in load.jsonl."""
    needle_lengths: tuple[int, ...] = ()
    """Lengths in tokens at which needles are looked for at the end of every stage (needle.jsonl); none by default."""
    needle_depths: int = 11
    """Depths in such a grid, from the beginning to the end of the text."""
    needle_trials: int = 5
    """Texts for each length and depth."""
    needle_format: str = "pass-key"
    """What is hidden: a "pass-key" in held-out text, or "pairs" as in the source "needles"."""

    def __post_init__(self) -> None:
        _check_positive(self, "monitor")
        _check_choice("monitor.needle_format", self.needle_format, ("pass-key", "pairs"))
        if self.eval_tokens < 2:
            raise RecipeError(
                "monitor.eval_tokens = 1 must be at least 2, one to read, one to guess"
            )


@dataclass(frozen=True)
class Stage:
    """One row of [[stages]]."""

    name: str
    """What the stage is called; `--set stages.NAME.key=…` reaches it."""
    seq_len: int
    """Tokens in a sequence."""
    batch: int
    """Sequences in an optimiser step."""
    lr: float
    """Learning rate after the warm-up."""
    kind: str = "pretrain"
    """What is done: "pretrain"."""
    steps: int | None = None
    """Optimiser steps; this or `tokens`."""
    tokens: int | None = None
    """Tokens to train on, rounded up to whole steps; this or `steps`."""
    micro_batch: int | None = None
    """Sequences computed at a time; gradients are accumulated over the batch. None: the whole batch."""
    lr_end: float = 0.0
    """Learning rate at the end of the cosine."""
    warmup_steps: int = 0
    """Steps in which the rate rises from 0."""
    decay_steps: int = 0
    """Last steps of the stage in which the rate falls along a cosine."""
    gamma: float = 1e-3
    """Speed of the router biases (report §4.2: 0.001, later 0)."""
    mtp_weight: float = 0.3
    """Weight λ of the MTP loss (report §4.2: 0.3, later 0.1)."""
    balance_alpha: float = 1e-4
    """Weight α of the sequence-wise balance loss (report §4.2: 0.0001)."""
    rope_scaling: dict[str, Any] | None = None
    """YaRN settings of this stage (report §4.3); None takes the model's own."""

    def __post_init__(self) -> None:
        path = f"stages.{self.name}"
        _check_choice(f"{path}.kind", self.kind, KINDS)
        if (self.steps is None) == (self.tokens is None):
            given = "neither is given" if self.steps is None else "both are given"
            raise RecipeError(f"{path} needs either steps or tokens, and {given}; give one of them")
        _check_positive(self, path, ("steps", "tokens", "seq_len", "batch", "micro_batch"))
        self._check_rates(path)
        if self.micro_batch is not None and self.micro_batch > self.batch:
            raise RecipeError(
                f"{path}.micro_batch = {self.micro_batch} exceeds batch = {self.batch}; lower it"
            )
        if self.warmup_steps + self.decay_steps > self.num_steps:
            raise RecipeError(
                f"{path}: warmup_steps = {self.warmup_steps} and decay_steps = {self.decay_steps} do "
                f"not fit into {self.num_steps} steps; lower them or train longer"
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

    @property
    def tokens_per_step(self) -> int:
        """Tokens in one optimiser step."""
        return self.batch * self.seq_len

    @property
    def num_steps(self) -> int:
        """Optimiser steps of the stage."""
        if self.steps is not None:
            return self.steps
        assert self.tokens is not None
        return -(-self.tokens // self.tokens_per_step)

    def lr_at(self, position: float) -> float:
        """Learning rate after `position` steps of the stage."""
        return learning_rate(
            position, self.num_steps, self.lr, self.lr_end, self.warmup_steps, self.decay_steps
        )


def _check_choice(path: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise RecipeError(f"{path} = {value!r} must be one of {', '.join(allowed)}; choose one")


def _check_positive(table: Any, path: str, keys: tuple[str, ...] | None = None) -> None:
    """Counts must be at least 1: the named ones where they are given, or every whole number of the table."""
    for key in keys or tuple(field.name for field in fields(table)):
        value = getattr(table, key)
        if isinstance(value, int) and value < 1:
            raise RecipeError(f"{path}.{key} = {value} must be at least 1; raise it")
