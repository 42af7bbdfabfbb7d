"""Experts placed by load, the busiest ones more than once (report §3.4; the policy of DeepSeek's EPLB).

All devices wait for the one with the most tokens. There are therefore more *slots* for experts (`num_replicas`,
equally many on each device) than experts, and two questions: how many slots does each expert get, and which device
has which?

- *How many*: every slot beyond one for each expert goes to the expert whose load per replica is the largest at that
  moment. No way of handing out the slots leaves a smaller maximum per replica.
- *Which device*: `pack` puts the heaviest first, each on the lightest device that still has a place.

*Hierarchical*, where the groups of the node-limited router divide evenly among the nodes: groups are packed onto
nodes first, so that a group stays on one node and a token crosses to no more nodes than it has groups; then replicas
are made and packed inside each node. Otherwise *global*: groups and nodes are ignored. The report's units for
prefilling are of the first kind; decoding, one expert or two on a device, is of the second.

How good is the packing? **No device ends with more than the load of the lightest one plus the largest single load
l.** For two devices A and B with n_A and n_B loads in them, and s the load handed out last, look at Φ = A - B + (n_B
- n_A)·s. It never exceeds l: while B has room, A is given a load only when it is no heavier than B, so that A - B <=
l; and that covers n_B < n_A. With n_B >= n_A, a load x <= s leaves A - B + (n_B - n_A)·x whichever of the two it
goes to, no more than before. At the end n_A = n_B, and Φ is A - B. So the heaviest is below the mean plus l, and no
placement at all is below the mean: what can be gained beyond this is less than one slot's load.

Axes: L layers, E experts, S slots, R the most replicas of one expert; I items to be packed · G devices (GPUs).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fathom.errors import ParallelError


def rebalance_experts(
    weight: Tensor, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Which expert each slot holds, for every layer by itself.

    `weight` [L, E] is the load of each expert (tokens, or an average of them), `num_replicas` the number of slots.
    Slot s lies on device s // (num_replicas / num_gpus); devices of a node are neighbours. Returns int64 on the CPU:

    - `phy2log` [L, S], the expert in each slot,
    - `log2phy` [L, E, R], the slots of each expert, filled up with -1,
    - `logcnt` [L, E], the number of slots of each expert.

    Raises `ParallelError` for loads that are none, and for numbers that do not divide.

    >>> rebalance_experts(torch.tensor([[9, 1, 4]]), 4, 1, 1, 2)[0]
    tensor([[0, 2, 0, 1]])
    """
    _check(weight, num_replicas, num_nodes, num_gpus)
    load_LE = weight.detach().float().cpu()
    experts = load_LE.shape[1]
    if num_groups < 1 or experts % num_groups:
        raise ParallelError(
            f"num_groups = {num_groups} with {experts} experts: groups are of equal size; take a divisor"
        )
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    order_LE = _experts_by_node(load_LE, num_groups, num_nodes)
    by_node = load_LE.gather(1, order_LE).view(
        -1, experts // num_nodes
    )  # row: one node of one layer
    expert, replica, count = _replicate(by_node, num_replicas // num_nodes)
    order = _pack((by_node / count).gather(1, expert), num_gpus // num_nodes)
    expert, replica = expert.gather(1, order), replica.gather(1, order)
    offset = torch.arange(num_nodes).repeat(len(load_LE)).mul(experts // num_nodes)
    phy2log = order_LE.gather(1, (expert + offset[:, None]).view(-1, num_replicas))
    logcnt = torch.zeros_like(order_LE).scatter_(1, order_LE, count.view_as(order_LE))
    return phy2log, _slots_of(phy2log, replica.view_as(phy2log), logcnt), logcnt


def loads_by_gpu(weight: Tensor, phy2log: Tensor, num_gpus: int) -> Tensor:
    """Load of each device [L, G]: every expert's load, shared equally by its slots.

    Without replicas, `phy2log` is a permutation; `torch.arange(E).expand(L, E)` is the placement that is not balanced.
    """
    slots = phy2log.shape[1]
    if phy2log.shape[0] != weight.shape[0] or slots % num_gpus:
        raise ParallelError(
            f"{slots} slots of {phy2log.shape[0]} layers with loads of {weight.shape[0]} layers on {num_gpus} devices: "
            "layers must be equally many, and the number of devices divide the slots"
        )
    weight = weight.double().cpu()
    count = torch.zeros_like(weight).scatter_add_(1, phy2log, torch.ones_like(phy2log).double())
    return (weight / count).gather(1, phy2log).view(len(weight), num_gpus, -1).sum(2)


def _check(weight: Tensor, num_replicas: int, num_nodes: int, num_gpus: int) -> None:
    if weight.ndim != 2 or not weight.numel():
        raise ParallelError(f"loads of shape {list(weight.shape)}: they are [layers, experts]")
    if not bool(((weight >= 0) & (weight.float() < float("inf"))).all()):
        raise ParallelError("a load is negative, infinite or no number; count tokens")
    if num_replicas < weight.shape[1]:
        raise ParallelError(
            f"num_replicas = {num_replicas} slots for {weight.shape[1]} experts; each needs one at least"
        )
    if num_nodes < 1 or num_gpus < 1 or num_gpus % num_nodes or num_replicas % num_gpus:
        raise ParallelError(
            f"{num_replicas} slots on {num_gpus} devices of {num_nodes} nodes: nodes must divide the devices, "
            "and devices the slots; change one of them"
        )


def _experts_by_node(load_LE: Tensor, groups: int, nodes: int) -> Tensor:
    """The experts of the first node, then those of the second, and so on [L, E]: groups packed onto nodes."""
    size = load_LE.shape[1] // groups
    group = _pack(load_LE.view(-1, groups, size).sum(2), nodes)
    return (group[:, :, None] * size + torch.arange(size)).flatten(1)


def _replicate(load: Tensor, slots: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hand out slots [rows, experts] -> expert and number of the replica in each slot, and replicas per expert."""
    rows, experts = load.shape
    expert = torch.arange(experts).expand(rows, experts).clone()
    replica, count = torch.zeros_like(expert), torch.ones_like(expert)
    for _ in range(slots - experts):
        busiest = (load / count).argmax(1, keepdim=True)
        expert = torch.cat([expert, busiest], 1)
        replica = torch.cat([replica, count.gather(1, busiest)], 1)
        count.scatter_add_(1, busiest, torch.ones_like(busiest))
    return expert, replica, count


def _pack(load_I: Tensor, packs: int) -> Tensor:
    """Items in the order of their packs [rows, items]: equally many in each, the heaviest packed first.

    Where a pack has a single place there is nothing to choose, and the items stay where they are.
    """
    rows, items = load_I.shape
    places = items // packs
    if places == 1:
        return torch.arange(items).expand(rows, items)
    # not a stable sort on purpose: equal loads fall as torch's plain sort leaves them, as in the released policy
    heaviest = load_I.argsort(dim=1, descending=True)
    total, held = torch.zeros(rows, packs), torch.zeros(rows, packs, dtype=torch.long)
    result = torch.empty_like(heaviest)
    for item in heaviest.split(1, 1):
        pack = total.masked_fill(held == places, float("inf")).argmin(1, keepdim=True)
        result.scatter_(1, pack * places + held.gather(1, pack), item)
        total.scatter_add_(1, pack, load_I.gather(1, item))
        held.scatter_add_(1, pack, torch.ones_like(pack))
    return result


def _slots_of(phy2log: Tensor, replica: Tensor, logcnt: Tensor) -> Tensor:
    """The inverse of `phy2log` [L, E, R]: each expert's slots, in the order in which they were handed out."""
    most = int(logcnt.max())
    layers, slots = phy2log.shape
    flat = torch.full((layers, logcnt.shape[1] * most), -1)
    slot = torch.arange(slots).expand(layers, slots)
    return flat.scatter_(1, phy2log * most + replica, slot).view(layers, -1, most)
