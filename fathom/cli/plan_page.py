"""`fathom plan --html`: the plan as one page that loads nothing, in the manner of a run's report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

import fathom.runs.report
from fathom import __version__
from fathom.cli.plan_bars import LEFT, ROW, WIDTH, bars
from fathom.cli.plan_beside import nothing_else
from fathom.cli.plan_tables import gain, gib, rate, seconds
from fathom.cli.plan_text import FP8_NOTE, MEMORY, TIME, published_lines
from fathom.errors import PlanError
from fathom.planning.describe import duration, human
from fathom.planning.plan import Plan
from fathom.planning.search import Candidate
from fathom.runs.report.html import details, facts_table, framed, rows_table
from fathom.runs.report.page import POLICY


def write_page(plan: Plan, values: dict[str, Any], path: Path) -> Path:
    """Write the page; `values` are those of `--json`, folded away at its end."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_document(plan, values), encoding="utf-8")
    except OSError as error:
        raise PlanError(f"{path} cannot be written: {error.strerror}; name another file") from error
    return path


def _document(plan: Plan, values: dict[str, Any]) -> str:
    css = Path(fathom.runs.report.__file__).parent / "report.css"
    name, cluster = escape(plan.name), escape(plan.task.cluster.name)
    body = "\n".join(
        part(plan)
        for part in (_header, _cards, _memory, _time, _cost, _what_ifs, _predictions, _layouts)
    )
    inputs = details("Everything", "the figures of --json", facts_table(values))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{name} on {cluster} · fathom plan</title>
<style>
{css.read_text(encoding="utf-8")}.rows td:not(:first-child), .rows th:not(:first-child) {{ text-align: right; }}
</style>
</head>
<body>
<main>
{body}
<h2>All figures</h2>
{inputs}
<footer>Written by fathom {escape(__version__)}, by formula alone; nothing was measured. docs/planning.md says how it is
reckoned and where each constant comes from. This page loads nothing from elsewhere.</footer>
</main>
</body>
</html>
"""


def _header(plan: Plan) -> str:
    state = "fits" if plan.fits else "does not fit"
    fp8 = f'<p class="note">FP8 {escape(FP8_NOTE)}.</p>' if plan.layout.fp8 else ""
    return (
        f'<header><div class="eyebrow">fathom · plan</div><h1>{escape(plan.name)} on '
        f"{escape(plan.task.cluster.name)}</h1><p>{escape(plan.layout.name)}: {state}</p>{fp8}</header>"
    )


def _cards(plan: Plan) -> str:
    cost, step, p = plan.cost, plan.step, plan.parameters
    dollars = "no price" if cost.usd is None else f"${human(cost.usd, 4)}"
    device = plan.task.cluster.device
    cards = [
        ("device hours", human(cost.hours, 4), f"{human(cost.tokens)} tokens, all stages"),
        ("on the wall", duration(cost.days * 86400), f"{cost.devices:,} devices"),
        (
            "price",
            dollars,
            "give --price" if device.price is None else f"${device.price:g} a device hour",
        ),
        ("tokens/s and device", rate(step.tokens_per_second), f"MFU {step.mfu:.1%}"),
        ("bubble", f"{step.bubble_fraction:.1%}", "of a step"),
        (
            "memory",
            gib(plan.memory.total),
            f"of {gib(device.memory)} on the fullest rank",
        ),
        ("parameters", human(p.main, 4), f"{human(p.active)} active per token"),
        ("work", human(step.flops), "operations per trained token"),
    ]
    items = "".join(
        f"<div><dt>{escape(a)}</dt><dd>{escape(b)}<small>{escape(c)}</small></dd></div>"
        for a, b, c in cards
    )
    return f'<dl class="cards">{items}</dl>'


def _memory(plan: Plan) -> str:
    device = plan.task.cluster.device
    every = {"as planned": plan.memory, **plan.memory_otherwise}
    every.pop(f"recompute {plan.layout.recompute}", None)
    rows = [
        (name, {MEMORY[k]: v for k, v in asdict(one).items() if v}, gib(one.total))
        for name, one in every.items()
    ]
    full = max(device.memory, *(one.total for one in every.values()))
    x = LEFT + WIDTH * device.memory / full
    line = f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{ROW * len(rows)}" stroke="var(--ink)" stroke-dasharray="3 4"/>'
    caption = (
        f"The fullest rank, number {plan.fullest[0]} of a pipeline, by class. The dashed line is the device's "
        f"{gib(device.memory)}."
    )
    caption += f" An average of the weights, if kept, takes {gib(plan.host_ema_bytes)} of host memory besides."
    return f"<h2>Memory</h2>{framed(bars(rows, full, line), caption, wide=True)}"


def _time(plan: Plan) -> str:
    every = {"as planned": plan.step}
    if plan.layout.overlap and plan.layout.ep > 1:
        every["without overlap"] = plan.step_without_overlap
    every |= {name: one for name, one in plan.bubbles.items() if name != plan.layout.schedule}
    rows = [
        (
            name,
            {says: getattr(one, key) for key, says in TIME.items()},
            f"{seconds(one.total)}, {rate(one.tokens_per_second)}/s",
        )
        for name, one in every.items()
    ]
    lacking = "".join(f" {name} {why}." for name, why in plan.schedules_lacking.items())
    caption = (
        f"One step of {plan.task.batch:,} sequences of {plan.task.seq_len:,} tokens on the slowest rank: as planned, "
        f"and on the same ranks under other schedules (report Table 2; GPipe and ZBV are not in it).{lacking} Behind "
        f"each bar: its length, tokens per second and device."
    )
    drawn = bars(rows, max(one.total for one in every.values()))
    table = rows_table(
        ("of a device", "bytes"),
        [
            (key.replace("_", " "), f"{size:,.0f}" if size > 100 else f"{size:.2f}")
            for key, size in plan.traffic.items()
            if size
        ],
    )
    sent = details("Traffic", "what a device sends: for a token and a layer, or for a step", table)
    return f"<h2>Time</h2>{framed(drawn, caption, wide=True)}{sent}"


def _cost(plan: Plan) -> str:
    cost = plan.cost
    rows = [
        (
            stage.stage,
            human(stage.tokens, 4),
            f"{stage.hours:,.2f}" if stage.hours < 10 else f"{stage.hours:,.0f}",
            duration(stage.hours * 3600 / cost.devices),
        )
        for stage in cost.stages
    ]
    body = rows_table(("stage", "tokens", "device hours", "on the wall"), rows)
    published = ""
    if plan.is_report:
        lines = "; ".join(published_lines())
        published = f'<p class="note">Published (report Table 1): {escape(lines)}.</p>'
    return f"<h2>The run</h2>{body}{published}"


def _what_ifs(plan: Plan) -> str:
    if not plan.what_ifs:
        return ""
    rows: Iterable[Sequence[str]] = [
        (one.what_if.says, rate(one.step.tokens_per_second), gain(one.gain))
        for one in plan.what_ifs
    ]
    return (
        "<h2>What if</h2><p>The hardware that the report asks for, one change at a time.</p>"
        + rows_table(("change", "tokens/s and device", "gain"), rows)
    )


def _predictions(plan: Plan) -> str:
    rows = [
        (
            one.point.name,
            f"{one.point.published:,.0f}",
            f"{one.predicted:,.0f}",
            gain(one.error),
        )
        for one in plan.predictions
    ]
    return (
        "<h2>How far to believe it</h2><p>Published runs reckoned with the same constants, none of which was fitted "
        "to them.</p>"
        + rows_table(("tokens/s and device", "published", "planned", "error"), rows)
        + _serving(plan)
    )


def _serving(plan: Plan) -> str:
    if not plan.decodes:
        return ""
    rows = [
        (
            one.unit.name,
            str(one.unit.devices),
            "",
            one.bound,
            f"{one.floor:,.0f}",
            f"{one.roof:,.0f}",
        )
        for one in plan.prefills
    ] + [
        (
            one.unit.name,
            str(one.unit.devices),
            f"{one.batch:.0f}",
            one.bound,
            f"{one.floor:,.0f}",
            f"{one.roof:,.0f}",
        )
        for one in plan.decodes
    ]
    heads = ("unit", "devices", "requests", "bound by", "one by one", "all hidden")
    return (
        "<h2>Serving</h2><p>Tokens per second and device, when reading, computing and sending follow one another, and "
        "when they hide one another.</p>" + rows_table(heads, rows)
    )


def _layouts(plan: Plan) -> str:
    rows = [_layout_row(one) for one in plan.alternatives]
    if not rows:
        return f"<h2>Layouts</h2><p>{nothing_else(plan)}.</p>"
    heads = ("layout", "recompute", "memory", "bubble", "step", "tokens/s and device")
    return "<h2>The nearest layouts that fit</h2>" + rows_table(heads, rows)


def _layout_row(one: Candidate) -> tuple[str, ...]:
    return (
        one.layout.name,
        one.layout.recompute,
        gib(one.memory.total),
        f"{one.step.bubble_fraction:.1%}",
        seconds(one.step.total),
        rate(one.step.tokens_per_second),
    )
