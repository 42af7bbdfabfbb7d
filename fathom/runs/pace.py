"""How long a run still takes, stage by stage, from what its steps and its looks have taken so far.

A token takes the longer the longer its sequence is, because of attention. What a token took in one stage is therefore
carried over to stages of other lengths by the operations that it needs there (`fathom.planning`). Evaluations, loss by
position and needles read text and go by their operations too: at the pace of the last look of their kind, and before
there was one at that of training. A sample, a checkpoint or an export takes what the last one took; before there was
one it is not counted.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from fathom.planning import forward_flops_per_token
from fathom.runs.recipe import Recipe, Stage
from fathom.runs.timeline import Span
from fathom.train.schedule import Moment

HELD_OUT, POSITIONS, NEEDLES = "held-out loss", "loss by position", "needles"
SAMPLES, CHECKPOINTS, EXPORTS = "samples", "checkpoints", "exports"
READING = (HELD_OUT, POSITIONS, NEEDLES)
"""Kinds of looks whose work is operations; that of the others is their number."""
STEPS = 20
"""Of the last so many steps of a stage the mean is taken."""


class Pace:
    """What steps and looks have taken, and what is left by that."""

    def __init__(self, recipe: Recipe, held_out: int) -> None:
        """held_out: tokens of the text that is never trained on."""
        self.recipe, self.held_out = recipe, held_out
        self._stage = ""
        self._steps: deque[tuple[float, float]] = deque(maxlen=STEPS)
        self._looks: dict[str, float] = {}
        self._forward: dict[tuple[int, bool], float] = {}

    def step(self, moment: Moment, seconds: float) -> None:
        """A step was made, which took so long."""
        if moment.stage != self._stage:
            self._stage = moment.stage
            self._steps.clear()
        operations = moment.batch * moment.seq_len * self._training(moment)
        self._steps.append((seconds, operations))

    @contextmanager
    def look(self, kind: str, work: float = 1.0) -> Iterator[None]:
        """Within, something of `kind` is done; `work` as `evaluation`, `positions` or `needles` say."""
        began = time.perf_counter()
        yield
        self._looks[kind] = (time.perf_counter() - began) / work

    def seconds_left(self, step: int) -> float:
        """From the end of a step, before whatever is done after it, to the end of the run. One step must be known."""
        spans = [span for span in self.recipe.spans if span.last_step >= step]
        left = sum(_tokens_left(span, step) * self._training(span.stage) for span in spans)
        looks = [look for span in spans for look in self._looks_left(span, step)]
        return left * self._per_operation + sum(work * self._rate(kind) for kind, work in looks)

    def evaluation(self, stage: Stage, limit: int | None) -> float:
        """Operations of an evaluation of the first `limit` held-out tokens or all; the average's is a second one."""
        tokens = self.held_out if limit is None else min(limit, self.held_out)
        passes = 2 if self.recipe.ema.decay else 1
        return passes * tokens * self._reading(stage.seq_len, stage.mtp_weight > 0)

    def positions(self, stage: Stage) -> float:
        """Operations of loss by position, in whole windows."""
        windows = max(self.recipe.monitor.position_tokens // stage.seq_len, 1)
        tokens = min(windows * stage.seq_len, self.held_out)
        return tokens * self._reading(stage.seq_len) if self.recipe.monitor.position_tokens else 0.0

    def needles(self) -> float:
        """Operations of a needle grid."""
        monitor = self.recipe.monitor
        column = sum(length * self._reading(length) for length in monitor.needle_lengths)
        return column * monitor.needle_depths * monitor.needle_trials

    def _looks_left(self, span: Span, step: int) -> Iterator[tuple[str, float]]:
        """(kind, work) of all that a stage is still looked at, what is due at `step` itself among it."""
        monitor, stage = self.recipe.monitor, span.stage
        yield (
            HELD_OUT,
            (_due(span, step, monitor.eval_every) - 1)
            * self.evaluation(stage, monitor.eval_tokens),
        )
        yield HELD_OUT, self.evaluation(stage, None)
        before = step <= span.first_step  # the look as the weights come into the stage
        same_rope, same_length = self._unchanged(stage)
        yield POSITIONS, (1 + (before and not (same_rope and same_length))) * self.positions(stage)
        yield NEEDLES, (1 + (before and not same_rope)) * self.needles()
        yield SAMPLES, _due(span, step, monitor.sample_every)
        yield CHECKPOINTS, _due(span, step, self.recipe.checkpoint.every)
        yield EXPORTS, 1

    def _unchanged(self, stage: Stage) -> tuple[bool, bool]:
        """Whether a stage has the rotary settings, and the length, of the one before it."""
        number = self.recipe.stages.index(stage)
        if not number:
            return False, False
        last = self.recipe.stages[number - 1]
        same_rope = self.recipe.rope_scaling(last) == self.recipe.rope_scaling(stage)
        return same_rope, last.seq_len == stage.seq_len

    @property
    def _per_operation(self) -> float:
        """Seconds of an operation in training."""
        seconds, operations = map(sum, zip(*self._steps, strict=True))
        return seconds / operations

    def _rate(self, kind: str) -> float:
        """Seconds for a unit of work of a kind of looks."""
        return self._looks.get(kind, self._per_operation if kind in READING else 0.0)

    def _training(self, at: Stage | Moment) -> float:
        """Operations of a token that is trained on: backward is twice forward."""
        return 3 * self._reading(at.seq_len, at.mtp_weight > 0)

    def _reading(self, seq_len: int, mtp: bool = False) -> float:
        """Operations of a token that is read in a sequence of this length."""
        if (seq_len, mtp) not in self._forward:
            found = forward_flops_per_token(self.recipe.model, seq_len, mtp)
            self._forward[seq_len, mtp] = found
        return self._forward[seq_len, mtp]


def _tokens_left(span: Span, step: int) -> int:
    """Tokens of a stage that are not trained on at the end of a step of the run."""
    return span.tokens_at(span.last_step) - span.tokens_at(max(step, span.first_step))


def _due(span: Span, step: int, every: int) -> int:
    """How often what is done every so many steps, and at the stage's end, is due from `step` on."""
    done = max(step - 1, span.first_step)
    return span.last_step // every - done // every + (span.last_step % every > 0)
