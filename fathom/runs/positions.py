"""positions.jsonl: held-out loss by position, before and after each stage; one of the callbacks of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fathom.train.loop import StepRecord, Trainer
from fathom.train.positions import loss_by_position

if TYPE_CHECKING:
    from fathom.runs.callbacks import Setting

LOG = "positions.jsonl"


class LossByPosition:
    """Looks before a stage's first step and after its last.

    Both in windows of the stage's own length and with its rotary settings, so that the two differ by what the stage
    taught; what changing the settings alone does is between one stage's "after" and the next one's "before".
    """

    def __init__(self, setting: Setting) -> None:
        self.s = setting

    def begin(self, trainer: Trainer) -> None:
        """Before the first step; a run that is resumed right there has the line already."""
        line = {"stage": self.s.stage.name, "when": "before"}
        begins = trainer.step == self.s.span.first_step
        if begins and not self.s.folder.has_line(LOG, line):
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
        self.s.log(LOG, line)
