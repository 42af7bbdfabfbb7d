"""The tables of a recipe, one dataclass each, one docstring per key; checks that need no other table.

Values that the report does not publish are our choice. [model] is `fathom.ModelConfig`; [optim], [guard] and [ema]
are `OptimConfig`, `GuardConfig` and `EmaConfig` in `fathom/train/`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

from fathom.data.draws import check_rate
from fathom.errors import DataError, RecipeError
from fathom.train.ramp import Batches
from fathom.train.schedule import learning_rate

KINDS = ("pretrain",)


@dataclass(frozen=True)
class DataConfig:
    """Table [data]: what is read and how it becomes tokens."""

    sources: tuple[str, ...] = ("stdlib",)
    """Files and folders, each with a name if you like ("code=src/"), "stdlib": this Python's own standard library, or
    one folder that `fathom data prepare` made."""
    weights: dict[str, float] = field(default_factory=dict)
    """Share of each named source in what is trained on; empty: as large as they are."""
    tokenizer: str = "bpe"
    """"bpe" or "char" trains one of the model's vocabulary size on the text; anything else is the path of one."""
    held_out: float = 0.02
    """Share of the text that is never trained on."""
    held_out_kind: str = "documents"
    """Hold out whole "documents", or the "tail" of each."""
    fim_rate: float = 0.0
    """Share of documents that are told prefix, suffix, middle (report §4.1: 0.1)."""
    split_rate: float = 0.0
    """Share of tokens joining punctuation and line ends that are split (report §4.1 gives no figure)."""
    dedup: str = "none"
    """Which repeated documents are dropped: "none", "exact" ones, or "near" ones too."""
    filters: tuple[str, ...] = ()
    """Names of filters that a document must pass (`fathom.data.filters`)."""
    isolate: bool = False
    """Whether a token sees its own document only (report §5.1, SFT); in pre-training it sees all before it (§4.1)."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise RecipeError("data.sources = [] is empty; name a file, a folder or 'stdlib'")
        if not 0 < self.held_out < 1:
            raise RecipeError(
                f"data.held_out = {self.held_out} must lie between 0 and 1; 0.02 is usual"
            )
        _check_choice("data.held_out_kind", self.held_out_kind, ("documents", "tail"))
        _check_choice("data.dedup", self.dedup, ("none", "exact", "near"))
        _check_weights("data.weights", self.weights)
        for key in ("fim_rate", "split_rate"):
            try:
                check_rate(f"data.{key}", getattr(self, key))
            except DataError as error:
                raise RecipeError(str(error)) from error


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
    asynchronous: bool = False
    """Copy the state to CPU memory and write it while training goes on; needs memory for that copy."""

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
    position_tokens: int = 16384
    """Held-out tokens whose loss by position is taken before and after a stage, one sequence at least; 0: none."""
    tensorboard: bool = False
    """Write the numbers of the logs for TensorBoard as well, into OUT/tensorboard."""
    needle_lengths: tuple[int, ...] = ()
    """Lengths in tokens at which needles are looked for before and after every stage (needle.jsonl); empty: none."""
    needle_depths: int = 11
    """Depths in such a grid, from the beginning to the end of the text."""
    needle_trials: int = 5
    """Texts for each length and depth."""
    needle_format: str = "pass-key"
    """What is hidden: a "pass-key" in held-out text, or "pairs" as in the source "needles"."""

    def __post_init__(self) -> None:
        counts = tuple(field.name for field in fields(self) if field.name != "position_tokens")
        _check_positive(self, "monitor", counts)
        if self.position_tokens < 0:
            raise RecipeError(
                f"monitor.position_tokens = {self.position_tokens} must be at least 0; 0 leaves it out"
            )
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
        _check_choice(f"{path}.kind", self.kind, KINDS)
        if (self.steps is None) == (self.tokens is None):
            given = "neither is given" if self.steps is None else "both are given"
            raise RecipeError(f"{path} needs either steps or tokens, and {given}; give one of them")
        counts = ("steps", "tokens", "seq_len", "batch", "micro_batch", "batch_start")
        _check_positive(
            self, path, (*counts, "batch_ramp_tokens", "batch_multiple", "decay_tokens")
        )
        self._check_batch(path)
        self._check_rates(path)
        _check_weights(f"{path}.weights", self.weights)
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


def _check_weights(path: str, weights: dict[str, Any]) -> None:
    for name, weight in weights.items():
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not (number and 0 <= weight < math.inf):
            raise RecipeError(f"{path}.{name} = {weight!r} must be a number, not negative")
    if weights and not sum(weights.values()):
        raise RecipeError(f"{path} = {weights} gives every source nothing; raise one of them")


def _check_choice(path: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise RecipeError(f"{path} = {value!r} must be one of {', '.join(allowed)}; choose one")


def _check_positive(table: Any, path: str, keys: tuple[str, ...] | None = None) -> None:
    """Counts must be at least 1: the named ones where they are given, or every whole number of the table."""
    for key in keys or tuple(one.name for one in fields(table)):
        value = getattr(table, key)
        if isinstance(value, int) and not isinstance(value, bool) and value < 1:
            raise RecipeError(f"{path}.{key} = {value} must be at least 1; raise it")
