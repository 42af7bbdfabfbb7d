"""Compiling the small elementwise functions inside the autograd rules, where that pays.

A whole-model `torch.compile` takes a minute before the first step and gets in the way of rules that
are to be replaced at the seams. What it wins on a CPU is the fusion of elementwise chains; those
chains are a few small functions here, each compiled once for all layers. Off until
`compile_elementwise(True)`; if the compiler is missing or fails, the plain function is used from
then on and the reason is warned once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])

_state: dict[str, bool] = {"enabled": False}


def compile_elementwise(enabled: bool) -> None:
    """Switch the compiled forms of the elementwise functions on or off for this process."""
    _state["enabled"] = enabled


def fused(function: F, plain: F | None = None) -> F:
    """A small pure function: compiled while `compile_elementwise` is on, else itself or `plain`.

    `plain` is for functions that, uncompiled, are quicker writing into their result by halves.
    """
    uncompiled = plain or function
    compiled: Callable[..., Any] | None = None

    @wraps(function)
    def call(*arguments: Any) -> Any:
        nonlocal compiled
        if not _state["enabled"] or torch.compiler.is_compiling():
            return uncompiled(*arguments)
        if compiled is None:
            compiled = torch.compile(function, dynamic=True)
        try:
            return compiled(*arguments)
        except Exception as problem:
            # A compiler has many ways to fail; the plain form always works.
            _state["enabled"] = False
            warnings.warn(f"torch.compile failed, going on without it: {problem}", stacklevel=2)
            return uncompiled(*arguments)

    return call  # type: ignore[return-value]
