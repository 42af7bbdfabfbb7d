"""From a plan to a run: the micro-batch that a run would take, and the command that runs what was planned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from shlex import quote

from fathom.cli.plan_tables import rate
from fathom.errors import FathomError, PlanError
from fathom.parallel.pipeline import share_layers
from fathom.planning.cluster import Cluster
from fathom.planning.layout import PlannedLayout, stages
from fathom.planning.plan import Plan
from fathom.runs.layout import RunLayout
from fathom.runs.recipe import Recipe, load_recipe
from fathom.runs.stage import Stage
from fathom.runs.tables import literal


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


def run_lines(source: str, overrides: Sequence[str], stage: str, plan: Plan) -> list[str]:
    """The command that runs what was planned, with every key that the recipe has otherwise, or why not.

    `source` and `overrides` are the recipe's as the user gave them, `stage` is the one that the plan shows. Nothing for
    what is not run today: FP8, interleaving, recomputing everything, an overlap that is not the schedule's. A line
    before tells of layers that had to be moved, since a run has a layer on every stage.
    """
    layout, cluster = plan.layout, plan.task.cluster
    overlaps = layout.pp > 1 and layout.traits.overlaps
    on_paper = layout.fp8 or layout.interleave > 1 or layout.recompute == "full"
    uneven = cluster.nodes > 1 and cluster.devices % cluster.device.per_node
    if on_paper or uneven or layout.overlap != overlaps or not plan.fits:
        return []
    try:
        note, layout = _without_empty_stages(plan)
        changes = dict(change.split("=", 1) for change in overrides)
        changes |= _changes(load_recipe(source, overrides), stage, plan, layout)
        words = [f"{key}={value}" for key, value in changes.items()]
        RunLayout(load_recipe(source, words), layout.world)
    except FathomError as error:
        return [f"the recipe as it is cannot be run so: {error}"]
    asked = " ".join(f"--set {quote(word)}" for word in words)
    return [*note, f"run it: {_start(cluster)} run {quote(source)} {asked}".rstrip()]


def _without_empty_stages(plan: Plan) -> tuple[list[str], PlannedLayout]:
    """The plan's layout, where it has an empty stage with a layer moved there, the fastest way; and a line on that."""
    layout, counts = plan.layout, _counts(plan, plan.layout)
    if layout.pp == 1 or min(counts) > 0:
        return [], layout
    empty = counts.index(0)
    moved = [
        tuple(count - (i == source) + (i == empty) for i, count in enumerate(counts))
        for source in range(len(counts))
        if counts[source] > 1
    ]
    found = [plan.task.candidate(replace(layout, split=split)) for split in moved]
    fitting = sorted((one for one in found if one.fits), key=lambda one: one.rank)
    if not fitting:
        raise PlanError("no layout with a layer on every stage fits; take other ranks")
    best = fitting[0]
    says = (
        f"a run has a layer on every stage: {','.join(map(str, best.layout.split or ()))} instead of "
        f"{','.join(map(str, counts))}, {rate(best.step.tokens_per_second)} tokens/s"
    )
    return [says], best.layout


def _start(cluster: Cluster) -> str:
    if cluster.devices == 1:
        return "fathom"
    if cluster.nodes == 1:
        return f"torchrun --nproc-per-node {cluster.devices} -m fathom"
    each = f"--nnodes {cluster.nodes} --nproc-per-node {cluster.device.per_node}"
    return f"torchrun {each} --rdzv-backend c10d --rdzv-endpoint HOST:29500 -m fathom"


def _changes(recipe: Recipe, name: str, plan: Plan, layout: PlannedLayout) -> dict[str, str]:
    """Keys of the recipe that the layout has otherwise, with values as `--set` takes them."""
    per_node = plan.task.cluster.device.per_node
    stage = next(one for one in recipe.stages if one.name == name)
    own = recipe.parallel
    wanted = replace(
        own, pp=layout.pp, ep=layout.ep, layers=(), zero1=layout.zero1, full_shard=layout.full_shard,
        schedule=layout.schedule if layout.pp > 1 else own.schedule,
        devices_per_node=per_node if layout.ep > per_node > 1 else own.devices_per_node,
    )  # fmt: skip
    wanted = replace(wanted, layers=_layers(recipe, _counts(plan, layout)))
    found = {
        f"parallel.{field.name}": getattr(wanted, field.name)
        for field in fields(wanted)
        if getattr(wanted, field.name) != getattr(own, field.name)
    }
    if run_micro_batch(recipe, stage, layout) != layout.micro_batch:
        found[f"stages.{name}.micro_batch"] = layout.micro_batch
    again = layout.recompute == "report"
    if again != recipe.precision.recompute:
        found["precision.recompute"] = again
    return {key: literal(value).replace(", ", ",") for key, value in found.items()}


def _layers(recipe: Recipe, planned: tuple[int, ...]) -> tuple[int, ...]:
    """`parallel.layers` for layers shared as planned; none where a run would share them so of itself."""
    if len(planned) == 1:
        return ()
    if planned == recipe.parallel.layers:
        return planned
    itself = share_layers(recipe.model, len(planned))
    return () if planned == tuple(map(len, itself)) else planned


def _counts(plan: Plan, layout: PlannedLayout) -> tuple[int, ...]:
    """Layers of each stage, MTP's left out."""
    layers = plan.config.num_hidden_layers
    every = stages(layout, plan.config, plan.task.mtp)
    return tuple(sum(layer < layers for layer in stage.layers) for stage in every)
