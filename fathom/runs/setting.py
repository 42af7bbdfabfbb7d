"""What the callbacks of a stage share, and what they show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fathom.data.prepared import TokenData
from fathom.data.progress import Say
from fathom.runs.crew import Crew
from fathom.runs.folder import RunFolder
from fathom.runs.pace import Pace
from fathom.runs.recipe import Recipe, Stage
from fathom.runs.tensorboard import TensorBoard
from fathom.runs.timeline import Span
from fathom.train.loop import Trainer


@dataclass(frozen=True)
class StepProgress:
    """One step for whoever shows it."""

    step: int
    steps: int
    line: str
    eta_seconds: float


Show = Callable[[StepProgress], None]


@dataclass
class Setting:
    """What the callbacks of one stage share."""

    folder: RunFolder
    recipe: Recipe
    stage: Stage
    data: TokenData
    peak_flops: float
    show: Show
    say: Say
    save: Callable[[Trainer], None]
    pace: Pace
    crew: Crew = field(default_factory=Crew.alone)
    rows: int | None = None
    """Sequences that a rank computes at a time (`RunLayout.micro_batch`); None: as the stage says for one process."""
    board: TensorBoard | None = field(init=False)

    def __post_init__(self) -> None:
        wanted = self.recipe.monitor.tensorboard and self.crew.speaks
        self.board = TensorBoard(self.folder.path) if wanted else None

    def log(self, name: str, line: dict[str, Any]) -> None:
        """Add a line to a log, and its numbers to TensorBoard where that is wanted."""
        self.folder.append(name, line)
        if self.board:
            self.board.write(name, line)

    def close(self) -> None:
        """Let go of what the stage held open; the run's own logs stay."""
        if self.board:
            self.board.close()

    @property
    def span(self) -> Span:
        """Where in the run the stage lies."""
        return self.recipe.spans[self.recipe.stages.index(self.stage)]

    @property
    def last_step(self) -> int:
        """The run's step that ends the stage."""
        return self.span.last_step

    def due(self, step: int, every: int) -> bool:
        """Whether something done every so many steps, and at the stage's end, is due."""
        return step % every == 0 or step == self.last_step
