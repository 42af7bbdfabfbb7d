"""`fathom plan RECIPE --cluster h800x2048`: what a run costs, before it is run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from fathom.cli.plan_run import run_lines, run_micro_batch
from fathom.errors import PlanError, did_you_mean
from fathom.parallel.schedules import traits
from fathom.planning.cluster import DEVICES, Cluster, read_cluster
from fathom.planning.layout import PlannedLayout
from fathom.planning.plan import Plan
from fathom.planning.plan_values import as_values
from fathom.planning.rates import Rates
from fathom.planning.run_cost import Segment
from fathom.planning.search import Task, choose
from fathom.planning.what_if import WHAT_IFS
from fathom.runs.parallel import ParallelConfig
from fathom.runs.recipe import Recipe, load_recipe
from fathom.runs.stage import Stage

SHOWN = 20
"""Layouts of a sweep that are shown."""


def plan(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE", help="A recipe's name (v3-671b, nano, …) or the path of one."
        ),
    ],
    cluster: Annotated[
        str, typer.Option(help="DEVICExCOUNT: h800, h100, h200, b200, a100, laptop; or a .toml.")
    ],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a value of the recipe."),
    ] = None,
    stage: Annotated[
        str | None, typer.Option(help="Stage that a step is shown for; default the longest.")
    ] = None,
    pp: Annotated[int | None, typer.Option(help="Ranks of a pipeline.")] = None,
    ep: Annotated[int | None, typer.Option(help="Ranks that share a layer's experts.")] = None,
    micro_batch: Annotated[
        int | None,
        typer.Option(help="Sequences computed at a time, in a search too; default the stage's."),
    ] = None,
    schedule: Annotated[
        str | None, typer.Option(help="GPipe, 1F1B, ZB1P, ZBV, DualPipe or DualPipeV.")
    ] = None,
    interleave: Annotated[int, typer.Option(help="Stages on a rank of an interleaved 1F1B.")] = 1,
    split: Annotated[
        str | None, typer.Option(metavar="N,N,…", help="Layers of each stage, uneven if you like.")
    ] = None,
    recompute: Annotated[
        str | None, typer.Option(help="none, report (norms, up-projections, SwiGLU) or full.")
    ] = None,
    fp8: Annotated[
        bool | None, typer.Option("--fp8/--no-fp8", help="Default: where the device has it.")
    ] = None,
    zero1: Annotated[
        bool | None,
        typer.Option("--zero1/--no-zero1", help="Shard masters, moments; default: the recipe's."),
    ] = None,
    full_shard: Annotated[
        bool | None,
        typer.Option("--full-shard/--no-full-shard", help="Shard weights too; the recipe's."),
    ] = None,
    overlap: Annotated[
        bool | None,
        typer.Option(
            "--overlap/--no-overlap", help="Hide the all-to-all; default: the schedule's."
        ),
    ] = None,
    price: Annotated[float | None, typer.Option(help="Dollars for an hour of one device.")] = None,
    what_if: Annotated[
        str | None,
        typer.Option(help=f"Plan with hardware that there is not: {', '.join(WHAT_IFS)}."),
    ] = None,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Rank all layouts at the stage's micro-batch.")
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write the plan as one page.")] = None,
) -> None:
    """Parameters, memory, traffic, bubble, step time, days and money of a run on a cluster, by formula alone."""
    chosen = load_recipe(recipe, set_ or [])
    wishes = {
        "pp": pp,
        "ep": ep,
        "micro_batch": micro_batch,
        "schedule": schedule,
        "interleave": interleave if interleave != 1 else None,
        "split": _split(split),
        "recompute": recompute,
        "fp8": fp8,
        "zero1": zero1,
        "full_shard": full_shard,
        "overlap": overlap,
    }
    made = make_plan(chosen, _cluster(cluster, price), stage, wishes, what_if)
    values = as_values(made, SHOWN if sweep else None) if json_ or html else {}
    if html:
        from fathom.cli.plan_page import write_page

        written = write_page(made, values, html)
    if json_:
        print(json.dumps(values, indent=2))
        return
    from fathom.cli.plan_text import print_plan

    print_plan(made, SHOWN if sweep else 0)
    if html:
        print(f"\nwritten: {written}")
    lines = run_lines(recipe, set_ or [], _shown(chosen, stage).name, made)
    if lines and what_if is None:
        print("", *lines, sep="\n")


def make_plan(
    recipe: Recipe,
    cluster: Cluster,
    stage: str | None,
    wishes: dict[str, Any],
    what_if: str | None = None,
) -> Plan:
    """The plan of a recipe on a cluster; of a layout what `wishes` leave None is chosen."""
    shown = _shown(recipe, stage)
    rates = _rates(what_if)
    task = Task(recipe.model, cluster, rates, shown.seq_len, shown.batch, shown.mtp_weight > 0)
    layout = _layout(recipe, task, shown, wishes | _of_the_recipe(recipe.parallel, wishes))
    return Plan(recipe.name, task, layout, tuple(segments(recipe)))


def _of_the_recipe(asked: ParallelConfig, wishes: dict[str, Any]) -> dict[str, Any]:
    """What table [parallel] says and the command line leaves open; a layout of one process says nothing."""
    own: dict[str, Any] = {"zero1": asked.zero1, "full_shard": asked.full_shard}
    if asked.pp > 1 or asked.ep > 1:
        own |= {"pp": asked.pp, "ep": asked.ep}
    if asked.pp > 1 and wishes.get("pp") != 1:
        own["schedule"] = asked.schedule
        if all(wishes.get(key) in (None, getattr(asked, key)) for key in ("pp", "schedule")):
            own["split"] = asked.layers or None
    return {key: value for key, value in own.items() if wishes.get(key) is None}


def _shown(recipe: Recipe, name: str | None) -> Stage:
    if name is None:
        return max(recipe.stages, key=lambda stage: stage.tokens_asked)
    for stage in recipe.stages:
        if stage.name == name:
            return stage
    names = [stage.name for stage in recipe.stages]
    raise PlanError(f"--stage {name!r} is no stage of {recipe.name}; {did_you_mean(name, names)}")


def _rates(what_if: str | None) -> Rates:
    if what_if is None:
        return Rates()
    if what_if not in WHAT_IFS:
        raise PlanError(f"--what-if {what_if!r} is not known; {did_you_mean(what_if, WHAT_IFS)}")
    return WHAT_IFS[what_if].rates(Rates())


def _cluster(text: str, price: float | None) -> Cluster:
    found = read_cluster(text)
    if price is None:
        return found
    return replace(found, device=replace(found.device, price=price))


def _layout(recipe: Recipe, task: Task, stage: Stage, wishes: dict[str, Any]) -> PlannedLayout:
    """What was wished for; the rest as in the report where that can be, or the fastest that fits."""
    wanted = {key: value for key, value in wishes.items() if value is not None}
    device = task.cluster.device
    fp8 = wanted.get("fp8", device.fp8 > 0 and recipe.precision.compute != "float32")
    like = PlannedLayout(
        micro_batch=wanted.get("micro_batch", stage.micro_batch or _whole_batch(task)),
        recompute=wanted.get("recompute", "report" if recipe.precision.recompute else "none"),
        fp8=fp8,
        zero1=wanted["zero1"],
        full_shard=wanted["full_shard"],
        moment_bytes=2 if fp8 else 4,
        overlap=wanted.get("overlap", False),
    )
    shape = {"pp", "ep", "schedule", "interleave", "split"} & set(wanted)
    if not shape:
        layout = choose(task, like)
        return replace(layout, overlap=wanted.get("overlap", layout.overlap))
    pp = wanted.get("pp", 1)
    _check_pipeline(task.cluster, pp, wanted.get("split"))
    if "schedule" in wanted:
        traits(wanted["schedule"])  # refuses a name that there is not
    for key in ("schedule", "interleave"):
        if key in wanted and pp == 1:
            raise PlanError(
                f"--{key} {wanted[key]} does nothing in a pipeline of one rank; give --pp above 1 too"
            )
    layout = replace(like, **{**wanted, "pp": pp, "dp": task.cluster.devices // pp})
    if "micro_batch" not in wanted:
        layout = replace(layout, micro_batch=run_micro_batch(recipe, stage, layout))
    return replace(layout, overlap=wanted.get("overlap", layout.traits.overlaps and pp > 1))


def _check_pipeline(cluster: Cluster, pp: int, split: tuple[int, ...] | None) -> None:
    if pp > cluster.devices:
        name = cluster.device.name
        remedy = f"--cluster {name}x{pp}" if name in DEVICES else f"devices = {pp} in its file"
        raise PlanError(
            f"pp = {pp} needs {pp} devices or a multiple and {cluster.name} has {cluster.devices}; give {remedy}"
        )
    if pp < 1 or cluster.devices % pp:
        raise PlanError(
            f"pp = {pp} must divide the {cluster.devices} devices of {cluster.name}; take a divisor"
        )
    if split and len(split) > pp == 1:
        raise PlanError(
            f"--split {','.join(map(str, split))} is for a pipeline of {len(split)} stages and pp is 1; give --pp "
            f"{len(split)} too"
        )


def _whole_batch(task: Task) -> int:
    """What a search tries for a stage without a micro-batch: each device's share of the batch."""
    return max(1, task.batch // task.cluster.devices)


def _split(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise PlanError(
            f"--split {text!r} must be whole numbers with commas between: 4,4,3"
        ) from error


def segments(recipe: Recipe) -> list[Segment]:
    """The recipe's stages, those whose batch grows in parts with one size each."""
    found: list[Segment] = []
    for stage in recipe.stages:
        mtp, left = stage.mtp_weight > 0, float(stage.tokens_asked)
        sizes: dict[int, int] = {}
        sequences = 0
        while sequences < stage.batches.ramp and sequences * stage.seq_len < left:
            size = stage.batches.size(sequences)
            sizes[size] = sizes.get(size, 0) + size
            sequences += size
        for size, taken in sizes.items():
            tokens = min(left, float(taken * stage.seq_len))
            found.append(Segment(stage.name, tokens, stage.seq_len, size, mtp))
            left -= tokens
        if left > 0:
            found.append(Segment(stage.name, left, stage.seq_len, stage.batch, mtp))
    return found
