"""A model in training on a mesh: what has to be the same whichever way it is laid out (report §3.2).

The loop reads a rank's rows of the batch and computes gradients weighted by their share of the *whole* batch,
so that sums over ranks are the whole batch's means. Here those sums are made: gradients over the
ranks that hold the same parameter (all of dp, but for experts the dp / ep that hold the same ones;
what an expert's tokens of other ranks have to say has come back with the all-to-all), losses and
expert loads over everyone, squares of the gradient norm over everyone and each number once. The router
biases move by the summed loads, the guard judges by summed numbers: every rank decides alike. What
is not a number on one rank is none in the sums, so that all of them skip or stop together.

With full sharding (`fathom.parallel.full`) gradients are summed during the backward pass, and a rank's parameters are
its own rows of them.

Alone, nothing of this costs anything or changes a bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fathom.model import Losses, Transformer
from fathom.model.block import Block
from fathom.model.moe import MoE
from fathom.parallel.building import draw_initial, stand_in
from fathom.parallel.experts import shard_experts
from fathom.parallel.mesh import Mesh
from fathom.parallel.pieces import (
    Named,
    Piece,
    Shard,
    here,
    model_shards,
    named,
    optimizer_shards,
    weight_shards,
)
from fathom.parallel.pipeline import Pipeline, Plan
from fathom.parallel.pipeline.stages import load_rows
from fathom.parallel.zero import BUCKET_BYTES, Bucket, grouped

if TYPE_CHECKING:
    from fathom.parallel.full import FullShard


class Parallel:
    """One model's life in a mesh; by default of one process."""

    def __init__(
        self,
        model: Transformer,
        mesh: Mesh | None = None,
        zero1: bool = True,
        bucket_bytes: int = BUCKET_BYTES,
        plan: Plan | None = None,
        full_shard: bool = False,
        outline_on: torch.device | None = None,
    ) -> None:
        """Takes the model's layers and experts apart and, with ZeRO-1, moves its parameters into buckets.

        All ranks together. `plan`: how the layers lie in the pipeline, where there is one. `full_shard`: parameters and
        gradients are to lie in shards too (refused in a pipeline); then `zero1` is not asked. `outline_on`: for a model
        that is an outline, the device that this rank's part of it is made on (`fathom.parallel.building`).

        So it comes before anything that holds on to parameters or their memory. All ranks bring the same weights.
        Raises `ParallelError` when the model cannot be laid out so.
        """
        self.model, self.mesh = model, mesh or Mesh.alone()
        if plan is None and self.mesh.pp.size > 1:
            plan = Plan(model.config, self.mesh.pp.size)
        self.pipeline = Pipeline(model, plan, self.mesh.pp) if plan else None
        self.traffic = shard_experts(model, self.mesh)
        if outline_on is not None:
            stand_in(model, outline_on)
        self.named = named(model, self.mesh, plan)
        self.full = self._shard() if full_shard and not self.alone else None
        self.lists = grouped(self.named, bucket_bytes)
        self.zero1 = zero1 and any(one.copies.size > 1 for one in self.named)
        self.buckets = [Bucket(members) for members in self.lists] if self.zero1 else []
        self.pieces = [piece for bucket in self.buckets for piece in bucket.pieces]
        if not self.zero1:
            self.pieces = [Piece(one, one.parameter) for one in self.named]
        if outline_on is not None:
            draw_initial(model, self.named)

    def _shard(self) -> FullShard:
        from fathom.parallel.full import FullShard  # FSDP takes its time to be imported

        full = FullShard(self.model, self.mesh, self.named)
        self.named = full.named
        return full

    @property
    def alone(self) -> bool:
        """Whether this is the only process."""
        return self.mesh.world.size == 1

    def rows(self, batch: int) -> range:
        """This rank's sequences of a batch, consecutive ones.

        Raises `ParallelError` when they cannot be shared out evenly.
        """
        return self.mesh.layout.rows(batch, self.mesh.dp.place)

    def total(self, number: int) -> int:
        """Sum of a number that each rank has of its rows."""
        if self.alone:
            return number
        return int(self.mesh.dp.sum(torch.tensor(number, device=self._device())))

    # --- after the backward passes ---------------------------------------------------------------

    def reduce(self, found: Losses) -> Losses:
        """Sum gradients, losses and expert loads of all ranks; the losses of the whole batch.

        `found` holds this rank's losses times its shares of the batch. With ZeRO-1 the parameters' gradients are gone
        afterwards, each rank has those of its pieces. (With full sharding they are so already.)
        """
        if self.alone:
            return found
        self._reduce_gradients()
        return self._reduce_numbers(found)

    def _reduce_gradients(self) -> None:
        if self.full:
            self.full.take_gradients()
        for bucket in self.buckets:
            bucket.reduce()
        for members in [] if self.zero1 else self.lists:
            gradients = [p.grad for p in (one.parameter for one in members) if p.grad is not None]
            if gradients and members[0].copies.size > 1:
                sums = members[0].copies.sum(torch.cat([g.reshape(-1) for g in gradients]))
                runs = sums.split([g.numel() for g in gradients])
                for gradient, run in zip(gradients, runs, strict=True):
                    gradient.copy_(run.view_as(gradient))

    def _reduce_numbers(self, found: Losses) -> Losses:
        """One small all-reduce in float64, which holds loads below 2^53 exactly."""
        losses = [found.main, found.mtp, found.balance, found.total, *found.mtp_by_depth]
        load_ME, device = found.expert_load, self._device()
        parts = [torch.stack([loss.double() for loss in losses]).to(device)]
        parts += [load_ME.flatten().to(device, torch.float64)]
        values, load = self.mesh.world.sum(torch.cat(parts)).split([len(p) for p in parts])
        main, mtp, balance, total, *by_depth = values.to(found.main.dtype).unbind()
        load_ME = load.to(load_ME).view_as(load_ME)
        self._set_loads(load_ME)
        return replace(
            found,
            main=main,
            mtp=mtp,
            balance=balance,
            total=total,
            mtp_by_depth=tuple(by_depth),
            expert_load=load_ME,
        )

    def _set_loads(self, load_ME: Tensor) -> None:
        """The routers here have counted what came by; now the whole step's tokens count."""
        inner, rows = self.model.model, load_rows(self.model.config)
        for layer, block in enumerate((*inner.layers, *inner.mtp)):
            here = isinstance(block, Block) and isinstance(block.mlp, MoE)
            if here and rows[layer] < len(load_ME):  # MTP's at weight 0 have seen nothing
                block.mlp.gate.expert_load.copy_(load_ME[rows[layer]])

    # --- the update ------------------------------------------------------------------------------

    def trained(self) -> list[nn.Parameter]:
        """What has a gradient and is updated here."""
        return [piece.part for piece in self.pieces if piece.part.grad is not None]

    def gradient_norm(self) -> Tensor:
        """Norm of the whole gradient, each number counted once; after `reduce`."""
        if self.alone:
            return nn.utils.get_total_norm([p.grad for p in self.trained() if p.grad is not None])
        once = [piece for piece in self.pieces if self.zero1 or piece.of.copies.place == 0]
        gradients = [piece.part.grad for piece in once if piece.part.grad is not None]
        square = nn.utils.get_total_norm(gradients).to(self._device(), torch.float64).square()
        return self.mesh.world.sum(square).sqrt().to(self.named[0].parameter.dtype)

    def share(self) -> None:
        """Bring what each rank has updated to all; after the optimiser's step."""
        for bucket in self.buckets:
            bucket.share()

    def release(self) -> None:
        """Free what forward passes that nobody differentiates have gathered; after the last of some."""
        if self.full:
            self.full.release()

    def _device(self) -> torch.device:
        return self.named[0].parameter.device

    # --- for checkpoints and comparisons ---------------------------------------------------------

    def weight_shards(self) -> Iterator[Shard]:
        """The masters that this rank updates, by the parameters' names. After filling them, `share`."""
        return weight_shards(self.pieces, self.zero1)

    def model_shards(self, tensors: Mapping[str, Tensor]) -> Iterator[Shard]:
        """Tensors that go by the model's names, like router biases and the average of the weights."""
        plan = self.pipeline.plan if self.pipeline else None
        tensors = {name: here(tensor) for name, tensor in tensors.items()}
        return model_shards(tensors, self.named, self.mesh, plan)

    def optimizer_shards(self, optimizer: torch.optim.Optimizer) -> Iterator[Shard]:
        """AdamW's state that this rank keeps, by name (`fathom.parallel.pieces`)."""
        return optimizer_shards(self.pieces, optimizer, self.zero1)

    def whole_gradients(self) -> Iterator[tuple[str, Tensor]]:
        """(name, gradient of one process) after `reduce`, one at a time, zero where there is none.

        All ranks together.
        """
        for bucket in self.buckets:
            for one, gradient in bucket.whole(lambda piece: piece.part.grad):
                yield one.name, self._whole(one, gradient)
        for piece in [] if self.zero1 else self.pieces:
            part = piece.part
            found = torch.zeros_like(part) if part.grad is None else part.grad
            yield piece.of.name, self._whole(piece.of, found)

    def whole_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name, parameter of one process), one at a time; all ranks together."""
        for one in self.named:
            yield one.name, self._whole(one, one.parameter.detach())

    def _whole(self, one: Named, tensor: Tensor) -> Tensor:
        if self.full:
            tensor = self.full.together(one.name, tensor)
        return tensor if tensor.shape == one.shape else self.mesh.ep.gather(tensor)
