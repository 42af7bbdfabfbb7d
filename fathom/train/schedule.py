"""The learning rate of a stage as a pure function (report §4.2): linear warm-up, constant, cosine.

Positions count optimiser steps, and a step uses the rate at its end: step n is position n, so that the
first step already learns and position 0, before any step, has rate 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Moment:
    """What holds at one moment of a run."""

    stage: str
    step: int
    """Optimiser steps done."""
    tokens: int
    """Tokens trained on."""
    lr: float
    batch: int
    """Sequences in a step: in the one that ends here when a step was asked for, else in one that would begin here."""
    seq_len: int
    gamma: float
    mtp_weight: float
    balance_alpha: float
    rope_scaling: dict[str, Any] | None


def learning_rate(
    position: float, steps: float, lr: float, lr_end: float, warmup_steps: int, decay_steps: float
) -> float:
    """Rate at `position` of `steps`: 0 to `lr` over the warm-up, then `lr`, then down to `lr_end`.

    The cosine takes the last `decay_steps` steps; with none, the rate stays `lr` to the end. A stage that is given in
    tokens need not be a whole number of steps long.
    """
    if position < warmup_steps:
        return lr * position / warmup_steps
    decay_start = steps - decay_steps
    if position <= decay_start or decay_steps == 0:
        return lr
    progress = min((position - decay_start) / decay_steps, 1.0)
    return lr_end + (lr - lr_end) * (1 + math.cos(math.pi * progress)) / 2
