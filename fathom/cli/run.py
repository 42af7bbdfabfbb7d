"""`fathom run RECIPE`: train, resume, or (with --dry-run) only say what would happen."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from fathom.cli.console import RunConsole
from fathom.cli.options import Device, choose_device
from fathom.errors import FathomError
from fathom.runs.execute import run as execute
from fathom.runs.recipe import load_recipe
from fathom.runs.tables import literal


def run(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE", help="A recipe's name (nano, mini, …) or the path of one."
        ),
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
    plot: Annotated[
        Path | None, typer.Option(help="With --dry-run: draw the schedules (.svg, .png, .pdf).")
    ] = None,
) -> None:
    """Train a model from a recipe; the same command again goes on where it stopped."""
    chosen = load_recipe(recipe, [*(set_ or []), *_sources(data)])
    if dry_run:
        from fathom.cli.dry_run import dry_run as describe

        describe(chosen, device, plot)
        return
    if plot:
        raise FathomError(
            "--plot draws what a run would do; add --dry-run (a run's report has its own pictures)"
        )
    folder = out or Path("runs") / chosen.name
    with RunConsole(chosen) as console:
        execute(chosen, folder, choose_device(device), console.show, console.say)
    prompt, place = quote(chosen.monitor.sample_prompt), quote(str(folder))
    print(f"\nspeak with it:  fathom generate {place} --prompt {prompt}    fathom chat {place}")


def _sources(data: list[str] | None) -> list[str]:
    """--data as an override of the recipe."""
    return [f"data.sources={literal(data)}"] if data else []
