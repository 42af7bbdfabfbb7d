"""Forward passes alone through a pipeline, for whatever looks at the model and learns nothing.

Each rank runs its stages from the first to the last, all micro-batches through one before the next one: GPipe's
forward half, in whatever way the stages lie on the ranks. Of two copies (DualPipe) the first one is read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fathom.model import Transformer
from fathom.model.objective import Rows
from fathom.model.transformer import Trunk
from fathom.parallel.pipeline.executor import Pipeline
from fathom.parallel.pipeline.mail import Mail
from fathom.parallel.schedules import Action, Schedule, Transfer

Measure = Callable[[Transformer, Trunk, Rows], Tensor]
"""What is wanted of a pass: numbers of a model, its states in front of the head, and the rows that were read."""


@torch.no_grad()
def read(pipeline: Pipeline, rows: Sequence[Rows], measure: Measure, mtp: bool) -> list[Tensor]:
    """What `measure` finds for each of the rows; nothing on ranks that do not have the last stage.

    All ranks of the pipeline together, with the same rows. In training mode the routers would count.
    """
    plan, model = pipeline.plan, pipeline.model
    parameter = next(model.parameters())
    mail = Mail(pipeline.group, parameter.device, model.compute_dtype or parameter.dtype)
    lists = Schedule("forward", plan.stages, len(rows), plan.placement, ())
    found: list[Tensor] = []
    parts = sorted((part for part in pipeline.stages if part.copy == 0), key=lambda p: p.stage)
    for part in parts:
        stage = pipeline.stages[part]
        for number, some in enumerate(rows):
            action = Action("F", part.stage, number)
            source, target = lists.receives(action), lists.sends(action)
            state = None if source is None else _take(mail, source, some, model.config.hidden_size)
            context = stage.context(some, keep_scores=False)
            state = stage.through(state, some, context)
            if target is None:
                found.append(measure(model, stage.finish(state, some, context, mtp), some))
            elif target.local:
                mail.hand_over(target, state)
            else:
                mail.send(target, state)
    mail.finish()
    return found


def _take(mail: Mail, source: Transfer, rows: Rows, width: int) -> Tensor:
    if not source.local:
        mail.receive(source, (*rows.inputs.shape, width))
    return mail.take(source)
