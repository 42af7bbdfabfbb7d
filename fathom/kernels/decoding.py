"""Products of a single row, which decoding consists of, at the rate at which a CPU reads memory.

With one row a product reads every weight once and computes next to nothing. MKL's matrix-vector
product takes the dot product of each weight row and reaches 11-14 GB/s where the same core reads
26-34. Going down the columns instead, y = sum_i x_i W[:, i], each weight column is one contiguous
run if the matrix stands in memory by columns. Two of torch's operations do that: a plain product,
best for many outputs, and `embedding_bag`, which is exactly a weighted sum of rows of W^T, best for
few; several experts' rows are several bags of one call. Under `torch.compile` the plain definition
becomes one fused loop over weights that stand by rows, which is as fast and leaves no calls.

Measured, one core, GB/s, plain / bag: 32768 x 512 on a Zen 4 22 / 13, on a Zen 5 26 / 30;
512 x 512 11 / 15 and 17 / 20. docs/experiments/001 and 004.

A matrix that stands by columns has the same shape and values; other products take it as it is.
Shapes: I in, O out, E experts, R rows.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fathom.kernels import few_rows

MANY_OUTPUTS = 768
"""Outputs from which the plain product is taken."""


def by_columns(weight: Tensor) -> Tensor:
    """The same [..., O, I] matrices, laid out in memory column after column."""
    return weight.transpose(-1, -2).contiguous().transpose(-1, -2)


def row_product(x_1I: Tensor, weight_OI: Tensor) -> Tensor:
    """x times the matrix transposed, [1, O]; best with weights that stand by columns."""
    if is_compiling():
        return (weight_OI * x_1I).sum(-1)[None]
    if few_rows.can(x_1I, weight_OI):
        return few_rows.product(x_1I, weight_OI)
    if weight_OI.shape[0] >= MANY_OUTPUTS:
        return torch.mm(x_1I, weight_OI.T)
    return _weighted_columns(x_1I, weight_OI[None], None, 1)


def expert_products(x_1I: Tensor, weight_EOI: Tensor, experts_R: Tensor) -> Tensor:
    """x times the matrices of some experts, transposed: [R, O]."""
    if is_compiling():
        return (weight_EOI[experts_R] * x_1I).sum(-1)
    x_RI = x_1I.expand(experts_R.shape[0], -1)
    return _weighted_columns(x_RI, weight_EOI, experts_R, experts_R.shape[0])


def summed_expert_products(x_RI: Tensor, weight_EOI: Tensor, experts_R: Tensor) -> Tensor:
    """The sum over rows of each times its own expert's matrix, transposed: [1, O]."""
    if is_compiling():
        return (weight_EOI[experts_R] * x_RI[:, None]).sum((0, -1))[None]
    return _weighted_columns(x_RI, weight_EOI, experts_R, 1)


@cache
def _columns(inputs: int, bags: int) -> tuple[Tensor, Tensor]:
    """Column numbers of one matrix, int64 [1, I], and where each of some bags of I begins."""
    with torch.inference_mode(False):
        return torch.arange(inputs)[None], torch.arange(bags) * inputs


def _weighted_columns(
    x_RI: Tensor, weight_EOI: Tensor, experts_R: Tensor | None, bags: int
) -> Tensor:
    """Sums over the columns of each row's matrix, [bags, O]: a bag for each row, or one for all."""
    outputs, inputs = weight_EOI.shape[1:]
    numbers, begins = _columns(inputs, bags)
    if experts_R is not None:
        numbers = numbers + experts_R[:, None] * inputs
    columns = weight_EOI.transpose(1, 2).reshape(-1, outputs)
    # torch's own function behind F.embedding_bag, whose checks cost as much as a small product
    return torch.embedding_bag(
        columns, numbers.flatten(), begins, False, 0, False, x_RI.flatten(), False
    )[0]


def absorb_query(q_HP: Tensor, up_HUC: Tensor) -> Tensor:
    """W_UK^T q of each head, [H, C]; `up_HUC` holds W_UK in its first P rows, then W_UV."""
    P = q_HP.shape[1]
    if is_compiling():
        return (q_HP[:, :, None] * up_HUC[:, :P]).sum(1)
    return torch.bmm(q_HP[:, None], up_HUC[:, :P])[:, 0]


def expand_values(latent_HC: Tensor, up_HUC: Tensor, nope: int) -> Tensor:
    """W_UV c of each head, [H, V]; word for word, since the batched product takes five times as long."""
    return (up_HUC[:, nope:] * latent_HC[:, None]).sum(-1)
