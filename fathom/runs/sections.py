"""Tables of a recipe, one dataclass each, one docstring per key; checks that need no other table.

Values that the report does not publish are our choice. [[stages]] are in `stage.py`, [parallel] in `parallel.py`;
[model] is `fathom.ModelConfig`; [optim], [guard] and [ema] are `OptimConfig`, `GuardConfig` and `EmaConfig` in
`fathom/train/`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from fathom.data.draws import check_rate
from fathom.errors import DataError, RecipeError
from fathom.runs.checks import check_choice, check_positive, check_weights


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
        check_choice("data.held_out_kind", self.held_out_kind, ("documents", "tail"))
        check_choice("data.dedup", self.dedup, ("none", "exact", "near"))
        check_weights("data.weights", self.weights)
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
        check_choice("precision.compute", self.compute, ("auto", "float32", "bfloat16"))


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
        check_positive(self, "checkpoint")


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
        check_positive(self, "monitor", counts)
        if self.position_tokens < 0:
            raise RecipeError(
                f"monitor.position_tokens = {self.position_tokens} must be at least 0; 0 leaves it out"
            )
        check_choice("monitor.needle_format", self.needle_format, ("pass-key", "pairs"))
        if self.eval_tokens < 2:
            raise RecipeError(
                "monitor.eval_tokens = 1 must be at least 2, one to read, one to guess"
            )
