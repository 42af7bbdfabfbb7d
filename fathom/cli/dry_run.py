"""What `fathom run RECIPE --dry-run` prints: the resolved recipe, its stages as a table, and what each costs here."""

from __future__ import annotations

import os
from pathlib import Path

from fathom.cli.options import choose_device
from fathom.parallel import launch
from fathom.planning.describe import duration, human
from fathom.runs.layout import RunLayout
from fathom.runs.machine import compute_dtype
from fathom.runs.recipe import Recipe
from fathom.runs.timeline import Span

ASSUMED_EFFICIENCY = 0.5
"""Share of the measured matrix-product rate that training is expected to reach (our guess)."""


def dry_run(recipe: Recipe, device: str, plot: Path | None) -> None:
    """Print it all, and draw the schedules into a file where one is named."""
    layout = RunLayout(recipe, processes_meant(recipe))  # refuses before anything is said
    print(recipe.to_toml())
    print_stages(recipe)
    print_layout(layout)
    _print_costs(recipe, device, layout)
    if plot:
        from fathom.runs.schedule_plot import draw_schedule

        print(f"schedules: {draw_schedule(recipe, plot)}")


def processes_meant(recipe: Recipe) -> int:
    """As many as torchrun has started, else the fewest that the recipe's layout needs."""
    if launch.launched():
        return int(os.environ["WORLD_SIZE"])
    return recipe.parallel.processes


def print_layout(layout: RunLayout) -> None:
    """What each process is for, and how long a pipeline idles; nothing for one process."""
    if layout.processes == 1:
        return
    print(layout.summary)
    if layout.plan:
        held = ", ".join(str(len(layers)) for layers in layout.plan.layers)
        print(f"  layers of each stage: {held} (of {layout.recipe.model.num_hidden_layers})")
        for stage in layout.recipe.stages:
            count, bubble = layout.bubble(stage)
            print(
                f"  stage {stage.name}: {count} micro-batches of {layout.micro_batch(stage)}, {100 * bubble:.0f} % of "
                f"the time idle by the simulator, where F, I and W take as long"
            )
    print()


def print_stages(recipe: Recipe) -> None:
    """One row per stage: from where to where, and what holds in it."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("stage", "tokens", "steps", "sequence", "batch", "rate", "γ", "λ", "α", "RoPE"):
        numeric = heading in ("steps", "sequence")
        table.add_column(heading, justify="right" if numeric else "left", no_wrap=True)
    for span in recipe.spans:
        table.add_row(*_row(recipe, span))
    console = Console(highlight=False)
    console.width = max(console.width, 120)  # a table is read whole or not at all, also in a file
    console.print(table)
    print(f"{recipe.steps:,} steps, {human(recipe.total_tokens)} tokens in all\n")


def _row(recipe: Recipe, span: Span) -> tuple[str, ...]:
    stage, ends = span.stage, span.tokens_at(span.last_step)
    first, last = recipe.at(step=span.first_step + 1), recipe.at(step=span.last_step)
    yarn = last.rope_scaling
    return (
        stage.name,
        f"{human(span.begins, 5)} – {human(ends, 5)}",
        f"{span.steps:,}",
        f"{stage.seq_len:,}",
        _change(f"{first.batch:,}", f"{last.batch:,}"),
        _rates(recipe, span),
        f"{stage.gamma:g}",
        f"{stage.mtp_weight:g}",
        f"{stage.balance_alpha:g}",
        f"YaRN {yarn['factor']:g}" if yarn else "plain",
    )


def _rates(recipe: Recipe, span: Span) -> str:
    """Every rate that the stage comes by: 0 → 2.2e-4 → 2.2e-5."""
    stage = span.stage
    begin = "0" if stage.warmup_steps else f"{stage.lr:.3g}"
    end = f"{recipe.at(step=span.last_step).lr:.3g}"
    middle = f"{stage.lr:.3g}"
    return _change(*([begin, middle, end] if middle not in (begin, end) else [begin, end]))


def _change(*values: str) -> str:
    return values[0] if len(set(values)) == 1 else " → ".join(values)


def _print_costs(recipe: Recipe, device: str, layout: RunLayout) -> None:
    import torch

    from fathom.planning import describe
    from fathom.train.rate import matmul_rate

    place = choose_device(device)
    dtype = compute_dtype(recipe.precision.compute, place)
    rate = matmul_rate(place, dtype or torch.float32)
    before: set[tuple[str, str]] = set()
    for span in recipe.spans:
        stage = span.stage
        print(f"stage {stage.name}" + (", where it differs from the one before" if before else ""))
        rows = describe(
            recipe.model,
            seq_len=stage.seq_len,
            micro_batch=layout.micro_batch(stage),
            tokens=stage.tokens_asked,
            mtp=stage.mtp_weight > 0,
            recompute=recipe.precision.recompute,
            compute_bytes=2 if dtype == torch.bfloat16 else 4,
            on_cpu=place.type == "cpu",
            flops_per_second=ASSUMED_EFFICIENCY * rate,
        )
        for what, how_much in rows:
            if (what, how_much) not in before:
                print(f"  {what:18} {how_much}")
        before = set(rows)
    if layout.processes > 1:
        print("memory and time are those of ONE process; what each of many needs: fathom plan")
    _print_total(recipe, ASSUMED_EFFICIENCY * rate)
    print(
        f"time assumes {100 * ASSUMED_EFFICIENCY:.0f}% of the {rate / 1e9:,.0f} GFLOP/s that a matrix "
        f"product reaches on this {place.type} now"
    )


def _print_total(recipe: Recipe, flops_per_second: float) -> None:
    from fathom.planning import flops_per_token

    work = sum(
        flops_per_token(recipe.model, stage.seq_len, stage.mtp_weight > 0) * stage.tokens_asked
        for stage in recipe.stages
    )
    print(f"in all {work:.3g} operations, about {duration(work / flops_per_second)}")
