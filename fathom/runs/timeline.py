"""Where every stage of a recipe lies, in steps and in tokens (report §4.2, §4.3).

A recipe's marks are tokens ("constant to 10T tokens"), but training goes in whole steps. Marks stay where the recipe
puts them: a stage takes steps until its mark is reached, at most one step late, and the next one ends at its own mark
all the same, so that lateness does not add up over stages. A stage given in steps has exactly those, from wherever
the one before it really ended.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fathom.runs.stage import Stage


@dataclass(frozen=True)
class Span:
    """One stage in its place."""

    stage: Stage
    first_step: int
    """Steps of the run before the stage."""
    steps: int
    """Steps of the stage."""
    begins: int
    """Tokens at which the recipe lets it begin."""
    late: int
    """Tokens beyond that when its first step really begins."""

    @property
    def last_step(self) -> int:
        """The run's step that ends the stage."""
        return self.first_step + self.steps

    @property
    def heading(self) -> str:
        """What a person is told before the stage's first step."""
        first, last = self.batch_of(self.first_step + 1), self.batch_of(self.last_step)
        batch = f"{first:,}" if first == last else f"{first:,} to {last:,}"
        return (
            f"stage {self.stage.name}: steps {self.first_step + 1:,} to {self.last_step:,}, each of {batch} × "
            f"{self.stage.seq_len:,} tokens"
        )

    def sequences_before(self, step: int) -> int:
        """Sequences of this stage that steps of the run before `step` (counted from 1) have taken."""
        return int(self.stage.batches.before(max(step - 1 - self.first_step, 0)))

    def tokens_at(self, step: float) -> int:
        """Tokens of the run that are trained on when `step` steps of it are done."""
        done = self.stage.batches.before(step - self.first_step)
        return self.begins + self.late + round(done * self.stage.seq_len)

    def step_at(self, tokens: float) -> int:
        """Steps of the run that are done when `tokens` tokens of it are trained on."""
        sequences = max(tokens - self.begins - self.late, 0) / self.stage.seq_len
        return self.first_step + min(int(self.stage.batches.steps(sequences)), self.steps)

    def batch_of(self, step: float) -> int:
        """Sequences in a step of the run."""
        batches = self.stage.batches
        return batches.size(batches.before(max(math.ceil(step) - 1 - self.first_step, 0)))

    def batch_at(self, tokens: float) -> int:
        """Sequences in a step that would begin when `tokens` tokens of the run are trained on."""
        return self.stage.batches.size(
            max(tokens - self.begins - self.late, 0) / self.stage.seq_len
        )


def lay_out(stages: Iterable[Stage]) -> tuple[Span, ...]:
    """The stages one after the other."""
    spans: list[Span] = []
    for stage in stages:
        spans.append(_next(stage, spans[-1] if spans else None))
    return tuple(spans)


def _next(stage: Stage, last: Span | None) -> Span:
    done, first_step = (last.tokens_at(last.last_step), last.last_step) if last else (0, 0)
    if stage.steps is not None:
        return Span(stage, first_step, stage.steps, done, 0)
    begins = last.begins + last.stage.tokens_asked if last and last.stage.tokens else done
    left = (begins + stage.tokens_asked - done) / stage.seq_len
    steps = max(math.ceil(stage.batches.steps(max(left, 0))), 1)
    return Span(stage, first_step, steps, begins, done - begins)


def total_tokens(spans: Sequence[Span]) -> int:
    """Tokens when the last step is done."""
    return spans[-1].tokens_at(spans[-1].last_step)


def span_at_tokens(spans: Sequence[Span], tokens: float) -> Span:
    """The stage that holds at a token; at a mark the one that ends there."""
    marks = [*(span.begins for span in spans[1:]), total_tokens(spans)]
    return spans[bisect_left(marks, tokens)]


def span_at_step(spans: Sequence[Span], step: float) -> Span:
    """The stage that a step of the run belongs to."""
    return spans[bisect_left([span.last_step for span in spans], step)]
