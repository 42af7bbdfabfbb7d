"""Who speaks with whom: the process groups of a layout, seen from one rank.

Every rank makes all groups in the same order, as `torch.distributed` wants it; a group that two
axes have in common is made once, and a group of one rank is none and costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fathom.errors import ParallelError
from fathom.parallel.layout import Layout
from fathom.parallel.waiting import waiting


def collective(new: str, old: str) -> Callable[..., Any]:
    """torch 2.13 has new names for some and warns of the old ones, which are all that 2.11 has."""
    return getattr(dist, new, None) or getattr(dist, old)


@dataclass(frozen=True)
class Group:
    """Ranks that speak with each other."""

    ranks: tuple[int, ...]
    """In the order of the group."""
    place: int
    """Which of them this rank is."""
    handle: dist.ProcessGroup | None = None
    """None for a group of one."""

    @property
    def size(self) -> int:
        """How many ranks."""
        return len(self.ranks)

    def sum(self, tensor: Tensor) -> Tensor:
        """The tensor, with the sum over all ranks in it; no gradient."""
        if self.handle is not None:
            with waiting():
                dist.all_reduce(tensor, group=self.handle)
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """Tensors of one shape from all ranks, joined along the first axis; no gradient."""
        if self.handle is None:
            return tensor
        out = tensor.new_empty(self.size * tensor.shape[0], *tensor.shape[1:])
        gather = collective("all_gather_single", "all_gather_into_tensor")
        with waiting():
            gather(out, tensor.contiguous(), group=self.handle)
        return out

    def scatter_sum(self, tensor: Tensor) -> Tensor:
        """This rank's equal part of the sum over all ranks, along the first axis; no gradient."""
        if self.handle is None:
            return tensor
        out = tensor.new_empty(tensor.shape[0] // self.size, *tensor.shape[1:])
        scatter = collective("reduce_scatter_single", "reduce_scatter_tensor")
        with waiting():
            scatter(out, tensor.contiguous(), group=self.handle)
        return out


class Mesh:
    """A rank's place in the layout, and its groups.

    world: everyone; pp: the stages of one pipeline; dp: the ranks of one stage; ep: those that its
    experts are spread over; replicas: those that hold the same experts; node: those of ep on this
    node; across: those of ep with this one's index on each node.
    """

    def __init__(self, layout: Layout) -> None:
        """Collective: all ranks of an initialised `torch.distributed` build the same layout.

        Raises `ParallelError` when there are not as many processes as the layout needs.
        """
        there = dist.get_world_size() if dist.is_initialized() else 1
        if there != layout.world:
            raise ParallelError(
                f"pp = {layout.pp} times dp = {layout.dp} needs {layout.world} processes, but there are {there}; start "
                f"as many with torchrun --nproc-per-node, or change the layout"
            )
        self.layout = layout
        self.rank = dist.get_rank() if there > 1 else 0
        self._made: dict[Any, list[dist.ProcessGroup | None]] = {}
        self._beside: dict[str, Group] = {}
        device = layout.ep // layout.nodes
        shape = (layout.pp, layout.replicas, layout.nodes, device)
        self._ranks = torch.arange(layout.world).view(shape)
        self.world = self._group(0, 1, 2, 3)
        self.dp, self.pp = self._group(1, 2, 3), self._group(0)
        self.ep, self.replicas = self._group(2, 3), self._group(1)
        self.node, self.across = self._group(3), self._group(2)

    @classmethod
    def alone(cls) -> Mesh:
        """One process and nobody else, whether or not others are there."""
        mesh = cls.__new__(cls)
        mesh.layout, mesh.rank, mesh._beside = Layout(), 0, {}
        one = Group((0,), 0)
        mesh.world = mesh.dp = mesh.pp = mesh.ep = mesh.replicas = mesh.node = mesh.across = one
        return mesh

    def beside(self, use: str) -> Group:
        """Everyone again, over gloo and so from CPU memory: a group of its own for each use.

        What goes on behind the training speaks through such a one, so that no message meets one of another thread.
        Collective when a use is first asked for.
        """
        if use not in self._beside:
            world = self.world
            alone = world.handle is None
            handle = None if alone else dist.new_group(backend="gloo")
            self._beside[use] = Group(world.ranks, world.place, handle)
        return self._beside[use]

    def across_stages(self, places: Collection[tuple[int, ...]]) -> dict[tuple[int, ...], Group]:
        """For sets of stages' ranks that hold the same parameters: who they are, over dp; those sets that this is in.

        Collective: all ranks ask for the same sets.
        """
        found = {}
        for stages in sorted(places):
            ranks = self._ranks[list(stages)].flatten().sort().values.tolist()
            handle = self._handles([ranks])[0]
            if self.rank in ranks:
                found[stages] = Group(tuple(ranks), ranks.index(self.rank), handle)
        return found

    def experts_across_stages(
        self, places: Collection[tuple[int, ...]]
    ) -> dict[tuple[int, ...], Group]:
        """The same of those ranks that hold the same experts too."""
        found = {}
        for stages in sorted(places):
            by_shard = self._ranks[list(stages)].flatten(0, 1).flatten(1).T.sort(1).values.tolist()
            for ranks, handle in zip(by_shard, self._handles(by_shard), strict=True):
                if self.rank in ranks:
                    found[stages] = Group(tuple(ranks), ranks.index(self.rank), handle)
        return found

    def _group(self, *axes: int) -> Group:
        """The group of this rank along some axes of (pp, replica, node, device)."""
        rest = [axis for axis in range(4) if axis not in axes]
        size = torch.tensor([self._ranks.shape[axis] for axis in axes]).prod().item()
        groups = self._ranks.permute(*rest, *axes).reshape(-1, int(size)).tolist()
        mine = next(i for i, ranks in enumerate(groups) if self.rank in ranks)
        ranks = tuple(groups[mine])
        return Group(ranks, ranks.index(self.rank), self._handles(groups)[mine])

    def _handles(self, groups: list[list[int]]) -> list[dist.ProcessGroup | None]:
        key = tuple(map(tuple, groups))
        if key not in self._made:
            self._made[key] = [self._handle(ranks) for ranks in groups]
        return self._made[key]

    def _handle(self, ranks: list[int]) -> dist.ProcessGroup | None:
        if len(ranks) == 1:
            return None
        if len(ranks) == self.layout.world:
            return dist.group.WORLD
        return dist.new_group(ranks)  # None-like for those outside
