"""Reading block-quantised FP8 weights (report §3.3.2, Figure 7b).

A matrix [O, I] in float8_e4m3fn comes with a float32 grid [ceil(O/128), ceil(I/128)] named
`weight_scale_inv`. The name is historical: a block is *multiplied* by its number. Blocks at ragged
edges count as padded with zeros; 576 rows, for example, have five rows of scales, the last for 64
rows only.
"""

from __future__ import annotations

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
SCALE = "_scale_inv"
"""What is appended to a tensor's name to name its scales."""


def grid(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """Shape of the scales of weights [..., O, I]."""
    return *shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1])


def dequantize(weight: Tensor, scale: Tensor, block: tuple[int, int] = (128, 128)) -> Tensor:
    """float32 [..., O, I] from FP8 `weight` [..., O, I] and float32 `scale` [..., ceil(O/rows), ceil(I/columns)]."""
    (rows, columns), (out, into) = block, weight.shape[-2:]
    down, across = scale.shape[-2:]
    padded = scale.new_zeros(*scale.shape[:-2], down * rows, across * columns, dtype=torch.float32)
    padded[..., :out, :into] = weight
    blocks = padded.unflatten(-1, (across, columns)).unflatten(-3, (down, rows))
    blocks *= scale.float()[..., :, None, :, None]
    return padded[..., :out, :into]
