"""The training loop (report §4.2), top to bottom on one page.

Everything that is not training (logs, evaluation, samples, checkpoints, progress) is a callback, called after each step
in the order given. Nothing here looks at a clock to decide anything, so the same recipe computes the same numbers
wherever it was interrupted.

On several ranks each runs this loop. `parallel` says which rows of a batch are a rank's own and makes the sums over
ranks; all that is decided is decided by sums, and so by all ranks alike. On one, it does nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from fathom.data.loader import Ahead, Batch, Loader
from fathom.model import Losses, Transformer, losses, update_bias
from fathom.parallel import Parallel
from fathom.parallel.pipeline import MicroBatch, Pipeline, Weights
from fathom.parallel.waiting import waited
from fathom.train.behind import Behind
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
    parallel: Parallel
    ema: Ema | None = None
    step: int = 0
    tokens: int = 0
    passed_over: dict[str, int] = field(default_factory=dict)
    """Sequences that roll-backs took out of what a stage reads, by the stage's name."""
    saving: Behind = field(default_factory=lambda: Behind("checkpoint"))
    """Where a checkpoint is written while training goes on."""

    @classmethod
    def start(
        cls,
        model: Transformer,
        optim: OptimConfig,
        guard: GuardConfig | None = None,
        ema: EmaConfig | None = None,
        parallel: Parallel | None = None,
    ) -> Trainer:
        """A trainer at step 0, without a guard or an average, and in one process, unless told."""
        parallel = parallel or Parallel(model)
        watch = Guard(guard or GuardConfig(action="off"), optim.clip_norm)
        average = Ema(model, ema) if ema and ema.decay else None
        optimizer = build_adamw(model, optim, parallel)
        return cls(model.train(), optimizer, optim, watch, parallel, average)


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
    first_sequence: int
    """Where in the stage's stream the batch began."""
    verdict: Verdict
    """The guard's."""
    waited: float = 0.0
    """Of the seconds, those in which this rank waited for others."""

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
    first_sequence: Callable[[int], int]
    """Sequences that the stage has taken before a step, counted over the whole run from 1."""
    last_step: int
    moment: Callable[[int], Moment]
    """What holds at a step, counted over the whole run from 1."""
    stop: Callable[[], bool] = field(default=lambda: False)
    """Asked after each step; True ends the stage early."""

    def rows(self, step: int, passed_over: int, parallel: Parallel) -> tuple[int, int] | None:
        """(first sequence, how many) that this rank reads for a step, or None behind the stage's end."""
        if step > self.last_step:
            return None
        mine = parallel.rows(self.moment(step).batch)
        return self.first_sequence(step) + passed_over + mine.start, len(mine)


class RollBack(Exception):
    """Raised before a step that the guard wants the run to be rolled back from; nothing has learnt from it."""

    def __init__(self, plan: StagePlan, record: StepRecord) -> None:
        super().__init__(record.verdict.reason)
        self.plan, self.record = plan, record

    def sequences_since(self, step: int) -> int:
        """How many the run saw of this stage's stream after `step`, the offending batch included."""
        moment = self.record.moment
        seen = self.plan.first_sequence(moment.step) + moment.batch
        return seen - self.plan.first_sequence(step + 1)


def train_stage(trainer: Trainer, plan: StagePlan, callbacks: Sequence[Callback]) -> bool:
    """Run the stage's remaining steps; False when `plan.stop` ended it early.

    Raises `RollBack` where the guard wants one, and `FathomError` where it sees no way on.
    """
    with closing(Ahead(plan.loader)) as reader:
        for step in range(trainer.step + 1, plan.last_step + 1):
            record = train_step(trainer, plan, reader, step)
            if record.verdict.action == "rollback":
                raise RollBack(plan, record)
            trainer.step, trainer.tokens = step, record.moment.tokens
            for callback in callbacks:
                callback(trainer, record)
            if plan.stop() and step < plan.last_step:
                return False
    return True


def train_step(trainer: Trainer, plan: StagePlan, reader: Ahead, step: int) -> StepRecord:
    """Read, differentiate, judge, and learn from the step if it is sound."""
    started, waited_before = time.perf_counter(), waited()
    moment = plan.moment(step)
    passed_over = trainer.passed_over.get(moment.stage, 0)
    rows = plan.rows(step, passed_over, trainer.parallel)
    assert rows is not None
    batch = reader.batch(rows, then=plan.rows(step + 1, passed_over, trainer.parallel))
    first = plan.first_sequence(step) + passed_over
    whole = Whole(trainer.parallel.total(int(batch.targets().sum())), moment.batch)
    pipeline = trainer.parallel.pipeline
    found = accumulate_gradients(trainer.model, batch, plan.micro_batch, moment, whole, pipeline)
    found = trainer.parallel.reduce(found)
    grad_norm = clip(trainer.model, trainer.optim.clip_norm, trainer.parallel).item()
    verdict = trainer.guard.judge(moment, found.main.item(), found.total.item(), grad_norm)
    if verdict.learns:
        learn(trainer, moment)
    else:
        forget(trainer)
    return StepRecord(
        moment,
        found.main.item(),
        found.mtp.item(),
        found.balance.item(),
        grad_norm,
        time.perf_counter() - started,
        found.expert_load,
        plan.loader.sources(first, moment.batch),
        first,
        verdict,
        waited() - waited_before,
    )


def learn(trainer: Trainer, moment: Moment) -> None:
    """Weights, router biases and the average of both take the step."""
    if trainer.ema:
        trainer.ema.wait()
    set_learning_rate(trainer.optimizer, moment.lr)
    trainer.optimizer.step()
    trainer.parallel.share()
    trainer.optimizer.zero_grad()
    update_bias(trainer.model, moment.gamma)
    if trainer.ema:
        trainer.ema.update(moment.step)


def forget(trainer: Trainer) -> None:
    """Drop all that a step left: gradients, and the load that its tokens added to the routers' counts."""
    trainer.optimizer.zero_grad()
    update_bias(trainer.model, gamma=0.0)


def accumulate_gradients(
    model: Transformer,
    batch: Batch,
    micro_batch: int,
    moment: Moment,
    whole: Whole | None = None,
    pipeline: Pipeline | None = None,
) -> Losses:
    """Gradients of the mean loss over the batch, a micro-batch at a time; detached sums.

    `whole` tells what other ranks have of the batch too; then the mean is the sum over all ranks.
    """
    parts = micro_batches(batch, micro_batch, whole)
    weights = Weights(moment.mtp_weight, moment.balance_alpha)
    if pipeline:
        return pipeline.run(parts, weights)
    return _weighted([_one_part(model, part, weights) for part in parts], parts, weights.mtp)


class Whole(NamedTuple):
    """What there is to a batch, on all ranks together."""

    targets: int
    sequences: int


def micro_batches(batch: Batch, rows: int, whole: Whole | None = None) -> list[MicroBatch]:
    """A batch, so many rows at a time.

    Weighting each part by its share gives the whole batch's mean: by its share of targets what is a mean over targets,
    by its share of sequences the balance loss, which is one over sequences (eq 17).
    """
    targets_B = batch.targets()
    whole = whole or Whole(int(targets_B.sum()), len(targets_B))
    found = []
    for start in range(0, len(targets_B), rows):
        part = slice(start, start + rows)
        some_B, ids = targets_B[part], batch.document_ids
        of_targets = int(some_B.sum()) / max(whole.targets, 1)
        share = len(some_B) / whole.sequences
        found.append(
            MicroBatch(batch.tokens[part], None if ids is None else ids[part], of_targets, share)
        )
    return found


def _one_part(model: Transformer, part: MicroBatch, weights: Weights) -> Losses:
    """Gradients of some rows' mean loss times their share of the batch.

    The losses come back without their graph, which would hold on to what recomputation starts from.
    """
    found = losses(
        model,
        part.tokens.to(model.lm_head.weight.device),
        part.document_ids,
        mtp_weight=weights.mtp,
        balance_alpha=weights.balance_alpha,
    )
    predicted = found.main + weights.mtp * found.mtp
    (predicted * part.targets + found.balance * part.sequences).backward()
    return found.detached()


def _weighted(parts: list[Losses], shares: list[MicroBatch], mtp_weight: float) -> Losses:
    def mean(values: Iterable[Tensor], of: str = "targets") -> Tensor:
        pairs = zip(values, shares, strict=True)
        return torch.stack([value * getattr(share, of) for value, share in pairs]).sum()

    main, mtp = mean(part.main for part in parts), mean(part.mtp for part in parts)
    balance = mean((part.balance for part in parts), "sequences")
    return Losses(
        main,
        mtp,
        balance,
        main + mtp_weight * mtp + balance,
        tuple(map(mean, zip(*(part.mtp_by_depth for part in parts), strict=True))),
        torch.stack([part.expert_load for part in parts]).sum(0),
    )
