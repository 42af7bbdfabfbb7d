"""Sweeps, the nearest layouts that fit, and the what-ifs of §3.5."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fathom.errors import PlanError
from fathom.planning.cluster import DEVICES, read_cluster
from fathom.planning.layout import REPORT, PlannedLayout, check
from fathom.planning.published import V2_LITE, V3
from fathom.planning.rates import Rates
from fathom.planning.search import Task, alternatives, choose, distance, sweep
from fathom.planning.what_if import WHAT_IFS, outcomes

SMALL = Task(V2_LITE, read_cluster("h100x8"), Rates(), 4096, 64)


def test_a_sweep_is_ranked_and_legal() -> None:
    found = sweep(SMALL, PlannedLayout(dp=8, fp8=False))
    assert len(found) > 20 and len({one.layout for one in found}) == len(found)
    assert [one.rank for one in found] == sorted(one.rank for one in found)
    for one in found:
        check(one.layout, V2_LITE, SMALL.cluster, 64)
    assert not found[-1].fits and found[0].fits


def test_the_nearest_that_fit() -> None:
    """Keeping all activations of the report's layout does not fit; its neighbours are named, nearest first."""
    task = Task(V3, read_cluster("h800x2048"), Rates(), 4096, 15360)
    like = replace(REPORT, recompute="none")
    assert not task.candidate(like).fits
    found = alternatives(task, like)
    assert found[0].layout == REPORT and all(one.fits for one in found)
    far = [distance(one.layout, like) for one in found]
    assert far == sorted(far) and far[0] == 1


def test_the_report_s_layout_is_chosen_for_the_report_s_cluster() -> None:
    task = Task(V3, read_cluster("h800x2048"), Rates(), 4096, 15360)
    assert choose(task, replace(REPORT, pp=1, dp=1, ep=1, schedule="1F1B")) == REPORT
    with pytest.raises(PlanError, match="no layout can train batches of 15361"):
        choose(replace(task, batch=15361), REPORT)
    with pytest.raises(PlanError, match="recompute = 'some'"):
        choose(task, replace(REPORT, recompute="some"))


def test_a_smaller_micro_batch_is_proposed_where_only_that_can_be() -> None:
    task = replace(SMALL, batch=8)
    with pytest.raises(PlanError, match=r"16 at a time, on h100x8; give --micro-batch 1$"):
        choose(task, PlannedLayout(micro_batch=16, fp8=False))
    assert choose(task, PlannedLayout(micro_batch=1, fp8=False)).micro_batch == 1


def test_zbv_is_searched() -> None:
    found = {one.layout.schedule for one in sweep(SMALL, PlannedLayout(dp=8, fp8=False))}
    assert found == {"1F1B", "ZB1P", "ZBV", "DualPipe", "DualPipeV"}


def test_what_ifs_of_the_report() -> None:
    """20 of 132 SMs back is at most 132 / 112 - 1; all of it is more than each."""
    found = {
        one.what_if.name: one
        for one in outcomes(V3, REPORT, DEVICES["h800"], Rates(), seq_len=4096, batch=15360)
    }
    assert 0.05 < found["offload"].gain < 132 / 112 - 1
    assert 0 < found["few-sms"].gain < found["offload"].gain
    singles = [found[name].gain for name in ("tile-scaling", "fused-cast", "transposed-reads")]
    assert all(0 < gain < 0.1 for gain in singles)
    assert found["all"].gain > max(found["offload"].gain, *singles)


@pytest.mark.parametrize("chosen", WHAT_IFS)
def test_what_is_planned_with_is_no_what_if(chosen: str) -> None:
    rates = WHAT_IFS[chosen].rates(Rates())
    found = outcomes(V3, REPORT, DEVICES["h800"], rates, seq_len=4096, batch=15360)
    names = {one.what_if.name for one in found}
    assert chosen not in names and all(one.gain >= 0 for one in found)
    assert bool(names) == (chosen != "all")


def test_what_ifs_that_change_nothing_are_left_out() -> None:
    plain = PlannedLayout(dp=8, ep=8, overlap=False, fp8=False)
    assert outcomes(V2_LITE, plain, DEVICES["h100"], Rates(), seq_len=4096, batch=64) == []
