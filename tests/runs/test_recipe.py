"""Recipes: read strictly, written back whole, and able to say what holds at any moment."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fathom
from fathom.errors import RecipeError
from fathom.runs.recipe import load_recipe, recipe_from_dict, recipe_names
from fathom.runs.tables import differences, to_toml
from tests.runs.tiny import MODEL, SECOND_STAGE, STAGE, tiny_dict, tiny_recipe

YARN = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32, "mscale": 1.0}


@pytest.mark.parametrize("name", recipe_names())
def test_packaged_recipes_load_and_know_every_moment(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    asked = sum(stage.tokens_asked for stage in recipe.stages)
    last = recipe.stages[-1]
    assert recipe.at(step=recipe.steps).tokens == recipe.total_tokens
    assert (
        asked <= recipe.total_tokens < asked + 2 * max(s.batch * s.seq_len for s in recipe.stages)
    )
    assert recipe.at(tokens=recipe.total_tokens).stage == last.name
    assert recipe.at(step=0).lr == 0.0 < recipe.at(step=1).lr


def test_the_recipes_that_the_documentation_names_are_there() -> None:
    assert {"nano", "mini", "shakespeare-char", "gpu-1b"} <= set(recipe_names())


@pytest.mark.parametrize("name", recipe_names())
def test_what_is_written_is_read_back_equal(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    (tmp_path / "again.toml").write_text(recipe.to_toml(), encoding="utf-8")
    assert load_recipe(tmp_path / "again.toml") == recipe


def test_awkward_texts_and_settings_survive_the_round_trip(tmp_path: Path) -> None:
    awkward = 'a "quoted" \\ path\twith é, 汉 and \x7f'
    recipe = tiny_recipe(
        awkward,
        monitor={"sample_prompt": "two\nlines\r\u2028"},
        stages=[STAGE, {**SECOND_STAGE, "rope_scaling": YARN, "lr": 1e-05}],
    )
    (tmp_path / "again.toml").write_bytes(recipe.to_toml().encode())
    again = load_recipe(tmp_path / "again.toml")
    assert again == recipe
    assert again.data.sources == (awkward,)


def test_a_source_with_a_dot_in_its_name_is_weighed(tmp_path: Path) -> None:
    weights = {"wiki.en": 0.5, "code": 1.5, "a b": 1.0}
    recipe = tiny_recipe(data={"weights": weights}, stages=[{**STAGE, "weights": weights}])
    (tmp_path / "again.toml").write_text(recipe.to_toml(), encoding="utf-8")
    assert load_recipe(tmp_path / "again.toml") == recipe


def test_zero_as_query_rank_means_none() -> None:
    recipe = tiny_recipe(model={**MODEL, "q_lora_rank": 0})
    assert recipe.model.q_lora_rank is None
    assert "q_lora_rank = 0\n" in recipe.to_toml()
    assert load_recipe("shakespeare-char").model.q_lora_rank is None


# --- what is refused -----------------------------------------------------------------------------


def changed(path: str, value: Any) -> dict[str, Any]:
    """The tiny recipe with one value changed; `stages.` reaches the first stage."""
    content = tiny_dict()
    table, _, key = path.rpartition(".")
    if table == "stages":
        content["stages"][0][key] = value
    else:
        (content.setdefault(table, {}) if table else content)[key] = value
    return content


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("modle", {}, ["modle", "did you mean 'model'"]),
        ("stages.warmup", 3, ["stages.pretrain.warmup", "did you mean 'warmup_steps'"]),
        ("model.hiden_size", 3, ["model.hiden_size is not a key", "did you mean 'hidden_size'"]),
        ("optim.lr", 1e-3, ["optim.lr is not a key", "weight_decay"]),
        ("stages.lr", "fast", ["stages.pretrain.lr = 'fast'", "a number"]),
        ("stages.lr", float("nan"), ["stages.pretrain.lr = nan"]),
        ("stages.lr", 0, ["stages.pretrain.lr = 0", "positive"]),
        ("stages.steps", 1.5, ["stages.pretrain.steps = 1.5", "a whole number"]),
        ("stages.steps", True, ["stages.pretrain.steps = True", "a whole number"]),
        ("stages.steps", 0, ["stages.pretrain.steps = 0", "at least 1"]),
        ("stages.tokens", 100, ["either steps or tokens"]),
        ("stages.micro_batch", 8, ["micro_batch = 8 exceeds batch = 4"]),
        ("stages.gamma", -1.0, ["stages.pretrain.gamma = -1.0", "at least 0"]),
        ("stages.decay_steps", 10, ["warmup_steps = 3 and decay_steps = 10", "12 steps"]),
        ("stages.seq_len", 65, ["seq_len = 65", "max_position_embeddings = 64"]),
        ("stages.kind", "sing", ["kind = 'sing'", "pretrain"]),
        ("stages.rope_scaling", {"type": "linear"}, ["stages.pretrain.rope_scaling", "linear"]),
        ("model.n_group", 3, ["[model]", "n_group"]),
        ("model.hidden_size", "wide", ["model.hidden_size = 'wide'", "a whole number"]),
        ("model", 3, ["model = 3", "[model]"]),
        ("data.sources", "a.txt", ["data.sources = 'a.txt'", "a list"]),
        ("data.sources", ["a", 3], ["data.sources[1] = 3", "a text"]),
        ("data.sources", [], ["data.sources", "empty"]),
        ("data.held_out", 1.0, ["data.held_out = 1.0", "between 0 and 1"]),
        ("data.fim_rate", 1.5, ["data.fim_rate=1.5 is not a share", "up to 1"]),
        ("data.split_rate", -0.1, ["data.split_rate=-0.1 is not a share"]),
        ("data.held_out_kind", "head", ["data.held_out_kind = 'head'", "tail"]),
        ("precision.compute", "float8", ["precision.compute = 'float8'", "bfloat16"]),
        ("precision.recompute", 1, ["precision.recompute = 1", "true or false"]),
        ("optim.beta1", 1.0, ["optim", "beta1 = 1.0"]),
        ("optim.clip_norm", 0.0, ["optim", "clip_norm = 0.0"]),
        ("checkpoint.keep", 0, ["checkpoint.keep = 0", "at least 1"]),
        ("monitor.eval_every", 0, ["monitor.eval_every = 0", "at least 1"]),
        ("monitor.eval_tokens", 1, ["monitor.eval_tokens = 1", "at least 2"]),
        ("name", "../else", ["name = '../else'"]),
        ("name", 7, ["name = 7", "str"]),
        ("seed", -1, ["seed = -1"]),
        ("stages", [], ["no [[stages]]"]),
        ("stages", 3, ["[[stages]]"]),
        ("stages", [STAGE, STAGE], ["two stages are called 'pretrain'"]),
        ("stages", [{"name": "short"}], ["stages.short has no 'seq_len'"]),
    ],
)
def test_each_mistake_is_named_with_its_key(path: str, value: Any, said: list[str]) -> None:
    with pytest.raises(RecipeError) as refused:
        recipe_from_dict(changed(path, value))
    message = str(refused.value)
    assert all(part in message for part in said), message


@pytest.mark.parametrize("key", ["name", "model", "stages"])
def test_what_must_be_there(key: str) -> None:
    content = tiny_dict()
    del content[key]
    with pytest.raises(RecipeError, match=f"no '{key}'"):
        recipe_from_dict(content)


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no recipe 'nanno'.*nano"):
        load_recipe("nanno")
    (tmp_path / "torn.toml").write_text("[model\n")
    with pytest.raises(RecipeError, match=r"torn\.toml is not TOML"):
        load_recipe(tmp_path / "torn.toml")
    (tmp_path / "junk.toml").write_bytes(bytes(range(256)))
    with pytest.raises(RecipeError, match=r"junk\.toml is not TOML"):
        load_recipe(tmp_path / "junk.toml")


# --- overrides -----------------------------------------------------------------------------------


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(to_toml(tiny_dict(stages=[STAGE, SECOND_STAGE])))
    return path


@pytest.mark.parametrize(
    ("override", "reached", "value"),
    [
        ("stages.pretrain.lr=3e-4", lambda r: r.stages[0].lr, 3e-4),
        ("stages.anneal.lr = 1", lambda r: r.stages[1].lr, 1.0),
        ("seed=5", lambda r: r.seed, 5),
        ("name=other", lambda r: r.name, "other"),
        ('name="other"', lambda r: r.name, "other"),
        ("data.tokenizer=char", lambda r: r.data.tokenizer, "char"),
        ('data.sources=["a b", "c"]', lambda r: r.data.sources, ("a b", "c")),
        ("precision.recompute=true", lambda r: r.precision.recompute, True),
        ("optim.beta2=0.99", lambda r: r.optim.beta2, 0.99),
        ("model.q_lora_rank=0", lambda r: r.model.q_lora_rank, None),
        ("monitor.sample_prompt=a = b", lambda r: r.monitor.sample_prompt, "a = b"),
        (
            'stages.anneal.rope_scaling={type="yarn", factor=2.0, original_max_position_embeddings=32}',
            lambda r: (r.at(step=r.steps).rope_scaling or {}).get("factor"),
            2.0,
        ),
    ],
)
def test_overrides_reach_every_kind_of_key(
    override: str, reached: Any, value: Any, written: Path
) -> None:
    found = reached(load_recipe(written, [override]))
    assert found == value and type(found) is type(value)
    assert reached(load_recipe(written)) != value, "the recipe said so already"


def test_the_last_override_of_a_key_wins(written: Path) -> None:
    assert load_recipe(written, ["seed=5", "seed=6"]).seed == 6


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("seed", "must look like"),
        ("=3", "must look like"),
        ("stages..lr=3", "must look like"),
        ("stages.sft.lr=3", "no stage is called 'sft'; there are pretrain, anneal"),
        ("stages.pretrain=3", "must name a key inside"),
        ("stages.pretrain.learning_rate=3", "stages.pretrain.learning_rate is not a key"),
        ("name.x=3", "must name a key inside"),
        ("name.x.y=3", "is not a table"),
        ("optimizer.lr=3", "did you mean 'optim'"),
        ("stages.pretrain.lr=fast", "stages.pretrain.lr = 'fast' must be a number"),
    ],
)
def test_overrides_that_mean_nothing_are_refused(override: str, said: str, written: Path) -> None:
    with pytest.raises(RecipeError, match=said):
        load_recipe(written, [override])


def test_differences_name_each_leaf_once() -> None:
    one, other = tiny_recipe(), tiny_recipe(seed=4, stages=[{**STAGE, "lr": 1.0}])
    found = differences(one.to_dict(), other.to_dict())
    assert found == ["seed: 3 → 4", "stages.pretrain.lr: 0.003 → 1.0"]
    assert differences(one.to_dict(), one.to_dict()) == []


# --- what holds when -----------------------------------------------------------------------------

FIRST = {"name": "first", "steps": 10, "seq_len": 8, "batch": 2, "lr": 1.0, "lr_end": 0.1}
FIRST |= {"warmup_steps": 4, "decay_steps": 4}
SECOND = {"name": "second", "tokens": 100, "seq_len": 16, "batch": 4, "lr": 0.5, "gamma": 0.0}
SECOND |= {"mtp_weight": 0.1, "rope_scaling": YARN}
QUARTER = 0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2


@pytest.fixture(scope="module")
def two_stages() -> Any:
    return tiny_recipe(stages=[FIRST, SECOND])


@pytest.mark.parametrize(
    ("tokens", "stage", "step", "lr"),
    [
        (0, "first", 0, 0.0),
        (8, "first", 0, 0.125),  # half a step
        (16, "first", 1, 0.25),
        (63, "first", 3, 63 / 64),
        (64, "first", 4, 1.0),  # warm
        (65, "first", 4, 1.0),
        (96, "first", 6, 1.0),  # the cosine begins
        (112, "first", 7, QUARTER),
        (128, "first", 8, 0.55),  # half-way down
        (160, "first", 10, 0.1),  # the border is still the first stage's
        (161, "second", 10, 0.5),
        (224, "second", 11, 0.5),
        (288, "second", 12, 0.5),  # 100 tokens are two steps of 64
    ],
)
def test_rates_at_and_around_every_mark(
    tokens: int, stage: str, step: int, lr: float, two_stages: Any
) -> None:
    moment = two_stages.at(tokens=tokens)
    assert (moment.stage, moment.step, moment.tokens) == (stage, step, tokens)
    assert moment.lr == pytest.approx(lr, rel=1e-12)


@pytest.mark.parametrize(
    ("step", "stage", "tokens", "lr"),
    [
        (1, "first", 16, 0.25),
        (10, "first", 160, 0.1),
        (11, "second", 224, 0.5),
        (12, "second", 288, 0.5),
    ],
)
def test_the_same_by_steps(step: int, stage: str, tokens: int, lr: float, two_stages: Any) -> None:
    moment = two_stages.at(step=step)
    assert (moment.stage, moment.step, moment.tokens) == (stage, step, tokens)
    assert moment.lr == pytest.approx(lr, rel=1e-12)


def test_everything_else_belongs_to_the_stage(two_stages: Any) -> None:
    before, after = two_stages.at(step=10), two_stages.at(step=11)
    assert (before.gamma, before.mtp_weight, before.balance_alpha) == (1e-3, 0.3, 1e-4)
    assert (after.gamma, after.mtp_weight, after.balance_alpha) == (0.0, 0.1, 1e-4)
    assert (before.batch, before.seq_len, after.batch, after.seq_len) == (2, 8, 4, 16)
    assert before.rope_scaling is None and after.rope_scaling == YARN


def test_moments_that_do_not_exist(two_stages: Any) -> None:
    for asked in ({"tokens": -1}, {"tokens": 289}, {"step": 13}, {"step": math.nan}):
        with pytest.raises(RecipeError, match="outside this recipe's 0 to"):
            two_stages.at(**asked)
    for asked in ({}, {"tokens": 1, "step": 1}):
        with pytest.raises(RecipeError, match="exactly one"):
            two_stages.at(**asked)


@pytest.mark.parametrize(
    "asked", [{"tokens": "10T"}, {"step": "5"}, {"tokens": True}, {"tokens": [1]}]
)
def test_a_moment_is_asked_for_by_a_number(asked: dict[str, Any], two_stages: Any) -> None:
    with pytest.raises(
        RecipeError, match=r"takes a number of (tokens|steps), and .* is none; write 10e12"
    ):
        two_stages.at(**asked)
    assert two_stages.at(tokens=np.int64(64)) == two_stages.at(tokens=64)


def test_the_package_offers_it() -> None:
    assert fathom.load_recipe("nano").at(tokens=500_000).stage == "pretrain"
