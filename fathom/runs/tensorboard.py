"""TensorBoard on request: every number of metrics.jsonl and evals.jsonl under its own name, in OUT/tensorboard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fathom.errors import FathomError

GROUPS = {"metrics.jsonl": "train", "evals.jsonl": "held_out"}
"""Logs whose numbers are shown, and what stands before their names."""


def require_tensorboard() -> None:
    """Raises `FathomError` when the package is missing; better before the run than after its first step."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise FathomError(
            f"monitor.tensorboard = true needs the package tensorboard ({error}); "
            f"pip install 'fathom[tensorboard]' or leave it at false"
        ) from error


class TensorBoard:
    """Writes lines of the logs as scalars. Its first line's step is where what an earlier one wrote ends."""

    def __init__(self, run_folder: Path) -> None:
        self.directory = run_folder / "tensorboard"
        self.writer: Any = None

    def write(self, log: str, line: dict[str, Any]) -> None:
        """Add the numbers of a line, on the disk at once: a checkpoint may follow."""
        if log not in GROUPS:
            return
        if self.writer is None:
            self.writer = self._begin(line["step"])
        for key, value in line.items():
            if key != "step" and isinstance(value, int | float):
                self.writer.add_scalar(f"{GROUPS[log]}/{key}", value, line["step"])
        self.writer.flush()

    def close(self) -> None:
        """End the writer's thread and close its file."""
        if self.writer is not None:
            self.writer.close()
            self.writer = None

    def _begin(self, step: int) -> Any:
        """A writer whose steps from `step` on replace those of the writers before it (resume, roll-back)."""
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self.directory), purge_step=step)
