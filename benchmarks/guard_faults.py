"""The faults that `guard.py` plants, and how: around the training loop's gradients and the loader's batches."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fathom.data.loader import Batch, Loader
from fathom.train import loop

STEPS, FAULT_STEP, NEVER = 300, 240, 1e9
"""Steps of a run, the step at which faults begin, and a clip_norm that clips nothing."""
NAMES = {"none": "no guard", "skip": "guard: skip", "rollback": "guard: roll back"}
"""Kinds of guard: none, or an action of [guard]."""


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong: what, from which step, for how many, how strongly, with which clip_norm, how often."""

    title: str
    kind: str = "none"
    step: int = FAULT_STEP
    steps: int = 1
    strength: float = 1.0
    clip_norm: float = 1.0
    every: int = 1
    rolled_back: bool = False
    """Whether rolling back is tried too."""

    def at(self, step: int) -> bool:
        inside = self.step <= step < self.step + self.steps
        return inside and (step - self.step) % self.every == 0


FAULTS = (
    Fault("NaN in the gradient", "scale", strength=math.nan, rolled_back=True),
    Fault("1 batch of one token", "one token"),
    Fault("8 batches of random tokens", "random", steps=8),
    Fault("25 random batches of 50", "random", steps=50, every=2),
    Fault("1 batch of one token", "one token", clip_norm=NEVER),
    Fault("8 batches of random tokens", "random", steps=8, clip_norm=NEVER, rolled_back=True),
    Fault("gradient × 10", "scale", strength=10),
    Fault("gradient × 10", "scale", strength=10, clip_norm=NEVER),
    Fault("noise of 10 × the gradient", "noise", strength=10, clip_norm=NEVER),
    Fault("8 gradients × 10", "scale", steps=8, strength=10, clip_norm=NEVER, rolled_back=True),
    Fault("gradient × 1,000", "scale", strength=1e3, clip_norm=NEVER),
    Fault("8 gradients × −10", "scale", steps=8, strength=-10, clip_norm=NEVER),
)


class Planted:
    """One fault, around the loop's gradients and the loader's batches; strikes a step's machine only once."""

    def __init__(self, fault: Fault) -> None:
        self.fault, self.struck = fault, set[int]()
        self.gradients, self.batch = loop.accumulate_gradients, Loader.batch

    def accumulate(
        self, model: Any, batch: Batch, micro_batch: int, moment: Any, *more: Any
    ) -> Any:
        found = self.gradients(model, batch, micro_batch, moment, *more)
        if self.fault.at(moment.step) and moment.step not in self.struck:
            self.struck.add(moment.step)
            self._spoil([p.grad for p in model.parameters() if p.grad is not None], moment.step)
        return found

    def _spoil(self, gradients: list[Tensor], step: int) -> None:
        if self.fault.kind == "scale":
            torch._foreach_mul_(gradients, self.fault.strength)
        if self.fault.kind == "noise":
            random = torch.Generator().manual_seed(step)
            norm = torch.nn.utils.get_total_norm(gradients)
            count = sum(g.numel() for g in gradients)
            for g in gradients:
                noise = torch.randn(g.shape, generator=random)
                g += self.fault.strength * norm / math.sqrt(count) * noise

    def read(self, loader: Loader, first_sequence: int, count: int) -> Batch:
        """Sequences of the steps' first reading are poisoned, whenever they are read."""
        batch = self.batch(loader, first_sequence, count)
        if not self.fault.at(first_sequence // count + 1):
            return batch
        if self.fault.kind == "one token":
            return replace(batch, tokens=torch.full_like(batch.tokens, 7))
        if self.fault.kind == "random":
            random = torch.Generator().manual_seed(first_sequence)
            tokens = torch.randint(4, 1024, batch.tokens.shape, generator=random)
            return replace(batch, tokens=tokens)
        return batch

    @contextmanager
    def here(self) -> Iterator[None]:
        planted = self

        def read(loader: Loader, first_sequence: int, count: int) -> Batch:
            return planted.read(loader, first_sequence, count)

        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(loop, "accumulate_gradients", self.accumulate))
            stack.enter_context(mock.patch.object(Loader, "batch", read))
            yield


@dataclass
class Outcome:
    """How a run ended."""

    fault: Fault
    guard: str
    seed: int
    folder: Path
    losses: list[float]
    """Training loss by step."""
    spikes: list[dict[str, Any]]
    end: float
    """Held-out loss at the end; NaN when it is none or the run did not come to its end."""
    error: str = ""


Clean = dict[float, list[Outcome]]
"""Clean runs by clip_norm, a run per seed."""


def title_of(fault: Fault) -> str:
    """What stands above its picture."""
    return fault.title + (", no clipping" if fault.clip_norm == NEVER else "")
