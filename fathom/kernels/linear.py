"""Matrix products, dense and grouped by expert, each one autograd rule.

This is the first seam of the model (docs/architecture.md, "The two seams").

`Linear` and `Experts` of the model call these; FP8, weight-only quantisation and a split
backward replace them from outside. `dtype` is the dtype of the product: operands are cast to it
here, weights stay as they are, gradients return in the dtype of what they belong to. There is no
autocast anywhere.

Shapes: N rows, I in, O out, E experts. A grouped product multiplies consecutive runs of rows,
`counts[e]` of them, by the matrix of expert e; no row is dropped and none is padded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import grouped_mm

from fathom.kernels.cpu_gemm import fast_products, onednn_is_better
from fathom.kernels.recompute import keep, kept

ROW_STEP = 64
"""Rows of a run that go to oneDNN are a multiple of this.

It compiles a kernel for every number of rows it meets (0.4 ms and 0.65 MB each), and the loads of
experts are new at every step.
"""

SHORT_RUN = 192
"""Rows per expert up to which torch's grouped_mm, one call for all experts, beats a loop of calls."""


def _plain(x: Tensor, weight_OI: Tensor, dtype: torch.dtype) -> Tensor:
    with fast_products(x.shape[:-1].numel(), x.device):
        return torch.nn.functional.linear(x.to(dtype), weight_OI.to(dtype))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, dtype: torch.dtype) -> Tensor:
        keep(ctx, x, weight_OI)
        ctx.dtype = dtype
        return _plain(x, weight_OI, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight_OI = kept(ctx)
        grad_NO = grad.to(ctx.dtype).reshape(-1, grad.shape[-1])
        grad_x = grad_weight = None
        with fast_products(grad_NO.shape[0], grad.device):
            if ctx.needs_input_grad[0]:
                grad_x = (grad_NO @ weight_OI.to(ctx.dtype)).view(x.shape).to(x.dtype)
            if ctx.needs_input_grad[1]:
                x_NI = x.to(ctx.dtype).reshape(-1, x.shape[-1])
                grad_weight = (grad_NO.T @ x_NI).to(weight_OI.dtype)
        return grad_x, grad_weight, None


def linear(x: Tensor, weight_OI: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """x [..., I] times weight [O, I] transposed -> [..., O], in `dtype` (default: its own)."""
    dtype = dtype or weight_OI.dtype
    rule = _Linear.apply if torch.is_grad_enabled() else _plain
    return rule(x, weight_OI, dtype)


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


def _short(counts: list[int], x: Tensor, *widths: int) -> bool:
    """Whether runs are short and `grouped_mm` takes such rows (in units of 16 bytes, float32)."""
    fits = x.dtype == torch.float32 and all(width % 4 == 0 for width in widths)
    return fits and x.device.type == "cpu" and 0 < sum(counts) <= SHORT_RUN * len(counts)


def _ends(counts: list[int]) -> Tensor:
    """The row behind each run, int32 [E]."""
    return torch.tensor(counts).cumsum(0, dtype=torch.int32)


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


def _product(x_NI: Tensor, matrices_EIO: Tensor, counts: list[int]) -> Tensor:
    """Rows of each run times that expert's matrix: [N, O]."""
    if _short(counts, x_NI, *matrices_EIO.shape[1:]):
        return grouped_mm(x_NI, matrices_EIO, offs=_ends(counts))
    matrices = matrices_EIO.unbind(0)
    out = x_NI.new_empty(x_NI.shape[0], matrices[0].shape[1])
    whole, rest = _split(counts, x_NI.device)
    with fast_products(ROW_STEP, x_NI.device):
        for expert, start, end in whole:
            torch.mm(x_NI[start:end], matrices[expert], out=out[start:end])
    for expert, start, end in rest:
        torch.mm(x_NI[start:end], matrices[expert], out=out[start:end])
    return out


def _outer(grad_NO: Tensor, x_NI: Tensor, counts: list[int]) -> Tensor:
    """Weight gradients [E, O, I]: each run's grad^T x, zero for experts without rows."""
    if _short(counts, x_NI, grad_NO.shape[1], x_NI.shape[1]):
        return grouped_mm(grad_NO.T, x_NI, offs=_ends(counts))
    out = grad_NO.new_empty(len(counts), grad_NO.shape[1], x_NI.shape[1])
    grad_ON, parts = grad_NO.T, out.unbind(0)
    whole, rest = _split(counts, x_NI.device)
    with fast_products(ROW_STEP, x_NI.device):
        for expert, start, end in whole:
            torch.mm(grad_ON[:, start:end], x_NI[start:end], out=parts[expert])
    begun = {expert for expert, _, _ in whole}
    for expert, start, end in rest:
        if expert in begun:
            parts[expert].addmm_(grad_ON[:, start:end], x_NI[start:end])
        else:
            torch.mm(grad_ON[:, start:end], x_NI[start:end], out=parts[expert])
    for expert, count in enumerate(counts):
        if not count:
            parts[expert].zero_()
    return out


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_NI: Tensor, weight_EOI: Tensor, counts: list[int], dtype: torch.dtype
    ) -> Tensor:
        keep(ctx, x_NI, weight_EOI)
        ctx.counts, ctx.dtype = counts, dtype
        return _product(x_NI.to(dtype), weight_EOI.to(dtype).transpose(1, 2), counts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x_NI, weight_EOI = kept(ctx)
        grad_NO = grad_NO.to(ctx.dtype).contiguous()
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = _product(grad_NO, weight_EOI.to(ctx.dtype), ctx.counts).to(x_NI.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = _outer(grad_NO, x_NI.to(ctx.dtype), ctx.counts).to(weight_EOI.dtype)
        return grad_x, grad_weight, None, None


class _GroupedOnDevice(torch.autograd.Function):
    """The same rule by torch's grouped_mm, where a loop would wait for counts on the device."""

    @staticmethod
    def forward(
        ctx: Any, x_NI: Tensor, weight_EOI: Tensor, ends_E: Tensor, dtype: torch.dtype
    ) -> Tensor:
        keep(ctx, x_NI, weight_EOI, ends_E)
        ctx.dtype = dtype
        matrices = weight_EOI.to(dtype).transpose(1, 2)
        return grouped_mm(x_NI.to(dtype), matrices, offs=ends_E)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x_NI, weight_EOI, ends_E = kept(ctx)
        grad_NO = grad_NO.to(ctx.dtype).contiguous()
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = grouped_mm(grad_NO, weight_EOI.to(ctx.dtype), offs=ends_E).to(x_NI.dtype)
        if ctx.needs_input_grad[1]:
            x = x_NI.to(ctx.dtype)
            grad_weight = grouped_mm(grad_NO.T, x, offs=ends_E).to(weight_EOI.dtype)
        return grad_x, grad_weight, None, None


def grouped_linear(
    x_NI: Tensor, weight_EOI: Tensor, counts_E: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """Rows [N, I], sorted by expert, times their expert's [O, I] transposed -> [N, O].

    `counts_E` (int64 [E], summing to N) says how many rows each expert has. On a CUDA device with
    BF16 products the counts stay there; elsewhere they are read once and the runs are looped over.
    """
    dtype = dtype or weight_EOI.dtype
    if x_NI.is_cuda and dtype == torch.bfloat16:
        return _GroupedOnDevice.apply(x_NI, weight_EOI, counts_E.cumsum(0).to(torch.int32), dtype)
    counts = counts_E.tolist()
    if not torch.is_grad_enabled():
        return _product(x_NI.to(dtype), weight_EOI.to(dtype).transpose(1, 2), counts)
    return _GroupedLinear.apply(x_NI, weight_EOI, counts, dtype)
