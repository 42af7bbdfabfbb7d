"""Time of one optimiser step of a layout (report §3.2): chunks, bubble, exposed communication, the update.

Without overlap a chunk takes its computation and its all-to-alls one after the other. With overlap a forward and a
backward chunk run into one another on the SMs that communication leaves (`overlap`); in the bubble nothing overlaps.
The slowest rank of a pipeline sets the pace. Gradients are reduced and weights gathered after the last micro-batch, in
the open, which a good implementation partly hides (full sharding does both beside the computation: `full_shard`);
transfers between stages are hidden, being small (their time is given).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from fathom.model import ModelConfig
from fathom.parallel.schedules import Costs, Schedule, bubble_by_formula, schedule, simulate
from fathom.planning.block_time import BlockTime, Setting, Work, block_time, end_time
from fathom.planning.cluster import DEVICES, Device
from fathom.planning.communication import pipeline_bytes, reduce_bytes
from fathom.planning.flops import flops_per_token
from fathom.planning.full_shard import exposed_seconds, sent_bytes
from fathom.planning.layout import PlannedLayout, Stage, stages
from fathom.planning.overlap import pair_seconds
from fathom.planning.rank_memory import Held, rank_parameters
from fathom.planning.rates import Rates


@dataclass(frozen=True)
class StepTime:
    """One step, and where its time goes on the slowest rank. Seconds."""

    compute: float
    """Computation, on the SMs that it has."""
    exposed: float
    """All-to-all that nothing hides."""
    bubble: float
    """Idle by the schedule's formula."""
    reduce: float
    """Gradients reduced, weights gathered."""
    update: float
    """AdamW reading and writing its state."""
    all_to_all: float
    """All of the all-to-all's time, hidden or not; no part of the sum."""
    pipeline: float
    """Time of the transfers between stages, taken as hidden; no part of the sum."""
    tokens: float
    """Trained in the step by one device's share: batch x sequence / devices."""
    flops: float
    """The model's operations per token (causal, MTP's counted, nothing twice)."""
    peak: float
    """Of the device's ordinary products, FLOP/s."""

    @property
    def total(self) -> float:
        """The step."""
        return self.compute + self.exposed + self.bubble + self.reduce + self.update

    @property
    def bubble_fraction(self) -> float:
        """Of the step."""
        return self.bubble / self.total

    @property
    def tokens_per_second(self) -> float:
        """Per device."""
        return self.tokens / self.total

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation, of the BF16 peak (FP32 where there is no other) also where FP8 multiplies."""
        return self.tokens_per_second * self.flops / self.peak


@dataclass(frozen=True)
class Chunk:
    """One stage and one micro-batch."""

    blocks: tuple[BlockTime, ...]
    end: Work
    """Head and loss, on the last stage."""

    @property
    def work(self) -> Work:
        """Computation."""
        total = self.end
        for block in self.blocks:
            total += block.work
        return total

    @property
    def transfer(self) -> float:
        """All-to-all time of one pass."""
        return sum(block.transfer for block in self.blocks)


def step_time(
    config: ModelConfig,
    layout: PlannedLayout,
    device: Device,
    rates: Rates,
    *,
    seq_len: int,
    batch: int,
    mtp: bool = True,
    parts: int = 1,
) -> StepTime:
    """Time of a step of `batch` sequences, each divided among `parts` devices. Too few micro-batches for a schedule
    with two directions (two for each rank) are reckoned as 1F1B without overlap; a broken number counts as it is.
    """
    setting = Setting(config, layout, device, rates, seq_len, parts)
    count = batch * parts / (layout.dp * layout.micro_batch)
    every = stages(layout, config, mtp)
    times = _block_times(setting, every)
    chunks = [_chunk(setting, stage, times, mtp) for stage in every]
    ranks = [_rank_time(setting, chunks, rank, count) for rank in range(layout.pp)]
    compute, exposed = max(ranks, key=sum)
    parameters = [rank_parameters(config, layout, r, mtp, every) for r in range(layout.pp)]
    full = max(parameters, key=lambda p: p.total)
    border = pipeline_bytes(config, device, setting.tokens) if layout.pp > 1 else 0
    crossings = 2 * count * layout.stages / layout.pp  # forward and back, for every stage of a rank
    return StepTime(
        compute=compute,
        exposed=exposed,
        bubble=_bubble(setting, chunks, count),
        reduce=_reduce_seconds(setting, full, compute, count, mtp),
        update=_update_seconds(layout, device, rates, full),
        all_to_all=max(_all_to_all(layout, chunks, rank, count) for rank in range(layout.pp)),
        pipeline=crossings * border / (rates.inter * device.inter_bandwidth),
        tokens=batch * seq_len / layout.world,
        flops=flops_per_token(config, seq_len, mtp),
        peak=device.peak(device.compute),
    )


def _block_times(setting: Setting, every: list[Stage]) -> dict[int, BlockTime]:
    """Times by layer; layers of a kind take the same."""
    kinds = dict.fromkeys((False, True), -1)
    times: dict[int, BlockTime] = {}
    for stage in every:
        for layer in stage.layers:
            moe = setting.config.is_moe_layer(layer)
            if kinds[moe] < 0:
                kinds[moe], times[layer] = layer, block_time(setting, layer)
            times[layer] = times[kinds[moe]]
    return times


def _chunk(setting: Setting, stage: Stage, times: dict[int, BlockTime], mtp: bool) -> Chunk:
    end = end_time(setting, mtp) if stage.last else Work()
    return Chunk(tuple(times[layer] for layer in stage.layers), end)


def overlaps(layout: PlannedLayout, count: float) -> bool:
    """Whether chunks run into one another: wanted, and enough micro-batches for a schedule with two directions."""
    if layout.traits.overlaps and layout.pp > 1 and count < layout.traits.least(layout.pp):
        return False
    return layout.overlap


def _rank_time(
    setting: Setting, chunks: list[Chunk], rank: int, count: float
) -> tuple[float, float]:
    """(computation, exposed all-to-all) of a rank in a step, no bubble."""
    layout = setting.layout
    mine = [chunks[stage] for stage in layout.held(rank)]
    share = count / 2 if layout.traits.copies == 2 else count
    if not overlaps(layout, count):
        work = sum(chunk.work.forward + chunk.work.backward for chunk in mine)
        return share * work, share * sum(_passes(layout) * chunk.transfer for chunk in mine)
    factor = _sm_factor(setting)
    # forward of a chunk beside backward of the other one; where a rank has one stage, beside its own
    partners = mine[::-1] if len(mine) == 2 else mine
    total = sum(pair_time(a, b, factor, layout) for a, b in zip(mine, partners, strict=True))
    work = factor * sum(chunk.work.forward + chunk.work.backward for chunk in mine)
    return share * work, share * (total - work)


def _sm_factor(setting: Setting) -> float:
    """How much longer computation takes on the SMs that communication leaves; on a small device it takes as large a
    share as on the H800, not as many.
    """
    if setting.layout.ep == 1:
        return 1.0
    sms = setting.device.sms
    taken = setting.rates.communication_sms * min(1.0, sms / DEVICES["h800"].sms)
    return sms / (sms - taken)


def _passes(layout: PlannedLayout) -> int:
    """All-to-all passes of a micro-batch: forward, backward, and forward again when all is made again."""
    return 3 if layout.recompute == "full" else 2


def pair_time(ahead: Chunk, behind: Chunk, factor: float, layout: PlannedLayout) -> float:
    """F&B of a forward and a backward chunk; blocks without a partner transfer in the open."""
    forward = [block for block in ahead.blocks if block.transfer]
    backward = [block for block in behind.blocks if block.transfer]
    both = min(len(forward), len(backward))
    work = factor * (ahead.work.forward + behind.work.backward)
    alone = forward[both:] + backward[both:]
    exposed = sum(block.transfer for block in alone)
    if both:
        a, b = _slower(forward[0], factor), _slower(backward[0], factor)
        exposed += both * max(0.0, pair_seconds(a, b) - a.work.forward - b.work.backward)
    if layout.recompute == "full":  # the second forward's all-to-all has nothing beside it
        exposed += behind.transfer
    return work + exposed


def _slower(block: BlockTime, factor: float) -> BlockTime:
    return BlockTime(
        block.attention.scaled(factor), block.mlp.scaled(factor), block.dispatch, block.combine
    )


def chunk_costs(setting: Setting, chunk: Chunk) -> Costs:
    """F, B, W and F&B of a stage, as the schedules' formulas want them; alone nothing is hidden."""
    layout, work = setting.layout, chunk.work
    pair = pair_time(chunk, chunk, _sm_factor(setting), layout) if layout.overlap else None
    again = (_passes(layout) - 1) * chunk.transfer
    return Costs(work.forward + chunk.transfer, work.inputs + again, work.weights, pair=pair)


def _bubble(setting: Setting, chunks: list[Chunk], count: float) -> float:
    """Idle time, with the costs of the slowest stage."""
    layout = setting.layout
    if layout.pp == 1:
        return 0.0
    slowest = max(chunks, key=lambda chunk: chunk.work.total + _passes(layout) * chunk.transfer)
    name = layout.schedule
    if layout.traits.overlaps and not overlaps(layout, count) and layout.overlap:
        name = "1F1B"
    costs = chunk_costs(setting, slowest)
    if name in ("ZB1P", "ZBV") and layout.interleave == 1 and count < 2 * layout.pp:
        return _simulated_bubble(_lists(name, layout.bubble_stages, max(1, round(count))), costs)
    return max(0.0, bubble_by_formula(name, layout.bubble_stages, costs))


def _simulated_bubble(lists: Schedule, costs: Costs) -> float:
    """Idle time where there are too few micro-batches to put weight gradients into the gaps, as the formulas do: up to
    four times as much as by formula."""
    found = simulate(lists, costs)
    return max(0.0, found.makespan - max(found.busy))


@cache
def _lists(name: str, number: int, count: int) -> Schedule:
    return schedule(name, number, count)


def _all_to_all(layout: PlannedLayout, chunks: list[Chunk], rank: int, count: float) -> float:
    share = count / 2 if layout.traits.copies == 2 else count
    return share * _passes(layout) * sum(chunks[stage].transfer for stage in layout.held(rank))


def _reduce_seconds(
    setting: Setting, parameters: Held, compute: float, count: float, mtp: bool
) -> float:
    """Rings over everything that has a copy of a parameter; of full sharding what shows beside the computation."""
    config, layout, device, rates = setting.config, setting.layout, setting.device, setting.rates
    inside = layout.world <= device.per_node
    rate = rates.intra * device.intra_bandwidth if inside else rates.inter * device.inter_bandwidth
    if layout.full_shard:
        seconds = sum(sent_bytes(config, layout, device, count, mtp)) / rate
        return exposed_seconds(config, seconds, compute, count, mtp)
    return sum(step_bytes(layout, parameters)) / rate


def step_bytes(layout: PlannedLayout, parameters: Held) -> tuple[float, float]:
    """(gradient bytes, weight bytes) that a rank sends at the end of a step: experts exist dp / ep times, all else dp
    times.
    """
    ranks = layout.dp * layout.traits.copies
    shared = reduce_bytes(parameters.shared, ranks, layout.zero1)
    experts = reduce_bytes(parameters.experts, ranks / layout.ep, layout.zero1)
    return shared[0] + experts[0], shared[1] + experts[1]


def _update_seconds(layout: PlannedLayout, device: Device, rates: Rates, parameters: Held) -> float:
    """Gradient read, master and two moments read and written, weights written."""
    sharded = layout.zero1 or layout.full_shard
    ranks = layout.dp * layout.traits.copies if sharded else 1
    mine = parameters.shared / ranks + parameters.experts / max(1.0, ranks / layout.ep)
    return mine * (4 + 8 + 4 * layout.moment_bytes + 2) / rates.bandwidth(device)
