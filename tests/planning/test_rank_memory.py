"""Memory of a rank: `training_memory` where there is one rank, sharded as ZeRO-1 shards, and the report's fits."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from fathom.parallel import SCHEDULES, Layout
from fathom.parallel.building import holdings
from fathom.parallel.pipeline import Plan
from fathom.planning import training_memory
from fathom.planning.cluster import DEVICES
from fathom.planning.layout import REPORT, PlannedLayout
from fathom.planning.memory import block_activations, fp8_block_bytes
from fathom.planning.published import V3
from fathom.planning.rank_memory import (
    RankMemory,
    fits,
    fullest_rank,
    host_ema_bytes,
    rank_memory,
    rank_parameters,
)
from tests.planning.test_planning import TINY

H800 = DEVICES["h800"]


@pytest.mark.parametrize("recompute", [False, True])
def test_one_rank_is_what_a_dry_run_says(recompute: bool) -> None:
    layout = PlannedLayout(
        micro_batch=3, fp8=False, recompute="report" if recompute else "none", moment_bytes=4
    )
    rank, memory = fullest_rank(TINY, layout, DEVICES["laptop"], seq_len=64, micro_batches=2)
    plain = training_memory(TINY, 64, 3, recompute=recompute)
    assert rank == 0
    assert memory.weights == plain.weights and memory.gradients == plain.gradients
    assert memory.moments == plain.moments and memory.logits == plain.logits
    assert memory.activations == plain.activations and memory.master == memory.all_to_all == 0
    assert memory.total == plain.total


def memory_of(layout: PlannedLayout) -> RankMemory:
    return fullest_rank(V3, layout, H800, seq_len=4096, micro_batches=120)[1]


def test_the_report_s_layout_fits_80_gb() -> None:
    """Report §3.2: no tensor parallelism was needed."""
    assert fits(memory_of(REPORT), H800)
    assert not fits(memory_of(replace(REPORT, recompute="none")), H800)
    assert not fits(memory_of(replace(REPORT, zero1=False)), H800)


def test_recomputation_and_fp8_storage_save_activations() -> None:
    full, report, none = (
        memory_of(replace(REPORT, recompute=kind)).activations
        for kind in ("full", "report", "none")
    )
    without_fp8 = memory_of(replace(REPORT, fp8=False)).activations
    assert full < report < without_fp8 < none


def test_fp8_bytes_by_hand() -> None:
    """V3's MoE block (§3.2.3, §3.3.3): BF16 residuals and latents, E5M6 attention output, FP8 expert inputs."""
    by_hand = (
        2 * 2 * 7168
        + 2 * (1536 + 576)
        + 128 * (128 * (1.5 + 4 / 128) + 4)
        + 8 * 7168 * (1 + 4 / 128)
        + 9 * 2 * 2048 * (1 + 4 / 128)
        + 4 * 2 * 256
    )
    assert fp8_block_bytes(V3, 10) == pytest.approx(by_hand)
    assert fp8_block_bytes(V3, 0) < fp8_block_bytes(V3, 10) < 2 * block_activations(V3, 10, True)


def test_zero1_shards_masters_and_moments() -> None:
    """Experts exist dp / ep = 2 times and twice more in DualPipe, everything else dp times."""
    mine = rank_parameters(V3, REPORT, 3)
    sharded = memory_of(REPORT)
    whole = memory_of(replace(REPORT, zero1=False))
    rank = fullest_rank(V3, REPORT, H800, seq_len=4096, micro_batches=120)[0]
    held = rank_parameters(V3, REPORT, rank)
    assert sharded.master == pytest.approx(4 * (held.shared / 256 + held.experts / 4))
    assert whole.master == pytest.approx(4 * held.total) and whole.moments == pytest.approx(
        whole.master
    )
    assert sharded.moments == pytest.approx(2 * 2 * (held.shared / 256 + held.experts / 4))
    assert host_ema_bytes(V3, REPORT, 3) == pytest.approx(
        4 * (mine.shared / 256 + mine.experts / 4)
    )


def test_the_first_rank_of_1f1b_keeps_most() -> None:
    layout = PlannedLayout(pp=16, dp=128, ep=64, schedule="1F1B")
    sizes = [
        rank_memory(V3, layout, H800, rank, seq_len=4096, micro_batches=120).activations
        for rank in range(1, 15)
    ]
    assert sizes == sorted(sizes, reverse=True)
    few = rank_memory(V3, layout, H800, 1, seq_len=4096, micro_batches=2).activations
    assert few == pytest.approx(sizes[0] * 2 / 15)


@pytest.mark.parametrize("schedule", [None, *SCHEDULES])
@pytest.mark.parametrize("seed", range(4))
def test_a_rank_holds_what_it_holds_in_a_run(schedule: str | None, seed: int) -> None:
    """Weights, and those whose moments it keeps; an embedding that is the head, or MTP's too, counts once on a rank."""
    rng = random.Random(seed)
    config = TINY.replace(
        num_hidden_layers=rng.randint(8, 11),
        num_nextn_predict_layers=seed % 3,
        first_k_dense_replace=rng.choice((0, 1, 20)),
        tie_word_embeddings=seed % 2 == 0,
    )
    real = Layout(pp=rng.choice((2, 4)) if schedule else 1, dp=4, ep=rng.choice((1, 2)))
    plan = Plan(config, real.pp, schedule) if schedule else None
    split = tuple(map(len, plan.layers)) if plan else None
    layout = PlannedLayout(real.pp, real.dp, real.ep, 1, schedule or "1F1B", split=split, fp8=False)
    for zero1 in (True, False):
        said = holdings(config, real, plan, zero1)
        for rank, expected in enumerate(said):
            mine = rank_parameters(config, layout, rank)
            assert mine.total == expected.weights
            state = host_ema_bytes(config, replace(layout, zero1=zero1), rank) / 4
            assert state == pytest.approx(expected.updated, abs=200)  # shares are rounded up
