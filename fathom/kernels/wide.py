"""Where more precision than BF16 is wanted: float32, or float64 for a model in float64.

A model in float64 is how layouts of many processes are compared with one process; a single sum in
float32 would hide what they differ by.
"""

from __future__ import annotations

import torch
from torch import Tensor


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for itself and all narrower ones, float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def at_least_float32(x: Tensor) -> Tensor:
    """The tensor in `wide_dtype` of its own; itself where that is what it is in."""
    return x.to(wide_dtype(x.dtype))
