"""A step's time: parts that must add up, directions in which it must move, and what it is made of."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.planning import flops_per_token
from fathom.planning.block_time import BlockTime, Setting, Work, block_time, end_time
from fathom.planning.cluster import DEVICES
from fathom.planning.layout import REPORT, PlannedLayout
from fathom.planning.overlap import pair_seconds
from fathom.planning.published import V2_LITE, V3
from fathom.planning.rates import Rates
from fathom.planning.step_time import Chunk, StepTime, pair_time, step_time

H800 = DEVICES["h800"]
SMALL = V3.replace(num_hidden_layers=8, num_nextn_predict_layers=0)


def step(layout: PlannedLayout = REPORT, rates: Rates | None = None, **changes: int) -> StepTime:
    shape = {"seq_len": 4096, "batch": 15360} | changes
    return step_time(V3, layout, H800, rates or Rates(), **shape)


def test_a_step_at_ideal_rates_takes_its_operations() -> None:
    """All rates at their peak, memory and links endless: model FLOPs over the peak (plus attention's fifth product)."""
    endless = replace(H800, memory_bandwidth=1e30, intra_bandwidth=1e30, inter_bandwidth=1e30)
    ideal = Rates(bf16=1.0, attention=1.0, attention_backward=1.0, memory=1.0, communication_sms=0)
    layout = PlannedLayout(dp=8, ep=8, overlap=False, recompute="none", fp8=False)
    found = step_time(SMALL, layout, endless, ideal, seq_len=4096, batch=64, mtp=False)
    operations = flops_per_token(SMALL, 4096, mtp=False)
    attention = 8 * 2 * 128 * (192 + 128) * 4097 / 2
    expected = found.tokens * (operations + 0.5 * attention) / endless.bf16
    assert found.total == pytest.approx(expected, rel=1e-6)
    assert found.mfu == pytest.approx(operations / (operations + 0.5 * attention), rel=1e-6)


def test_parts_add_up() -> None:
    found = step()
    parts = ("compute", "exposed", "bubble", "reduce", "update")
    assert sum(getattr(found, part) for part in parts) == pytest.approx(found.total)
    assert found.tokens == 15360 * 4096 / 2048
    assert found.tokens_per_second == pytest.approx(found.tokens / found.total)
    assert found.bubble_fraction == pytest.approx(found.bubble / found.total)


def test_overlap_pays_where_communication_is_large() -> None:
    """Fewer SMs compute, but most of the all-to-all disappears (report §3.2.1)."""
    with_it, without = step(), step(replace(REPORT, overlap=False))
    assert with_it.total < without.total
    assert without.compute < with_it.compute  # which rank is the slowest may change too
    assert with_it.exposed < 0.2 * without.exposed


def test_a_rank_without_head_computes_on_112_of_132_sms() -> None:
    setting = Setting(V3, REPORT, H800, Rates(), 4096)
    chunk = Chunk((block_time(setting, 10),) * 4, Work())
    factor = 132 / 112
    both = pair_time(chunk, chunk, factor, REPORT)
    assert both >= factor * (chunk.work.forward + chunk.work.backward)
    assert both < chunk.work.forward + chunk.work.backward + 2 * chunk.transfer
    assert both > 2 * chunk.transfer


def test_no_overlap_among_devices_that_share_no_experts() -> None:
    alone = PlannedLayout(pp=16, dp=128, schedule="1F1B")
    found = step(alone)
    assert found.exposed == 0 and found.all_to_all == 0
    assert found.compute == pytest.approx(step(replace(alone, overlap=False)).compute)


def test_recomputation_costs_time() -> None:
    none, report, full = (
        step(replace(REPORT, recompute=kind)) for kind in ("none", "report", "full")
    )
    assert none.compute < report.compute < full.compute
    assert full.exposed > report.exposed


def test_fp8_is_faster() -> None:
    assert step().compute < step(replace(REPORT, fp8=False)).compute


def test_schedules_in_the_order_of_table_2() -> None:
    plain = [step(replace(REPORT, schedule=name, overlap=False)) for name in ("1F1B", "ZB1P")]
    dual = step()
    assert plain[0].bubble > plain[1].bubble > dual.bubble > 0
    inter = step(PlannedLayout(pp=16, dp=128, ep=64, schedule="1F1B", interleave=2, overlap=False))
    assert inter.bubble < 0.8 * plain[0].bubble  # the head is in one of the smaller stages


def test_few_micro_batches_are_reckoned_as_1f1b() -> None:
    """24 micro-batches for 16 ranks, as at the report's first batch of 3,072, are too few for two directions."""
    few = step(batch=3072)
    plain = step(replace(REPORT, overlap=False, schedule="DualPipe"), batch=3072)
    assert few.exposed == pytest.approx(plain.exposed)
    assert few.bubble_fraction > 0.25


def test_few_micro_batches_fill_no_gaps() -> None:
    """Of two ranks with one micro-batch the first waits for F and I of the second, W filling one gap of two."""

    def bubble(schedule: str, count: int) -> float:
        layout = PlannedLayout(pp=2, schedule=schedule, overlap=False, fp8=False)
        return step_time(
            V2_LITE, layout, DEVICES["h100"], Rates(), seq_len=4096, batch=count, mtp=False
        ).bubble

    by_formula = bubble("ZB1P", 4)
    assert bubble("ZB1P", 1) == pytest.approx((bubble("1F1B", 1) + by_formula) / 2)
    assert bubble("ZB1P", 1) > bubble("ZB1P", 3) >= by_formula
    assert bubble("ZBV", 1) > 2 * bubble("ZBV", 4)


def test_divided_sequences_keep_a_micro_batch_s_tokens() -> None:
    """Eight parts of 32K: as many tokens, attention over a longer context, nothing else."""
    short = step()
    long = step_time(V3, REPORT, H800, Rates(), seq_len=32768, batch=1920, parts=8)
    assert long.tokens == short.tokens
    assert (
        long.flops / short.flops < long.compute / short.compute < 2.5
    )  # attention is the slower part
    assert long.reduce == short.reduce


def test_mtp_and_head_cost_what_they_do() -> None:
    setting = Setting(V3, REPORT, H800, Rates(), 4096)
    two, one = end_time(setting, mtp=True), end_time(setting, mtp=False)
    assert two.forward > 2 * one.forward > 0
    assert (
        step_time(V3, REPORT, H800, Rates(), seq_len=4096, batch=15360, mtp=False).total
        < step().total
    )


def test_a_dense_block_sends_nothing() -> None:
    setting = Setting(V3, REPORT, H800, Rates(), 4096)
    dense, moe = block_time(setting, 0), block_time(setting, 10)
    assert dense.transfer == 0 < moe.dispatch < moe.combine


TIMES = st.floats(0.1, 10)
WORKS = st.builds(Work, TIMES, TIMES, TIMES)


@settings(max_examples=60, deadline=None)
@given(
    st.builds(BlockTime, WORKS, WORKS, TIMES, TIMES),
    st.builds(BlockTime, WORKS, WORKS, TIMES, TIMES),
)
def test_a_pair_lies_between_its_bounds(ahead: BlockTime, behind: BlockTime) -> None:
    """No faster than either stream alone, no slower than one after the other."""
    compute = ahead.work.forward + behind.work.backward
    send = ahead.transfer + behind.transfer
    found = pair_seconds(ahead, behind)
    assert max(compute, send) - 1e-9 <= found <= compute + send + 1e-9


def test_gradients_of_combine_take_the_way_of_dispatch() -> None:
    """A slow way back of gradients hides the weight gradients of the MLP behind it, a slow way there does not."""
    none, mlp = BlockTime(Work(), Work(), 0.0, 0.0), Work(0.0, 1.0, 3.0)
    assert pair_seconds(none, BlockTime(Work(), mlp, dispatch=0.0, combine=3.0)) == 4
    assert pair_seconds(none, BlockTime(Work(), mlp, dispatch=3.0, combine=0.0)) == 7


def test_free_transfers_leave_computation_alone() -> None:
    work = Work(1.0, 1.0, 1.0)
    silent = BlockTime(work, work, 0.0, 0.0)
    assert pair_seconds(silent, silent) == pytest.approx(6.0)
    brief = BlockTime(work, work, 0.5, 0.5)
    assert pair_seconds(brief, brief) == pytest.approx(6.0)  # all hidden
