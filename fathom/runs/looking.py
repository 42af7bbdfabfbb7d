"""What a run looks at while it goes on: held-out loss, loss by position, samples, needles. All are callbacks.

Those that look before a stage's first step too have a method `begin`. None of them touches training's random state.
"""

from __future__ import annotations

import math
from typing import Any

from fathom.data.prepare import TokenData
from fathom.evaluation import Form, Grid, Pairs, PassKey, even_depths, needle_grid
from fathom.evaluation.needle import check
from fathom.inference import Sampling, generate
from fathom.model import Transformer
from fathom.runs.pace import HELD_OUT, NEEDLES, POSITIONS, SAMPLES
from fathom.runs.recipe import Recipe
from fathom.runs.setting import Setting
from fathom.train.evaluate import HeldOut, evaluate
from fathom.train.loop import StepRecord, Trainer
from fathom.train.positions import loss_by_position


class HeldOutLoss:
    """evals.jsonl: loss and bits per byte on held-out text; the loss of the averaged weights too, if there are some."""

    def __init__(self, setting: Setting) -> None:
        self.s = setting

    def __call__(self, trainer: Trainer, record: StepRecord) -> None:
        monitor, pace = self.s.recipe.monitor, self.s.pace
        if not self.s.due(trainer.step, monitor.eval_every):
            return
        limit = None if trainer.step == self.s.last_step else monitor.eval_tokens
        with pace.look(HELD_OUT, pace.evaluation(self.s.stage, limit)):
            found = self._measured(trainer, limit)
            average = self._of_the_average(trainer, limit)
        line = {"step": trainer.step, "tokens": trainer.tokens, "loss": found.loss}
        line |= {"bits_per_byte": found.bits_per_byte, "mtp_loss": found.mtp_loss}
        if average:
            line["ema_loss"] = average.loss
        self.s.log("evals.jsonl", line | {"held_out_tokens": found.tokens})
        self.s.say(
            f"step {trainer.step}: held-out loss {found.loss:.3f} (perplexity "
            f"{math.exp(min(found.loss, 50)):,.1f}), {found.bits_per_byte:.3f} bits per byte"
        )

    def _measured(self, trainer: Trainer, limit: int | None) -> HeldOut:
        stage = self.s.stage
        rows, mtp = self.s.rows or stage.micro_batch or stage.batch, stage.mtp_weight > 0
        seq_len, parallel = stage.seq_len, trainer.parallel
        return evaluate(trainer.model, self.s.data, seq_len, rows, limit, mtp, parallel=parallel)

    def _of_the_average(self, trainer: Trainer, limit: int | None) -> HeldOut | None:
        if not trainer.ema:
            return None
        with trainer.ema.in_place_of_weights():
            return self._measured(trainer, limit)


class Samples:
    """samples.jsonl: what the model writes by now, with a random state of its own."""

    def __init__(self, setting: Setting) -> None:
        self.s = setting
        # Read now: a prompt with characters that the tokenizer lacks is no surprise for step 200.
        prompt = setting.data.tokenizer.prompt_ids(setting.recipe.monitor.sample_prompt)
        self.prompt = prompt[-max(setting.stage.seq_len - 1, 1) :]

    def __call__(self, trainer: Trainer, record: StepRecord) -> None:
        monitor = self.s.recipe.monitor
        if not self.s.due(trainer.step, monitor.sample_every):
            return
        with self.s.pace.look(SAMPLES):
            text = self.s.crew.first(lambda: self._write(trainer, monitor.sample_tokens))
        line = {"step": trainer.step, "prompt": monitor.sample_prompt, "text": text}
        self.s.log("samples.jsonl", line)
        self.s.say(f"step {trainer.step} writes:\n{monitor.sample_prompt}{text}\n")

    def _write(self, trainer: Trainer, tokens: int) -> str:
        tokenizer = self.s.data.tokenizer
        count = max(min(tokens, self.s.stage.seq_len - len(self.prompt)), 1)
        sampling = Sampling(temperature=0.7, top_p=0.95, seed=self.s.recipe.seed)
        return tokenizer.decode(
            generate(trainer.model, self.prompt, count, sampling, {tokenizer.eos_id})
        )


class _BothEnds:
    """A look at the model as it comes into a stage and as it leaves it: a line "before" and one "after" in `log`.

    A run that is resumed right where a stage begins has the first of them already. Where nothing changes between two
    stages, it is what was seen as the one before ended, and nothing is looked at twice.
    """

    log: str

    def __init__(self, setting: Setting) -> None:
        self.s = setting

    def begin(self, trainer: Trainer) -> None:
        """Before the stage's first step."""
        line = {"stage": self.s.stage.name, "when": "before"}
        begins = trainer.step == self.s.span.first_step
        if begins and self.s.crew.first(lambda: self.s.folder.line_with(self.log, line)) is None:
            self._look(trainer, "before")

    def __call__(self, trainer: Trainer, record: StepRecord) -> None:
        if trainer.step == self.s.last_step:
            self._look(trainer, "after")

    def _look(self, trainer: Trainer, when: str) -> None:
        asked = self.asked(trainer)
        if asked is None:
            return
        found = self._already_seen(trainer, asked) if when == "before" else None
        if found is None:
            with self.s.pace.look(*self.work):
                found = self.measured(trainer)
        line = {"step": trainer.step, "stage": self.s.stage.name, "when": when}
        self.s.folder.append(self.log, line | found)
        self.told(when, found)

    def _already_seen(self, trainer: Trainer, asked: dict[str, Any]) -> dict[str, Any] | None:
        """What the last look gave, if it asked the same of the same weights with the same rotary settings."""
        recipe, number = self.s.recipe, self.s.recipe.stages.index(self.s.stage)
        last = recipe.stages[number - 1]
        if not number or recipe.rope_scaling(last) != recipe.rope_scaling(self.s.stage):
            return None
        line = {"step": trainer.step, "stage": last.name, "when": "after"}
        seen = self.s.crew.first(lambda: self.s.folder.line_with(self.log, line | asked))
        return seen and {key: value for key, value in seen.items() if key not in line}

    def asked(self, trainer: Trainer) -> dict[str, Any] | None:
        """What the recipe asks for, as the line will have it; None for nothing."""
        raise NotImplementedError

    @property
    def work(self) -> tuple[str, float]:
        """Kind and work of a look, for `Pace.look`."""
        raise NotImplementedError

    def measured(self, trainer: Trainer) -> dict[str, Any]:
        """What else the line says."""
        raise NotImplementedError

    def told(self, when: str, found: dict[str, Any]) -> None:
        """Say what was found, if that is worth a line."""


class LossByPosition(_BothEnds):
    """positions.jsonl: held-out loss by position, before a stage's first step and after its last.

    Both in windows of the stage's own length and with its rotary settings, so that the two differ by what the stage
    taught; what changing the settings alone does is between one stage's "after" and the next one's "before".
    """

    log = "positions.jsonl"

    def asked(self, trainer: Trainer) -> dict[str, Any] | None:
        wanted = self.s.recipe.monitor.position_tokens > 0
        return {"seq_len": self.s.stage.seq_len} if wanted else None

    @property
    def work(self) -> tuple[str, float]:
        return POSITIONS, self.s.pace.positions(self.s.stage)

    def measured(self, trainer: Trainer) -> dict[str, Any]:
        seq_len, limit = self.s.stage.seq_len, self.s.recipe.monitor.position_tokens
        found = loss_by_position(
            trainer.model, self.s.data, seq_len, limit, parallel=trainer.parallel
        )
        return {"seq_len": seq_len, "edges": list(found.edges), "loss": list(found.loss)}


class Needles(_BothEnds):
    """needle.jsonl: what is found in long texts as the model comes into a stage and as it leaves it.

    The lengths are the recipe's, for every stage: between one stage's "after" and the next one's "before" there is only
    the change of rotary settings, if any. Nothing is looked for unless the recipe names lengths.
    """

    log = "needle.jsonl"

    def asked(self, trainer: Trainer) -> dict[str, Any] | None:
        monitor = self.s.recipe.monitor
        if not monitor.needle_lengths or not trainer.step:  # the run's beginning knows nothing yet
            return None
        depths = list(even_depths(monitor.needle_depths))
        grid = {"lengths": list(monitor.needle_lengths), "depths": depths}
        return grid | {"trials": monitor.needle_trials}

    @property
    def work(self) -> tuple[str, float]:
        return NEEDLES, self.s.pace.needles()

    def measured(self, trainer: Trainer) -> dict[str, Any]:
        monitor, form = self.s.recipe.monitor, needle_form(self.s.recipe, self.s.data)
        depths = even_depths(monitor.needle_depths)
        lengths, trials = monitor.needle_lengths, monitor.needle_trials
        return self.s.crew.first(
            lambda: needle_grid(trainer.model, form, lengths, depths, trials).to_dict()
        )

    def told(self, when: str, found: dict[str, Any]) -> None:
        share = 100 * Grid(**found).share()
        self.s.say(f"{when} {self.s.stage.name}: {share:.0f} % of the needles found")


def needle_form(recipe: Recipe, data: TokenData) -> Form:
    """What the recipe hides. Raises `DataError` where the tokenizer has no characters for it."""
    if recipe.monitor.needle_format == "pairs":
        return Pairs(data.tokenizer)
    return PassKey(data.tokenizer, data.held_out)


def check_needles(recipe: Recipe, model: Transformer, data: TokenData) -> None:
    """Raise `FathomError` for needles that could not be looked for; better before a stage than at its end."""
    monitor = recipe.monitor
    if monitor.needle_lengths:
        depths, trials = even_depths(monitor.needle_depths), monitor.needle_trials
        check(model, needle_form(recipe, data), monitor.needle_lengths, depths, trials)
