"""A recipe: everything a run does, as data. A table of stages over a model, read from TOML.

>>> recipe = load_recipe("nano", ["stages.pretrain.lr=3e-4"])
>>> recipe.at(tokens=1_000_000).lr

A bare name finds a recipe that fathom brings along, a path works too. Values that the report does not publish are our
choice and said to be where they are set.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from numbers import Real
from pathlib import Path
from typing import Any

from fathom.errors import ConfigError, RecipeError, did_you_mean
from fathom.model import ModelConfig
from fathom.runs.parallel import ParallelConfig
from fathom.runs.sections import (
    CheckpointConfig,
    DataConfig,
    MonitorConfig,
    PrecisionConfig,
)
from fathom.runs.stage import Stage
from fathom.runs.tables import build, parse_value, to_toml, unknown
from fathom.runs.timeline import Span, lay_out, span_at_step, span_at_tokens, total_tokens
from fathom.train.ema import EmaConfig
from fathom.train.guard import GuardConfig
from fathom.train.optimizer import OptimConfig
from fathom.train.schedule import Moment

TABLES: dict[str, type] = {
    "model": ModelConfig,
    "data": DataConfig,
    "optim": OptimConfig,
    "guard": GuardConfig,
    "ema": EmaConfig,
    "parallel": ParallelConfig,
    "precision": PrecisionConfig,
    "checkpoint": CheckpointConfig,
    "monitor": MonitorConfig,
}
"""The tables of a recipe but [[stages]], in the order in which they are written out."""
FOLDER = Path(__file__).resolve().parent.parent / "recipes"


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
    guard: GuardConfig = field(default_factory=GuardConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)

    def __post_init__(self) -> None:
        _check(self)

    @cached_property
    def spans(self) -> tuple[Span, ...]:
        """Where each stage lies, in steps and in tokens."""
        return lay_out(self.stages)

    @property
    def steps(self) -> int:
        """Optimiser steps of all stages."""
        return self.spans[-1].last_step

    @property
    def total_tokens(self) -> int:
        """Tokens trained on when all steps are done."""
        return total_tokens(self.spans)

    def at(self, tokens: float | None = None, step: float | None = None) -> Moment:
        """What holds once `tokens` tokens, or `step` steps, have been trained on.

        At a border the stage that ends there still holds. Raises `RecipeError` beyond the end and for what is no
        number.
        """
        if (tokens is None) == (step is None):
            raise RecipeError("at() takes either tokens or step; give exactly one of them")
        if tokens is not None:
            _check_inside(tokens, self.total_tokens, "tokens")
            span = span_at_tokens(self.spans, tokens)
            return self._moment(span, span.step_at(tokens), tokens, span.batch_at(tokens))
        assert step is not None
        _check_inside(step, self.steps, "steps")
        span = span_at_step(self.spans, step)
        return self._moment(span, int(step), span.tokens_at(step), span.batch_of(step))

    def _moment(self, span: Span, step: int, tokens: float, batch: int) -> Moment:
        stage = span.stage
        return Moment(
            stage=stage.name,
            step=step,
            tokens=round(tokens),
            lr=stage.lr_at(tokens - span.begins),
            batch=batch,
            seq_len=stage.seq_len,
            gamma=stage.gamma,
            mtp_weight=stage.mtp_weight,
            balance_alpha=stage.balance_alpha,
            rope_scaling=self.rope_scaling(stage),
        )

    def rope_scaling(self, stage: Stage) -> dict[str, Any] | None:
        """Rotary settings of a stage: its own or the model's; None is plain RoPE."""
        return stage.rope_scaling or self.model.rope_scaling

    def weights(self, stage: Stage) -> dict[str, float]:
        """Share of each source in a stage; empty: as large as they are."""
        return stage.weights or self.data.weights

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, in the recipe's own layout."""
        content = asdict(self)
        # TOML has no null: a recipe says 0 for "no query latent".
        content["model"]["q_lora_rank"] = self.model.q_lora_rank or 0
        plain = ("name", "seed")
        return {key: content[key] for key in (*plain, *TABLES, "stages")}

    def to_toml(self) -> str:
        """The resolved recipe, every default written out."""
        return to_toml(self.to_dict())


def _check_inside(asked: float, end: int, unit: str) -> None:
    if not isinstance(asked, Real) or isinstance(asked, bool):
        raise RecipeError(
            f"at() takes a number of {unit}, and {asked!r} is none; write 10e12 for 10T"
        )
    if not 0 <= asked <= end:
        raise RecipeError(f"{asked} is outside this recipe's 0 to {end} {unit}")


def _check(recipe: Recipe) -> None:
    """What only the whole recipe can tell."""
    if not recipe.name or set(recipe.name) & set("/\\\0") or recipe.name.startswith("."):
        raise RecipeError(
            f"name = {recipe.name!r} must be usable as a folder's name; choose another"
        )
    if not 0 <= recipe.seed < 2**63:
        raise RecipeError(f"seed = {recipe.seed} must lie in 0 to 2^63 - 1; choose another")
    if not recipe.stages:
        raise RecipeError("the recipe has no [[stages]]; add one")
    names = [stage.name for stage in recipe.stages]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise RecipeError(f"two stages are called {twice!r}; give each its own name")
    for stage in recipe.stages:
        _check_fits(stage, recipe.model)


def _check_fits(stage: Stage, model: ModelConfig) -> None:
    """What a stage asks of the model."""
    if stage.seq_len > model.max_position_embeddings:
        raise RecipeError(
            f"stages.{stage.name}.seq_len = {stage.seq_len} exceeds model.max_position_embeddings = "
            f"{model.max_position_embeddings}; raise that or shorten the sequences"
        )
    try:
        model.replace(rope_scaling=stage.rope_scaling)
    except ConfigError as error:
        raise RecipeError(f"stages.{stage.name}.rope_scaling: {error}") from error


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
        name, own = path.name.removesuffix(".toml"), "fathom's own recipes are"
        raise RecipeError(
            f"no recipe {str(name_or_path)!r}: there is no such file; {did_you_mean(name, recipe_names(), own)}"
        )
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not TOML: {error}; correct it there") from error
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}; mend that") from error


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
        names = map(str, named)
        raise RecipeError(f"no stage is called {name!r}; {did_you_mean(name, names, 'there are')}")
    return named[name]


def recipe_from_dict(content: dict[str, Any]) -> Recipe:
    """A recipe from nested tables, everything checked."""
    known = {*TABLES, "name", "seed", "stages"}
    parts: dict[str, Any] = {}
    for key, value in content.items():
        if key not in known:
            raise RecipeError(unknown(key, key, known))
        if key in TABLES:
            if not isinstance(value, dict):
                raise RecipeError(f"{key} = {value!r} must be a table: [{key}]")
            parts[key] = _table(TABLES[key], value, key)
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
