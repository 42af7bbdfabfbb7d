"""Laying out MLA's raw projections for attention, and the gradients back (report eqs 3-4, 7-9).

kv_b_proj gives each head [k_nope | v] side by side, and the rotated key comes once for all heads.
Torch's flash kernel on a CPU wants values as wide as keys, and V3's are narrower (128 < 192).
Padding them costs a copy; but the d_qk numbers that *end* with v are already there in kv_b_proj's
output: the leading ones are the tail of k_nope, whose output columns are dropped and whose gradient
is zero.

Shapes: B batch, T positions, H heads, P = nope dims, R rotary dims, V value dims.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from fathom.kernels.rotary import Rotation, rotate_
from fathom.kernels.visible import ALL, Visible


@dataclass(frozen=True)
class HeadShape:
    """Heads and their sizes: H heads of P + R query/key dimensions and V value dimensions."""

    heads: int
    nope: int
    rope: int
    value: int

    @property
    def qk(self) -> int:
        return self.nope + self.rope


def _by_heads(x_BTHd: Tensor) -> Tensor:
    """A copy that stands in memory head after head, as products per head want it; same shape."""
    return x_BTHd.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)


class Expansion:
    """What one call of expanded attention knows besides its projections, and how they are laid out.

    Rotated queries, whole keys, widened values; angles, softmax scale, and which keys are visible.
    """

    def __init__(
        self,
        shape: HeadShape,
        rotation: Rotation,
        scale: float,
        visible: Visible = ALL,
    ) -> None:
        self.shape, self.rotation, self.scale, self.visible = shape, rotation, scale, visible
        self.wide_values = shape.value <= shape.qk and shape.qk - shape.value <= shape.nope

    def operands(
        self, q_raw: Tensor, kv_raw: Tensor, k_rope_BTR: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, T, H, .], all equally wide; values are the last of theirs."""
        return self.queries(q_raw), *self.keys_values(kv_raw, k_rope_BTR)

    def operands_grad(
        self, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The transpose of `operands`."""
        return self.queries_grad(grad_q), *self.keys_values_grad(grad_k, grad_v)

    def values(self, wide: Tensor) -> Tensor:
        """The V numbers in which widened values, or what attention made of them, end."""
        return wide[..., wide.shape[-1] - self.shape.value :]

    def queries(self, q_raw: Tensor) -> Tensor:
        """[B, T, H*(P+R)] -> [B, T, H, P+R], the last R dimensions rotated (eqs 7-9)."""
        s = self.shape
        q = _by_heads(q_raw.view(*q_raw.shape[:2], s.heads, s.qk))
        rotate_(q[..., s.nope :], self.rotation)
        return pad(q, (0, s.value - s.qk)) if s.value > s.qk else q

    def queries_grad(self, grad_q: Tensor) -> Tensor:
        """The transpose of `queries`: turned back, heads flattened."""
        grad = grad_q[..., : self.shape.qk].clone(memory_format=torch.contiguous_format)
        rotate_(grad[..., self.shape.nope :], self.rotation.back())
        return grad.flatten(2)

    def keys_values(self, kv_raw: Tensor, k_rope_BTR: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T, H*(P+V)] and the shared rotated key -> k and v, equally wide.

        [B, T, H, P+R], or V if that is wider; v ends in the values.
        """
        s = self.shape
        kv = kv_raw.view(*kv_raw.shape[:2], s.heads, s.nope + s.value)
        B, T = kv.shape[:2]
        k = kv.new_empty(B, s.heads, T, s.qk).transpose(1, 2)
        k[..., : s.nope] = kv[..., : s.nope]
        k[..., s.nope :] = k_rope_BTR[:, :, None]
        if self.wide_values:
            return k, kv[..., s.nope + s.value - s.qk :]
        narrow = s.qk - s.value
        v = kv[..., s.nope :]
        return (k, pad(v, (narrow, 0))) if narrow >= 0 else (pad(k, (0, -narrow)), v)

    def keys_values_grad(self, grad_k: Tensor, grad_v: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the raw key-value projection and of the shared rotated key."""
        s = self.shape
        grad_kv = grad_k.new_empty(*grad_k.shape[:3], s.nope + s.value)
        grad_kv[..., : s.nope] = grad_k[..., : s.nope]
        grad_kv[..., s.nope :] = self.values(grad_v)
        return grad_kv.flatten(2), grad_k[..., s.nope : s.qk].sum(2)
