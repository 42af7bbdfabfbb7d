"""A whole plan: every figure of a run on a cluster from one set of inputs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from fathom.model import ModelConfig
from fathom.parallel.schedules import SCHEDULES
from fathom.planning import serving
from fathom.planning.communication import (
    combine,
    copies,
    dispatch,
    pipeline_bytes,
)
from fathom.planning.full_shard import sent_bytes
from fathom.planning.layout import PlannedLayout, check, has_experts, lacks, micro_batches
from fathom.planning.parameters import Parameters, count_parameters
from fathom.planning.published import V3, Prediction, predictions
from fathom.planning.rank_memory import (
    RankMemory,
    fits,
    fullest_rank,
    host_ema_bytes,
    rank_parameters,
)
from fathom.planning.run_cost import (
    RunCost,
    Segment,
    run_cost,
)
from fathom.planning.search import Candidate, Task, alternatives, sweep
from fathom.planning.step_time import StepTime, step_bytes, step_time
from fathom.planning.what_if import Outcome, outcomes


@dataclass(frozen=True)
class Plan:
    """What a run of `segments` costs in `layout`; `PlanError` when the layout cannot be."""

    name: str
    """Of the recipe."""
    task: Task
    """Model, cluster, rates, and the sequence length and batch that a step is shown for."""
    layout: PlannedLayout
    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        check(self.layout, self.config, self.task.cluster, self.task.batch)

    @property
    def config(self) -> ModelConfig:
        """The model."""
        return self.task.config

    @cached_property
    def parameters(self) -> Parameters:
        """By part."""
        return count_parameters(self.config)

    @property
    def micro_batches(self) -> int:
        """Of one pipeline in a step."""
        return micro_batches(self.layout, self.task.batch)

    @cached_property
    def fullest(self) -> tuple[int, RankMemory]:
        """The rank that needs most, and its memory."""
        return self._fullest(self.layout)

    def _fullest(self, layout: PlannedLayout) -> tuple[int, RankMemory]:
        return fullest_rank(
            self.config,
            layout,
            self.task.cluster.device,
            seq_len=self.task.seq_len,
            micro_batches=self.micro_batches,
            mtp=self.task.mtp,
        )

    @property
    def memory(self) -> RankMemory:
        """Of the fullest rank."""
        return self.fullest[1]

    @property
    def fits(self) -> bool:
        """Whether the fullest rank fits its device."""
        return fits(self.memory, self.task.cluster.device)

    @cached_property
    def memory_otherwise(self) -> dict[str, RankMemory]:
        """The fullest rank's memory with other recomputation, and without FP8 storage."""
        found = {
            f"recompute {kind}": self._fullest(replace(self.layout, recompute=kind))[1]
            for kind in ("none", "report", "full")
        }
        if self.layout.fp8:
            found["without FP8"] = self._fullest(replace(self.layout, fp8=False))[1]
        return found

    @property
    def host_ema_bytes(self) -> float:
        """Host memory of the fullest rank's EMA."""
        return host_ema_bytes(self.config, self.layout, self.fullest[0], self.task.mtp)

    @cached_property
    def step(self) -> StepTime:
        """One step."""
        return self._step(self.layout)

    def _step(self, layout: PlannedLayout) -> StepTime:
        task = self.task
        return step_time(
            task.config,
            layout,
            task.cluster.device,
            task.rates,
            seq_len=task.seq_len,
            batch=task.batch,
            mtp=task.mtp,
        )

    @cached_property
    def step_without_overlap(self) -> StepTime:
        """The same step when every all-to-all is waited for."""
        return self._step(replace(self.layout, overlap=False))

    @cached_property
    def bubbles(self) -> dict[str, StepTime]:
        """A step under every schedule that can be on the same ranks, all-to-all hidden as planned."""
        return {
            name: self._step(other)
            for name, other in self._schedules.items()
            if name not in self.schedules_lacking
        }

    @cached_property
    def schedules_lacking(self) -> dict[str, str]:
        """What the other schedules need for that and do not have."""
        layers, count = self.config.num_hidden_layers, self.micro_batches
        every = {name: lacks(one, layers, count) for name, one in self._schedules.items()}
        return {name: why for name, why in every.items() if why}

    @property
    def _schedules(self) -> dict[str, PlannedLayout]:
        """The layout under every schedule; none without a pipeline."""
        if self.layout.pp == 1:
            return {}
        return {
            name: replace(self.layout, schedule=name, interleave=1, split=None)
            for name in SCHEDULES
        }

    @cached_property
    def cost(self) -> RunCost:
        """The whole run."""
        task = self.task
        return run_cost(
            task.config, self.layout, task.cluster, task.rates, self.segments, task.seq_len
        )

    @cached_property
    def alternatives(self) -> list[Candidate]:
        """The nearest layouts that fit."""
        return alternatives(self.task, self.layout)

    @cached_property
    def swept(self) -> list[Candidate]:
        """All layouts, best first."""
        return sweep(self.task, self.layout)

    @cached_property
    def what_ifs(self) -> list[Outcome]:
        """The hardware that the report asks for."""
        task = self.task
        return outcomes(
            task.config,
            self.layout,
            task.cluster.device,
            task.rates,
            seq_len=task.seq_len,
            batch=task.batch,
            mtp=task.mtp,
        )

    @cached_property
    def predictions(self) -> list[Prediction]:
        """Published runs, with the constants of machines that there are, whatever is asked of this one."""
        return predictions()

    @property
    def is_report(self) -> bool:
        """Whether it is the report's model, so that its published hours may stand beside ours."""
        same = ("hidden_size", "num_hidden_layers", "n_routed_experts", "num_experts_per_tok")
        return all(getattr(self.config, key) == getattr(V3, key) for key in same)

    @cached_property
    def decodes(self) -> list[serving.Decode]:
        """Decoding on the published units: at as many requests as fit, and at what production's figures imply."""
        device = self.task.cluster.device
        if not (self.is_report and device.bf16):
            return []
        implied = serving.PUBLISHED_DECODE / serving.PUBLISHED_USER_RATE
        return [
            serving.decode(
                self.config,
                serving.UNITS[name],
                device,
                self.task.rates,
                context=serving.PUBLISHED_CONTEXT,
                batch=batch,
            )
            for name, batch in (
                ("report decode", None),
                ("production decode", None),
                ("production decode", implied),
            )
        ]

    @cached_property
    def prefills(self) -> list[serving.Prefill]:
        """Prefilling on the published units, prompts of 4,096 tokens."""
        device = self.task.cluster.device
        if not (self.is_report and device.bf16):
            return []
        return [
            serving.prefill(self.config, serving.UNITS[name], device, self.task.rates, prompt=4096)
            for name in ("report prefill", "production prefill")
        ]

    @cached_property
    def traffic(self) -> dict[str, float]:
        """Bytes that a device sends, per token or per step."""
        config, layout, device = self.config, self.layout, self.task.cluster.device
        moe = has_experts(config) and layout.ep > 1
        way = copies(config, device, layout.ep)
        send = dispatch(config, device, layout.ep, layout.fp8)
        back = combine(config, device, layout.ep)
        most = max(
            (rank_parameters(config, layout, r, self.task.mtp) for r in range(layout.pp)),
            key=lambda p: p.total,
        )
        gradients, weights = step_bytes(layout, most)
        if layout.full_shard:
            gradients, weights = sent_bytes(
                config, layout, device, self.micro_batches, self.task.mtp
            )
        tokens = self.task.seq_len * layout.micro_batch
        return {
            "nodes_per_token": way.nodes if moe else 1.0,
            "dispatch_inter": send.inter_bytes if moe else 0.0,
            "dispatch_intra": send.intra_bytes if moe else 0.0,
            "combine_inter": back.inter_bytes if moe else 0.0,
            "combine_intra": back.intra_bytes if moe else 0.0,
            "pipeline_micro_batch": float(
                pipeline_bytes(config, device, tokens) if layout.pp > 1 else 0
            ),
            "gradients_step": gradients,
            "weights_step": weights,
        }
