"""Memory of one rank by class for a training layout (report §3.2.3, §3.3.3, Table 2).

A BF16 copy of the weights multiplies; FP32 masters and moments belong to the optimiser and are sharded by ZeRO-1. On a
device without BF16 the masters multiply themselves. With full sharding gradients are sharded too, and no copy of the
weights stays (`full_shard`). Activations are those of the micro-batches that a schedule has under way, which is most at
the first ranks of a pipeline; the fullest rank decides whether a layout fits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from fathom.model import ModelConfig
from fathom.planning.cluster import Device
from fathom.planning.communication import copies
from fathom.planning.full_shard import at_a_time
from fathom.planning.layout import PlannedLayout, Stage, stages
from fathom.planning.memory import (
    block_activations,
    end_activations,
    fp8_block_bytes,
    logits_bytes,
)
from fathom.planning.parameters import around_mtp_block, block_parameters
from fathom.planning.rates import BYTES, SCALE

RESERVE = 0.06
"""Share of a device's memory for the context, NCCL's buffers and the allocator's gaps: our allowance, 4.8 of 80 GiB."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes by class on one rank."""

    weights: float
    """What multiplies."""
    gradients: float
    """FP32, summed over micro-batches."""
    master: float
    """FP32 weights of the optimiser, where they are not the ones that multiply."""
    moments: float
    """AdamW's two."""
    activations: float
    """Kept for backward, of all micro-batches under way."""
    all_to_all: float
    """Send and receive buffers of one dispatch and one combine."""
    logits: float
    """A chunk of logits, and the gradient of the head."""

    @property
    def total(self) -> float:
        """On the device."""
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Held:
    """Parameters of some stages on one rank."""

    shared: float
    """All but routed experts: on every data-parallel rank."""
    experts: float
    """This rank's share of routed experts."""
    twice: float = 0.0
    """Those of the shared ones that another rank of the pipeline has too: an embedding at both ends."""

    @property
    def total(self) -> float:
        """All of them."""
        return self.shared + self.experts


def held(
    config: ModelConfig, layout: PlannedLayout, mine: Sequence[Stage], mtp: bool = True
) -> Held:
    """Parameters of a rank that has these stages; what several of them need it has once."""
    shared, experts = 0.0, 0.0
    for stage in mine:
        for layer in stage.layers:
            dense, routed = block_parameters(config, layer)
            shared += dense + (around_mtp_block(config) if layer >= config.num_hidden_layers else 0)
            experts += routed / layout.ep
    matrix, tied = config.vocab_size * config.hidden_size, config.tie_word_embeddings
    first, last = any(stage.first for stage in mine), any(stage.last for stage in mine)
    both_ends = tied or (mtp and config.num_nextn_predict_layers > 0)
    embeds = first or (last and both_ends)
    if embeds:
        shared += matrix
    if last:
        shared += config.hidden_size + (0 if tied else matrix)
    return Held(shared, experts, matrix if embeds and both_ends and first != last else 0.0)


def rank_parameters(
    config: ModelConfig,
    layout: PlannedLayout,
    rank: int,
    mtp: bool = True,
    every: list[Stage] | None = None,
) -> Held:
    """Parameters on a rank of a pipeline; `every`: its stages, where they are at hand.

    DualPipe puts the first and the last stage on the same rank, so MTP shares embedding and head there (§3.2.3); the
    other schedules with MTP on the last stage, or with a tied head, need the embedding a second time there.
    """
    every = every or stages(layout, config, mtp)
    return held(config, layout, [every[number] for number in layout.held(rank)], mtp)


def rank_memory(
    config: ModelConfig,
    layout: PlannedLayout,
    device: Device,
    rank: int,
    *,
    seq_len: int,
    micro_batches: int,
    mtp: bool = True,
    every: list[Stage] | None = None,
) -> RankMemory:
    """Bytes of a rank of a pipeline; see `fullest_rank`. `every`: its stages, where they are at hand."""
    every = every or stages(layout, config, mtp)
    parameters = rank_parameters(config, layout, rank, mtp, every)
    number = BYTES[device.compute]
    masters_multiply = number == 4
    sharded = _sharded(parameters, layout)
    mine = [every[stage] for stage in layout.held(rank)]
    tokens = seq_len * layout.micro_batch
    flights = layout.in_flight(rank, micro_batches)
    depth = config.num_nextn_predict_layers if mtp else 0
    activations = sum(
        flight * tokens * _stage_bytes(config, layout, device, stage, depth)
        for stage, flight in zip(mine, flights, strict=True)
    )
    head = any(stage.last for stage in mine)
    weights, gradients = number * parameters.total, 4.0 * parameters.total
    if layout.full_shard:
        gathered, whole = at_a_time(config, layout, device, mtp)
        weights = gathered + (4 * sharded if masters_multiply else 0.0)
        gradients = whole + 4 * sharded
    return RankMemory(
        weights=weights,
        gradients=gradients,
        master=0.0 if masters_multiply else 4 * sharded,
        moments=2 * (4 if masters_multiply else layout.moment_bytes) * sharded,
        activations=activations,
        all_to_all=tokens * _buffer_bytes(config, layout, device),
        logits=float(logits_bytes(config, tokens, depth, masters_multiply)) if head else 0.0,
    )


def _sharded(parameters: Held, layout: PlannedLayout) -> float:
    """Parameters whose optimiser state a rank holds; the two copies of a stage in DualPipe share the work, and so do
    both ends of a pipeline whose embedding is at both."""
    if not (layout.zero1 or layout.full_shard):
        return parameters.total
    ranks = layout.dp * layout.traits.copies
    shared = parameters.shared - parameters.twice / 2
    return shared / ranks + parameters.experts / (ranks / layout.ep)


def _stage_bytes(
    config: ModelConfig, layout: PlannedLayout, device: Device, stage: Stage, depth: int
) -> float:
    """Bytes per token that a stage keeps of one micro-batch."""
    number = BYTES[device.compute]
    recompute = layout.recompute != "none"
    end = end_activations(config, depth, recompute) * number if stage.last else 0
    if layout.recompute == "full":
        return number * config.hidden_size * len(stage.layers) + end
    if layout.fp8 and recompute:
        return sum(fp8_block_bytes(config, layer) for layer in stage.layers) + end
    return number * sum(block_activations(config, i, recompute) for i in stage.layers) + end


def _buffer_bytes(config: ModelConfig, layout: PlannedLayout, device: Device) -> float:
    """Bytes per token of all-to-all buffers: what is sent and what arrives, once to dispatch and once to combine."""
    if layout.ep == 1:
        return 0.0
    way = copies(config, device, layout.ep)
    number = BYTES[device.compute]
    dispatched = 1 + SCALE if layout.fp8 else number
    return 2 * (way.inter + way.intra) * config.hidden_size * (dispatched + number)


def fullest_rank(
    config: ModelConfig,
    layout: PlannedLayout,
    device: Device,
    *,
    seq_len: int,
    micro_batches: int,
    mtp: bool = True,
) -> tuple[int, RankMemory]:
    """The rank of a pipeline that needs most, and what it needs."""
    every = stages(layout, config, mtp)
    found = [
        rank_memory(
            config,
            layout,
            device,
            rank,
            seq_len=seq_len,
            micro_batches=micro_batches,
            mtp=mtp,
            every=every,
        )
        for rank in range(layout.pp)
    ]
    rank = max(range(layout.pp), key=lambda number: found[number].total)
    return rank, found[rank]


def host_ema_bytes(
    config: ModelConfig, layout: PlannedLayout, rank: int, mtp: bool = True
) -> float:
    """Bytes of host memory of an average of the weights (§3.2.3), where one is kept: FP32, sharded as masters are."""
    return 4 * _sharded(rank_parameters(config, layout, rank, mtp), layout)


def fits(memory: RankMemory, device: Device) -> bool:
    """Whether a device holds it, its reserve kept free."""
    return memory.total <= (1 - RESERVE) * device.memory
