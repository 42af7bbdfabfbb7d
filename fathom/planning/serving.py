"""Serving by formula (report §3.4, and the deployment that DeepSeek described in February 2025, "Day 6").

Prefill and decode run on units of their own: every device of a unit computes attention for its own requests (the report
shards it by TP 4 over a batch; production did not), and the routed experts of a layer, with some of them doubled, are
divided over the unit. A decode step is bound by what it reads (weights once, caches of all requests), by its products,
and by two all-to-alls per MoE layer; the roof is where the three hide one another, the floor where they follow one
after another. The report's and production's units differ (spec trap 26); both are here.
"""

from __future__ import annotations

from dataclasses import dataclass

from fathom.errors import PlanError
from fathom.model import ModelConfig
from fathom.planning.cluster import Device
from fathom.planning.communication import expected_distinct
from fathom.planning.flops import head_flops
from fathom.planning.layout import has_experts
from fathom.planning.parameters import (
    attention_matrices,
    count_parameters,
    expert,
    feed_forward,
)
from fathom.planning.rank_memory import RESERVE
from fathom.planning.rates import BYTES, SCALE, Rates, product_seconds


@dataclass(frozen=True)
class Unit:
    """Devices that hold one copy of the model together."""

    name: str
    devices: int
    redundant: int
    """Experts that are held twice."""
    source: str

    def experts_per_device(self, config: ModelConfig) -> float:
        """Routed experts of a layer on one device, doubled ones counted."""
        return (config.n_routed_experts + self.redundant) / self.devices


UNITS = {
    "report prefill": Unit("report prefill", 32, 32, "report §3.4.1: EP32, 32 redundant, 9 + 1"),
    "report decode": Unit("report decode", 320, 64, "report §3.4.2: EP320, one expert each"),
    "production prefill": Unit("production prefill", 32, 32, "Day 6: EP32, 9 + 1 a device"),
    "production decode": Unit("production decode", 144, 32, "Day 6: EP144, 32 redundant, 2 + 1"),
}

PUBLISHED_PREFILL = 73_700 / 8
"""Day 6: input tokens per second and device of an 8-GPU node, cache hits counted."""
CACHE_HITS = 342 / 608
"""Day 6: input tokens that came from the cache on disk."""
PUBLISHED_DECODE = 14_800 / 8
"""Day 6: output tokens per second and device."""
PUBLISHED_CONTEXT = 4_989
"""Day 6: mean length of the cache at an output token."""
PUBLISHED_USER_RATE = 21
"""Day 6: tokens per second that a user sees, 20 to 22."""


def cache_bytes(config: ModelConfig, fp8: bool) -> float:
    """Bytes of cache per token: BF16, or FlashMLA's FP8 form, 656 bytes for V3's layer: FP8 latent with an FP32 scale
    for every 128, BF16 rotated key.
    """
    C, R = config.kv_lora_rank, config.qk_rope_head_dim
    layer = C * (1 + SCALE) + 2 * R if fp8 else 2 * (C + R)
    return layer * config.num_hidden_layers


@dataclass(frozen=True)
class Decode:
    """One decoding step on one device."""

    unit: Unit
    batch: float
    """Requests on the device."""
    context: int
    weights: float
    """Bytes of weights on the device."""
    most: float
    """Requests that fit beside them."""
    memory: float
    """Seconds of reading."""
    compute: float
    """Seconds of products and attention, as if nothing had to be read."""
    network: float
    """Seconds of all-to-all."""

    @property
    def bound(self) -> str:
        """What takes longest."""
        return max(("memory", "compute", "network"), key=lambda name: getattr(self, name))

    @property
    def roof(self) -> float:
        """Tokens per second and device when the three hide one another."""
        return self.batch / max(self.memory, self.compute, self.network)

    @property
    def floor(self) -> float:
        """Tokens per second and device when they follow one another."""
        return self.batch / (self.memory + self.compute + self.network)


def unit_weights(config: ModelConfig, unit: Unit, fp8: bool = True) -> float:
    """Bytes of weights on a device: its experts, and all else whole; FP8 but for embedding, head and gates."""
    p = count_parameters(config)
    linear = 1 + 4 / 128**2 if fp8 else 2.0
    layers = range(config.num_hidden_layers)
    moe = sum(config.is_moe_layer(i) for i in layers)
    routed = moe * config.n_routed_experts * expert(config)
    gates = moe * config.n_routed_experts * config.hidden_size
    shared = p.main - routed - 2 * p.vocabulary - gates
    mine = moe * unit.experts_per_device(config) * expert(config)
    return linear * (shared + mine) + 2 * (2 * p.vocabulary + gates)


def decode(
    config: ModelConfig,
    unit: Unit,
    device: Device,
    rates: Rates,
    *,
    context: int,
    batch: float | None = None,
    fp8_cache: bool = False,
) -> Decode:
    """A step of `batch` requests on each device with `context` tokens in the cache; None: as many as fit."""
    _check(config, unit)
    fp8 = device.fp8 > 0
    weights = unit_weights(config, unit, fp8)
    room = (1 - RESERVE) * device.memory - weights
    request = context * cache_bytes(config, fp8_cache)
    most = max(0.0, room / request)
    if batch is None:
        batch = max(1.0, float(int(most)))
    read = weights - 2 * config.vocab_size * config.hidden_size + batch * request  # no embedding
    return Decode(
        unit=unit,
        batch=batch,
        context=context,
        weights=weights,
        most=most,
        memory=read / rates.bandwidth(device),
        compute=_decode_products(config, device, rates, batch, context, fp8),
        network=_decode_network(config, unit, device, rates, batch, fp8),
    )


def _check(config: ModelConfig, unit: Unit) -> None:
    if not has_experts(config):
        raise PlanError("the model has no experts to divide over a serving unit; plan a MoE model")
    if unit.experts_per_device(config) < 1:
        raise PlanError(
            f"{unit.name}: {unit.devices} devices are more than the {config.n_routed_experts} experts and "
            f"{unit.redundant} redundant ones; take a smaller unit"
        )


def _decode_products(
    config: ModelConfig, device: Device, rates: Rates, batch: float, context: int, fp8: bool
) -> float:
    """Operations of a step at the rates of large products; what reading adds is in `memory`."""
    dtype = "fp8" if fp8 else device.compute
    layers = range(config.num_hidden_layers)
    active = sum(
        attention_matrices(config)
        + feed_forward(config, i)
        - (
            (config.n_routed_experts - config.num_experts_per_tok) * expert(config)
            if config.is_moe_layer(i)
            else 0
        )
        for i in layers
    )
    linear = batch * 2 * active / rates.product(device, dtype)
    head = batch * head_flops(config) / rates.product(device, device.compute)
    # MLA in the latent space: scores over C + R numbers a head, sums over C
    per_key = 2 * config.num_attention_heads * (2 * config.kv_lora_rank + config.qk_rope_head_dim)
    peak = device.peak(device.compute)
    attention = batch * context * per_key * len(layers) / (rates.decode_attention * peak)
    return linear + head + attention


def _decode_network(
    config: ModelConfig, unit: Unit, device: Device, rates: Rates, batch: float, fp8: bool
) -> float:
    """Straight to every expert's device (§3.4.2: point to point), dispatch FP8 and combine BF16."""
    if unit.devices == 1:
        return 0.0
    targets = expected_distinct(
        unit.devices, config.n_routed_experts / unit.devices, config.num_experts_per_tok
    )
    inside = unit.devices <= device.per_node
    own = min(device.per_node, unit.devices) / unit.devices
    number = (1 + SCALE if fp8 else BYTES[device.compute]) + BYTES[device.compute]
    size = batch * targets * config.hidden_size * number
    moe = sum(config.is_moe_layer(i) for i in range(config.num_hidden_layers))
    if inside:
        return moe * size / (rates.intra * device.intra_bandwidth)
    return moe * (1 - own) * size / (rates.inter * device.inter_bandwidth)


@dataclass(frozen=True)
class Prefill:
    """Tokens of prompts on one device. Seconds per token."""

    unit: Unit
    compute: float
    network: float

    @property
    def roof(self) -> float:
        """Tokens per second and device when computation and all-to-all of two micro-batches hide one another."""
        return 1 / max(self.compute, self.network)

    @property
    def floor(self) -> float:
        """Tokens per second and device when they follow one another."""
        return 1 / (self.compute + self.network)

    @property
    def bound(self) -> str:
        """What takes longer."""
        return "compute" if self.compute > self.network else "network"


def prefill(
    config: ModelConfig, unit: Unit, device: Device, rates: Rates, *, prompt: int
) -> Prefill:
    """Prompts of `prompt` tokens, 16K tokens at a time on a device (as in the published profile)."""
    from fathom.planning.block_time import Setting, block_time
    from fathom.planning.layout import PlannedLayout

    _check(config, unit)
    together = max(1, 16_384 // prompt)
    layout = PlannedLayout(
        dp=unit.devices, ep=unit.devices, micro_batch=together, fp8=device.fp8 > 0, overlap=False
    )
    setting = Setting(config, layout, device, rates, prompt)
    layers = [block_time(setting, i) for i in range(config.num_hidden_layers)]
    compute = sum(block.work.forward for block in layers) / setting.tokens
    network = sum(block.transfer for block in layers) / setting.tokens
    # only a prompt's last token goes through the head
    head = product_seconds(
        rates, device, device.compute, together, config.vocab_size, config.hidden_size
    )
    return Prefill(unit, compute + head / setting.tokens, network)
