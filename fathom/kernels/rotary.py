"""Turning the rotary dimensions of queries and keys by the angles of their positions (eqs 3, 8).

Pair (a, b) becomes (a cos - b sin, b cos + a sin), computed in float32. The released weights have
pairs side by side, (2j, 2j+1): as complex numbers that is one product. Without `interleave` pairs
are (j, j + R/2).

Shapes: B batch, T positions, H heads, R rotary dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotation:
    """cos and sin of each position's angles, [B or 1, T, 1, R/2], and which dimensions are pairs."""

    cos: Tensor
    sin: Tensor
    interleave: bool = True

    def back(self) -> Rotation:
        """By the same angles the other way, which is also the gradient's."""
        return replace(self, sin=-self.sin)

    def first(self, length: int) -> Rotation:
        """Of the first `length` positions only."""
        return self.rows(slice(length))

    def rows(self, rows: slice | Tensor) -> Rotation:
        """Of some positions only."""
        return replace(self, cos=self.cos[:, rows], sin=self.sin[:, rows])


def rotate_reference(x_BTHR: Tensor, rotation: Rotation) -> Tensor:
    """The definition, with torch's own gradient."""
    x = x_BTHR.to(torch.promote_types(x_BTHR.dtype, torch.float32))
    a, b = (x[..., 0::2], x[..., 1::2]) if rotation.interleave else x.chunk(2, dim=-1)
    pair = (a * rotation.cos - b * rotation.sin, b * rotation.cos + a * rotation.sin)
    turned = torch.stack(pair, -1).flatten(-2) if rotation.interleave else torch.cat(pair, -1)
    return turned.to(x_BTHR.dtype)


def rotate_(x_BTHR: Tensor, rotation: Rotation) -> Tensor:
    """The same in place."""
    even = (x_BTHR.storage_offset(), *x_BTHR.stride()[:-1])
    paired = x_BTHR.stride(-1) == 1 and all(number % 2 == 0 for number in even)
    plain = torch.is_grad_enabled() or x_BTHR.dtype != torch.float32
    if not rotation.interleave or not paired or plain:
        return x_BTHR.copy_(rotate_reference(x_BTHR, rotation))
    turning = torch.complex(rotation.cos, rotation.sin)
    torch.view_as_complex(x_BTHR.unflatten(-1, (-1, 2))).mul_(turning)
    return x_BTHR


def rotate(x_BTHR: Tensor, rotation: Rotation) -> Tensor:
    """[B, T, H, R] turned, as a new tensor."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():  # which has no complex numbers
        return rotate_reference(x_BTHR, rotation)
    return rotate_(x_BTHR.clone(memory_format=torch.contiguous_format), rotation)
