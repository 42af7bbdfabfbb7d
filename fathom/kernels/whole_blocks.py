"""Blocks of the model for a few rows in one call of our C++ (`native/block.hpp`).

A row's way through a block is a dozen products and some small functions; as torch's operations the
calls cost more than reading the weights. The structures here are those of block.hpp, field by field.

Shapes: N rows, D hidden, R rotary dims, L layers.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fathom.kernels.few_rows import INT, LONG, POINTER, Texts, TextsStructure, Weights
from fathom.kernels.native import library
from fathom.kernels.rotary import Rotation

_FLOAT = ctypes.c_float


class Shape(ctypes.Structure):
    """What all layers have in common. query_rank 0: queries come from the hidden state."""

    _fields_ = (
        *((name, LONG) for name in ("hidden", "heads", "nope", "rope", "value", "rank")),
        *((name, LONG) for name in ("query_rank", "experts", "choices", "groups", "kept_groups")),
        *((name, LONG) for name in ("softmax", "best_two", "normed", "interleave", "group")),
        *((name, _FLOAT) for name in ("routed_scale", "attention_scale", "eps", "latent_eps")),
    )


class Layer(ctypes.Structure):
    """One layer's weights and cache. No router: a dense layer; width 0: no shared experts."""

    _fields_ = (
        *((f"{name}_norm", POINTER) for name in ("input", "query", "latent", "post")),
        *((name, Weights) for name in ("query_a", "query_b", "latent", "out")),
        *((name, POINTER) for name in ("up_by_head", "router", "bias")),
        *((name, Weights) for name in ("gate_up", "routed_down", "gate", "up", "down")),
        *((name, LONG) for name in ("inner", "width")),
        ("cache", POINTER),
    )


class _Pass(ctypes.Structure):
    _fields_ = (
        ("rows", LONG),
        *((name, POINTER) for name in ("cos", "sin", "slots")),
        ("texts", TextsStructure),
        ("h", POINTER),
    )


@cache
def _function() -> Any | None:
    found = library()
    if found is None:
        return None
    function = found.fathom_blocks
    function.argtypes = [POINTER, POINTER, LONG, POINTER, INT]
    function.restype = None
    return function


def available() -> bool:
    """Whether there is C++ here."""
    return _function() is not None


def read(
    shape: Shape,
    layers: ctypes.Array[Layer],
    h_ND: Tensor,
    rotation: Rotation,
    slots_N: Tensor,
    texts: Texts,
) -> Tensor:
    """The residual stream behind the layers, [N, D], in place of what came; the cache gets the rows' entries.

    slots_N: where in the cache [slots, C + R] those go, int64.
    """
    function = _function()
    assert function is not None
    if h_ND.dtype != torch.float32 or h_ND.device.type != "cpu" or not h_ND.is_contiguous():
        raise ValueError(
            f"rows of {h_ND.dtype} on {h_ND.device} cannot be read; give contiguous float32 on the CPU"
        )
    cos, sin = rotation.cos.contiguous(), rotation.sin.contiguous()
    places = (cos.data_ptr(), sin.data_ptr(), slots_N.data_ptr(), texts.structure())
    rows = _Pass(h_ND.shape[0], *places, h_ND.data_ptr())
    function(ctypes.byref(shape), layers, len(layers), ctypes.byref(rows), torch.get_num_threads())
    return h_ND
