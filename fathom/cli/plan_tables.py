"""Pieces of the page that `fathom plan` prints: titles, tables, lines, and numbers in words."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table


def print_title(console: Console, text: str) -> None:
    """A heading with a line before it."""
    console.print(f"\n{text}", style="bold", markup=False)


def table(*headings: str) -> Table:
    """A plain table; every column but the first lies to the right."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_header=any(headings), header_style="dim")
    for number, heading in enumerate(headings):
        made.add_column(heading, justify="right" if number else "left", overflow="fold")
    return made


def print_rows(console: Console, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table, row by row."""
    made = table(*headings)
    for row in rows:
        made.add_row(*row)
    console.print(made)


def print_lines(console: Console, rows: Sequence[tuple[str, str]]) -> None:
    """What, and how much in words."""
    made = Table(box=None, pad_edge=False, show_header=False)
    made.add_column(no_wrap=True, style="dim")
    made.add_column(overflow="fold")
    for row in rows:
        made.add_row(*row)
    console.print(made)


def gib(size: float) -> str:
    """Bytes as GiB, less than one as MiB."""
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"


def gain(share: float) -> str:
    """A change in percent with its sign, which nothing has none of."""
    text = f"{share:+.1%}"
    return text if text.strip("+-") != "0.0%" else "0.0%"


def counted(number: int, what: str) -> str:
    """1 micro-batch, 4 micro-batches, 2 devices."""
    ending = "" if number == 1 else "es" if what.endswith("ch") else "s"
    return f"{number:,} {what}{ending}"


def seconds(time: float) -> str:
    """Seconds with about three figures."""
    if time < 10:
        return f"{time:.3g} s"
    return f"{time:.1f} s" if time < 100 else f"{time:,.0f} s"


def rate(tokens_per_second: float) -> str:
    """Tokens per second, whole unless there are few."""
    return f"{tokens_per_second:,.0f}" if tokens_per_second >= 100 else f"{tokens_per_second:.3g}"


def bar(share: float, width: int = 24) -> str:
    """A share as blocks."""
    return "█" * max(1 if share > 0 else 0, round(share * width))
