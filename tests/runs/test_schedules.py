"""The report's own run (§4.2, §4.3) at and around every mark, and how marks in tokens become whole steps."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fathom
from fathom.errors import RecipeError
from fathom.planning import count_parameters
from fathom.runs.recipe import Recipe
from fathom.train.ramp import Batches
from tests.runs.tiny import SECOND_STAGE, STAGE, tiny_recipe

T, B = 10**12, 10**9
V3 = fathom.load_recipe("v3-671b")
FULL_STEP = 15360 * 4096
END_OF_4K = 14_800_046_260_224
"""Where the last whole step at 4K ends: less than one step of 62.9M tokens behind 14.8T."""


@pytest.mark.parametrize(
    ("tokens", "stage", "lr"),
    [
        (0, "constant", 0.0),
        (1000 * 3072 * 4096, "constant", 1.1e-4),  # half of the warm-up; the batch has not grown
        (2000 * 3072 * 4096 - 1, "constant", 2.2e-4),
        (2000 * 3072 * 4096, "constant", 2.2e-4),
        (469 * B, "constant", 2.2e-4),
        (10 * T - 1, "constant", 2.2e-4),
        (10 * T, "constant", 2.2e-4),
        (10 * T + 1, "cosine", 2.2e-4),
        (10 * T + 4.3 * T / 4, "cosine", 2.2e-5 + 0.99e-4 * (1 + math.cos(math.pi / 4))),
        (10 * T + 4.3 * T / 2, "cosine", 1.21e-4),
        (14.3 * T - 1, "cosine", 2.2e-5),
        (14.3 * T, "cosine", 2.2e-5),
        (14.3 * T + 1, "low", 2.2e-5),
        (14.633 * T, "low", 2.2e-5),
        (14.633 * T + 1, "lowest", 7.3e-6),
        (14.8 * T, "lowest", 7.3e-6),
        (END_OF_4K, "lowest", 7.3e-6),
        (END_OF_4K + 1, "extend-32k", 7.3e-6),
        (END_OF_4K + 1000 * FULL_STEP, "extend-32k", 7.3e-6),
        (END_OF_4K + 1000 * FULL_STEP + 1, "extend-128k", 7.3e-6),
        (END_OF_4K + 2000 * FULL_STEP, "extend-128k", 7.3e-6),
    ],
)
def test_learning_rate_of_the_report(tokens: float, stage: str, lr: float) -> None:
    moment = V3.at(tokens=tokens)
    assert moment.stage == stage
    assert moment.lr == pytest.approx(lr, rel=1e-6)


def test_warm_up_takes_two_thousand_steps() -> None:
    assert [V3.at(step=s).lr for s in (0, 1, 1000)] == pytest.approx([0, 1.1e-7, 1.1e-4])
    assert V3.at(step=1999).lr < V3.at(step=2000).lr == V3.at(step=2001).lr == 2.2e-4


@pytest.mark.parametrize(
    ("tokens", "batch"),
    [
        (0, 3072),
        (469 * B / 12 - 1, 3072),
        (469 * B / 12 + 1, 4096),
        (469 * B / 2 + 1, 9216),
        (469 * B - 1, 14336),
        (469 * B, 15360),
        (10 * T, 15360),
        (14.8 * T, 15360),
        (END_OF_4K + 1, 1920),
        (END_OF_4K + 1000 * FULL_STEP + 1, 480),
    ],
)
def test_batch_of_the_report(tokens: float, batch: int) -> None:
    assert V3.at(tokens=tokens).batch == batch


def test_a_step_has_the_size_that_was_due_when_it_began() -> None:
    last_below = V3.at(tokens=469 * B - 1).step
    assert V3.at(step=1).batch == 3072
    assert [V3.at(step=last_below + n).batch for n in (0, 1, 2)] == [14336, 14336, 15360]


@pytest.mark.parametrize(
    ("tokens", "gamma", "mtp_weight"),
    [
        (0, 1e-3, 0.3),
        (10 * T, 1e-3, 0.3),
        (10 * T + 1, 1e-3, 0.1),
        (14.3 * T, 1e-3, 0.1),
        (14.3 * T + 1, 0.0, 0.1),
        (14.8 * T, 0.0, 0.1),
        (END_OF_4K + 1, 0.0, 0.1),
    ],
)
def test_bias_speed_and_mtp_weight_of_the_report(
    tokens: float, gamma: float, mtp_weight: float
) -> None:
    moment = V3.at(tokens=tokens)
    assert (moment.gamma, moment.mtp_weight) == (gamma, mtp_weight)
    assert moment.balance_alpha == 1e-4


def test_context_of_the_report() -> None:
    """4K with plain RoPE, then 1,000 steps each at 32K and 128K with YaRN, s = 40, alpha = 1, beta = 32."""
    yarn = {
        "type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096,
        "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
    }  # fmt: skip
    assert V3.at(tokens=14.8 * T).seq_len == 4096 and V3.at(tokens=14.8 * T).rope_scaling is None
    spans = V3.spans[-2:]
    assert [(s.stage.seq_len, s.stage.batch, s.steps) for s in spans] == [
        (32768, 1920, 1000),
        (131072, 480, 1000),
    ]
    assert all(s.stage.rope_scaling == yarn for s in spans)
    assert {V3.at(step=s.first_step + 1).batch * s.stage.seq_len for s in spans} == {FULL_STEP}


def test_optimiser_and_model_of_the_report() -> None:
    optim = V3.optim
    assert (optim.beta1, optim.beta2, optim.weight_decay, optim.clip_norm) == (0.9, 0.95, 0.1, 1.0)
    assert count_parameters(V3.model).main == 671_026_404_352
    assert V3.data.fim_rate == 0.1


def test_every_step_of_the_report_is_counted_once() -> None:
    assert V3.steps == 246_108 and V3.total_tokens == END_OF_4K + 2000 * FULL_STEP
    for span in V3.spans:
        assert 0 <= span.late < FULL_STEP
        assert V3.at(step=span.last_step).stage == span.stage.name
        assert V3.at(step=span.first_step + 1).stage == span.stage.name


def test_the_ablation_baseline_has_the_size_that_the_report_gives() -> None:
    recipe = fathom.load_recipe("v3-16b")
    sizes = count_parameters(recipe.model)
    assert round(sizes.main / B, 1) == 15.7
    assert (sizes.main - sizes.inactive - sizes.embedding) / B == pytest.approx(2.4, abs=0.06)
    assert sum(stage.tokens_asked for stage in recipe.stages) == 1.33 * T
    rates = [recipe.at(tokens=share * 1.33 * T).lr for share in (0.8, 0.8001, 0.9, 0.9001)]
    assert rates == pytest.approx([4.2e-4, 4.2e-4 * 0.316, 4.2e-4 * 0.316, 4.2e-4 * 0.316**2])


# --- marks and whole steps -----------------------------------------------------------------------

COUNTS = st.integers(1, 40)


@given(COUNTS, COUNTS, st.floats(0, 500), COUNTS)
@settings(max_examples=150, deadline=None)
def test_a_batch_grows_from_start_to_full(
    start: int, more: int, ramp: float, multiple: int
) -> None:
    batches = Batches(start + more, start, ramp, multiple)
    sizes = [batches.size(batches.before(step)) for step in range(200)]
    assert sizes[0] == (start if ramp > 0 else start + more)
    assert all(a <= b for a, b in pairwise(sizes))
    assert all((size - start) % multiple == 0 or size == start + more for size in sizes)
    for step in range(199):
        assert batches.before(step + 1) == batches.before(step) + sizes[step]
        assert batches.steps(batches.before(step)) == step
        assert batches.steps(batches.before(step) + sizes[step] / 2) == pytest.approx(step + 0.5)
        expected = start + more * batches.before(step) / ramp if ramp else 0
        if batches.before(step) < ramp:
            assert 0 <= expected - sizes[step] < multiple + 1e-6


def staged(*stages: dict[str, Any]) -> Recipe:
    base = {key: value for key, value in STAGE.items() if key not in ("steps", "micro_batch")}
    named = [{**base, "warmup_steps": 0, "name": f"s{i}", **s} for i, s in enumerate(stages)]
    return tiny_recipe(stages=named)


STAGES = st.lists(
    st.fixed_dictionaries(
        {"tokens": st.integers(2000, 9000), "batch": st.integers(1, 12), "seq_len": st.sampled_from([8, 16, 32])}
    ),
    min_size=1,
    max_size=4,
)  # fmt: skip


@given(STAGES)
@settings(max_examples=60, deadline=None)
def test_marks_stay_where_they_are_and_stages_end_at_most_a_step_late(stages: list[dict]) -> None:
    recipe = staged(*stages)
    mark = done = 0
    for stage, span in zip(stages, recipe.spans, strict=True):
        assert span.begins == mark
        mark += stage["tokens"]
        done += span.steps * stage["batch"] * stage["seq_len"]
        assert mark <= done < mark + stage["batch"] * stage["seq_len"]
        assert recipe.at(step=span.last_step).tokens == done
        assert recipe.at(tokens=mark).stage == span.stage.name
    assert recipe.total_tokens == done


def test_sequences_are_counted_without_gaps_along_a_ramp() -> None:
    recipe = staged(
        {"tokens": 8000, "batch": 12, "batch_start": 3, "batch_ramp_tokens": 4000}, {"steps": 3}
    )
    for span in recipe.spans:
        taken = 0
        for step in range(span.first_step + 1, span.last_step + 1):
            assert span.sequences_before(step) == taken
            taken += recipe.at(step=step).batch
    sizes = [recipe.at(step=s).batch for s in range(1, recipe.spans[0].last_step + 1)]
    assert sizes[0] == 3 and sizes[-1] == 12 and len(set(sizes)) > 4


def test_a_stage_that_begins_late_grows_by_tokens_as_it_does_by_steps() -> None:
    ramp = {"tokens": 8000, "batch": 12, "batch_start": 1, "batch_ramp_tokens": 4000}
    recipe = staged({"tokens": 100, "batch": 12, "seq_len": 32}, ramp)
    late = recipe.spans[1]
    assert late.late == 284
    for step in range(late.first_step + 1, late.last_step):
        due = recipe.at(step=step + 1).batch
        assert recipe.at(tokens=recipe.at(step=step).tokens).batch == due, step


def test_a_cosine_in_tokens_ends_at_the_mark() -> None:
    recipe = staged({"tokens": 4000, "lr_end": 1e-4, "decay_tokens": 2000})
    assert recipe.at(tokens=2000).lr == pytest.approx(3e-3)
    assert recipe.at(tokens=3000).lr == pytest.approx((3e-3 + 1e-4) / 2)
    assert recipe.at(tokens=4000).lr == pytest.approx(1e-4)
    assert recipe.at(step=recipe.steps).lr == pytest.approx(1e-4), (
        "the last whole step is beyond it"
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batch_start": 2}, "batch_start = 2 and batch_ramp_tokens = None"),
        ({"batch_start": 9, "batch_ramp_tokens": 100}, "batch_start = 9 exceeds batch = 4"),
        ({"decay_steps": 3, "decay_tokens": 9}, "decay_steps = 3 and decay_tokens = 9"),
        ({"decay_tokens": 4000, "warmup_steps": 9}, "decay_tokens = 4000 do not fit into 12 steps"),
        ({"weights": {"en": -1.0}}, "weights.en = -1.0 must be a number, not negative"),
        ({"weights": {"en": 0.0}}, "gives every source nothing"),
    ],
)
def test_what_cannot_be(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        tiny_recipe(stages=[{**STAGE, "warmup_steps": 0, **changes}])


def test_a_run_keeps_its_place_in_steps_and_tokens() -> None:
    recipe = tiny_recipe(stages=[STAGE, SECOND_STAGE])
    assert [recipe.at(step=s).tokens for s in (0, 1, 12, 13, 16)] == [0, 128, 1536, 1664, 2048]
    assert [recipe.at(tokens=t).step for t in (0, 127, 128, 1536, 1537, 2048)] == [
        0,
        0,
        1,
        12,
        12,
        16,
    ]
