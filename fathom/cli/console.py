"""How a run is shown: a bar with the latest figures on a terminal, plain lines everywhere else."""

from __future__ import annotations

import sys
from types import TracebackType

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from fathom.planning.describe import duration
from fathom.runs.recipe import Recipe
from fathom.runs.setting import StepProgress

PLAIN_LINES = 100
"""About how many progress lines a run prints where there is no terminal."""


class Console:
    """Shows one run; a context, so that the terminal is left as it was."""

    def __init__(self, recipe: Recipe) -> None:
        self.every = max(1, recipe.steps // PLAIN_LINES)
        self.bar: Progress | None = None
        if sys.stdout.isatty():
            self.bar = Progress(
                TextColumn("{task.completed}/{task.total}"),
                BarColumn(bar_width=20),
                TextColumn("{task.description}", markup=False),
                TimeElapsedColumn(),
                console=RichConsole(highlight=False),
            )
            self.task = self.bar.add_task("", total=recipe.steps)

    def __enter__(self) -> Console:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.bar:
            self.bar.stop()

    def say(self, line: str) -> None:
        """A line of text, above the bar if there is one."""
        if self.bar:
            self.bar.console.print(line, markup=False)
        else:
            print(line, flush=True)

    def show(self, progress: StepProgress) -> None:
        """The latest step."""
        line = f"{progress.line}  eta {duration(progress.eta_seconds)}"
        if self.bar:
            self.bar.update(self.task, completed=progress.step, description=line)
        elif progress.step % self.every == 0 or progress.step in (1, progress.steps):
            print(f"step {progress.step}/{progress.steps}  {line}", flush=True)


# A model may say anything, also what would ring a terminal's bell or repaint it.
_AS_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {
    127: 0x2421
}
_AS_PICTURES |= dict.fromkeys(range(128, 160), 0xFFFD)


def show(text: str) -> None:
    """Print a piece of text at once; on a terminal, control characters appear as pictures (ESC as ␛)."""
    print(text.translate(_AS_PICTURES) if sys.stdout.isatty() else text, end="", flush=True)
