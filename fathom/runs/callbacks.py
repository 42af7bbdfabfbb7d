"""What a run does besides training, after each step: the extras, all of them, in the order in which they run.

Those that look before a stage's first step too have a method `begin`. None of them changes what is learnt: no random
state of training is touched and no clock decides anything.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from fathom.model.router import Router
from fathom.parallel.pipeline.stages import load_rows
from fathom.planning import flops_per_token
from fathom.runs.folder import SPIKES
from fathom.runs.looking import HeldOutLoss, LossByPosition, Needles, Samples
from fathom.runs.pace import CHECKPOINTS
from fathom.runs.setting import Setting, StepProgress
from fathom.train.evaluate import bits_per_byte
from fathom.train.loop import Callback, StepRecord, Trainer


def stage_callbacks(setting: Setting) -> list[Callback]:
    """All of them. Logs come before the checkpoint, so that none is missing for a saved step.

    Samples and needles are made token by token by one rank, and are left out where none has a whole model.
    """
    writing: list[Callback] = [Samples(setting), Needles(setting)] if setting.crew.whole else []
    return [
        Metrics(setting),
        Spikes(setting),
        HeldOutLoss(setting),
        LossByPosition(setting),
        *writing,
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

    def __call__(self, trainer: Trainer, record: StepRecord) -> None:
        line = self._line(trainer, record)
        now_and_then = self.s.due(trainer.step, self.s.recipe.monitor.load_every)
        if now_and_then and self.s.crew.size > 1:
            line |= self._slowest(record)
        self.s.log("metrics.jsonl", line)
        if now_and_then:
            biases = self.s.crew.everyone(_bias_ranges(trainer))
            rows = {row: ends for some in biases for row, ends in some.items()}
            load = {"step": trainer.step, "load": record.expert_load.tolist()}
            self.s.log("load.jsonl", load | {"bias": [rows[row] for row in sorted(rows)]})
        self.s.pace.step(record.moment, record.seconds)
        eta = self.s.pace.seconds_left(trainer.step)
        self.s.show(StepProgress(trainer.step, self.s.recipe.steps, _shown(line), eta))

    def _slowest(self, record: StepRecord) -> dict[str, Any]:
        """The rank that worked longest on the step, and how many times as long as the median one."""
        seconds = self.s.crew.gather(record.seconds - record.waited)
        slowest = max(range(len(seconds)), key=seconds.__getitem__)
        ratio = seconds[slowest] / max(statistics.median(seconds), 1e-9)
        return {"slowest_rank": slowest, "slowest_ratio": ratio}

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


def _bias_ranges(trainer: Trainer) -> dict[int, list[float]]:
    """[smallest, largest] router bias of each MoE block here that has one, by its row of the loads."""
    inner, rows = trainer.model.model, load_rows(trainer.model.config)
    found = {}
    for layer, block in enumerate((*inner.layers, *inner.mtp)):
        for router in (module for module in block.modules() if isinstance(module, Router)):
            bias = router.e_score_correction_bias
            if bias is not None:
                found[rows[layer]] = [bias.min().item(), bias.max().item()]
    return found


def _shown(line: dict) -> str:
    mtp = f"  mtp {line['mtp_loss']:.3f}" if line["mtp_weight"] and line["mtp_loss"] else ""
    if line["skipped"]:
        return f"skipped: {line['skipped']}"
    return (
        f"loss {line['loss']:.3f}{mtp}  bits/byte {line['bits_per_byte']:.3f}  "
        f"grad {line['grad_norm']:.2f}  lr {line['lr']:.1e}  {line['tokens_per_second']:,.0f} tok/s  "
        f"mfu {100 * line['mfu']:.0f}%  load {line['max_load']:.2f}"
    )


def spike_line(record: StepRecord) -> dict[str, Any]:
    """What spikes.jsonl says about a remarkable step: what was seen, what was done, and which data it was."""
    verdict, moment = record.verdict, record.moment
    return {
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


class Checkpoints:
    """checkpoints/: every so many steps and at the stage's end."""

    def __init__(self, setting: Setting) -> None:
        self.s = setting

    def __call__(self, trainer: Trainer, record: StepRecord) -> None:
        if self.s.due(trainer.step, self.s.recipe.checkpoint.every):
            with self.s.pace.look(CHECKPOINTS):
                self.s.save(trainer)
