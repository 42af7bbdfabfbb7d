"""Products of rows that are sorted by expert, as one autograd rule (report eq 12's experts).

Consecutive runs of rows, `counts[e]` of them, are multiplied by the matrix of expert e; no row is
dropped and none is padded. Three ways, by where the rows are and how long the runs:

- on a GPU with BF16 products torch's `grouped_mm`, so that counts never leave the device;
- on a CPU with short runs the same operation, since one call for all experts is worth more than the
  rate of each product (docs/experiments/005);
- otherwise a loop of products over the runs, through oneDNN where that is better.

Shapes: N rows, I in, O out, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import grouped_mm

from fathom.kernels.cpu_gemm import fast_products, onednn_is_better
from fathom.kernels.put_off import PutOff
from fathom.kernels.recompute import keep, kept_later

ROW_STEP = 64
"""Rows of a run that go to oneDNN are a multiple of this.

It compiles a kernel for every number of rows it meets (0.4 ms and 0.65 MB each), and the loads of
experts are new at every step.
"""

SHORT_RUN = 192
"""Mean rows per expert up to which runs count as short."""

Run = tuple[int, int, int]


def runs(counts: list[int]) -> list[Run]:
    """(expert, first row, end row) of every expert that has rows."""
    found, start = [], 0
    for expert, count in enumerate(counts):
        if count:
            found.append((expert, start, start + count))
        start += count
    return found


def grouped_reference(x_NI: Tensor, weight_EOI: Tensor, counts: list[int]) -> Tensor:
    """The grouped product as a plain loop with torch's gradient; the rule below must equal it."""
    parts = torch.split(x_NI, counts)
    return torch.cat([part @ weight_EOI[e].T for e, part in enumerate(parts)])


def _split(counts: list[int], device: torch.device) -> tuple[list[Run], list[Run]]:
    """Each run in two: whole multiples of `ROW_STEP` rows for oneDNN, and what is left."""
    if device.type != "cpu" or not onednn_is_better():
        return [], runs(counts)
    whole, rest = [], []
    for expert, start, end in runs(counts):
        middle = end - (end - start) % ROW_STEP
        if start < middle:
            whole.append((expert, start, middle))
        if middle < end:
            rest.append((expert, middle, end))
    return whole, rest


Groups = list[int] | Tensor
"""Rows of each expert, to be looped over, or int32 [E] the row behind each run, for one call."""


def _product(x_NI: Tensor, matrices_EIO: Tensor, groups: Groups) -> Tensor:
    """Rows of each run times that expert's matrix: [N, O]."""
    if isinstance(groups, Tensor):
        return grouped_mm(x_NI, matrices_EIO, offs=groups)
    matrices = matrices_EIO.unbind(0)
    out = x_NI.new_empty(x_NI.shape[0], matrices[0].shape[1])
    whole, rest = _split(groups, x_NI.device)
    with fast_products(ROW_STEP, x_NI.device):
        for expert, start, end in whole:
            torch.mm(x_NI[start:end], matrices[expert], out=out[start:end])
    for expert, start, end in rest:
        torch.mm(x_NI[start:end], matrices[expert], out=out[start:end])
    return out


def _outer(grad_NO: Tensor, x_NI: Tensor, groups: Groups) -> Tensor:
    """Weight gradients [E, O, I]: each run's grad^T x, zero for experts without rows."""
    if isinstance(groups, Tensor):
        return grouped_mm(grad_NO.T, x_NI, offs=groups)
    out = grad_NO.new_empty(len(groups), grad_NO.shape[1], x_NI.shape[1])
    grad_ON, parts = grad_NO.T, out.unbind(0)
    whole, rest = _split(groups, x_NI.device)
    with fast_products(ROW_STEP, x_NI.device):
        for expert, start, end in whole:
            torch.mm(grad_ON[:, start:end], x_NI[start:end], out=parts[expert])
    begun = {expert for expert, _, _ in whole}
    for expert, start, end in rest:
        if expert in begun:
            parts[expert].addmm_(grad_ON[:, start:end], x_NI[start:end])
        else:
            torch.mm(grad_ON[:, start:end], x_NI[start:end], out=parts[expert])
    for expert, count in enumerate(groups):
        if not count:
            parts[expert].zero_()
    return out


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_NI: Tensor,
        weight_EOI: Tensor,
        groups: Groups,
        dtype: torch.dtype,
        put_off: PutOff | None,
    ) -> Tensor:
        keep(ctx, x_NI, weight_EOI)
        ctx.groups, ctx.dtype, ctx.put_off = groups, dtype, put_off
        ctx.x_dtype, ctx.weight_dtype = x_NI.dtype, weight_EOI.dtype
        return _product(x_NI.to(dtype), weight_EOI.to(dtype).transpose(1, 2), groups)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_NO: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        get_x, get_weight = kept_later(ctx)
        weight_EOI = get_weight()
        grad_NO = grad_NO.to(ctx.dtype).contiguous()
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = _product(grad_NO, weight_EOI.to(ctx.dtype), ctx.groups).to(ctx.x_dtype)
        if ctx.needs_input_grad[1]:
            make = partial(_weight_gradient, get_x, grad_NO, ctx.groups, ctx.weight_dtype)
            grad_weight = make() if ctx.put_off is None else ctx.put_off.gradient(weight_EOI, make)
        return grad_x, grad_weight, None, None, None


def _weight_gradient(
    get_x: Callable[[], Tensor], grad_NO: Tensor, groups: Groups, weight_dtype: torch.dtype
) -> Tensor:
    return _outer(grad_NO, get_x().to(grad_NO.dtype), groups).to(weight_dtype)


def _in_one_call(x_NI: Tensor, weight_EOI: Tensor, dtype: torch.dtype) -> bool:
    """Whether `grouped_mm` is to do it; its rows must begin at multiples of 16 bytes."""
    E, outputs, inputs = weight_EOI.shape
    fits = outputs * dtype.itemsize % 16 == inputs * dtype.itemsize % 16 == 0
    if x_NI.is_cuda:
        return fits and dtype == torch.bfloat16
    short = x_NI.device.type == "cpu" and 0 < x_NI.shape[0] <= SHORT_RUN * E
    return fits and short and dtype == torch.float32


def grouped_linear(
    x_NI: Tensor,
    weight_EOI: Tensor,
    counts_E: Tensor,
    dtype: torch.dtype | None = None,
    put_off: PutOff | None = None,
) -> Tensor:
    """Rows [N, I], sorted by expert, times their expert's [O, I] transposed -> [N, O].

    `counts_E` (int64 [E], summing to N) says how many rows each expert has. `put_off`: who may take the weights'
    gradients for later.
    """
    dtype = dtype or weight_EOI.dtype
    groups: Groups
    if _in_one_call(x_NI, weight_EOI, dtype):
        groups = counts_E.cumsum(0, dtype=torch.int32)
    else:
        groups = counts_E.tolist()
    if not torch.is_grad_enabled():
        return _product(x_NI.to(dtype), weight_EOI.to(dtype).transpose(1, 2), groups)
    return _GroupedLinear.apply(x_NI, weight_EOI, groups, dtype, put_off)
