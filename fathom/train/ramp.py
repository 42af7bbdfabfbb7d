"""How many sequences each step of a stage takes (report §4.2: 3,072, growing to 15,360 over the first 469B tokens).

The report says "gradually" and nothing more. Our choice: the size grows linearly in the tokens trained on, in whole
multiples of `multiple`, so that the global batch can always be divided among the devices. A step's size is decided by
what was trained on before it, and the size is full from the step on that begins at or behind the end of the ramp.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Batches:
    """Sequences per step: from `start` to `full` while `ramp` sequences are trained on, then `full` for ever."""

    full: int
    start: int
    ramp: float = 0.0
    multiple: int = 1

    def size(self, sequences: float) -> int:
        """Sequences in a step that begins when `sequences` have been trained on."""
        if sequences >= self.ramp:
            return self.full
        grown = (self.full - self.start) * sequences / self.ramp
        return self.start + int(grown // self.multiple) * self.multiple

    def before(self, steps: float) -> float:
        """Sequences in the first `steps` steps; a part of a step has that part of its sequences."""
        whole = min(int(steps), len(self._marks) - 1)
        return self._marks[whole] + (steps - whole) * self.size(self._marks[whole])

    def steps(self, sequences: float) -> float:
        """Steps in which `sequences` are trained on: the inverse of `before`."""
        whole = bisect_right(self._marks, sequences) - 1
        return whole + (sequences - self._marks[whole]) / self.size(self._marks[whole])

    @cached_property
    def _marks(self) -> list[int]:
        """Sequences before each step of the ramp, the first step with a full batch last."""
        marks = [0]
        while marks[-1] < self.ramp:
            marks.append(marks[-1] + self.size(marks[-1]))
        return marks
