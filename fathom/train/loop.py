"""The training loop (report §4.2), top to bottom on one page.

Everything that is not training (logs, evaluation, samples, checkpoints, progress) is a callback, called after each step
in the order given. Nothing here looks at a clock to decide anything, so the same recipe computes the same numbers
wherever it was interrupted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fathom.data.loader import Ahead, Batch, Loader
from fathom.errors import FathomError
from fathom.model import Losses, Transformer, losses, update_bias
from fathom.train.optimizer import OptimConfig, build_adamw, clip, set_learning_rate
from fathom.train.schedule import Moment


@dataclass
class Trainer:
    """What a run trains and how far it is."""

    model: Transformer
    optimizer: torch.optim.AdamW
    optim: OptimConfig
    step: int = 0
    tokens: int = 0

    @classmethod
    def start(cls, model: Transformer, optim: OptimConfig) -> Trainer:
        """A trainer at step 0."""
        return cls(model.train(), build_adamw(model, optim), optim)


@dataclass
class StepRecord:
    """One optimiser step, for the callbacks."""

    moment: Moment
    loss: float
    mtp_loss: float
    balance_loss: float
    grad_norm: float
    seconds: float
    expert_load: Tensor
    """int64 [MoE blocks, experts]: tokens of the whole batch sent to each expert."""
    sources: dict[str, int]
    """Sequences of the batch from each source of the data."""


Callback = Callable[[Trainer, StepRecord], None]


@dataclass
class StagePlan:
    """The steps of one stage: its data, and what holds at each step."""

    loader: Loader
    micro_batch: int
    first_sequence: Callable[[int], int]
    """Sequences that the stage has taken before a step, counted over the whole run from 1."""
    last_step: int
    moment: Callable[[int], Moment]
    """What holds at a step, counted over the whole run from 1."""
    stop: Callable[[], bool] = field(default=lambda: False)
    """Asked after each step; True ends the stage early."""

    def rows(self, step: int) -> tuple[int, int] | None:
        """(first sequence, how many) of a step, or None behind the stage's end."""
        if step > self.last_step:
            return None
        return self.first_sequence(step), self.moment(step).batch


def train_stage(trainer: Trainer, plan: StagePlan, callbacks: Sequence[Callback]) -> bool:
    """Run the stage's remaining steps; False when `plan.stop` ended it early."""
    with closing(Ahead(plan.loader)) as reader:
        for step in range(trainer.step + 1, plan.last_step + 1):
            started = time.perf_counter()
            moment, rows = plan.moment(step), plan.rows(step)
            assert rows is not None
            batch = reader.batch(rows, then=plan.rows(step + 1))
            found = accumulate_gradients(trainer.model, batch, plan.micro_batch, moment)
            grad_norm = clip(trainer.model, trainer.optim.clip_norm).item()
            _refuse_non_finite(step, found.total.item(), grad_norm)
            set_learning_rate(trainer.optimizer, moment.lr)
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()
            update_bias(trainer.model, moment.gamma)
            trainer.step, trainer.tokens = step, moment.tokens
            record = StepRecord(
                moment,
                found.main.item(),
                found.mtp.item(),
                found.balance.item(),
                grad_norm,
                time.perf_counter() - started,
                found.expert_load,
                batch.sources,
            )
            for callback in callbacks:
                callback(trainer, record)
            if plan.stop() and step < plan.last_step:
                return False
    return True


def accumulate_gradients(
    model: Transformer, batch: Batch, micro_batch: int, moment: Moment
) -> Losses:
    """Gradients of the mean loss over the batch, a micro-batch at a time; detached sums.

    Weighting each part by its share of targets gives the whole batch's mean.
    """
    device = model.lm_head.weight.device
    targets_B = batch.targets()
    parts, shares = [], []
    for start in range(0, len(targets_B), micro_batch):
        rows = slice(start, start + micro_batch)
        part = losses(
            model,
            batch.tokens[rows].to(device),
            None if batch.document_ids is None else batch.document_ids[rows],
            mtp_weight=moment.mtp_weight,
            balance_alpha=moment.balance_alpha,
        )
        share = (targets_B[rows].sum() / targets_B.sum()).item()
        (part.total * share).backward()
        parts.append(part)
        shares.append(share)
    return _weighted(parts, shares)


def _weighted(parts: list[Losses], shares: list[float]) -> Losses:
    def mean(values: Iterable[Tensor]) -> Tensor:
        pairs = zip(values, shares, strict=True)
        return torch.stack([value.detach() * share for value, share in pairs]).sum()

    return Losses(
        mean(part.main for part in parts),
        mean(part.mtp for part in parts),
        mean(part.balance for part in parts),
        mean(part.total for part in parts),
        tuple(map(mean, zip(*(part.mtp_by_depth for part in parts), strict=True))),
        torch.stack([part.expert_load for part in parts]).sum(0),
    )


def _refuse_non_finite(step: int, loss: float, grad_norm: float) -> None:
    """Stop before a broken step touches the weights."""
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return
    raise FathomError(
        f"loss {loss} and gradient norm {grad_norm} at step {step} are not finite; the last "
        f"checkpoint is unharmed. Lower the learning rate (--set stages.NAME.lr=…) in a new run folder"
    )
