"""Which tensors are alive at a time, seen at torch's dispatcher; exact where resident sizes are noise."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveTensors(TorchDispatchMode):
    """Within: counts what operators allocate. `peak`: most bytes at a time, `largest`: of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = self.largest = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        found = function(*arguments, **(options or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf.untyped_storage())
        return found

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self.sizes:
            return
        self.sizes[storage._cdata] = storage.nbytes()
        weakref.finalize(storage, self._drop, storage._cdata)
        self.now += storage.nbytes()
        self.peak, self.largest = max(self.peak, self.now), max(self.largest, storage.nbytes())

    def _drop(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)


def live(work: Callable[[], Any]) -> LiveTensors:
    """What `work` allocates."""
    with LiveTensors() as seen:
        work()
    return seen
