"""What a plan and a run have in common: the recipe as it would be run in a planned layout."""

from __future__ import annotations

from dataclasses import replace

from fathom.errors import FathomError
from fathom.planning.layout import PlannedLayout
from fathom.runs.layout import RunLayout
from fathom.runs.recipe import Recipe
from fathom.runs.stage import Stage


def run_micro_batch(recipe: Recipe, stage: Stage, layout: PlannedLayout) -> int:
    """Sequences at a time where nothing names a number: as `fathom run` would cut the batch in this layout.

    A layout that no run can have is for the plan to refuse, or to reckon with a device's whole share.
    """
    schedule = layout.schedule if layout.pp > 1 else recipe.parallel.schedule
    try:
        asked = replace(
            recipe.parallel, pp=layout.pp, ep=layout.ep, schedule=schedule, layers=(),
            full_shard=layout.full_shard,
        )  # fmt: skip
        alone = replace(recipe, parallel=asked, stages=(stage,))
        return RunLayout(alone, layout.world).micro_batch(stage)
    except FathomError:
        return stage.micro_batch or max(1, stage.batch // layout.world)
