"""`fathom run RECIPE`: train, resume, or (with --dry-run) only say what would happen."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from fathom.cli.console import Console
from fathom.cli.options import Device, choose_device
from fathom.runs.execute import compute_dtype
from fathom.runs.execute import run as execute
from fathom.runs.recipe import Recipe, load_recipe
from fathom.runs.tables import literal

ASSUMED_EFFICIENCY = 0.5
"""Share of the measured matrix-product rate that --dry-run expects training to reach (our guess)."""


def run(
    recipe: Annotated[
        str, typer.Argument(help="A recipe's name (nano, mini, …) or the path of one.")
    ],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a value: stages.pretrain.lr=3e-4"),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; default runs/RECIPE.")] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Text to train on: a file or folder of .txt, .md, code, .jsonl, .parquet; "
            "or what fathom data prepare made."
        ),
    ] = None,
    device: Device = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be done.")] = False,
) -> None:
    """Train a model from a recipe; the same command again goes on where it stopped."""
    chosen = load_recipe(recipe, [*(set_ or []), *_sources(data)])
    if dry_run:
        _describe(chosen, device)
        return
    folder = out or Path("runs") / chosen.name
    with Console(chosen) as console:
        execute(chosen, folder, choose_device(device), console.show, console.say)
    prompt, place = quote(chosen.monitor.sample_prompt), quote(str(folder))
    print(f"\nspeak with it:  fathom generate {place} --prompt {prompt}    fathom chat {place}")


def _sources(data: list[str] | None) -> list[str]:
    """--data as an override of the recipe."""
    return [f"data.sources={literal(data)}"] if data else []


def _describe(recipe: Recipe, device: str) -> None:
    """The resolved recipe, what it costs, and how long it may take here."""
    import torch

    from fathom.planning import describe
    from fathom.train.rate import matmul_rate

    place = choose_device(device)
    dtype = compute_dtype(recipe.precision.compute, place)
    rate = matmul_rate(place, dtype or torch.float32)
    print(recipe.to_toml())
    for stage in recipe.stages:
        print(f"stage {stage.name}: {stage.num_steps:,} steps of {stage.tokens_per_step:,} tokens")
        rows = describe(
            recipe.model,
            seq_len=stage.seq_len,
            micro_batch=stage.micro_batch or stage.batch,
            tokens=stage.num_steps * stage.tokens_per_step,
            mtp=stage.mtp_weight > 0,
            recompute=recipe.precision.recompute,
            compute_bytes=2 if dtype == torch.bfloat16 else 4,
            on_cpu=place.type == "cpu",
            flops_per_second=ASSUMED_EFFICIENCY * rate,
        )
        for what, how_much in rows:
            print(f"  {what:18} {how_much}")
    print(
        f"time assumes {100 * ASSUMED_EFFICIENCY:.0f}% of the {rate / 1e9:,.0f} GFLOP/s that a matrix "
        f"product reaches on this {place.type} now"
    )
