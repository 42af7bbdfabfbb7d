"""Weight gradients put off: the backward pass in two (report §3.2.1, after ZeroBubble).

The gradient of a product's input is wanted at once by the stage before; that of its weight by nobody
until the optimiser's step. Inside `PutOff.collecting` the products' rules compute the first only and leave the
second as a task, so that a pipeline can run the tasks where it would otherwise wait (DeepSeek's
DualPipe has a `WeightGradStore` for this). A task keeps the product's input and the gradient of its
output, and nothing of the graph.

torch's own split (`torch.distributed.pipelining`) walks the graph twice and would compute both gradients
in both walks of a rule like ours; a rule that puts off its own half costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

Task = tuple[Tensor, Callable[[], Tensor]]
"""A weight, and what makes its gradient."""


class PutOff:
    """What the products of one model share; outside of `collecting` it changes nothing."""

    def __init__(self) -> None:
        self._tasks: list[Task] | None = None

    @contextmanager
    def collecting(self) -> Iterator[list[Task]]:
        """Within, weight gradients are left as tasks in the list."""
        assert self._tasks is None
        self._tasks = []
        try:
            yield self._tasks
        finally:
            self._tasks = None

    def gradient(self, weight: Tensor, make: Callable[[], Tensor]) -> Tensor | None:
        """What a rule gives as its weight's gradient: the gradient, or None where it was put off."""
        if self._tasks is None:
            return make()
        self._tasks.append((weight, make))
        return None


@torch.no_grad()
def run_tasks(tasks: list[Task]) -> None:
    """Add the gradients that were put off to their weights' `grad`; the list is empty then."""
    while tasks:
        weight, make = tasks.pop(0)
        gradient = make()
        if weight.grad is None:
            weight.grad = gradient
        else:
            weight.grad += gradient
