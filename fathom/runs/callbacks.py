"""What a run does besides training, after each step: the extras, all of them, in the order in which they run.

Those that look before a stage's first step too have a method `begin`. None of them changes what is learnt: no random
state of training is touched and no clock decides anything.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fathom.data.prepare import Say, TokenData
from fathom.evaluation import Form, Pairs, PassKey, even_depths, needle_grid
from fathom.inference import Sampling, generate
from fathom.planning import flops_per_token
from fathom.runs.folder import RunFolder
from fathom.runs.recipe import Recipe, Stage
from fathom.runs.timeline import Span
from fathom.train.evaluate import bits_per_byte, evaluate
from fathom.train.loop import Callback, StepRecord, Trainer
from fathom.train.positions import loss_by_position


@dataclass(frozen=True)
class Progress:
    """One step for whoever shows it."""

    step: int
    steps: int
    line: str
    eta_seconds: float


Show = Callable[[Progress], None]


@dataclass
class Setting:
    """What the callbacks of one stage share."""

    folder: RunFolder
    recipe: Recipe
    stage: Stage
    data: TokenData
    peak_flops: float
    show: Show
    say: Say
    save: Callable[[Trainer], None]

    @property
    def span(self) -> Span:
        """Where in the run the stage lies."""
        return self.recipe.spans[self.recipe.stages.index(self.stage)]

    @property
    def last_step(self) -> int:
        """The run's step that ends the stage."""
        return self.span.last_step

    def due(self, step: int, every: int) -> bool:
        """Whether something done every so many steps, and at the stage's end, is due."""
        return step % every == 0 or step == self.last_step


def stage_callbacks(setting: Setting) -> list[Callback]:
    """All of them. Logs come before the checkpoint, so that none is missing for a saved step."""
    return [
        Metrics(setting),
        HeldOutLoss(setting),
        LossByPosition(setting),
        Samples(setting),
        Needles(setting),
        Checkpoints(setting),
    ]


def begin_stage(callbacks: Sequence[Callback], trainer: Trainer) -> None:
    """Let the callbacks that have a `begin` look at the model as it comes into the stage."""
    for callback in callbacks:
        if hasattr(callback, "begin"):
            callback.begin(trainer)


class Metrics:
    """metrics.jsonl and the progress line each step, load.jsonl now and then."""

    def __init__(self, setting: Setting) -> None:
        self.s = setting
        mtp = setting.stage.mtp_weight > 0
        self.flops = flops_per_token(setting.recipe.model, setting.stage.seq_len, mtp)
        self.recent: list[float] = []
        self.last = time.perf_counter()

    def __call__(self, trainer: Trainer, record: StepRecord) -> None:
        line = self._line(trainer, record)
        self.s.folder.append("metrics.jsonl", line)
        if self.s.due(trainer.step, self.s.recipe.monitor.load_every):
            load = {"step": trainer.step, "load": record.expert_load.tolist()}
            self.s.folder.append("load.jsonl", load | {"bias": _bias_range(trainer)})
        self.recent = [*self.recent[-19:], time.perf_counter() - self.last]
        self.last = time.perf_counter()
        eta = (self.s.recipe.steps - trainer.step) * sum(self.recent) / len(self.recent)
        self.s.show(Progress(trainer.step, self.s.recipe.steps, _shown(line), eta))

    def _line(self, trainer: Trainer, record: StepRecord) -> dict:
        m = record.moment
        rate = m.batch * m.seq_len / record.seconds
        load = record.expert_load.float()
        violation = (load.amax(1) / load.mean(1)).tolist() if load.numel() else []
        return {
            "step": trainer.step,
            "stage": m.stage,
            "tokens": m.tokens,
            "loss": record.loss,
            "mtp_loss": record.mtp_loss,
            "balance_loss": record.balance_loss,
            "bits_per_byte": bits_per_byte(record.loss, self.s.data.bytes_per_token("train")),
            "grad_norm": record.grad_norm,
            "lr": m.lr,
            "batch": m.batch,
            "seq_len": m.seq_len,
            "gamma": m.gamma,
            "mtp_weight": m.mtp_weight,
            "balance_alpha": m.balance_alpha,
            "sources": record.sources,
            "max_load": max(violation, default=1.0),
            "expert_load": violation,
            "tokens_per_second": rate,
            "mfu": rate * self.flops / self.s.peak_flops,
            "seconds": record.seconds,
        }


def _bias_range(trainer: Trainer) -> list[list[float]]:
    """[smallest, largest] router bias of each MoE block that has one."""
    biases = (router.e_score_correction_bias for router in trainer.model.routers())
    return [[b.min().item(), b.max().item()] for b in biases if b is not None]


def _shown(line: dict) -> str:
    mtp = f"  mtp {line['mtp_loss']:.3f}" if line["mtp_weight"] and line["mtp_loss"] else ""
    return (
        f"loss {line['loss']:.3f}{mtp}  bits/byte {line['bits_per_byte']:.3f}  "
        f"grad {line['grad_norm']:.2f}  lr {line['lr']:.1e}  {line['tokens_per_second']:,.0f} tok/s  "
        f"mfu {100 * line['mfu']:.0f}%  load {line['max_load']:.2f}"
    )


class HeldOutLoss:
    """evals.jsonl: loss and bits per byte on held-out text."""

    def __init__(self, setting: Setting) -> None:
        self.s = setting

    def __call__(self, trainer: Trainer, record: StepRecord) -> None:
        monitor, stage = self.s.recipe.monitor, self.s.stage
        if not self.s.due(trainer.step, monitor.eval_every):
            return
        limit = None if trainer.step == self.s.last_step else monitor.eval_tokens
        rows = stage.micro_batch or stage.batch
        mtp = stage.mtp_weight > 0
        found = evaluate(trainer.model, self.s.data, stage.seq_len, rows, limit, mtp)
        line = {"step": trainer.step, "tokens": trainer.tokens, "loss": found.loss}
        line |= {"bits_per_byte": found.bits_per_byte, "mtp_loss": found.mtp_loss}
        self.s.folder.append("evals.jsonl", line | {"held_out_tokens": found.tokens})
        self.s.say(
            f"step {trainer.step}: held-out loss {found.loss:.3f} (perplexity "
            f"{math.exp(min(found.loss, 50)):,.1f}), {found.bits_per_byte:.3f} bits per byte"
        )


class LossByPosition:
    """positions.jsonl: held-out loss by position, before a stage's first step and after its last.

    Both in windows of the stage's own length and with its rotary settings, so that the two differ by what the stage
    taught; what changing the settings alone does is between one stage's "after" and the next one's "before".
    """

    def __init__(self, setting: Setting) -> None:
        self.s = setting

    def begin(self, trainer: Trainer) -> None:
        """Before the first step; a run that is resumed right there has the line already."""
        line = {"stage": self.s.stage.name, "when": "before"}
        begins = trainer.step == self.s.span.first_step
        if begins and not self.s.folder.has_line("positions.jsonl", line):
            self._look(trainer, "before")

    def __call__(self, trainer: Trainer, record: StepRecord) -> None:
        if trainer.step == self.s.last_step:
            self._look(trainer, "after")

    def _look(self, trainer: Trainer, when: str) -> None:
        stage, limit = self.s.stage, self.s.recipe.monitor.position_tokens
        if not limit:
            return
        found = loss_by_position(trainer.model, self.s.data, stage.seq_len, limit)
        line = {"step": trainer.step, "stage": stage.name, "when": when, "seq_len": stage.seq_len}
        line |= {"edges": list(found.edges), "loss": list(found.loss)}
        self.s.folder.append("positions.jsonl", line)


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
        text = self._write(trainer, monitor.sample_tokens)
        line = {"step": trainer.step, "prompt": monitor.sample_prompt, "text": text}
        self.s.folder.append("samples.jsonl", line)
        self.s.say(f"step {trainer.step} writes:\n{monitor.sample_prompt}{text}\n")

    def _write(self, trainer: Trainer, tokens: int) -> str:
        tokenizer = self.s.data.tokenizer
        count = max(min(tokens, self.s.stage.seq_len - len(self.prompt)), 1)
        sampling = Sampling(temperature=0.7, top_p=0.95, seed=self.s.recipe.seed)
        return tokenizer.decode(
            generate(trainer.model, self.prompt, count, sampling, {tokenizer.eos_id})
        )


class Needles:
    """needle.jsonl: what is found in long texts as the model comes into a stage and as it leaves it.

    The lengths are the recipe's, for every stage: between one stage's "after" and the next one's "before" there is only
    the change of rotary settings. Nothing is looked for unless the recipe names lengths.
    """

    def __init__(self, setting: Setting) -> None:
        self.s = setting

    def begin(self, trainer: Trainer) -> None:
        """Before the first step of every stage but the run's first, which knows nothing yet."""
        line = {"stage": self.s.stage.name, "when": "before"}
        begins = 0 < trainer.step == self.s.span.first_step
        if begins and not self.s.folder.has_line("needle.jsonl", line):
            self._look(trainer, "before")

    def __call__(self, trainer: Trainer, record: StepRecord) -> None:
        if trainer.step == self.s.last_step:
            self._look(trainer, "after")

    def _look(self, trainer: Trainer, when: str) -> None:
        monitor = self.s.recipe.monitor
        if not monitor.needle_lengths:
            return
        depths = even_depths(monitor.needle_depths)
        grid = needle_grid(
            trainer.model, self._form(), monitor.needle_lengths, depths, monitor.needle_trials
        )
        line = {"step": trainer.step, "stage": self.s.stage.name, "when": when}
        self.s.folder.append("needle.jsonl", line | grid.to_dict())
        self.s.say(f"{when} {self.s.stage.name}: {100 * grid.share():.0f} % of the needles found")

    def _form(self) -> Form:
        data = self.s.data
        if self.s.recipe.monitor.needle_format == "pairs":
            return Pairs(data.tokenizer)
        return PassKey(data.tokenizer, data.held_out)


class Checkpoints:
    """checkpoints/: every so many steps and at the stage's end."""

    def __init__(self, setting: Setting) -> None:
        self.s = setting

    def __call__(self, trainer: Trainer, record: StepRecord) -> None:
        if self.s.due(trainer.step, self.s.recipe.checkpoint.every):
            self.s.save(trainer)
