"""Products of a few rows on a CPU at the rate of memory, by our own C++ where it can be compiled.

With up to some sixteen rows a product reads every weight for next to no arithmetic, and a library's
product reaches half of the memory's rate or less. `native/products.cpp` reads each weight once for
all rows. The same text serves weights in float32, bfloat16 and int8 (`precision.storage` makes
those), which take a half and a quarter of the reading. Callers ask `can` first and have another way.

Shapes: N rows, I in, O out, E experts, K choices, D hidden.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fathom.kernels.native import library

MOST_ROWS = 16
"""Rows up to which it is faster than the libraries' products."""

GROUP = 64
"""Inputs that share a scale of int8 weights."""

_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int


@cache
def _functions() -> tuple[Any, Any, Any] | None:
    """The three C functions with their types, or None."""
    found = library()
    if found is None:
        return None
    product, experts = found.fathom_product, found.fathom_experts
    product.argtypes = [
        _INT,
        _POINTER,
        _POINTER,
        _LONG,
        _POINTER,
        _LONG,
        _LONG,
        _LONG,
        _POINTER,
        _INT,
    ]
    experts.argtypes = [
        *(_INT, _POINTER, _POINTER, _POINTER, _POINTER, _LONG, _LONG, _LONG, _LONG),
        *(_POINTER, _LONG, _LONG, _POINTER, _POINTER, _POINTER, _INT),
    ]
    attend = found.fathom_attend
    attend.argtypes = [
        *(_POINTER, _LONG, _POINTER, _LONG, _LONG),
        *(_POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _INT),
    ]
    product.restype = experts.restype = attend.restype = None
    return product, experts, attend


def can(x: Tensor, weight: Tensor) -> bool:
    """Whether few rows x (float32, on a CPU) may be multiplied with such weights here."""
    return (
        not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.shape[:-1].numel() <= MOST_ROWS
        and weight.dtype in _KINDS
        and weight.is_contiguous()
        and _functions() is not None
    )


def product(x: Tensor, weight_OI: Tensor, scales_OG: Tensor | None = None) -> Tensor:
    """x [..., I] times the weights transposed, [..., O]. int8 weights have scales [O, ceil(I / GROUP)]."""
    function = _functions()
    assert function is not None
    x_NI = x.reshape(-1, x.shape[-1]).contiguous()
    outputs, inputs = weight_OI.shape
    out = torch.empty(x_NI.shape[0], outputs)
    scales, group = _scaling(scales_OG, weight_OI)
    function[0](
        _KINDS[weight_OI.dtype],
        weight_OI.data_ptr(),
        scales,
        group,
        x_NI.data_ptr(),
        x_NI.shape[0],
        inputs,
        outputs,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out.view(*x.shape[:-1], outputs)


def experts(
    x_ND: Tensor,
    gate_up_EOD: Tensor,
    down_EDI: Tensor,
    indices_NK: Tensor,
    weights_NK: Tensor,
    scales: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The routed part of eq 12: sum over each row's choices of weight * expert(row), [N, D]."""
    function = _functions()
    assert function is not None
    x_ND, indices = x_ND.contiguous(), indices_NK.contiguous()
    weights = weights_NK.to(torch.float32).contiguous()
    E, D, inner = down_EDI.shape
    out = torch.zeros(x_ND.shape)
    gate_up_scales, _ = _scaling(scales[0] if scales else None, gate_up_EOD)
    down_scales, _ = _scaling(scales[1] if scales else None, down_EDI)
    function[1](
        _KINDS[down_EDI.dtype],
        gate_up_EOD.data_ptr(),
        gate_up_scales,
        down_EDI.data_ptr(),
        down_scales,
        GROUP if scales else max(D, inner),
        *(E, D, inner),
        x_ND.data_ptr(),
        *indices.shape,
        indices.data_ptr(),
        weights.data_ptr(),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


@dataclass(frozen=True)
class Texts:
    """Where the queries and the cached tokens of some texts are, int64 on the CPU: the same for all layers.

    Text p has rows rows_at[p] .. rows_at[p + 1] and sees the runs of slots runs_at[p] .. runs_at[p + 1].
    """

    rows_at: Tensor
    runs_at: Tensor
    starts: Tensor
    ends: Tensor


def one_text(length: int) -> Texts:
    """One row that sees `length` slots from the first on."""
    return Texts(_ONE, _ONE, _ONE[:1], torch.tensor([length]))


_ONE = torch.tensor([0, 1])


def can_attend(query_MHX: Tensor, cache_SX: Tensor) -> bool:
    """Whether `attend` serves these here."""
    return (
        query_MHX.device.type == "cpu"
        and query_MHX.dtype == cache_SX.dtype == torch.float32
        and cache_SX.is_contiguous()
        and not torch.compiler.is_compiling()
        and _functions() is not None
    )


def attend(query_MHX: Tensor, cache_SX: Tensor, texts: Texts) -> Tensor:
    """Causal softmax(q . c) c of each text's last rows over its runs of the cache: [M, H, X].

    The cache is read once: scores, a softmax that goes along, and the weighted sum of one stretch of
    keys before the next.
    """
    function = _functions()
    assert function is not None
    query_MHX = query_MHX.contiguous()
    out = torch.empty_like(query_MHX)
    function[2](
        cache_SX.data_ptr(),
        cache_SX.shape[1],
        query_MHX.data_ptr(),
        query_MHX.shape[1],
        len(texts.rows_at) - 1,
        texts.rows_at.data_ptr(),
        texts.runs_at.data_ptr(),
        texts.starts.data_ptr(),
        texts.ends.data_ptr(),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def _scaling(scales_OG: Tensor | None, weight: Tensor) -> tuple[int | None, int]:
    """Where the scales are, and inputs per scale."""
    if (scales_OG is None) == (weight.dtype == torch.int8):
        raise ValueError(
            f"weights of {weight.dtype} {'need' if scales_OG is None else 'have no'} scales"
        )
    if scales_OG is None:
        return None, weight.shape[-1]
    return scales_OG.data_ptr(), GROUP
