"""Full sharding on paper: what a rank keeps whole for a while, and what it sends (`fathom.parallel.full`).

N ranks hold the same weights: dp what is dense, dp / ep an expert. Of weights, gradients and moments a rank keeps 1/N.
Besides there are for a while

- embedding, head, last norm and MTP's loose parts, for a whole pass;
- the weights of two blocks, the one that computes and the one that comes, and the gradients of one.

For every micro-batch a block's weights are gathered for the forward and again for the backward pass, and its gradients
are reduced: 3 (N - 1)/N of its parameters; what stays for a pass is gathered once. Dense weights travel in float32,
experts in the dtype of their products, gradients in float32. Gathering runs beside the computation of the block before,
so only what is longer than the computation shows, and one block's share in any case.
"""

from __future__ import annotations

from dataclasses import dataclass

from fathom.model import ModelConfig
from fathom.planning.cluster import Device
from fathom.planning.layout import PlannedLayout
from fathom.planning.parameters import block_parameters, outside_blocks
from fathom.planning.rates import BYTES


@dataclass(frozen=True)
class Units:
    """Parameters on one rank of what is gathered at a time, before it is sharded."""

    ends: float
    """What stays for a whole pass."""
    dense: tuple[float, ...]
    """Each block's, without routed experts."""
    experts: tuple[float, ...]
    """Each block's routed experts."""


def units(config: ModelConfig, layout: PlannedLayout, mtp: bool = True) -> Units:
    """Of a model on one stage."""
    last = config.num_hidden_layers
    every = range(last + (config.num_nextn_predict_layers if mtp else 0))
    blocks = [block_parameters(config, layer) for layer in every]
    dense = tuple(float(shared) for shared, _ in blocks)
    experts = tuple(routed / layout.ep for _, routed in blocks)
    return Units(float(outside_blocks(config, mtp)), dense, experts)


def at_a_time(
    config: ModelConfig, layout: PlannedLayout, device: Device, mtp: bool = True
) -> tuple[float, float]:
    """Bytes of gathered weights, and of gradients that are whole, at most."""
    unit = units(config, layout, mtp)
    number = _gathered_bytes(device)
    gathered = layout.dp > layout.ep  # else nobody else holds this rank's experts
    experts = unit.experts if gathered else (0.0,) * len(unit.experts)
    blocks = list(zip(unit.dense, experts, strict=True))
    weights = sorted(4 * dense + number * routed for dense, routed in blocks)
    gradients = max(4 * (dense + routed) for dense, routed in blocks)
    return 4 * unit.ends + sum(weights[-2:]), 4 * unit.ends + gradients


def sent_bytes(
    config: ModelConfig,
    layout: PlannedLayout,
    device: Device,
    micro_batches: float,
    mtp: bool = True,
) -> tuple[float, float]:
    """(gradient bytes, weight bytes) that a rank sends in a step."""
    unit = units(config, layout, mtp)
    of_dense = (layout.dp - 1) / layout.dp
    holders = layout.dp / layout.ep
    of_experts = (holders - 1) / holders
    dense, experts = sum(unit.dense), sum(unit.experts)
    gradients = 4 * ((dense + unit.ends) * of_dense + experts * of_experts)
    weights = 4 * (2 * dense + unit.ends) * of_dense
    weights += 2 * _gathered_bytes(device) * experts * of_experts
    return micro_batches * gradients, micro_batches * weights


def exposed_seconds(
    config: ModelConfig, seconds: float, compute: float, micro_batches: float, mtp: bool = True
) -> float:
    """What shows of so many seconds of gathering and reducing beside so many of computation, in a step."""
    blocks = config.num_hidden_layers + (config.num_nextn_predict_layers if mtp else 0)
    return max(seconds / (micro_batches * blocks), seconds - compute)


def _gathered_bytes(device: Device) -> int:
    """Of an expert's number on its way."""
    return BYTES[device.compute]
