"""Which layouts there are for a model on a cluster, and which of them fit: `--sweep`, and the nearest that do.

Every pp, dp and ep that divide what they must, with 1F1B, ZB1P, ZBV, DualPipe and DualPipeV (GPipe idles as 1F1B does
and keeps more), recomputation as asked for, as in the report or of everything, and only the micro-batch asked for: the
stage's, unless the user names another. Ranked by tokens per second; what does not fit comes last.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import log2

from fathom.errors import PlanError
from fathom.model import ModelConfig
from fathom.parallel.schedules import traits
from fathom.planning.cluster import Cluster
from fathom.planning.layout import (
    REPORT,
    PlannedLayout,
    check,
    check_settings,
    has_experts,
    micro_batches,
)
from fathom.planning.rank_memory import RankMemory, fits, fullest_rank
from fathom.planning.rates import Rates
from fathom.planning.step_time import StepTime, step_time

SEARCHED = ("1F1B", "ZB1P", "ZBV", "DualPipe", "DualPipeV")
"""Schedules that a sweep tries."""


@dataclass(frozen=True)
class Candidate:
    """A layout and what it would be like."""

    layout: PlannedLayout
    memory: RankMemory
    """Of the fullest rank."""
    step: StepTime
    fits: bool

    @property
    def rank(self) -> tuple[bool, float]:
        """Sorts the best first."""
        return not self.fits, -self.step.tokens_per_second


@dataclass(frozen=True)
class Task:
    """What is to be laid out."""

    config: ModelConfig
    cluster: Cluster
    rates: Rates
    seq_len: int
    batch: int
    mtp: bool = True

    def candidate(self, layout: PlannedLayout) -> Candidate:
        """Weigh one layout; `PlanError` when it cannot be."""
        check(layout, self.config, self.cluster, self.batch)
        _, memory = fullest_rank(
            self.config,
            layout,
            self.cluster.device,
            seq_len=self.seq_len,
            micro_batches=micro_batches(layout, self.batch),
            mtp=self.mtp,
        )
        step = step_time(
            self.config,
            layout,
            self.cluster.device,
            self.rates,
            seq_len=self.seq_len,
            batch=self.batch,
            mtp=self.mtp,
        )
        return Candidate(layout, memory, step, fits(memory, self.cluster.device))


def sweep(task: Task, like: PlannedLayout) -> list[Candidate]:
    """Every layout that can be, best first; what is not searched (FP8, ZeRO-1, micro-batch) is as in `like`."""
    found = []
    for layout in _layouts(task, like):
        try:
            found.append(task.candidate(layout))
        except PlanError:
            continue
    return sorted(found, key=lambda candidate: candidate.rank)


def alternatives(task: Task, like: PlannedLayout, most: int = 5) -> list[Candidate]:
    """The layouts that fit, nearest to `like` first: fewest doublings and halvings of pp, dp, ep and micro-batch,
    another schedule, recomputation, overlap or interleaving counting as one each; at equal distance the faster.
    """
    smaller = [like]
    if like.micro_batch > 1:
        smaller.append(replace(like, micro_batch=1))
    swept = [one for start in smaller for one in sweep(task, start)]
    fitting = [one for one in swept if one.fits and one.layout != like]
    fitting.sort(key=lambda one: (distance(one.layout, like), -one.step.tokens_per_second))
    return fitting[:most]


def choose(task: Task, like: PlannedLayout) -> PlannedLayout:
    """The report's layout where it can be and fits, else the fastest that fits, else the fastest."""
    check_settings(like, task.cluster)
    report = replace(
        like,
        pp=REPORT.pp,
        dp=REPORT.dp,
        ep=REPORT.ep,
        schedule=REPORT.schedule,
        overlap=True,
    )
    try:
        if task.candidate(report).fits:
            return report
    except PlanError:
        pass
    found = sweep(task, like)
    if not found:
        one = like.micro_batch > 1 and sweep(task, replace(like, micro_batch=1))
        remedy = "give --micro-batch 1" if one else "change the batch or the number of devices"
        raise PlanError(
            f"no layout can train batches of {task.batch} sequences, {like.micro_batch} at a time, on "
            f"{task.cluster.name}; {remedy}"
        )
    return found[0].layout


def distance(one: PlannedLayout, other: PlannedLayout) -> float:
    """Changes between two layouts."""
    sizes = ("pp", "dp", "ep", "micro_batch")
    total = sum(abs(log2(getattr(one, key) / getattr(other, key))) for key in sizes)
    kinds = ("schedule", "recompute", "zero1", "full_shard", "fp8", "overlap", "interleave")
    return total + sum(getattr(one, key) != getattr(other, key) for key in kinds)


def _layouts(task: Task, like: PlannedLayout) -> Iterator[PlannedLayout]:
    devices = task.cluster.devices
    deepest = min(task.config.num_hidden_layers + 1, devices)
    for pp in _divisors(devices, deepest):
        dp = devices // pp
        schedules = SEARCHED if pp > 1 else ("1F1B",)
        experts = task.config.n_routed_experts if has_experts(task.config) else 1
        for ep in _divisors(dp, min(dp, experts)):
            if experts % ep:
                continue
            for schedule in schedules:
                for recompute in dict.fromkeys((like.recompute, "report", "full")):
                    yield replace(
                        like, pp=pp, dp=dp, ep=ep, schedule=schedule, recompute=recompute,
                        overlap=traits(schedule).overlaps, interleave=1, split=None,
                        full_shard=like.full_shard and pp == 1,
                    )  # fmt: skip


def _divisors(number: int, most: int) -> list[int]:
    return [n for n in range(1, most + 1) if number % n == 0]
