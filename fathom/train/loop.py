"""The training loop (report §4.2), top to bottom on one page.

Everything that is not training (logs, evaluation, samples, checkpoints, progress) is a callback, called after each step
in the order given. Nothing here looks at a clock to decide anything, so the same recipe computes the same numbers
wherever it was interrupted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fathom.data.loader import Loader
from fathom.model import Losses, Transformer, losses, update_bias
from fathom.train.ema import Ema, EmaConfig
from fathom.train.guard import Guard, GuardConfig, Verdict
from fathom.train.optimizer import OptimConfig, build_adamw, clip, set_learning_rate
from fathom.train.schedule import Moment


@dataclass
class Trainer:
    """What a run trains and how far it is."""

    model: Transformer
    optimizer: torch.optim.AdamW
    optim: OptimConfig
    guard: Guard
    ema: Ema | None = None
    step: int = 0
    tokens: int = 0
    passed_over: int = 0
    """Sequences that roll-backs took out of the stream of data."""

    @classmethod
    def start(
        cls,
        model: Transformer,
        optim: OptimConfig,
        guard: GuardConfig | None = None,
        ema: EmaConfig | None = None,
    ) -> Trainer:
        """A trainer at step 0, without a guard or an average unless told."""
        watch = Guard(guard or GuardConfig(action="off"), optim.clip_norm)
        average = Ema(model, ema) if ema and ema.decay else None
        return cls(model.train(), build_adamw(model, optim), optim, watch, average)


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
    first_sequence: int
    """Where in the stage's stream the batch began."""
    verdict: Verdict
    """The guard's."""

    @property
    def skipped(self) -> str | None:
        """Why nothing was learnt from the step; None for all others."""
        return None if self.verdict.learns else self.verdict.reason


Callback = Callable[[Trainer, StepRecord], None]


@dataclass
class StagePlan:
    """The steps of one stage: its data, and what holds at each step."""

    loader: Loader
    micro_batch: int
    first_step: int
    """Steps done before the stage begins."""
    last_step: int
    moment: Callable[[int], Moment]
    """What holds at a step, counted over the whole run from 1."""
    stop: Callable[[], bool] = field(default=lambda: False)
    """Asked after each step; True ends the stage early."""

    def first_sequence(self, step: int) -> int:
        """Sequences of the stage's stream before a step, if none was passed over."""
        return (step - 1 - self.first_step) * self.moment(step).batch


class RollBack(Exception):
    """Raised before a step that the guard wants the run to be rolled back from; nothing has learnt from it."""

    def __init__(self, plan: StagePlan, record: StepRecord) -> None:
        super().__init__(record.verdict.reason)
        self.plan, self.record = plan, record

    def sequences_since(self, step: int) -> int:
        """How many the run saw of this stage's stream after `step`, the offending batch included."""
        moment, first = self.record.moment, max(step, self.plan.first_step) + 1
        seen = self.plan.first_sequence(moment.step) + moment.batch
        return seen - self.plan.first_sequence(first)


def train_stage(trainer: Trainer, plan: StagePlan, callbacks: Sequence[Callback]) -> bool:
    """Run the stage's remaining steps; False when `plan.stop` ended it early.

    Raises `RollBack` where the guard wants one, and `FathomError` where it sees no way on.
    """
    for step in range(trainer.step + 1, plan.last_step + 1):
        started = time.perf_counter()
        moment = plan.moment(step)
        first_sequence = plan.first_sequence(step) + trainer.passed_over
        batch = plan.loader.batch(first_sequence, moment.batch)
        found = accumulate_gradients(trainer.model, batch, plan.micro_batch, moment)
        grad_norm = clip(trainer.model, trainer.optim.clip_norm).item()
        verdict = trainer.guard.judge(moment, found.main.item(), found.total.item(), grad_norm)
        if verdict.learns:
            learn(trainer, moment)
        else:
            forget(trainer)
        record = StepRecord(
            moment,
            found.main.item(),
            found.mtp.item(),
            found.balance.item(),
            grad_norm,
            time.perf_counter() - started,
            found.expert_load,
            first_sequence,
            verdict,
        )
        if verdict.action == "rollback":
            raise RollBack(plan, record)
        trainer.step, trainer.tokens = step, moment.tokens
        for callback in callbacks:
            callback(trainer, record)
        if plan.stop() and step < plan.last_step:
            return False
    return True


def learn(trainer: Trainer, moment: Moment) -> None:
    """Weights, router biases and the average of both take the step."""
    if trainer.ema:
        trainer.ema.wait()
    set_learning_rate(trainer.optimizer, moment.lr)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    update_bias(trainer.model, moment.gamma)
    if trainer.ema:
        trainer.ema.update(moment.step)


def forget(trainer: Trainer) -> None:
    """Drop all that a step left: gradients, and the load that its tokens added to the routers' counts."""
    trainer.optimizer.zero_grad()
    update_bias(trainer.model, gamma=0.0)


def accumulate_gradients(
    model: Transformer, batch: Tensor, micro_batch: int, moment: Moment
) -> Losses:
    """Gradients of the mean loss over `batch` [B, T + 1], a micro-batch at a time; detached sums.

    Rows are equally long, so weighting each part by its share of rows gives the whole batch's mean.
    """
    device = model.lm_head.weight.device
    parts, shares = [], []
    for rows in batch.split(micro_batch):
        part = losses(
            model,
            rows.to(device),
            mtp_weight=moment.mtp_weight,
            balance_alpha=moment.balance_alpha,
        )
        share = rows.shape[0] / batch.shape[0]
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
