"""Full sharding on paper: by hand, and against the shards that FSDP2 keeps of a real model."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fathom.errors import PlanError
from fathom.model import ModelConfig, Transformer
from fathom.parallel import Layout, Mesh, Parallel
from fathom.planning.cluster import DEVICES, read_cluster
from fathom.planning.full_shard import at_a_time, exposed_seconds, sent_bytes, units
from fathom.planning.layout import PlannedLayout, check
from fathom.planning.rank_memory import fullest_rank, rank_parameters
from tests.parallel.processes import run
from tests.planning.test_planning import TINY

LAPTOP, H800 = DEVICES["laptop"], DEVICES["h800"]
FULL = PlannedLayout(dp=4, ep=2, full_shard=True, fp8=False, moment_bytes=4)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("mtp", [False, True])
def test_units_are_the_whole(tied: bool, mtp: bool) -> None:
    config = TINY.replace(tie_word_embeddings=tied)
    unit, held = units(config, FULL, mtp), rank_parameters(config, FULL, 0, mtp)
    assert unit.ends + sum(unit.dense) == pytest.approx(held.shared)
    assert sum(unit.experts) == pytest.approx(held.experts)


def test_memory_by_hand() -> None:
    unit = units(TINY, FULL)
    dense, experts, ends = sum(unit.dense), sum(unit.experts), unit.ends
    sharded = (dense + ends) / 4 + experts / 2
    blocks = sorted(a + b for a, b in zip(unit.dense, unit.experts, strict=True))
    memory = fullest_rank(TINY, FULL, LAPTOP, seq_len=64, micro_batches=2)[1]
    assert memory.weights == pytest.approx(4 * (sharded + ends + blocks[-1] + blocks[-2]))
    assert memory.gradients == pytest.approx(4 * (sharded + ends + blocks[-1]))
    assert memory.moments == pytest.approx(8 * sharded) and memory.master == 0
    on_gpu = fullest_rank(TINY, FULL, H800, seq_len=64, micro_batches=2)[1]
    assert on_gpu.master == pytest.approx(4 * sharded), "masters do not multiply there"
    assert on_gpu.weights < memory.weights


def test_experts_that_nobody_else_holds_are_not_gathered() -> None:
    unit, alone = units(TINY, replace(FULL, ep=4)), replace(FULL, ep=4)
    weights, gradients = at_a_time(TINY, alone, LAPTOP)
    assert weights == pytest.approx(4 * (unit.ends + sum(sorted(unit.dense)[-2:])))
    assert gradients == pytest.approx(4 * (unit.ends + max(unit.dense)))


def test_bytes_are_three_of_four_of_each_parameter_for_every_micro_batch() -> None:
    layout = replace(FULL, ep=1)
    unit = units(TINY, layout)
    blocks = sum(unit.dense) + sum(unit.experts)
    gradients, weights = sent_bytes(TINY, layout, LAPTOP, 5)
    assert gradients == pytest.approx(5 * 4 * 0.75 * (blocks + unit.ends))
    assert weights == pytest.approx(5 * 4 * 0.75 * (2 * blocks + unit.ends))


def test_computation_hides_all_but_a_block_s_share() -> None:
    blocks = TINY.num_hidden_layers + TINY.num_nextn_predict_layers
    assert exposed_seconds(TINY, 1.0, 10.0, 2) == pytest.approx(1 / (2 * blocks))
    assert exposed_seconds(TINY, 10.0, 1.0, 2) == pytest.approx(9.0)


def test_in_a_pipeline_it_is_refused() -> None:
    layout = replace(FULL, pp=2, dp=4)
    with pytest.raises(PlanError, match=r"full_shard with pp = 2 .*--no-full-shard"):
        check(layout, TINY, read_cluster("laptopx8"), 8)


def kept(config: ModelConfig, dp: int, ep: int) -> int:
    """Numbers that this rank keeps of a model in full shards."""
    parallel = Parallel(Transformer(config), Mesh(Layout(dp=dp, ep=ep)), full_shard=True)
    return sum(piece.part.numel() for piece in parallel.pieces)


def test_a_rank_keeps_what_the_plan_says() -> None:
    memory = fullest_rank(TINY, FULL, LAPTOP, seq_len=8, micro_batches=1)[1]
    for numbers in run(kept, 4, TINY, 4, 2):
        assert 8 * numbers == pytest.approx(memory.moments, rel=0.05)
