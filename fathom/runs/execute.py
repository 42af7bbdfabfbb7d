"""A whole run, top to bottom: folder, data, model, stages, export, report. The same call again resumes.

Everything that shows something to a person comes in as a function, so that this works without a terminal.

On several processes each runs this page. `Crew` says which of them speaks and writes; model, steps, evaluations,
checkpoints and export are everybody's, and what decides where the run goes is agreed.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fathom.data.prepared import TokenData
from fathom.data.progress import Say
from fathom.errors import FathomError
from fathom.kernels import compile_elementwise
from fathom.model import Transformer
from fathom.model.initial import outline
from fathom.parallel import Parallel
from fathom.parallel.export import export
from fathom.runs.callbacks import begin_stage, spike_line, stage_callbacks
from fathom.runs.crew import Crew
from fathom.runs.environment import environment, what_changed
from fathom.runs.folder import SPIKES, RunFolder, SilentFolder
from fathom.runs.layout import RunLayout
from fathom.runs.looking import check_needles
from fathom.runs.machine import check_memory, check_memory_of_ranks, compute_dtype
from fathom.runs.pace import EXPORTS, Pace
from fathom.runs.recipe import Recipe, Stage
from fathom.runs.saving import finish_saving, resume_run, save_run
from fathom.runs.setting import Setting, Show
from fathom.runs.stopping import asked_to_stop
from fathom.runs.streams import stage_loader
from fathom.runs.tensorboard import require_tensorboard
from fathom.runs.token_data import token_data
from fathom.train.checkpoint import checkpoints
from fathom.train.loop import RollBack, StagePlan, Trainer, train_stage
from fathom.train.memory import keep_freed_memory
from fathom.train.rate import matmul_rate


class Run:
    """One run in one folder: what its stages share."""

    def __init__(
        self, recipe: Recipe, out: str | Path, device: torch.device, show: Show, say: Say
    ) -> None:
        self.layout = RunLayout(recipe, dist.get_world_size() if dist.is_initialized() else 1)
        self.crew = Crew(self.layout.layout, self.layout.full_shard)
        self.recipe, self.device = recipe, device
        self.show, self.say = (show, say) if self.crew.speaks else (_silent, _silent)
        self.folder = RunFolder(out) if self.crew.speaks else SilentFolder(out)
        self.stopping = threading.Event()
        self.data: TokenData
        self.trainer: Trainer
        self.pace: Pace
        self.peak_flops = 1.0
        self.saved_step: int | None = None

    def set_up(self) -> None:
        """Folder, data, model and optimiser, put back to where the run was."""
        if self.crew.size == 1:
            check_memory(self.recipe.model, self.device)
        else:
            check_memory_of_ranks(self.layout, self.crew, self.device)
        if self.recipe.monitor.tensorboard:
            require_tensorboard()
        self.crew.first(lambda: self.folder.claim(self.recipe))
        if self.crew.size > 1:
            self.say(self.layout.summary)
        keep_freed_memory()
        compile_elementwise(self.recipe.precision.compile)
        dtype = compute_dtype(self.recipe.precision.compute, self.device)
        self._write_environment(dtype)
        self.data = self._read_data()
        self.pace = Pace(self._looked_at(), len(self.data.held_out))
        self.trainer = self._start()
        self._check_stages()
        self._resume()
        self._go_on()
        self.peak_flops = self.crew.size * matmul_rate(self.device, dtype or torch.float32)

    def _write_environment(self, dtype: torch.dtype | None) -> None:
        """environment.json, with a word where it is not the one that the run began in."""
        now, before = environment(self.device, dtype), self.folder.read_environment()
        now |= {"processes": self.crew.size, "layout": self.layout.name}
        if changed := what_changed(before, now):
            self.say(f"{changed}; it goes on, but not to the last bit as it would have")
        self.folder.write("environment.json", json.dumps(now, indent=1))

    def _read_data(self) -> TokenData:
        """The first rank makes the tokens ready, the others wait for them and open what is there."""
        made: list[TokenData] = []
        self.crew.first(lambda: made.append(self._prepare()))
        return made[0] if made else TokenData.open(self.folder.data)

    def _prepare(self) -> TokenData:
        return token_data(self.recipe, self.folder.data, self.say)

    def _start(self) -> Trainer:
        """A trainer at step 0."""
        recipe = self.recipe
        model = self._build_model(compute_dtype(recipe.precision.compute, self.device))
        asked = recipe.parallel
        parallel = Parallel(
            model,
            self.crew.mesh,
            asked.zero1,
            plan=self.layout.plan_on(self.device),
            full_shard=asked.full_shard,
            outline_on=None if self.crew.size == 1 else self.device,
        )
        return Trainer.start(model, recipe.optim, recipe.guard, recipe.ema, parallel)

    def _build_model(self, dtype: torch.dtype | None) -> Transformer:
        """The model as the seed makes it, on the device; the same on every device.

        Of many processes none has the memory for it: there an outline, which `Parallel` gives this rank's numbers.
        """
        torch.manual_seed(self.recipe.seed)
        ids = self.data.tokenizer.sentence_ids()  # a loaded tokenizer brings its own
        config = self.recipe.model.replace(**ids)
        alone = self.crew.size == 1
        model = Transformer(config).to(self.device) if alone else outline(config)
        model.set_compute_dtype(dtype)
        model.set_recompute(self.recipe.precision.recompute)
        return model

    def _looked_at(self) -> Recipe:
        """The recipe with the looks that this layout allows; says which those are that it does not."""
        monitor = self.recipe.monitor
        if self.crew.whole:
            return self.recipe
        self.say(
            "no process has the whole model: samples and needles are left out; speak with the run folder "
            "(fathom generate, fathom eval needle), at any time"
        )
        return replace(self.recipe, monitor=replace(monitor, needle_lengths=()))

    def _check_stages(self) -> None:
        """Refuse now what would otherwise end the run when a later stage begins or ends."""
        for index in range(len(self.recipe.stages)):
            stage_loader(self.recipe, index, self.data)
        check_needles(self.pace.recipe, self.trainer.model, self.data)

    def _resume(self) -> None:
        if resume_run(self.trainer, self.folder.checkpoints, self._data_marks(), self.say):
            done = self.trainer.step == self.recipe.steps
            ending = "all steps are done" if done else "going on from there"
            self.say(f"checkpoint of step {self.trainer.step} found: {ending}")
        else:
            if checkpoints(self.folder.checkpoints):
                self.say("no checkpoint is whole: beginning anew")
            if self.trainer.step:  # a roll-back
                del self.trainer  # there may not be the memory for two
                self.trainer = self._start()
        self.saved_step = self.trainer.step

    def _go_on(self) -> None:
        """Whatever was said and set after the step that the trainer is at now is undone."""
        self.folder.forget_after(self.trainer.step, self.trainer.guard.tally.spikes)
        moment = self.recipe.at(step=self.trainer.step)
        self.trainer.model.set_rope_scaling(moment.rope_scaling)

    def save(self, trainer: Trainer) -> None:
        """A checkpoint now, unless this step has one; logs reach the disk before it."""
        if trainer.step == self.saved_step:
            return
        self.folder.sync()
        asked, directory = self.recipe.checkpoint, self.folder.checkpoints
        save_run(trainer, directory, asked.keep, self._data_marks(), asked.asynchronous)
        self.saved_step = trainer.step

    def finish_last_save(self) -> None:
        """Let a checkpoint that is being written reach the disk before the folder is given up for another error."""
        if hasattr(self, "trainer"):
            with suppress(Exception):
                finish_saving(self.trainer)

    def _data_marks(self) -> dict[str, Any]:
        """What tells this run's data from any other. Weights that prepared text was given can be changed there."""
        own = self.recipe.data.weights
        return {
            "tokenizer": self.data.tokenizer.fingerprint,
            "text": self.data.fingerprint,
            "mixture": {} if own else self.data.manifest["weights"],
        }

    def reached(self) -> str:
        """Where a run that is called again will go on."""
        if self.saved_step is None:  # stopped before a checkpoint was looked for
            return "where it was"
        return f"step {self.saved_step}" if self.saved_step else "the start"

    def train(self) -> None:
        """All stages that are not done yet, from an earlier step again after each roll-back."""
        while self.trainer.step < self.recipe.steps:
            try:
                self._train_stages()
            except RollBack as spike:
                self._roll_back(spike)
        finish_saving(self.trainer)

    def _roll_back(self, spike: RollBack) -> None:
        """Go back to the newest good checkpoint, or the start, and pass over the data seen since."""
        tally, passed_over = self.trainer.guard.tally, Counter(self.trainer.passed_over)
        spike.__traceback__ = None  # whose frames hold the trainer
        self._resume()
        since = spike.sequences_since(self.trainer.step)
        line = spike_line(spike.record) | {"to": self.trainer.step, "passed_over": since}
        self.folder.append(SPIKES, line)
        self.trainer.guard.rolled_back(tally, self.trainer.step)
        passed_over[spike.record.moment.stage] += since
        self.trainer.passed_over = dict(passed_over)
        self._go_on()
        self.say(
            f"step {spike.record.moment.step} is rolled back: {spike}; {since} sequences are passed over"
        )

    def _train_stages(self) -> None:
        for index, stage in enumerate(self.recipe.stages):
            if self.trainer.step >= self.recipe.spans[index].last_step:
                continue
            if not STAGES[stage.kind](self, index, stage):
                self.save(self.trainer)
                finish_saving(self.trainer)
                raise KeyboardInterrupt
            if stage is not self.recipe.stages[-1]:  # whose export follows in any case
                self.export()

    def export(self) -> None:
        """OUT/model: a Hugging Face directory, in float32, tokenizer included."""
        with self.pace.look(EXPORTS):
            export(self.trainer.parallel, self.folder.model, self.data.tokenizer)


def pretrain(run: Run, index: int, stage: Stage) -> bool:
    """Next-token and multi-token prediction on packed documents; False when stopped early."""
    recipe, span = run.recipe, run.recipe.spans[index]
    run.trainer.model.set_rope_scaling(recipe.rope_scaling(stage))
    plan = StagePlan(
        loader=stage_loader(recipe, index, run.data, run.trainer.passed_over),
        micro_batch=run.layout.micro_batch(stage),
        first_sequence=span.sequences_before,
        last_step=span.last_step,
        moment=lambda step: recipe.at(step=step),
        stop=lambda: run.crew.any(run.stopping.is_set()),
    )
    setting = Setting(
        run.folder, recipe, stage, run.data, run.peak_flops, run.show, run.say, run.save,
        run.pace, run.crew, run.layout.micro_batch(stage),
    )  # fmt: skip
    with closing(setting):
        callbacks = stage_callbacks(setting)
        run.say(span.heading)
        begin_stage(callbacks, run.trainer)
        return train_stage(run.trainer, plan, callbacks)


STAGES: dict[str, Callable[[Run, int, Stage], bool]] = {"pretrain": pretrain}
"""What each kind of stage does. A function returns False when it was stopped before its end."""


def run(
    recipe: Recipe,
    out: str | Path,
    device: torch.device | str = "cpu",
    show: Show = lambda progress: None,
    say: Say = lambda line: None,
) -> Path:
    """Run `recipe` in the folder `out`, from the start or from where it stopped; returns the folder.

    `show` gets each step's progress, `say` everything else worth a line. Ctrl-C finishes the step, saves and raises
    KeyboardInterrupt; a second one leaves at once. Raises `FathomError` for what a user can mend.
    """
    job = Run(recipe, out, torch.device(device), show, say)
    try:
        job.set_up()
        with asked_to_stop(job.stopping, job.crew.size > 1, job.say):
            job.train()
            job.export()
    except KeyboardInterrupt:
        job.say(f"stopped; the same command goes on from {job.reached()}")
        raise
    except Exception:
        job.finish_last_save()
        raise
    finally:
        job.folder.close()
    if job.crew.speaks:
        _report(job)
    job.crew.wait()
    return job.folder.path


def _report(job: Run) -> None:
    """The report is made from the folder's files; without matplotlib the run is whole all the same."""
    from fathom.runs.report import write_report

    try:
        job.say(f"report: {write_report(job.folder.path)}")
    except FathomError as error:
        job.say(f"no report yet: {error}")


def _silent(_: object) -> None:
    """What ranks say and show that do not speak."""
