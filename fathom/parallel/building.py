"""A rank's part of a model without the whole: no device has the memory for 671 billion weights, if only for a moment.

The model begins as an outline on the `meta` device (`fathom.model.initial`). Layers and experts of other ranks are
taken out of it as they are out of a real one. What is left gets *stand-ins* on the device, parameters of the right
shape whose numbers all lie in one and the same place; so buckets can be laid out before there is anything to
put into them. Last, initial numbers are drawn to where they stay. Never more is needed than the rank's part and
the piece that is being drawn.

The numbers are those of one process. They are drawn on the CPU, whatever the device.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fathom.model import ModelConfig, Transformer
from fathom.model.initial import Run, draw_runs, outline
from fathom.parallel.experts import sharded_names
from fathom.parallel.layout import Layout
from fathom.parallel.pieces import Named, rows_of
from fathom.parallel.pipeline import Plan


def stand_in(model: Transformer, device: torch.device) -> None:
    """Put parameters that have no memory yet on the device, and buffers, which begin at zero, as they are.

    What two modules share they share afterwards.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None:
                if old not in made:
                    made[old] = nn.Parameter(_stand_in(old, device), old.requires_grad)
                module._parameters[name] = made[old]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.zeros_like(buffer, device=device)


def _stand_in(old: Tensor, device: torch.device) -> Tensor:
    if old.numel() == 1:  # contiguous whatever its strides: taken for a real one, so it is one
        return torch.zeros(old.shape, dtype=old.dtype, device=device)
    return torch.zeros((), dtype=old.dtype, device=device).expand(old.shape)


def give_memory(parameters: Iterable[nn.Parameter]) -> None:
    """Each stand-in among the parameters gets a place for its numbers."""
    for one in parameters:
        if not one.is_contiguous():
            one.data = torch.empty_like(one, memory_format=torch.contiguous_format)


def draw_initial(model: Transformer, parameters: Iterable[Named]) -> None:
    """Initial numbers from torch's CPU generator, also for what no bucket has given memory to."""
    parameters = list(parameters)
    give_memory(one.parameter for one in parameters)
    runs = {one.name: Run(one.parameter.detach(), one.offset) for one in parameters}
    draw_runs(model.config, runs)


@dataclass(frozen=True)
class Holding:
    """Numbers of parameters on one rank."""

    weights: int
    """Its part of the model; gradients are as many."""
    updated: int
    """Those that it keeps moments of."""


def holdings(
    config: ModelConfig,
    layout: Layout,
    plan: Plan | None = None,
    zero1: bool = True,
    full_shard: bool = False,
    place: int = 0,
) -> list[Holding]:
    """What the ranks of a pipeline hold, from the embedding on; without one, what every rank holds.

    `place`: along dp, where rows are cut by full sharding; no later rank has more than the first.
    """
    model = outline(config)
    sharded, found = sharded_names(model), [[0, 0] for _ in range(layout.pp)]
    for name, parameter in model.named_parameters():
        holders = plan.holders(name) if plan else (0,)
        numbers, copies, mine = parameter.numel(), len(holders) * layout.dp, place
        if name in sharded:
            numbers, copies = numbers // layout.ep, copies // layout.ep
            mine = place // layout.ep
        if full_shard:
            inner = parameter.shape[1:].numel()
            numbers = updated = len(rows_of(mine, numbers // inner, copies)) * inner
        else:
            updated = -(-numbers // copies) if zero1 else numbers
        for rank in holders:
            found[rank][0] += numbers
            found[rank][1] += updated
    return [Holding(*numbers) for numbers in found]
