"""Whether a recipe can be run by so many processes, and how: everything that is refused before anything starts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from fathom.errors import ParallelError, ScheduleError
from fathom.parallel import OVERLAPPED_ORDER, POSTED_EARLY, Layout, simulate
from fathom.parallel.pipeline import Plan
from fathom.runs.parallel import ParallelConfig
from fathom.runs.recipe import Recipe, Stage


@dataclass(frozen=True)
class RunLayout:
    """A recipe laid out over processes. Raises `ParallelError` where that cannot be."""

    recipe: Recipe
    processes: int

    def __post_init__(self) -> None:
        self.layout.check(self.recipe.model)
        for stage in self.recipe.stages:
            for size in batch_sizes(stage):
                self._check_batch(stage, size)
            self.micro_batch(stage)

    @cached_property
    def layout(self) -> Layout:
        """pp, dp and ep; dp follows from the number of processes."""
        asked, there = self.recipe.parallel, self.processes
        if there % asked.processes:
            raise ParallelError(
                f"parallel.pp = {asked.pp} and ep = {asked.ep} need {asked.processes} processes or a multiple, and "
                f"there {'is' if there == 1 else 'are'} {there}; start them with torchrun {_nodes(asked)} -m fathom "
                f"run …, or change parallel.pp and parallel.ep"
            )
        return Layout(asked.pp, there // asked.pp, asked.ep, asked.devices_per_node)

    @cached_property
    def plan(self) -> Plan | None:
        """The pipeline's schedule and stages; None without a pipeline."""
        asked = self.recipe.parallel
        if asked.pp == 1:
            return None
        try:
            return Plan(self.recipe.model, asked.pp, asked.schedule, asked.layers or None)
        except ParallelError as error:
            raise ParallelError(f"parallel.pp = {asked.pp}: {error}") from error

    def plan_on(self, device: torch.device) -> Plan | None:
        """The same with the order inside overlapped pairs: the report's where the host only issues work, else one that
        posts all-to-alls before it computes (docs/experiments/016)."""
        order = OVERLAPPED_ORDER if device.type == "cuda" else POSTED_EARLY
        return self.plan and replace(self.plan, order=order)

    @property
    def name(self) -> str:
        """In a few letters: pp2 dp4 ep2 1F1B."""
        layout, pipeline = self.layout, f" {self.recipe.parallel.schedule}" if self.plan else ""
        sharded = " full_shard" if self.full_shard else ""
        return f"pp{layout.pp} dp{layout.dp} ep{layout.ep}{pipeline}{sharded}"

    @property
    def summary(self) -> str:
        """On one line, for people."""
        ranks = self.layout
        return (
            f"layout {self.name}: {self.processes} processes, {ranks.dp} for the rows of a batch, experts over "
            f"{ranks.ep}"
        )

    @property
    def full_shard(self) -> bool:
        """Whether weights lie in shards."""
        return self.recipe.parallel.full_shard and self.processes > 1

    def micro_batch(self, stage: Stage) -> int:
        """Sequences that a rank computes at a time.

        The stage's own number. Without one: all of a rank's share; in a pipeline the largest equal parts that there are
        enough of for the schedule, two to a stage if they can be had, so that stages work at the same time.
        """
        shares = sorted({size // self.layout.dp for size in batch_sizes(stage)})
        plan = self.plan
        if plan is None:
            return stage.micro_batch or shares[-1]
        if stage.micro_batch is not None:
            self._check_schedule(stage, plan, stage.micro_batch, shares)
            return stage.micro_batch
        for rows in range(shares[0], 1, -1):
            enough = shares[0] // rows >= 2 * plan.stages
            if enough and not any(share % rows for share in shares) and _fits(plan, rows, shares):
                return rows
        self._check_schedule(stage, plan, 1, shares)
        return 1

    def bubble(self, stage: Stage) -> tuple[int, float]:
        """Micro-batches of a full step, and the share of the time that a rank idles by the simulator, each action
        (F, I, W) taking as long as any other and transfers none."""
        assert self.plan is not None
        count = -(-(stage.batch // self.layout.dp) // self.micro_batch(stage))
        return count, simulate(self.plan.schedule(count)).bubble_fraction

    def _check_batch(self, stage: Stage, size: int) -> None:
        dp = self.layout.dp
        if size % dp:
            ramp = stage.batch_start is not None
            keys = "batch_start, batch and batch_multiple multiples" if ramp else "batch a multiple"
            raise ParallelError(
                f"stages.{stage.name}: a batch of {size} sequences cannot be shared evenly by dp = {dp} ranks; make "
                f"{keys} of {dp}, or change the number of processes or parallel.pp"
            )

    def _check_schedule(self, stage: Stage, plan: Plan, rows: int, shares: list[int]) -> None:
        for share in shares:
            try:
                plan.schedule(-(-share // rows))
            except ScheduleError as error:
                raise ScheduleError(
                    f"stages.{stage.name}.batch gives a pipeline {share} sequences in micro-batches of {rows}: {error} "
                    f"(stages.{stage.name}.micro_batch, parallel.schedule)"
                ) from error


def _nodes(asked: ParallelConfig) -> str:
    """What torchrun is told to start as few processes as can be."""
    node = asked.devices_per_node
    if node is None or asked.processes <= node:
        return f"--nproc-per-node {asked.processes}"
    return f"--nnodes {-(-asked.processes // node)} --nproc-per-node {node}"


def _fits(plan: Plan, rows: int, shares: list[int]) -> bool:
    """Whether the schedule works with micro-batches of so many rows."""
    try:
        for count in {share // rows for share in shares}:
            plan.schedule(count)
    except ScheduleError:
        return False
    return True


def batch_sizes(stage: Stage) -> Iterator[int]:
    """All sizes that a stage's batch has, on its ramp too."""
    batches = stage.batches
    if batches.ramp:
        most = (batches.full - batches.start) // batches.multiple
        yield from (batches.start + i * batches.multiple for i in range(most + 1))
    yield batches.full
