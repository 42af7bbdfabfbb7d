"""`fathom eval needle RUN_OR_DIR`: how far a model's context really reaches, as a heat map."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.align import Align
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fathom.cli.opening import open_model
from fathom.cli.options import Device, RunOrDir, choose_device
from fathom.data import TokenData, Tokenizer
from fathom.errors import DataError, FathomError
from fathom.evaluation.haystack import Form, Pairs, PassKey
from fathom.evaluation.needle import Grid, even_depths, needle_grid
from fathom.pictures import check_picture
from fathom.runs.folder import RunFolder

SHADES = ((0.9, "black on green"), (0.5, "black on yellow"), (0.0, "white on red"))
"""From which share on a cell of the terminal's heat map has which style."""
CELL = 8
"""Its width in characters."""


def needle(
    run_or_dir: RunOrDir,
    lengths: Annotated[
        str,
        typer.Option(help="Lengths in tokens, with commas (default: up to the model's context)."),
    ] = "",
    depths: Annotated[
        str, typer.Option(help="How many depths, or the depths themselves: 11 or 0,0.25,1.")
    ] = "11",
    trials: Annotated[int, typer.Option(help="Texts for each length and depth.")] = 5,
    form: Annotated[
        str,
        typer.Option(
            "--format", help='"pass-key" for models of real text, "pairs" for those of "needles".'
        ),
    ] = "pass-key",
    filler: Annotated[
        Path | None,
        typer.Option(help="Text to hide a pass key in (default: the run's held-out text)."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write a picture: FILE.png, .svg or .pdf.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    seed: Annotated[int, typer.Option(help="Another seed hides other needles.")] = 0,
    device: Device = "auto",
) -> None:
    """Hide a needle in texts of several lengths at several depths, and count how often it is found."""
    if out:
        check_picture(out)
    model, tokenizer, origin = open_model(run_or_dir, mtp=False)
    tokenizer, model = tokenizer or Tokenizer.load(origin), model.to(choose_device(device))
    limit = model.config.max_position_embeddings
    chosen = _numbers("--lengths", lengths, int) if lengths else _doubling(limit)
    with _progress(quiet=as_json) as progress:
        grid = needle_grid(
            model,
            _form(form, tokenizer, run_or_dir, filler),
            chosen,
            _depths(depths),
            trials,
            seed,
            progress,
        )
    if out:
        from fathom.evaluation.heat_map import draw

        draw([(f"{run_or_dir}: needles found, %", grid)], out)
    if as_json:
        print(json.dumps({"format": form, "seed": seed, "share": grid.share(), **grid.to_dict()}))
    else:
        Console().print(_table(grid))
        print(f"found {100 * grid.share():.1f} % of {grid.trials * _cells(grid)} needles")


def _form(name: str, tokenizer: Tokenizer, run_or_dir: str, filler: Path | None) -> Form:
    if name == "pairs":
        return Pairs(tokenizer)
    if name != "pass-key":
        raise FathomError(f"--format {name!r} is not known; use 'pass-key' or 'pairs'")
    return PassKey(tokenizer, _filler(tokenizer, run_or_dir, filler))


def _filler(tokenizer: Tokenizer, run_or_dir: str, filler: Path | None) -> Any:
    """Ids of the file, or the run's held-out tokens."""
    if filler is None:
        folder = RunFolder(run_or_dir).data
        if not folder.is_dir():
            raise DataError(f"{run_or_dir} has no held-out text; give one with --filler FILE")
        return TokenData.open(folder).held_out
    try:
        return tokenizer.encode(filler.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{filler} cannot be read as text ({error}); give another") from error


def _numbers(option: str, text: str, kind: type) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise FathomError(
            f"{option} {text!r} must be numbers with commas between them, as in 256,1024"
        ) from None


def _depths(text: str) -> tuple[float, ...]:
    """A count, or the depths themselves: a list, or one number with a point in it."""
    if text.strip().isdigit():
        return even_depths(int(text))
    return tuple(_numbers("--depths", text, float))


def _doubling(limit: int) -> list[int]:
    """The model's context and its halves, down to 256 or five lengths in all."""
    found = [limit]
    while len(found) < 5 and found[0] // 2 >= 256:
        found.insert(0, found[0] // 2)
    return found


@contextmanager
def _progress(quiet: bool) -> Iterator[Any]:
    """What the grid tells as a bar on stderr; nothing there when it is no terminal or `quiet`."""
    columns = (TextColumn("reading haystacks"), BarColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    hidden = quiet or not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task("", total=None)
        yield lambda read, total: bar.update(task, completed=read, total=total)


def _table(grid: Grid) -> Table:
    table = Table(title="needles found, %", box=None, padding=(0, 0))
    table.add_column("depth ", justify="right")
    for length in grid.lengths:
        table.add_column(f"{length:,}", justify="center", min_width=CELL)
    for number, depth in enumerate(grid.depths):
        row = [grid.found[column][number] for column in range(len(grid.lengths))]
        table.add_row(f"{depth:.0%} ", *map(_cell, row))
    return table


def _cell(share: float) -> Align:
    style = next(style for least, style in SHADES if share >= least)
    return Align(f"{100 * share:.0f}", "center", style=style, width=CELL)


def _cells(grid: Grid) -> int:
    return len(grid.lengths) * len(grid.depths)
