"""How long work is shown: something that changes on a terminal, plain lines everywhere else."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TextColumn
from rich.status import Status
from rich.table import Column

from fathom.planning.describe import duration
from fathom.runs.recipe import Recipe
from fathom.runs.setting import StepProgress

PLAIN_LINES = 100
"""About how many progress lines a run prints where there is no terminal."""
PLAIN_SECONDS = 5.0
"""Between two lines of progress of other work there."""


class _Console:
    """Lines above what changes; a context, so that the terminal is left as it was."""

    live: Progress | Status | None = None
    """What changes; None without a terminal."""

    def __enter__(self) -> Self:
        if self.live:
            self.live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.live:
            self.live.stop()

    def say(self, line: str) -> None:
        """A line of text."""
        if self.live:
            self.live.console.print(line, markup=False)
        else:
            print(line, flush=True)


class RunConsole(_Console):
    """A run: a bar with the latest figures."""

    def __init__(self, recipe: Recipe) -> None:
        self.every = max(1, recipe.steps // PLAIN_LINES)
        if sys.stdout.isatty():
            count = Column(no_wrap=True, min_width=2 * len(str(recipe.steps)) + 1)
            rest = Column(no_wrap=True, overflow="ellipsis", ratio=1)  # what a narrow terminal cuts
            self.bar = self.live = Progress(
                TextColumn("{task.completed}/{task.total}", table_column=count),
                BarColumn(bar_width=10, table_column=Column(min_width=10)),
                TextColumn("{task.description}", markup=False, table_column=rest),
                console=RichConsole(highlight=False),
                expand=True,
            )
            self.task = self.bar.add_task("", total=recipe.steps)

    def show(self, progress: StepProgress) -> None:
        """The latest step."""
        eta = f"eta {duration(progress.eta_seconds)}"
        line = f"{progress.line}  {eta}"
        if self.live:
            first = f"{eta}  {progress.line}"
            self.bar.update(self.task, completed=progress.step, description=first)
        elif progress.step % self.every == 0 or progress.step in (1, progress.steps):
            print(f"step {progress.step}/{progress.steps}  {line}", flush=True)


class TextConsole(_Console):
    """Work that tells in words how far it is: one changing line."""

    def __init__(self) -> None:
        if sys.stdout.isatty():
            self.status = self.live = RichConsole(highlight=False).status("")
        self.last = time.monotonic()

    def show(self, line: str) -> None:
        """How far it is."""
        if self.live:
            self.status.update(line)
        elif time.monotonic() - self.last > PLAIN_SECONDS:
            self.last = time.monotonic()
            print(line, flush=True)


# A model may say anything, also what would ring a terminal's bell or repaint it.
_AS_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {
    127: 0x2421
}
_AS_PICTURES |= dict.fromkeys(range(128, 160), 0xFFFD)


def show(text: str) -> None:
    """Print a piece of text at once; on a terminal, control characters appear as pictures (ESC as ␛)."""
    print(text.translate(_AS_PICTURES) if sys.stdout.isatty() else text, end="", flush=True)
