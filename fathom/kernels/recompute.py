"""Recomputation that lives inside autograd rules (report §3.2.3).

The report keeps neither the outputs of RMSNorm nor those of the MLA up-projections for the backward
pass but makes them again; the same pays for SwiGLU. Wrapping layers in `torch.utils.checkpoint`
would do it too, but re-runs whole layers (router counters count twice) and falls apart when the
backward is split in two. Here a tensor can carry the way it was made; a rule that would save the
tensor saves that instead. So the saving composes with any rule that uses `keep` and `kept`: plain
products, grouped products, attention, and whatever replaces the products at the seam.

A tensor wanted by several rules is made again once: `Remade` counts who still needs it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor


class Remade:
    """How to make a tensor again, and the tensor itself while somebody still needs it."""

    __slots__ = ("inputs", "make", "users", "value")

    def __init__(self, make: Callable[..., Tensor], inputs: tuple[Any, ...]) -> None:
        self.make, self.inputs = make, inputs
        self.users = 0
        self.value: Tensor | None = None

    def get(self) -> Tensor:
        """The tensor, made at the first call of a backward pass and dropped at the last."""
        self.users -= 1
        value = self.value
        if value is None:
            inputs = (i.get() if isinstance(i, Remade) else i for i in self.inputs)
            with torch.no_grad():
                value = self.make(*inputs)
        self.value = value if self.users > 0 else None
        return value


def remember(tensor: Tensor, make: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """Mark `tensor` as equal to `make(*inputs)`, so that rules keep the inputs instead of it.

    An input that is itself remembered is kept as its own recipe.
    """
    tensor._fathom_remade = Remade(make, tuple(map(_as_kept, inputs)))  # type: ignore[attr-defined]
    return tensor


def same(tensor: Tensor, other: Tensor) -> Tensor:
    """Mark `tensor` as being `other` in another graph: rules keep neither where they would not keep `other`."""
    remade = getattr(other, "_fathom_remade", None)
    if remade is not None:
        tensor._fathom_remade = remade  # type: ignore[attr-defined]
    return tensor


def _as_kept(value: Any) -> Any:
    """A tensor without its history, or how it is made again."""
    remade = getattr(value, "_fathom_remade", None)
    if remade is not None:
        remade.users += 1
        return remade
    return value.detach() if isinstance(value, Tensor) else value


def keep(ctx: Any, *tensors: Tensor | None) -> None:
    """`ctx.save_for_backward`, except that remembered tensors are not kept but their recipe."""
    ctx.remade = tuple(getattr(tensor, "_fathom_remade", None) for tensor in tensors)
    for remade in ctx.remade:
        if remade is not None:
            remade.users += 1
    plain = (t if r is None else None for t, r in zip(tensors, ctx.remade, strict=True))
    ctx.save_for_backward(*plain)


def kept(ctx: Any) -> tuple[Any, ...]:
    """What `keep` was given, remembered tensors made again."""
    return tuple(get() for get in kept_later(ctx))


def kept_later(ctx: Any) -> tuple[Callable[[], Any], ...]:
    """The same, each by a function to be called once, when it is needed; it may outlive the backward pass."""
    pairs = zip(ctx.saved_tensors, ctx.remade, strict=True)
    return tuple(
        partial(_itself, tensor) if remade is None else remade.get for tensor, remade in pairs
    )


def _itself(tensor: Tensor | None) -> Tensor | None:
    return tensor
