"""Bytes between devices: all-to-all, pipeline, ZeRO (report §3.2.2, §3.2.3, §3.3.3).

A token goes to its experts in two hops: once over the network to every node that has one of them, then inside the node
to every device that has one. Node-limited routing (§2.1.2) keeps the nodes at M. Choices are taken as uniform: each
token draws K of the experts of M groups without replacement, so some of the M nodes may get none.

The report's arithmetic of §3.2.2 follows: a link inside the node is 160 / 50 = 3.2 times as fast as one between nodes,
so 3.2 experts per node cost no more than one, and with M = 4 nodes up to 13 experts the same as 8.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

from fathom.model import ModelConfig
from fathom.planning.cluster import Device
from fathom.planning.rates import BYTES, SCALE, Rates


def free_experts_per_node(device: Device) -> float:
    """Experts of a node that a token can be sent to in the time of its one transfer between nodes (§3.2.2).

    >>> from fathom.planning.cluster import DEVICES
    >>> free_experts_per_node(DEVICES["h800"])
    3.2
    """
    return device.intra_bandwidth / device.inter_bandwidth


def experts_at_the_same_cost(device: Device, nodes: int) -> float:
    """Experts of a token on so many nodes for the price of one on each; 12.8, the report's "13", for four of H800s."""
    return free_experts_per_node(device) * nodes


def expected_distinct(pools: float, pool_size: float, drawn: int) -> float:
    """Pools that a draw of `drawn` out of pools x pool_size without replacement touches, on average.

    >>> round(expected_distinct(4, 32, 8), 2)
    3.63
    """
    total = round(pools * pool_size)
    if total <= drawn:
        return pools
    return pools * (1 - comb(max(total - round(pool_size), 0), drawn) / comb(total, drawn))


@dataclass(frozen=True)
class Copies:
    """How often one token travels in one dispatch, on average; a combine is the same way back."""

    nodes: float
    """Nodes it is sent to, its own counted."""
    inter: float
    """Copies over the network."""
    intra: float
    """Copies inside nodes."""


def copies(config: ModelConfig, device: Device, ep: int) -> Copies:
    """Copies of a token for experts spread over `ep` ranks, as many as fit to a node."""
    if ep == 1:
        return Copies(1, 0, 0)
    per_node = min(ep, device.per_node)
    nodes = max(1.0, ep / device.per_node)
    groups, kept = config.n_group, config.topk_group
    if config.topk_method == "greedy":
        groups, kept = 1, 1
    reach = min(nodes, max(1.0, kept * nodes / groups)) if nodes > groups else min(nodes, kept)
    if groups == 1:
        reach = nodes
    reachable = config.n_routed_experts * kept / groups
    K = config.num_experts_per_tok
    sent = expected_distinct(reach, reachable / reach, K)
    # kept groups of one node may hide in a part of it; then only that part's devices can be reached
    ranks = min(reach * per_node, ep * kept / groups) if nodes <= 1 else reach * per_node
    arrived = expected_distinct(ranks, reachable / ranks, K)
    return Copies(sent, sent * (1 - 1 / nodes), arrived * (1 - 1 / per_node))


@dataclass(frozen=True)
class AllToAll:
    """One direction of one MoE layer, for one token."""

    inter_bytes: float
    intra_bytes: float

    def seconds(self, rates: Rates, device: Device) -> float:
        """Both hops run at a time (§3.2.2), so the slower counts."""
        between = self.inter_bytes / (rates.inter * device.inter_bandwidth)
        inside = self.intra_bytes / (rates.intra * device.intra_bandwidth)
        return max(between, inside)


def dispatch(config: ModelConfig, device: Device, ep: int, fp8: bool) -> AllToAll:
    """Hidden states to the experts; FP8 with a scale for every 128 numbers (§3.3.3). Also: gradients to them."""
    return _all_to_all(config, device, ep, 1 + SCALE if fp8 else BYTES[device.compute])


def combine(config: ModelConfig, device: Device, ep: int) -> AllToAll:
    """Results back; BF16 always (§3.3.3)."""
    return _all_to_all(config, device, ep, BYTES[device.compute])


def _all_to_all(config: ModelConfig, device: Device, ep: int, number: float) -> AllToAll:
    way, size = copies(config, device, ep), config.hidden_size * number
    return AllToAll(way.inter * size, way.intra * size)


def pipeline_bytes(config: ModelConfig, device: Device, tokens: float) -> float:
    """Of one micro-batch across one border of stages, one way; backward sends as much back."""
    return tokens * config.hidden_size * BYTES[device.compute]


def reduce_bytes(parameters: float, ranks: float, zero1: bool) -> tuple[float, float]:
    """(gradient bytes, weight bytes) that a rank sends at the end of a step, by a ring over `ranks`.

    ZeRO-1: reduce-scatter of FP32 gradients and all-gather of BF16 weights; without it an all-reduce of gradients.
    FP32 on the wire is our choice: the report accumulates gradients in FP32 and does not say how it sends them.
    """
    share = (ranks - 1) / ranks
    if zero1:
        return 4 * parameters * share, 2 * parameters * share
    return 2 * 4 * parameters * share, 0.0
