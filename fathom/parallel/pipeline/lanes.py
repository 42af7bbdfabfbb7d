"""Where an operation runs: computations here, all-to-alls beside them.

On a GPU the host only issues. What follows on one stream waits for what was issued there before, so an
all-to-all needs a stream of its own; there it waits for what it needs and nothing else (events), and the
computation that needs it waits for it. NCCL's transfers run on a third, NCCL's own, in the order in which they were
posted. The backward pass of an operation runs on the stream of its forward pass; autograd sees to that.

A dispatch is where the host does wait, when it sends and when it receives: how many rows go, how many come and to
how many experts it must know to make room for them. It waits for the stream of the network alone. The computations
issued before go on meanwhile, and in the published order one of the other chunk stands in front of each such wait.

On a CPU the host computes, transfers are the business of gloo's threads, and there is nothing to choose.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def network_stream(device: torch.device) -> torch.cuda.Stream | None:
    """A stream for all-to-alls, where the device has any."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


class Lane:
    """The way of one micro-batch, between the stream of computations and that of the network."""

    def __init__(self, network: torch.cuda.Stream | None) -> None:
        self.network = network
        self.computed: torch.cuda.Event | None = None

    def mark(self) -> None:
        """What this micro-batch sends next was made by now."""
        if self.network is not None:
            self.computed = torch.cuda.current_stream().record_event()

    @contextmanager
    def beside(self, *used: Tensor) -> Iterator[None]:
        """Within, operations go to the network's stream, behind the mark; `used` was made on the other."""
        if self.network is None:
            yield
            return
        if self.computed is not None:
            self.network.wait_event(self.computed)
        for tensor in used:
            tensor.record_stream(self.network)  # or its memory may be given away too early
        with torch.cuda.stream(self.network):
            yield

    def join(self, *made: Tensor) -> None:
        """Computations wait for what was issued beside them, and use what was `made` there."""
        if self.network is None:
            return
        current = torch.cuda.current_stream()
        current.wait_stream(self.network)
        for tensor in made:
            tensor.record_stream(current)
