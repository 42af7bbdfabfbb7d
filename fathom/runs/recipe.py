"""A recipe: everything a run does, as data (DESIGN §2). A table of stages over a model, read from TOML.

>>> recipe = load_recipe("nano", ["stages.pretrain.lr=3e-4"])
>>> recipe.at(tokens=1_000_000).lr

A bare name finds a recipe that fathom brings along, a path works too. Values that the report does not publish are our
choice and said to be where they are set.
"""

from __future__ import annotations

import tomllib
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from fathom.errors import ConfigError, RecipeError
from fathom.model import ModelConfig
from fathom.runs.tables import build, parse_value, to_toml, unknown
from fathom.train.optimizer import OptimConfig
from fathom.train.schedule import Moment, learning_rate

FOLDER = Path(__file__).resolve().parent.parent / "recipes"
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


@dataclass(frozen=True)
class PrecisionConfig:
    """Table [precision]: how products are computed and what is kept for the backward pass."""

    compute: str = "auto"
    """Dtype of matrix products: "float32", "bfloat16", or "auto": bfloat16 on a GPU that has it, else float32."""
    recompute: bool = False
    """Make norms, MLA up-projections and SwiGLU again in backward instead of keeping them (report §3.2.3)."""
    compile: bool = False
    """Compile the elementwise functions inside the rules; pays in long runs where a C++ compiler or GPU is at hand."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Table [checkpoint]."""

    every: int = 100
    """Steps between checkpoints; the end of a stage always has one."""
    keep: int = 2
    """How many of the last are kept."""


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
    """YaRN settings from this stage on (report §4.3); None is plain RoPE."""

    def __post_init__(self) -> None:
        path = f"stages.{self.name}"
        if self.kind not in KINDS:
            raise RecipeError(f"{path}.kind = {self.kind!r} must be one of {', '.join(KINDS)}")
        if (self.steps is None) == (self.tokens is None):
            raise RecipeError(f"{path} needs either steps or tokens; give exactly one of them")
        for key in ("steps", "tokens", "seq_len", "batch", "micro_batch"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise RecipeError(f"{path}.{key} = {value} must be at least 1; raise it")
        if self.micro_batch is not None and self.micro_batch > self.batch:
            raise RecipeError(
                f"{path}.micro_batch = {self.micro_batch} exceeds batch = {self.batch}; lower it"
            )
        for key in ("lr_end", "gamma", "mtp_weight", "balance_alpha", "warmup_steps", "decay_steps"):
            if getattr(self, key) < 0:
                raise RecipeError(f"{path}.{key} = {getattr(self, key)} must not be negative")
        if not self.lr > 0:
            raise RecipeError(f"{path}.lr = {self.lr} must be positive; 3e-4 is a usual value")
        if self.warmup_steps + self.decay_steps > self.num_steps:
            raise RecipeError(
                f"{path}: warmup_steps = {self.warmup_steps} and decay_steps = {self.decay_steps} do "
                f"not fit into {self.num_steps} steps; lower them or train longer"
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


@dataclass(frozen=True)
class Recipe:
    """A whole run."""

    name: str
    """What it is called; the default run folder is runs/NAME."""
    model: ModelConfig
    """Shape of the model, in the released config.json's terms."""
    stages: tuple[Stage, ...]
    """What is done, in order."""
    seed: int = 0
    """Seed of everything random."""
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)

    def __post_init__(self) -> None:
        _check(self)

    @property
    def steps(self) -> int:
        """Optimiser steps of all stages."""
        return sum(stage.num_steps for stage in self.stages)

    def first_step(self, index: int) -> int:
        """Steps done before stage `index`."""
        return sum(stage.num_steps for stage in self.stages[:index])

    def at(self, tokens: float | None = None, step: float | None = None) -> Moment:
        """What holds once `tokens` tokens, or `step` steps, have been trained on.

        At a border the stage that ends there still holds. Raises `RecipeError` beyond the end.
        """
        if (tokens is None) == (step is None):
            raise RecipeError("at() takes either tokens or step; give exactly one of them")
        sizes = [1 if tokens is None else stage.tokens_per_step for stage in self.stages]
        lengths = [stage.num_steps * size for stage, size in zip(self.stages, sizes, strict=True)]
        ends = list(accumulate(lengths))
        asked = step if tokens is None else tokens
        assert asked is not None
        if not 0 <= asked <= ends[-1]:
            unit = "steps" if tokens is None else "tokens"
            raise RecipeError(f"{asked} is outside this recipe's 0 to {ends[-1]} {unit}")
        index = bisect_left(ends, asked)
        stage = self.stages[index]
        position = (asked - (ends[index] - lengths[index])) / sizes[index]
        before = sum(s.num_steps * s.tokens_per_step for s in self.stages[:index])
        return Moment(
            stage=stage.name,
            step=self.first_step(index) + int(position),
            tokens=before + round(position * stage.tokens_per_step),
            lr=stage.lr_at(position),
            batch=stage.batch,
            seq_len=stage.seq_len,
            gamma=stage.gamma,
            mtp_weight=stage.mtp_weight,
            balance_alpha=stage.balance_alpha,
            rope_scaling=stage.rope_scaling,
        )

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, in the recipe's own layout."""
        content = asdict(self)
        # TOML has no null: a recipe says 0 for "no query latent".
        content["model"]["q_lora_rank"] = self.model.q_lora_rank or 0
        order = ("name", "seed", "model", "data", "optim", "precision", "checkpoint", "monitor")
        return {key: content[key] for key in (*order, "stages")}

    def to_toml(self) -> str:
        """The resolved recipe, every default written out."""
        return to_toml(self.to_dict())


def _check(recipe: Recipe) -> None:
    """What only the whole recipe can tell."""
    if not recipe.stages:
        raise RecipeError("the recipe has no [[stages]]; add one")
    names = [stage.name for stage in recipe.stages]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise RecipeError(f"two stages are called {twice!r}; give each its own name")
    for stage in recipe.stages:
        if stage.seq_len > recipe.model.max_position_embeddings:
            raise RecipeError(
                f"stages.{stage.name}.seq_len = {stage.seq_len} exceeds model.max_position_embeddings = "
                f"{recipe.model.max_position_embeddings}; raise that or shorten the sequences"
            )
    if not 0 < recipe.data.held_out < 1:
        raise RecipeError(f"data.held_out = {recipe.data.held_out} must lie between 0 and 1")
    if recipe.data.held_out_kind not in ("documents", "tail"):
        raise RecipeError(
            f"data.held_out_kind = {recipe.data.held_out_kind!r} must be 'documents' or 'tail'"
        )
    if not recipe.data.sources:
        raise RecipeError("data.sources is empty; name a file, a folder or 'stdlib'")
    if recipe.precision.compute not in ("auto", "float32", "bfloat16"):
        raise RecipeError(
            f"precision.compute = {recipe.precision.compute!r} must be auto, float32 or bfloat16"
        )
    positive = {
        **{f"monitor.{k}": v for k, v in asdict(recipe.monitor).items() if isinstance(v, int)},
        **{f"checkpoint.{k}": v for k, v in asdict(recipe.checkpoint).items()},
    }
    for key, value in positive.items():
        if value < 1:
            raise RecipeError(f"{key} = {value} must be at least 1; raise it")


def recipe_names() -> list[str]:
    """The recipes that fathom brings along."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe by name or path and apply `key=value` overrides.

    Raises `RecipeError` that names key, value, constraint and remedy.
    """
    content = _read(name_or_path)
    for override in overrides:
        _override(content, override)
    return recipe_from_dict(content)


def _read(name_or_path: str | Path) -> dict[str, Any]:
    path = Path(name_or_path)
    packaged = FOLDER / f"{name_or_path}.toml"
    if not path.is_file() and packaged.is_file():
        path = packaged
    if not path.is_file():
        raise RecipeError(
            f"no recipe {str(name_or_path)!r}: there is no such file, and fathom's own are "
            f"{', '.join(recipe_names())}"
        )
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not TOML: {error}; correct it there") from error


def _override(content: dict[str, Any], override: str) -> None:
    """Apply one `a.b=value` to the nested dict, stages by name."""
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise RecipeError(f"--set {override!r} must look like stages.pretrain.lr=3e-4")
    place: Any = content
    for number, key in enumerate(keys[:-1]):
        if isinstance(place, list):
            place = _stage_called(place, key)
        elif isinstance(place, dict):
            place = place.setdefault(key, {})
        else:
            raise RecipeError(f"--set {override!r}: {'.'.join(keys[:number])} is not a table")
    if not isinstance(place, dict):
        raise RecipeError(f"--set {override!r} must name a key inside a table or stage")
    place[keys[-1]] = parse_value(text.strip())


def _stage_called(stages: list[Any], name: str) -> Any:
    named = {stage.get("name"): stage for stage in stages if isinstance(stage, dict)}
    if name not in named:
        raise RecipeError(f"no stage is called {name!r}; there are {', '.join(map(str, named))}")
    return named[name]


def recipe_from_dict(content: dict[str, Any]) -> Recipe:
    """A recipe from nested tables, everything checked."""
    tables = {
        "model": ModelConfig,
        "data": DataConfig,
        "optim": OptimConfig,
        "precision": PrecisionConfig,
        "checkpoint": CheckpointConfig,
        "monitor": MonitorConfig,
    }
    known = {*tables, "name", "seed", "stages"}
    parts: dict[str, Any] = {}
    for key, value in content.items():
        if key not in known:
            raise RecipeError(unknown(key, key, known))
        if key in tables:
            if not isinstance(value, dict):
                raise RecipeError(f"{key} = {value!r} must be a table: [{key}]")
            parts[key] = _table(tables[key], value, key)
        elif key == "stages":
            parts[key] = _stages(value)
        else:
            parts[key] = value
    for key, kind in (("name", str), ("seed", int)):
        if key in parts and (not isinstance(parts[key], kind) or isinstance(parts[key], bool)):
            raise RecipeError(f"{key} = {parts[key]!r} must be of type {kind.__name__}")
    for key in ("name", "model", "stages"):
        if key not in parts:
            raise RecipeError(f"the recipe has no {key!r}; add it")
    return Recipe(**parts)


def _table(cls: type, table: dict[str, Any], where: str) -> Any:
    if cls is ModelConfig and table.get("q_lora_rank") == 0:
        table = {**table, "q_lora_rank": None}
    try:
        return build(cls, table, where)
    except ConfigError as error:
        raise RecipeError(f"[{where}]: {error}") from error


def _stages(rows: Any) -> tuple[Stage, ...]:
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise RecipeError("stages must be written as [[stages]] tables")
    return tuple(
        build(Stage, row, f"stages.{row.get('name', number)}") for number, row in enumerate(rows)
    )
