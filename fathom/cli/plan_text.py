"""What `fathom plan` prints: a page of 80 columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from rich import box
from rich.console import Console
from rich.table import Table

from fathom.planning import serving
from fathom.planning.describe import duration, human
from fathom.planning.plan import Plan
from fathom.planning.rank_memory import RESERVE
from fathom.planning.run_cost import (
    HOURS_PER_TRILLION,
    PUBLISHED_HOURS,
    PUBLISHED_PRICE,
    published_hours,
)
from fathom.planning.search import Candidate

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


def print_plan(plan: Plan, swept: int) -> None:
    """All of it on standard output; `swept`: so many layouts of a sweep."""
    console = Console(highlight=False, soft_wrap=False)
    console.width = min(max(console.width, 80), 100)
    for part in (_head, _memory, _traffic, _step, _bubbles, _cost, _what_ifs, _predictions):
        part(console, plan)
    _serving(console, plan)
    if swept:
        _candidates(console, f"The best {swept} layouts", plan.swept[:swept])
    else:
        _candidates(console, "The nearest layouts that fit", plan.alternatives)


def _title(console: Console, text: str) -> None:
    console.print(f"\n{text}", style="bold", markup=False)


def table(*headings: str) -> Table:
    """A plain table; every column but the first lies to the right."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_header=any(headings), header_style="dim")
    for number, heading in enumerate(headings):
        made.add_column(heading, justify="right" if number else "left", overflow="fold")
    return made


def _rows(console: Console, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    made = table(*headings)
    for row in rows:
        made.add_row(*row)
    console.print(made)


def _lines(console: Console, rows: Sequence[tuple[str, str]]) -> None:
    """What, and how much in words."""
    made = Table(box=None, pad_edge=False, show_header=False)
    made.add_column(no_wrap=True, style="dim")
    made.add_column(overflow="fold")
    for row in rows:
        made.add_row(*row)
    console.print(made)


def gib(size: float) -> str:
    """Bytes as GiB, small ones as MiB."""
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:,.1f} MiB"


def _head(console: Console, plan: Plan) -> None:
    p, task = plan.parameters, plan.task
    device = task.cluster.device
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    _title(console, f"{plan.name} on {task.cluster.name}: {verdict}")
    layout = plan.layout
    how = [
        f"FP8 and {device.compute.upper()}" if layout.fp8 else device.compute.upper(),
        f"recompute {layout.recompute}",
        f"ZeRO-1 {'on' if layout.zero1 else 'off'}",
        f"overlap {'on' if layout.overlap else 'off'}",
    ]
    _lines(
        console,
        [
            ("layout", f"{layout.name}, {', '.join(how)}"),
            (
                "step",
                (
                    f"{task.batch:,} x {task.seq_len:,} tokens; {plan.micro_batches} micro-batch(es) of "
                    f"{layout.micro_batch} for each of {layout.dp} pipelines"
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
    _title(console, f"Memory of the fullest rank (rank {rank} of a pipeline)")
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
    _lines(console, [("otherwise", "; ".join(others)), ("on the host", average)])


def bar(share: float, width: int = 24) -> str:
    """A share as blocks."""
    return "█" * max(1 if share > 0 else 0, round(share * width))


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
    _title(console, "Traffic that a device sends")
    links = f"{device.intra_bandwidth / 1e9:g} GB/s inside a node, {device.inter_bandwidth / 1e9:g} GB/s between"
    _lines(console, [*lines, ("links", links)])


def _step(console: Console, plan: Plan) -> None:
    without = plan.step_without_overlap
    _title(console, "One step on the slowest rank")
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
    _rows(console, headings, rows)


def seconds(time: float) -> str:
    """Seconds with about three figures."""
    if time < 10:
        return f"{time:.3g} s"
    return f"{time:.1f} s" if time < 100 else f"{time:,.0f} s"


def rate(tokens_per_second: float) -> str:
    """Tokens per second, whole unless there are few."""
    return f"{tokens_per_second:,.0f}" if tokens_per_second >= 100 else f"{tokens_per_second:.3g}"


def _bubbles(console: Console, plan: Plan) -> None:
    if not plan.bubbles:
        return
    _title(console, "Bubble by schedule (report Table 2), the same ranks")
    rows = [
        (name, seconds(one.bubble), f"{one.bubble_fraction:.1%}", rate(one.tokens_per_second))
        for name, one in plan.bubbles.items()
    ]
    _rows(console, ("schedule", "idle", "of the step", "tokens/s"), rows)


def _cost(console: Console, plan: Plan) -> None:
    cost = plan.cost
    _title(console, f"The run: {human(cost.tokens)} tokens")
    rows = [
        (
            stage.stage,
            human(stage.tokens),
            f"{stage.hours:,.1f}" if stage.hours < 100 else f"{stage.hours:,.0f}",
            duration(stage.hours * 3600 / cost.devices),
        )
        for stage in cost.stages
    ]
    _rows(console, ("stage", "tokens", "device hours", "on the wall"), rows)
    dollars = "no price is known: give --price" if cost.usd is None else f"${cost.usd:,.0f}"
    total = f"{cost.hours:,.0f}" if cost.hours >= 100 else f"{cost.hours:.2g}"
    _lines(
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
        _lines(console, [("published", line) for line in published_lines()])


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


def _what_ifs(console: Console, plan: Plan) -> None:
    if not plan.what_ifs:
        return
    _title(console, "What if the hardware were as the report asks (§3.5)")
    rows = [
        (
            f"{one.what_if.name}: {one.what_if.says}",
            rate(one.step.tokens_per_second),
            f"{one.gain:+.1%}",
        )
        for one in plan.what_ifs
    ]
    _rows(console, ("", "tokens/s", "gain"), rows)


def _predictions(console: Console, plan: Plan) -> None:
    if not plan.task.cluster.device.bf16:
        return  # nobody publishes runs on such
    _title(console, "How far to believe it: published runs, the same constants")
    rows = [
        (
            f"{one.point.who}, {one.point.cluster}",
            f"{one.point.published:,.0f}",
            f"{one.predicted:,.0f}",
            f"{one.error:+.1%}",
        )
        for one in plan.predictions
    ]
    _rows(console, ("tokens/s and device", "published", "planned", "error"), rows)


def _serving(console: Console, plan: Plan) -> None:
    if not plan.decodes:
        return
    _title(console, "Serving (report §3.4), tokens/s and device")
    rows = [
        (
            f"{one.unit.name}, {one.unit.devices} devices",
            "",
            one.bound,
            f"{one.floor:,.0f}",
            f"{one.roof:,.0f}",
        )
        for one in plan.prefills
    ]
    rows += [
        (
            f"{one.unit.name}, {one.unit.devices} devices",
            f"{one.batch:.0f} of {one.most:.0f}",
            one.bound,
            f"{one.floor:,.0f}",
            f"{one.roof:,.0f}",
        )
        for one in plan.decodes
    ]
    _rows(console, ("unit", "requests", "bound by", "one by one", "all hidden"), rows)
    computed = serving.PUBLISHED_PREFILL * (1 - serving.CACHE_HITS)
    _lines(
        console,
        [
            (
                "published",
                (
                    f"Day 6: decode {serving.PUBLISHED_DECODE:,.0f}; prefill {serving.PUBLISHED_PREFILL:,.0f}, "
                    f"{computed:,.0f} of them computed, the rest from the cache on disk"
                ),
            ),
            (
                "cache",
                (
                    f"{serving.cache_bytes(plan.config, False):,.0f} bytes per token, "
                    f"{serving.cache_bytes(plan.config, True):,.0f} in FP8; contexts of {serving.PUBLISHED_CONTEXT:,}"
                ),
            ),
        ],
    )


def _candidates(console: Console, title: str, found: Sequence[Candidate]) -> None:
    if not found:
        _title(console, "No other layout fits: take more devices or larger ones")
        return
    _title(console, title)
    rows = [
        (
            one.layout.name,
            one.layout.recompute,
            gib(one.memory.total),
            "yes" if one.fits else "no",
            f"{one.step.bubble_fraction:.1%}",
            rate(one.step.tokens_per_second),
        )
        for one in found
    ]
    _rows(console, ("layout", "recompute", "memory", "fits", "bubble", "tokens/s"), rows)
