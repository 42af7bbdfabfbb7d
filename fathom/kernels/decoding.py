"""Products of single rows, which decoding consists of, at the rate at which a CPU reads memory.

With one row a product reads every weight once and computes next to nothing. MKL's matrix-vector
product takes the dot product of each weight row and reaches 14 GB/s where the same core reads 34.
Going down the columns instead, y = sum_i x_i W[:, i], each weight column is one contiguous run if
the matrix stands in memory by columns; and `embedding_bag` is exactly such a weighted sum of rows
of W^T, vectorised and prefetched: 20-30 GB/s. Several experts' rows are several bags of one call.
Measured with a Zen 5 core and matrices of 0.5-64 MB; float32 on a CPU only.

A matrix that stands by columns has the same shape and values; other products take it as it is.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def by_columns(weight: Tensor) -> Tensor:
    """The same [..., O, I] matrices, laid out in memory column after column."""
    return weight.transpose(-1, -2).contiguous().transpose(-1, -2)


def stands_by_columns(weight: Tensor) -> bool:
    """Whether a float32 CPU tensor [..., O, I] is laid out as by `by_columns` (and not by rows)."""
    *_, across, down = weight.stride()
    return (
        across == 1
        and down == weight.shape[-2]
        and weight.dtype == torch.float32
        and weight.device.type == "cpu"
    )


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


def row_products(x_RI: Tensor, weight_EOI: Tensor, experts_R: Tensor | None = None) -> Tensor:
    """Row r of x times the matrix of expert r (None: of the only one), transposed: [R, O].

    Weights stand by columns.
    """
    return _weighted_columns(x_RI, weight_EOI, experts_R, x_RI.shape[0])


def summed_row_products(x_RI: Tensor, weight_EOI: Tensor, experts_R: Tensor) -> Tensor:
    """The sum of `row_products` over the rows, [1, O]."""
    return _weighted_columns(x_RI, weight_EOI, experts_R, 1)
