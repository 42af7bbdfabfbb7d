"""What `fathom plan` prints beside the plan itself: changed hardware, published runs, serving, other layouts."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from fathom.cli.plan_tables import gain, gib, print_lines, print_rows, print_title, rate
from fathom.planning import serving
from fathom.planning.plan import Plan
from fathom.planning.search import Candidate


def what_ifs(console: Console, plan: Plan) -> None:
    if not plan.what_ifs:
        return
    print_title(console, "What if the hardware were as the report asks (§3.5)")
    rows = [
        (
            f"{one.what_if.name}: {one.what_if.says}",
            rate(one.step.tokens_per_second),
            gain(one.gain),
        )
        for one in plan.what_ifs
    ]
    print_rows(console, ("", "tokens/s", "gain"), rows)


def predictions(console: Console, plan: Plan) -> None:
    if not plan.task.cluster.device.bf16:
        return  # nobody publishes runs on such
    print_title(console, "How far to believe it: published runs, the same constants")
    rows = [
        (
            one.point.name,
            f"{one.point.published:,.0f}",
            f"{one.predicted:,.0f}",
            gain(one.error),
        )
        for one in plan.predictions
    ]
    print_rows(console, ("tokens/s and device", "published", "planned", "error"), rows)


def serving_units(console: Console, plan: Plan) -> None:
    if not plan.decodes:
        return
    print_title(console, "Serving (report §3.4), tokens/s and device")
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
    print_rows(console, ("unit", "requests", "bound by", "one by one", "all hidden"), rows)
    computed = serving.PUBLISHED_PREFILL * (1 - serving.CACHE_HITS)
    print_lines(
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


def nothing_else(plan: Plan) -> str:
    """What stands where no other layout fits."""
    if plan.fits:
        return "No other layout fits"
    return "No layout fits: take more devices or larger ones"


def candidates(console: Console, title: str, found: Sequence[Candidate], plan: Plan) -> None:
    if not found:
        print_title(console, nothing_else(plan))
        return
    print_title(console, title)
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
    print_rows(console, ("layout", "recompute", "memory", "fits", "bubble", "tokens/s"), rows)
