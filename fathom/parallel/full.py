"""Full sharding (ZeRO-3, Rajbhandari et al. 2020) by torch's FSDP2: weights, gradients and moments all lie in shards.

ZeRO-1 spares the moments, 8 of the 16 bytes that float32 AdamW wants of a number; masters and gradients stay whole on
every rank. Here a rank keeps 1/N of all four. Of a parameter [rows, ...] that N ranks hold, rank i has the rows
i c ... (i + 1) c - 1, c = ceil(rows / N), which is a run of the flattened whole, as expert parallelism's cut is. So
from here on the rest of `fathom.parallel` sees a smaller parameter that nobody else holds; moments, clipping, average
and checkpoints need not know of it. (A rank may get nothing of a parameter with fewer rows than ranks. Where a rank's
experts are fewer than the ranks that hold them, full sharding therefore spares less.)

Weights are put together where they are used, a block at a time, and freed behind it: one all-gather for the forward
pass, one for the backward pass, and a reduce-scatter for the gradients, (N - 1)/N of the parameters each. That is 1.5
times what ZeRO-1 sends, and it is sent for every micro-batch, where ZeRO-1 sends once a step. Gradients are *summed*,
since a rank's losses are already weighted by their share of the whole batch.

What is put together at a time:

- each block's attention, norms, router and shared experts, over dp;
- its routed experts, over the dp / ep ranks that hold the same ones, in the dtype of their products: they are cast to
  that before they multiply in any case, so it is the same numbers in half the bytes. Where nobody else holds them they
  are left alone. They are asked for with their block, since the all-to-all makes the host wait before them;
- for the whole of a pass embedding, last norm, head and the parts of MTP modules that are no block (norms, eh_proj).
  Embedding and head are used at both ends of the pass, by the main model and every MTP module, tied or not.

Two things about FSDP2 decide how it is applied. It looks for tensors in dataclasses among a module's arguments (torch
2.13) and *replaces the dataclass* when it finds some: a block would get a copy of the pass's `Context`, what routers
write there would be lost, and the balance loss with it, without an error. Of a list of modules it looks at the first
one's arguments only. So a block is sharded as the list of its four parts, of which the first is a norm that gets no
context. And it gathers before `forward` and before nothing else, so `Transformer.trunk`, which training calls, is
made known to it.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from fathom.errors import ParallelError
from fathom.model import Transformer
from fathom.model.block import Block
from fathom.model.moe import Experts, LocalDispatcher, MoE
from fathom.parallel.mesh import Group, Mesh, collective
from fathom.parallel.pieces import Named, here, rows_of
from fathom.parallel.waiting import waiting


@dataclass(frozen=True, eq=False)
class _Sharded:
    """A parameter of which this rank keeps some rows."""

    whole: DTensor
    """As FSDP knows it."""
    part: nn.Parameter
    """The rows that are here, in the same memory."""
    rows: int
    """Of all ranks of the group together."""
    group: Group


class FullShard:
    """A model whose parameters lie in shards over the ranks that hold the same ones."""

    def __init__(self, model: Transformer, mesh: Mesh, parameters: list[Named]) -> None:
        """All ranks together, after `shard_experts` and `set_compute_dtype`, before anything holds on to parameters.

        Raises `ParallelError` for a pipeline.
        """
        if mesh.pp.size > 1:
            raise ParallelError(
                f"full sharding with pp = {mesh.pp.size} would gather every weight again for each micro-batch of the "
                f"pipeline; use ZeRO-1 there, or pp = 1"
            )
        self._model = cast(FSDPModule, model)
        _apply(model, mesh, parameters[0].parameter.device.type)
        live = dict(model.named_parameters())
        self._sharded: dict[str, _Sharded] = {}
        self.named = [self._here(one, live[one.name], mesh) for one in parameters]
        """The parameters again, of each what is here; those that were sharded are nobody else's."""

    def _here(self, one: Named, parameter: nn.Parameter, mesh: Mesh) -> Named:
        if not isinstance(parameter, DTensor):
            return one
        part = nn.Parameter(here(parameter.detach()), one.parameter.requires_grad)
        rows, group = parameter.shape[0], one.copies
        self._sharded[one.name] = _Sharded(parameter, part, rows, group)
        first = rows_of(group.place, rows, group.size).start
        offset = one.offset + first * parameter.shape[1:].numel()
        return Named(one.name, part, Group((mesh.rank,), 0), one.shape, offset)

    def take_gradients(self) -> None:
        """Hand the parts what backward passes have summed over the ranks."""
        for one in self._sharded.values():
            gradient = one.whole.grad
            one.part.grad = None if gradient is None else here(gradient)
            one.whole.grad = None

    def release(self) -> None:
        """Free the weights that a forward pass without a backward pass leaves gathered; they would go stale."""
        self._model.reshard()

    def together(self, name: str, part: Tensor) -> Tensor:
        """This rank's rows of something in the shape of a parameter, and everybody else's. All ranks together."""
        one = self._sharded.get(name)
        if one is None:
            return part
        most = len(rows_of(0, one.rows, one.group.size))
        padded = part.new_zeros(most, *part.shape[1:])
        padded[: len(part)] = part
        return one.group.gather(padded)[: one.rows]


def _apply(model: Transformer, mesh: Mesh, device: str) -> None:
    # True of the routers' scores and of what MoE gives. Nothing here adds in place to either.
    warnings.filterwarnings("ignore", r"FSDP2-wrapped module \(.*\) returned a view tensor")
    everyone = _device_mesh(mesh.dp, device)
    holders = _device_mesh(mesh.replicas, device) if mesh.replicas.size > 1 else None
    kept = set() if holders else set(_of_experts(model))
    for block in _blocks(model):
        parts = [block.input_layernorm, block.self_attn, block.post_attention_layernorm, block.mlp]
        if holders and isinstance(block.mlp, MoE):
            _shard_experts(block.mlp, holders)
        with _in_memory(parts, kept):
            fully_shard(parts, mesh=everyone, reshard_after_forward=True, ignored_params=kept)
        if holders and isinstance(block.mlp, MoE):
            first = cast(FSDPModule, block.input_layernorm)
            first.set_modules_to_forward_prefetch([cast(FSDPModule, block.mlp.experts)])
    with _in_memory([model], kept):
        fully_shard(model, mesh=everyone, reshard_after_forward=False, ignored_params=kept)
    register_fsdp_forward_method(model, "trunk")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            _sum_gradients(module)


def _shard_experts(moe: MoE, holders: DeviceMesh) -> None:
    experts = moe.experts
    dtype, master = experts.compute_dtype, experts.down_proj.dtype
    policy = MixedPrecisionPolicy()
    if dtype is not None and dtype.itemsize < master.itemsize:
        policy = MixedPrecisionPolicy(dtype, master, cast_forward_inputs=False)
    with _in_memory([experts]):
        fully_shard(experts, mesh=holders, reshard_after_forward=True, mp_policy=policy)
    if type(moe.dispatcher) is LocalDispatcher:
        moe.dispatcher = _Dispatcher()


@contextmanager
def _in_memory(modules: Sequence[nn.Module], kept: Collection[nn.Parameter] = ()) -> Iterator[None]:
    """Within, these modules' parameters are cut, which stand-ins need memory for; then the whole ones have none."""
    found = nn.ModuleList(modules).parameters()
    whole = [one for one in found if not isinstance(one, DTensor) and one not in kept]
    for parameter in whole:
        parameter.data = parameter.detach().contiguous()
    yield
    for parameter in whole:
        parameter.data = parameter.new_empty(0)


class _Dispatcher(LocalDispatcher):
    """The same by another type, so that few rows, too, go by `Experts.forward`, before which weights are gathered."""


def _blocks(model: Transformer) -> Iterator[Block]:
    for module in (*model.model.layers, *model.model.mtp):
        yield cast(Block, module)


def _of_experts(model: Transformer) -> Iterator[nn.Parameter]:
    for module in model.modules():
        if isinstance(module, Experts):
            yield from module.parameters()


def _device_mesh(group: Group, device: str) -> DeviceMesh:
    """A group in the words of FSDP."""
    assert group.handle is not None
    return DeviceMesh.from_group(group.handle, device)


# --- collectives ---------------------------------------------------------------------------------


def _sum_gradients(module: FSDPModule) -> None:
    """No means, on any backend; and time in which others are waited for is counted."""
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)
    module.set_custom_all_gather(_Gather())  # type: ignore[arg-type]
    module.set_custom_reduce_scatter(_Scatter())  # type: ignore[arg-type]


class _Allocates:
    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for what is sent or comes."""
        return torch.empty(*size, dtype=dtype, device=device)


class _Gather(_Allocates):
    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> dist.Work | None:
        gather = collective("all_gather_single", "all_gather_into_tensor")
        with waiting():
            return gather(output_tensor, input_tensor, group=group, async_op=async_op)


class _Scatter(_Allocates):
    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> dist.Work | None:
        scatter = collective("reduce_scatter_single", "reduce_scatter_tensor")
        with waiting():
            return scatter(output_tensor, input_tensor, op=op, group=group, async_op=async_op)
