"""What of a model this rank updates, and how that is called by somebody with another layout.

A *piece* is a run of one parameter's numbers. Without ZeRO-1 it is the whole parameter; with it, the
part of it that falls to this rank. Expert parallelism has already cut the parameter to this rank's
experts, consecutive ones along the first axis, and full sharding to this rank's rows. All cuts are
runs of the flattened whole, so a piece is named by the parameter's name, its shape in one process, and
where in that, flattened, it begins:
the same words in every layout.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fathom.errors import CheckpointError
from fathom.model import Transformer
from fathom.parallel.experts import sharded_names
from fathom.parallel.mesh import Group, Mesh
from fathom.parallel.pipeline.plan import Plan


@dataclass(frozen=True, eq=False)
class Named:
    """A parameter of this rank's model."""

    name: str
    parameter: nn.Parameter
    copies: Group
    """The ranks that hold the same numbers."""
    shape: torch.Size
    """In one process."""
    offset: int
    """Where this rank's numbers begin in the flattened parameter of one process."""


@dataclass(frozen=True, eq=False)
class Piece:
    """What this rank updates of a parameter."""

    of: Named
    part: nn.Parameter
    """The parameter itself, or one axis of its numbers in the same memory."""
    start: int = 0
    """Where the part begins in the flattened parameter of this rank."""

    @property
    def place(self) -> slice:
        """In the flattened parameter of one process."""
        begin = self.of.offset + self.start
        return slice(begin, begin + self.part.numel())


@dataclass(frozen=True, eq=False)
class Shard:
    """A run of one tensor's numbers, live: reading a checkpoint into it changes the training."""

    name: str
    tensor: Tensor
    shape: torch.Size
    """Of the whole tensor, in one process."""
    offset: int
    """Where the run begins in the flattened whole."""
    first: bool
    """Whether this is the rank that writes it, where several hold the same."""


def here(tensor: Tensor) -> Tensor:
    """What lies on this rank of a tensor of the model, in the same memory; all of it but with full sharding."""
    to_local = getattr(tensor, "to_local", None)  # FSDP's tensors have it
    return to_local() if to_local else tensor


def rows_of(place: int, rows: int, ranks: int) -> range:
    """Which of some rows a rank has with full sharding: equal parts, but that the last ranks may have fewer or none."""
    each = -(-rows // ranks)
    return range(min(place * each, rows), min((place + 1) * each, rows))


def named(model: Transformer, mesh: Mesh, plan: Plan | None = None) -> list[Named]:
    """All parameters of a model whose experts are sharded over the mesh, and its layers as the plan says.

    All ranks together.
    """
    sharded, found = sharded_names(model), []
    holders = plan.holders if plan else lambda name: ()
    shared = plan.shared if plan else set()
    dense, experts = mesh.across_stages(shared), mesh.experts_across_stages(shared)
    for name, parameter in model.named_parameters():
        whole, offset, copies = parameter.shape, 0, dense.get(holders(name), mesh.dp)
        if name in sharded:
            whole = torch.Size((whole[0] * mesh.ep.size, *whole[1:]))
            offset = mesh.ep.place * parameter.numel()
            copies = experts.get(holders(name), mesh.replicas)
        found.append(Named(name, parameter, copies, whole, offset))
    return found


def optimizer_shards(
    pieces: Iterable[Piece], optimizer: torch.optim.Optimizer, alone: bool
) -> Iterator[Shard]:
    """AdamW's state of the pieces, as `exp_avg.NAME`, `exp_avg_sq.NAME` and `step.NAME`, zeros where there is none.

    `alone`: whether nobody else holds the same pieces (ZeRO-1); else the first rank that does is the one to write.
    """
    for piece in pieces:
        state, part, first = optimizer.state[piece.part], piece.part, True
        if not alone:
            first = piece.of.copies.place == 0
        for key in ("exp_avg", "exp_avg_sq"):
            if key not in state:
                state[key] = torch.zeros_like(part)
            yield Shard(
                f"{key}.{piece.of.name}",
                state[key].view(-1),
                piece.of.shape,
                piece.place.start,
                first,
            )
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=part.device)
        beginning = first and piece.place.start == 0
        yield Shard(f"step.{piece.of.name}", state["step"].view(1), torch.Size(), 0, beginning)


def weight_shards(pieces: Iterable[Piece], alone: bool) -> Iterator[Shard]:
    """The masters of the pieces by the parameters' names."""
    for piece in pieces:
        first = alone or piece.of.copies.place == 0
        flat = piece.part.detach().view(-1)
        yield Shard(piece.of.name, flat, piece.of.shape, piece.place.start, first)


def model_shards(
    tensors: Mapping[str, Tensor],
    parameters: Iterable[Named],
    mesh: Mesh,
    plan: Plan | None = None,
) -> Iterator[Shard]:
    """Tensors that this rank keeps by names of its model's and in their shapes: buffers, the average of the weights."""
    known = {one.name: one for one in parameters}
    for name, tensor in tensors.items():
        one, flat = known.get(name), tensor.detach().view(-1)
        if one:
            yield Shard(name, flat, one.shape, one.offset, one.copies.place == 0)
        else:  # two ranks of a pipeline may hold its layer (DualPipe)
            stage = plan.holders(name)[0] if plan else 0
            first = mesh.dp.place == 0 and mesh.pp.place == stage
            yield Shard(name, flat, tensor.shape, 0, first)


@torch.no_grad()
def fill(shards: Iterable[Shard], whole: Mapping[str, Tensor]) -> None:
    """Copy into each shard its run of the whole tensors. Raises `CheckpointError` where one is missing or misshapen."""
    for shard in shards:
        tensor = whole.get(shard.name)
        if tensor is None or tensor.shape != shard.shape:
            there = "missing" if tensor is None else f"of shape {tuple(tensor.shape)}"
            raise CheckpointError(
                f"{shard.name} is {there}, this model wants {tuple(shard.shape)}; it was written by another model"
            )
        run = tensor.flatten()[shard.offset : shard.offset + shard.tensor.numel()]
        shard.tensor.copy_(run)
