"""What a run does besides training, after each step: the extras, all of them, in the order in which they run.

Those that look before a stage's first step too have a method `begin`. None of them changes what is learnt: no random
state of training is touched and no clock decides anything.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fathom.data.prepare import Say, TokenData
from fathom.inference import Sampling, generate
from fathom.planning import flops_per_token
from fathom.runs.folder import SPIKES, RunFolder
from fathom.runs.positions import LossByPosition
from fathom.runs.recipe import Recipe, Stage
from fathom.runs.tensorboard import TensorBoard
from fathom.runs.timeline import Span
from fathom.train.evaluate import HeldOut, bits_per_byte, evaluate
from fathom.train.loop import Callback, StepRecord, Trainer


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
    board: TensorBoard | None = field(init=False)

    def __post_init__(self) -> None:
        wanted = self.recipe.monitor.tensorboard
        self.board = TensorBoard(self.folder.path) if wanted else None

    def log(self, name: str, line: dict[str, Any]) -> None:
        """Add a line to a log, and its numbers to TensorBoard where that is wanted."""
        self.folder.append(name, line)
        if self.board:
            self.board.write(name, line)

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
        Spikes(setting),
        HeldOutLoss(setting),
        LossByPosition(setting),
        Samples(setting),
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
        self.s.log("metrics.jsonl", as_json(line))
        if self.s.due(trainer.step, self.s.recipe.monitor.load_every):
            load = {"step": trainer.step, "load": record.expert_load.tolist()}
            self.s.log("load.jsonl", load | {"bias": _bias_range(trainer)})
        self.recent = [*self.recent[-19:], time.perf_counter() - self.last]
        self.last = time.perf_counter()
        eta = (self.s.recipe.steps - trainer.step) * sum(self.recent) / len(self.recent)
        self.s.show(Progress(trainer.step, self.s.recipe.steps, _shown(line), eta))

    def _line(self, trainer: Trainer, record: StepRecord) -> dict:
        m = record.moment
        rate = m.batch * m.seq_len / record.seconds
        load = record.expert_load.float()
        per_token = self.s.data.bytes_per_token("train")
        violation = (load.amax(1) / load.mean(1)).tolist() if load.numel() else []
        return {
            "step": trainer.step,
            "stage": m.stage,
            "tokens": m.tokens,
            "batch": m.batch,
            "seq_len": m.seq_len,
            "loss": record.loss,
            "mtp_loss": record.mtp_loss,
            "balance_loss": record.balance_loss,
            "bits_per_byte": bits_per_byte(record.loss, per_token),
            "grad_norm": record.grad_norm,
            "loss_z": record.verdict.loss_z,
            "grad_norm_z": record.verdict.grad_norm_z,
            "skipped": record.skipped,
            "lr": m.lr,
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


def as_json(line: dict[str, Any]) -> dict[str, Any]:
    """The line with None for numbers that are not finite, for which JSON has no word."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in line.items()
    }


def spike_line(record: StepRecord) -> dict[str, Any]:
    """What spikes.jsonl says about a remarkable step: what was seen, what was done, and which data it was."""
    verdict, moment = record.verdict, record.moment
    line = {
        "step": moment.step,
        "stage": moment.stage,
        "action": verdict.action,
        "reason": verdict.reason,
        "loss": record.loss,
        "grad_norm": record.grad_norm,
        "loss_z": verdict.loss_z,
        "grad_norm_z": verdict.grad_norm_z,
        "data": {
            "first_sequence": record.first_sequence,
            "count": moment.batch,
            "sources": record.sources,
        },
    }
    return as_json(line)


class Spikes:
    """spikes.jsonl: steps that the guard skipped or remarked on. Roll-backs never come to a callback."""

    def __init__(self, setting: Setting) -> None:
        self.s = setting

    def __call__(self, trainer: Trainer, record: StepRecord) -> None:
        if record.verdict.reason is None:
            return
        self.s.log(SPIKES, spike_line(record))
        done = "recorded" if record.verdict.learns else "skipped"
        self.s.say(f"step {trainer.step} is {done}: {record.verdict.reason}")


def _bias_range(trainer: Trainer) -> list[list[float]]:
    """[smallest, largest] router bias of each MoE block that has one."""
    biases = (router.e_score_correction_bias for router in trainer.model.routers())
    return [[b.min().item(), b.max().item()] for b in biases if b is not None]


def _shown(line: dict) -> str:
    mtp = f"  mtp {line['mtp_loss']:.3f}" if line["mtp_weight"] and line["mtp_loss"] else ""
    if line["skipped"]:
        return f"skipped: {line['skipped']}"
    return (
        f"loss {line['loss']:.3f}{mtp}  bits/byte {line['bits_per_byte']:.3f}  "
        f"grad {line['grad_norm']:.2f}  lr {line['lr']:.1e}  {line['tokens_per_second']:,.0f} tok/s  "
        f"mfu {100 * line['mfu']:.0f}%  load {line['max_load']:.2f}"
    )


class HeldOutLoss:
    """evals.jsonl: loss and bits per byte on held-out text; the loss of the averaged weights too, if there are some."""

    def __init__(self, setting: Setting) -> None:
        self.s = setting

    def __call__(self, trainer: Trainer, record: StepRecord) -> None:
        monitor, stage = self.s.recipe.monitor, self.s.stage
        if not self.s.due(trainer.step, monitor.eval_every):
            return
        limit = None if trainer.step == self.s.last_step else monitor.eval_tokens
        rows = stage.micro_batch or stage.batch
        mtp = stage.mtp_weight > 0

        def measure() -> HeldOut:
            return evaluate(trainer.model, self.s.data, stage.seq_len, rows, limit, mtp)

        found = measure()
        line = {"step": trainer.step, "tokens": trainer.tokens, "loss": found.loss}
        line |= {"bits_per_byte": found.bits_per_byte, "mtp_loss": found.mtp_loss}
        if trainer.ema:
            with trainer.ema.in_place_of_weights():
                line["ema_loss"] = measure().loss
        self.s.log("evals.jsonl", line | {"held_out_tokens": found.tokens})
        self.s.say(
            f"step {trainer.step}: held-out loss {found.loss:.3f} (perplexity "
            f"{math.exp(min(found.loss, 50)):,.1f}), {found.bits_per_byte:.3f} bits per byte"
        )


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
        self.s.log("samples.jsonl", line)
        self.s.say(f"step {trainer.step} writes:\n{monitor.sample_prompt}{text}\n")

    def _write(self, trainer: Trainer, tokens: int) -> str:
        tokenizer = self.s.data.tokenizer
        count = max(min(tokens, self.s.stage.seq_len - len(self.prompt)), 1)
        sampling = Sampling(temperature=0.7, top_p=0.95, seed=self.s.recipe.seed)
        return tokenizer.decode(
            generate(trainer.model, self.prompt, count, sampling, {tokenizer.eos_id})
        )


class Checkpoints:
    """checkpoints/: every so many steps and at the stage's end."""

    def __init__(self, setting: Setting) -> None:
        self.s = setting

    def __call__(self, trainer: Trainer, record: StepRecord) -> None:
        if self.s.due(trainer.step, self.s.recipe.checkpoint.every):
            self.s.save(trainer)
