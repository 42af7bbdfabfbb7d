"""Products of a few rows on a CPU at the rate of memory, by our own C++ where it can be compiled.

With up to some sixteen rows a product reads every weight for next to no arithmetic, and a library's
product reaches half of the memory's rate or less. `native/rows.hpp` reads each weight once for
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
POINTER, LONG, INT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int


class Weights(ctypes.Structure):
    """A matrix as C++ reads it; the tensors must outlive it."""

    _fields_ = (("data", POINTER), ("scales", POINTER), ("kind", LONG))

    @classmethod
    def of(cls, weight: Tensor, scales: Tensor | None = None) -> Weights:
        """Of contiguous [..., O, I], int8 with scales [..., O, ceil(I / GROUP)]."""
        if (scales is None) == (weight.dtype == torch.int8):
            raise ValueError(
                f"weights of {weight.dtype} {'need' if scales is None else 'have no'} scales"
            )
        at = None if scales is None else scales.data_ptr()
        return cls(weight.data_ptr(), at, _KINDS[weight.dtype])


@cache
def _functions() -> tuple[Any, Any, Any] | None:
    """The three C functions with their types, or None."""
    found = library()
    if found is None:
        return None
    product, experts, attend = found.fathom_product, found.fathom_experts, found.fathom_attend
    product.argtypes = [POINTER, LONG, POINTER, LONG, LONG, LONG, POINTER, INT]
    experts.argtypes = [
        *(POINTER, POINTER, LONG, LONG, LONG, LONG),
        *(POINTER, LONG, LONG, POINTER, POINTER, POINTER, INT),
    ]
    attend.argtypes = [POINTER, LONG, LONG, POINTER, LONG, POINTER, POINTER, INT]
    product.restype = experts.restype = attend.restype = None
    return product, experts, attend


def readable(weight: Tensor) -> bool:
    """Whether C++ reads such a matrix where it stands."""
    return weight.device.type == "cpu" and weight.dtype in _KINDS and weight.is_contiguous()


def can(x: Tensor, weight: Tensor) -> bool:
    """Whether few rows x (float32, on a CPU) may be multiplied with such weights here."""
    return (
        not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.shape[:-1].numel() <= MOST_ROWS
        and readable(weight)
        and _functions() is not None
    )


def product(x: Tensor, weight_OI: Tensor, scales_OG: Tensor | None = None) -> Tensor:
    """x [..., I] times the weights transposed, [..., O]. int8 weights have scales [O, ceil(I / GROUP)]."""
    function = _functions()
    assert function is not None
    x_NI = x.reshape(-1, x.shape[-1]).contiguous()
    outputs, inputs = weight_OI.shape
    out = x_NI.new_empty(x_NI.shape[0], outputs)
    weights = Weights.of(weight_OI, scales_OG)
    function[0](
        ctypes.byref(weights),
        GROUP if scales_OG is not None else inputs,
        x_NI.data_ptr(),
        *(x_NI.shape[0], inputs, outputs),
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
    out = torch.zeros_like(x_ND)
    first, second = scales or (None, None)
    gate_up, down = Weights.of(gate_up_EOD, first), Weights.of(down_EDI, second)
    function[1](
        ctypes.byref(gate_up),
        ctypes.byref(down),
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


class TextsStructure(ctypes.Structure):
    _fields_ = (
        ("count", LONG),
        *((name, POINTER) for name in ("rows_at", "runs_at", "starts", "ends")),
    )


@dataclass(frozen=True)
class Texts:
    """Where the queries and the cached tokens of some texts are, int64 on the CPU: the same for all layers.

    Text p has rows rows_at[p] .. rows_at[p + 1] and sees the runs of slots runs_at[p] .. runs_at[p + 1].
    """

    rows_at: Tensor
    runs_at: Tensor
    starts: Tensor
    ends: Tensor

    def structure(self) -> TextsStructure:
        """As C++ reads it; `self` must outlive it."""
        parts = (self.rows_at, self.runs_at, self.starts, self.ends)
        return TextsStructure(len(self.rows_at) - 1, *(part.data_ptr() for part in parts))


def can_attend(query_MHX: Tensor, cache_SX: Tensor) -> bool:
    """Whether `attend` serves these here."""
    return (
        query_MHX.device.type == "cpu"
        and query_MHX.dtype == cache_SX.dtype == torch.float32
        and cache_SX.is_contiguous()
        and not torch.compiler.is_compiling()
        and _functions() is not None
    )


def attend(query_MHX: Tensor, cache_SX: Tensor, texts: Texts, kept: int | None = None) -> Tensor:
    """Causal softmax(q . c) c of each text's last rows over its runs of the cache: [M, H, X], or [M, H, kept].

    The cache is read once: scores, a softmax that goes along, and the weighted sum of one stretch of
    keys before the next. `kept`: how many numbers of each key the sum is wanted of.
    """
    function = _functions()
    assert function is not None
    query_MHX = query_MHX.contiguous()
    width = cache_SX.shape[1]
    kept = width if kept is None else kept
    out = query_MHX.new_empty(*query_MHX.shape[:2], kept)
    places = texts.structure()
    function[2](
        cache_SX.data_ptr(),
        *(width, kept),
        query_MHX.data_ptr(),
        query_MHX.shape[1],
        ctypes.byref(places),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out
