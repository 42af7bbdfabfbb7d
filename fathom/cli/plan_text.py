"""What `fathom plan` prints: a page of 80 columns."""

from __future__ import annotations

from dataclasses import asdict

from rich.console import Console

from fathom.cli.plan_beside import candidates, predictions, serving_units, what_ifs
from fathom.cli.plan_tables import (
    bar,
    counted,
    gib,
    print_lines,
    print_rows,
    print_title,
    rate,
    seconds,
    table,
)
from fathom.planning.describe import duration, human
from fathom.planning.plan import Plan
from fathom.planning.rank_memory import RESERVE
from fathom.planning.run_cost import (
    HOURS_PER_TRILLION,
    PUBLISHED_HOURS,
    PUBLISHED_PRICE,
    published_hours,
)

MEMORY = {
    "weights": "weights that multiply",
    "gradients": "gradients, FP32",
    "master": "master weights",
    "moments": "AdamW's moments",
    "activations": "activations kept for backward",
    "all_to_all": "all-to-all buffers",
    "logits": "logits, gradient of the head",
}
TIME = {
    "compute": "computation",
    "exposed": "all-to-all in the open",
    "bubble": "pipeline bubble",
    "reduce": "gradients and weights exchanged",
    "update": "optimiser's update",
}
"""Parts of a step, in words."""

FP8_NOTE = (
    "is reckoned as in the report; fathom does not train in it yet: --no-fp8 for what can run today"
)


def print_plan(plan: Plan, swept: int) -> None:
    """All of it on standard output; `swept`: so many layouts of a sweep."""
    console = Console(highlight=False, soft_wrap=False)
    console.width = min(max(console.width, 80), 100)
    for part in (_head, _memory, _traffic, _step, _bubbles, _cost):
        part(console, plan)
    for beside in (what_ifs, predictions, serving_units):
        beside(console, plan)
    if swept:
        candidates(console, f"The best {swept} layouts", plan.swept[:swept], plan)
    else:
        candidates(console, "The nearest layouts that fit", plan.alternatives, plan)


def _head(console: Console, plan: Plan) -> None:
    p, task = plan.parameters, plan.task
    device = task.cluster.device
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    print_title(console, f"{plan.name} on {task.cluster.name}: {verdict}")
    layout = plan.layout
    how = [
        f"FP8 and {device.compute.upper()}" if layout.fp8 else device.compute.upper(),
        f"recompute {layout.recompute}",
        *([] if layout.full_shard else [f"ZeRO-1 {'on' if layout.zero1 else 'off'}"]),
        f"overlap {'on' if layout.overlap else 'off'}",
    ]
    each = f" for each of {layout.dp} {'pipelines' if layout.pp > 1 else 'devices'}"
    each = each if layout.dp > 1 else ""
    print_lines(
        console,
        [
            ("layout", f"{layout.name}, {', '.join(how)}"),
            *([("FP8", FP8_NOTE)] if layout.fp8 else []),
            (
                "step",
                (
                    f"{task.batch:,} x {task.seq_len:,} tokens; {counted(plan.micro_batches, 'micro-batch')} of "
                    f"{layout.micro_batch}{each}"
                ),
            ),
            (
                "parameters",
                f"{human(p.main, 4)}, {human(p.active)} active, {human(p.mtp)} in MTP modules",
            ),
            (
                "  by part",
                (
                    f"experts and FFN {human(p.feed_forward)}, attention {human(p.attention)}, embedding "
                    f"and head {human(p.embedding + p.head)}"
                ),
            ),
            ("work", f"{human(plan.step.flops)} operations per trained token"),
        ],
    )


def _memory(console: Console, plan: Plan) -> None:
    rank, memory = plan.fullest
    device = plan.task.cluster.device
    print_title(console, f"Memory of the fullest rank (rank {rank} of a pipeline)")
    rows = [
        (MEMORY[key], gib(size), bar(size / device.memory))
        for key, size in asdict(memory).items()
        if size
    ]
    rows.append(
        (
            "in all",
            gib(memory.total),
            f"{memory.total / device.memory:.0%} of {gib(device.memory)}; {RESERVE:.0%} kept free",
        )
    )
    made = table("class", "bytes", "")
    made.columns[2].justify = "left"
    for row in rows:
        made.add_row(*row)
    console.print(made)
    others = [
        f"{name} {gib(one.total)}"
        for name, one in plan.memory_otherwise.items()
        if name != f"recompute {plan.layout.recompute}"
    ]
    average = f"{gib(plan.host_ema_bytes)} if an average of the weights is kept"
    print_lines(console, [("otherwise", "; ".join(others)), ("on the host", average)])


def _traffic(console: Console, plan: Plan) -> None:
    traffic, device = plan.traffic, plan.task.cluster.device
    lines = []
    if traffic["dispatch_intra"]:
        for way in ("dispatch", "combine"):
            between, inside = traffic[f"{way}_inter"], traffic[f"{way}_intra"]
            lines.append(
                (
                    way,
                    f"{human(between)}B between nodes, {human(inside)}B inside, for a token and a layer",
                )
            )
        lines.append(
            ("nodes", f"{traffic['nodes_per_token']:.2f} on average for a token (even choices)")
        )
    if plan.layout.pp > 1:
        size = traffic["pipeline_micro_batch"]
        lines.append(
            (
                "pipeline",
                f"{gib(size)} for a micro-batch and a border, {plan.step.pipeline:.2f} s a step",
            )
        )
    if plan.layout.world > 1:
        lines.append(
            (
                "each step",
                (
                    f"{gib(traffic['gradients_step'])} of gradients and {gib(traffic['weights_step'])} of weights, "
                    f"{plan.step.reduce:.2f} s"
                ),
            )
        )
    if not lines:
        return
    print_title(console, "Traffic that a device sends")
    links = f"{device.intra_bandwidth / 1e9:g} GB/s inside a node, {device.inter_bandwidth / 1e9:g} GB/s between"
    print_lines(console, [*lines, ("links", links)])


def _step(console: Console, plan: Plan) -> None:
    without = plan.step_without_overlap
    print_title(console, "One step on the slowest rank")
    hidden = plan.layout.overlap and plan.layout.ep > 1
    headings = ("", "as planned", "share") + (("without overlap",) if hidden else ())
    rows = [
        (says, seconds(getattr(plan.step, key)), f"{getattr(plan.step, key) / plan.step.total:.1%}")
        + ((seconds(getattr(without, key)),) if hidden else ())
        for key, says in TIME.items()
    ]
    rows += [
        (says, text(plan.step), "") + ((text(without),) if hidden else ())
        for says, text in (
            ("in all", lambda s: seconds(s.total)),
            ("tokens/s and device", lambda s: rate(s.tokens_per_second)),
            ("MFU", lambda s: f"{s.mfu:.1%}"),
        )
    ]
    print_rows(console, headings, rows)


def _bubbles(console: Console, plan: Plan) -> None:
    if not plan.bubbles:
        return
    print_title(
        console, "Bubble by schedule, the same ranks (Table 2; GPipe and ZBV are not in it)"
    )
    rows = [
        (name, seconds(one.bubble), f"{one.bubble_fraction:.1%}", rate(one.tokens_per_second))
        for name, one in plan.bubbles.items()
    ]
    rows += [(name, "", "", why) for name, why in plan.schedules_lacking.items()]
    print_rows(console, ("schedule", "idle", "of the step", "tokens/s"), rows)


def _cost(console: Console, plan: Plan) -> None:
    cost = plan.cost
    print_title(console, f"The run: {human(cost.tokens)} tokens")
    rows = [
        (
            stage.stage,
            human(stage.tokens),
            f"{stage.hours:,.1f}" if stage.hours < 100 else f"{stage.hours:,.0f}",
            duration(stage.hours * 3600 / cost.devices),
        )
        for stage in cost.stages
    ]
    print_rows(console, ("stage", "tokens", "device hours", "on the wall"), rows)
    dollars = "no price is known: give --price" if cost.usd is None else f"${cost.usd:,.0f}"
    total = f"{cost.hours:,.0f}" if cost.hours >= 100 else f"{cost.hours:.2g}"
    print_lines(
        console,
        [
            ("in all", f"{total} device hours, {duration(cost.days * 86400)}, {dollars}"),
            (
                "counted in",
                f"{1 - plan.task.rates.good_time:.0%} of the time lost to interruptions",
            ),
        ],
    )
    if plan.is_report:
        print_lines(console, [("published", line) for line in published_lines()])


def published_lines() -> list[str]:
    """What the report says of its own run."""
    total = sum(PUBLISHED_HOURS.values())
    parts = ", ".join(f"{what} {hours / 1e3:,.0f}K" for what, hours in PUBLISHED_HOURS.items())
    return [
        (
            f"{parts} H800 hours; {total / 1e3:,.0f}K x ${PUBLISHED_PRICE:.0f} = "
            f"${total * PUBLISHED_PRICE / 1e6:.3f}M"
        ),
        f"14.8T x {HOURS_PER_TRILLION / 1e3:.0f}K hours per T = {published_hours(14.8e12) / 1e3:,.0f}K",
    ]
