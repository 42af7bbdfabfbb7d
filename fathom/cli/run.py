"""`fathom run RECIPE`: train, resume, or (with --dry-run) only say what would happen."""

from __future__ import annotations

import os
from pathlib import Path
from shlex import quote
from typing import Annotated

import torch
import typer

from fathom.cli.console import RunConsole
from fathom.cli.options import Device, choose_device
from fathom.errors import FathomError
from fathom.parallel import launch
from fathom.runs.execute import run as execute
from fathom.runs.layout import RunLayout
from fathom.runs.recipe import Recipe, load_recipe
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
    overrides = [*(set_ or []), *_sources(data)]
    if launch.launched() and not dry_run:
        from fathom.cli.many import as_one_of_many

        _refuse_plot(plot)
        as_one_of_many(
            lambda processes: _check(recipe, overrides, processes),
            lambda place, speaks: _train(load_recipe(recipe, overrides), out, place, speaks),
        )
    chosen = load_recipe(recipe, overrides)
    if dry_run and os.environ.get("RANK", "0") != "0":
        return
    if dry_run:
        from fathom.cli.dry_run import dry_run as describe

        describe(chosen, device, plot)
        return
    _refuse_plot(plot)
    _train(chosen, out, choose_device(device), speaks=True)


def _refuse_plot(plot: Path | None) -> None:
    if plot:
        raise FathomError(
            "--plot draws what a run would do; add --dry-run (a run's report has its own pictures)"
        )


def _check(recipe: str, overrides: list[str], processes: int) -> None:
    """Refuse, before anything starts, what so many processes cannot run."""
    RunLayout(load_recipe(recipe, overrides), processes)


def _train(recipe: Recipe, out: Path | None, device: torch.device, speaks: bool) -> None:
    """The run; of several processes one shows how far it is."""
    folder = out or Path("runs") / recipe.name
    if not speaks:
        execute(recipe, folder, device)
        return
    with RunConsole(recipe) as console:
        execute(recipe, folder, device, console.show, console.say)
    prompt, place = quote(recipe.monitor.sample_prompt), quote(str(folder))
    print(f"\nspeak with it:  fathom generate {place} --prompt {prompt}    fathom chat {place}")


def _sources(data: list[str] | None) -> list[str]:
    """--data as an override of the recipe."""
    return [f"data.sources={literal(data)}"] if data else []
