"""How a training run is laid out over devices (report §3.1-3.2): pipeline, data and expert parallelism.

World = pp x dp, and ep divides dp: experts are sharded over ep ranks and exist dp / ep times, everything else exists dp
times or is sharded over dp (ZeRO-1). The report's own layout is pp 16, dp 128, ep 64. Which layers which stage gets is
not published: here a stage gets a run of whole layers so that the heaviest stage is as light as it can be.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from fathom.errors import PlanError
from fathom.model import ModelConfig
from fathom.parallel.schedules import Traits, in_flight, traits
from fathom.planning.cluster import Cluster
from fathom.planning.layer_split import split_layers

RECOMPUTE = ("none", "report", "full")


@dataclass(frozen=True)
class PlannedLayout:
    """A layout on paper, and how a step is computed in it: all that its memory and time depend on.

    `fathom.parallel.Layout` says which process does what in a world that there is, and refuses what can never be. This
    one may be impossible, since a search makes many that are; `check` says whether it can be for a model and a cluster.
    Nodes are the cluster's here.
    """

    pp: int = 1
    """Ranks of a pipeline."""
    dp: int = 1
    """Pipelines."""
    ep: int = 1
    """Ranks among which the experts of a layer are divided."""
    micro_batch: int = 1
    """Sequences computed at a time."""
    schedule: str = "1F1B"
    """Pipeline schedule (`fathom.parallel.SCHEDULES`)."""
    interleave: int = 1
    """Stages on each rank of an interleaved 1F1B (Narayanan et al. 2021); 1: not interleaved."""
    overlap: bool = True
    """Whether the all-to-all of one micro-batch runs beside the computation of another, taking some SMs."""
    recompute: str = "report"
    """What backward makes again: "none"; "report": norms, MLA up-projections and SwiGLU (§3.2.3); "full": all."""
    zero1: bool = True
    """Whether master weights and moments are sharded over data-parallel ranks."""
    full_shard: bool = False
    """Whether weights and gradients are sharded too, and gathered a block at a time (FSDP2); for pp = 1."""
    fp8: bool = True
    """Whether linear layers multiply in FP8, keep FP8 for backward and dispatch FP8 (§3.3)."""
    moment_bytes: int = 2
    """Of each of AdamW's moments: 2 (BF16, §3.3.3) or 4."""
    split: tuple[int, ...] | None = None
    """Layers of each stage; None: so that the heaviest stage is as light as it can be."""

    @property
    def world(self) -> int:
        """Devices."""
        return self.pp * self.dp

    @property
    def name(self) -> str:
        """In a few letters: pp16 dp128 ep64 DualPipe; mb4 for micro-batches of four sequences."""
        pipeline = f" {self.schedule}" if self.pp > 1 else ""
        micro = f" mb{self.micro_batch}" if self.micro_batch > 1 else ""
        sharded = " full_shard" if self.full_shard else ""
        return f"pp{self.pp} dp{self.dp} ep{self.ep}{micro}{pipeline}{sharded}"

    @cached_property
    def traits(self) -> Traits:
        """What is so of the schedule whatever the numbers."""
        return traits(self.schedule)

    @property
    def stages(self) -> int:
        """Different stages along the pipeline."""
        return self.bubble_stages * self.interleave

    @property
    def bubble_stages(self) -> int:
        """PP of the schedule's formula."""
        return self.traits.stages(self.pp)

    def held(self, rank: int) -> tuple[int, ...]:
        """Stages of a rank: the schedule's; every pp-th when interleaved."""
        if self.interleave > 1:
            return tuple(range(rank, self.stages, self.pp))
        return self.traits.held(rank, self.pp)

    def in_flight(self, rank: int, micro_batches: int) -> tuple[float, ...]:
        """Micro-batches whose activations each stage of `held(rank)` keeps at most."""
        counts = in_flight(self.schedule, self.pp, rank, micro_batches)
        if self.interleave == 1:
            return counts
        # Narayanan et al. 2021: (1 + (pp - 1) / (pp v)) times the first rank's pp
        count = min(micro_batches, counts[0] + (self.pp - 1) / self.interleave)
        return (count,) * self.interleave


REPORT = PlannedLayout(pp=16, dp=128, ep=64, schedule="DualPipe")
"""Report §3.1-3.3: 16-way pipeline, 64-way experts, ZeRO-1, DualPipe, FP8, recomputation, BF16 moments.
The micro-batch of one sequence is our reading of the published traces (sequence 4,096)."""


def check(layout: PlannedLayout, config: ModelConfig, cluster: Cluster, batch: int) -> None:
    """Raise `PlanError` unless this layout can be: value, constraint, remedy."""
    check_settings(layout, cluster)
    _check_counts(layout, config, cluster)
    _check_pipeline(layout, config)
    micro_batches(layout, batch)


def check_settings(layout: PlannedLayout, cluster: Cluster) -> None:
    """The part of `check` that no choice of pp, dp and ep mends."""
    for key in ("pp", "dp", "ep", "micro_batch", "interleave"):
        if getattr(layout, key) < 1:
            raise PlanError(f"{key} = {getattr(layout, key)} must be at least 1; raise it")
    if layout.recompute not in RECOMPUTE:
        raise PlanError(
            f"recompute = {layout.recompute!r} must be one of {', '.join(RECOMPUTE)}; choose one"
        )
    if layout.moment_bytes not in (2, 4):
        raise PlanError(
            f"moment_bytes = {layout.moment_bytes} must be 2 (BF16) or 4 (FP32); choose one"
        )
    if layout.fp8:
        cluster.device.peak("fp8")


def _check_counts(layout: PlannedLayout, config: ModelConfig, cluster: Cluster) -> None:
    if layout.world != cluster.devices:
        raise PlanError(
            f"pp {layout.pp} x dp {layout.dp} = {layout.world} devices, but {cluster.name} has {cluster.devices}; "
            f"change one of them"
        )
    if layout.dp % layout.ep:
        raise PlanError(
            f"ep = {layout.ep} must divide dp = {layout.dp}: experts are sharded over data-parallel ranks; lower ep "
            f"or raise dp"
        )
    if has_experts(config) and config.n_routed_experts % layout.ep:
        raise PlanError(
            f"ep = {layout.ep} must divide the {config.n_routed_experts} routed experts; take a divisor"
        )
    if not has_experts(config) and layout.ep > 1:
        raise PlanError(f"ep = {layout.ep} must be 1: the model has no experts to divide; lower it")


def _check_pipeline(layout: PlannedLayout, config: ModelConfig) -> None:
    layers = config.num_hidden_layers
    if layout.interleave > 1 and layout.schedule != "1F1B":
        raise PlanError(
            f"interleave = {layout.interleave} is for 1F1B and the schedule is {layout.schedule}; leave it at 1"
        )
    if layout.full_shard and layout.pp > 1:
        raise PlanError(
            f"full_shard with pp = {layout.pp} would gather every weight again for each micro-batch; give "
            f"--no-full-shard or take pp = 1"
        )
    if layout.traits.parts == 2 and layout.bubble_stages % 2:
        raise PlanError(
            f"{layout.schedule} needs an even number of stages and pp = {layout.pp} gives {layout.bubble_stages}; "
            f"change pp or the schedule"
        )
    if layout.pp > 1 and layout.stages > layers + 1:
        raise PlanError(
            f"{layout.stages} stages are more than the {layers} layers and the head; lower pp or interleave"
        )
    if layout.split is not None and (
        len(layout.split) != layout.stages or sum(layout.split) != layers or min(layout.split) < 0
    ):
        raise PlanError(
            f"split = {','.join(map(str, layout.split))} must be {layout.stages} numbers that make {layers} layers "
            f"together; correct it"
        )


def micro_batches(layout: PlannedLayout, batch: int) -> int:
    """Micro-batches of one pipeline in a step of `batch` sequences."""
    at_a_time = layout.dp * layout.micro_batch
    if batch % at_a_time:
        raise PlanError(
            f"a batch of {batch} sequences must be a multiple of dp {layout.dp} x micro-batch {layout.micro_batch} = "
            f"{at_a_time}; change one of them"
        )
    count = batch // at_a_time
    least = layout.traits.least(layout.pp) if layout.pp > 1 else 1
    if count < least:
        each = f" for each of {layout.dp} pipelines" if layout.dp > 1 else ""
        raise PlanError(
            f"{layout.schedule} over {layout.pp} ranks needs {least} micro-batches, and a batch of {batch} has {count}"
            f"{each}; lower dp or the micro-batch, or take 1F1B"
        )
    if layout.traits.copies == 2 and layout.pp > 1 and count % 2:
        raise PlanError(
            f"{layout.schedule} needs an even number of micro-batches and has {count}; change the batch or dp"
        )
    return count


def lacks(layout: PlannedLayout, layers: int, count: int) -> str | None:
    """What a schedule needs and does not have with `layers` layers and `count` micro-batches; None: nothing."""
    least = layout.traits.least(layout.pp)
    if layout.traits.parts == 2 and layout.bubble_stages % 2:
        return "needs an even number of stages"
    if layout.stages > layers + 1:
        return f"needs {layout.stages - 1} layers"
    if count < least:
        return f"needs {least} micro-batches"
    if layout.traits.copies == 2 and count % 2:
        return "needs an even number of micro-batches"
    return None


def has_experts(config: ModelConfig) -> bool:
    """Whether any layer, MTP's counted, is MoE."""
    last = config.num_hidden_layers + config.num_nextn_predict_layers
    return any(config.is_moe_layer(layer) for layer in range(last))


@dataclass(frozen=True)
class Stage:
    """What one stage computes."""

    layers: tuple[int, ...]
    """Indices of blocks, MTP's after the main model's."""
    first: bool
    """Whether it looks tokens up."""
    last: bool
    """Whether it has the final norm and the head."""


def stages(layout: PlannedLayout, config: ModelConfig, mtp: bool = True) -> list[Stage]:
    """Every stage's blocks; embedding with the first, head and MTP with the last (§3.2.3)."""
    layers = config.num_hidden_layers
    ranks = tuple(layout.held(rank) for rank in range(layout.pp))
    counts = layout.split or split_layers(config, mtp, ranks)
    found, start = [], 0
    for number, count in enumerate(counts):
        last = number == len(counts) - 1
        blocks = list(range(start, start + count))
        if last and mtp:
            blocks += range(layers, layers + config.num_nextn_predict_layers)
        found.append(Stage(tuple(blocks), number == 0, last))
        start += count
    return found
