"""Schedules for the tests: every name, with numbers that it accepts."""

from __future__ import annotations

from hypothesis import strategies as st

from fathom.parallel import SCHEDULES, Schedule, schedule

SMALLEST = {"DualPipeV": 1, "DualPipe": 2}
"""Fewest micro-batches per stage, where there is a limit."""


@st.composite
def plans(draw: st.DrawFn, names: tuple[str, ...] = SCHEDULES, most_stages: int = 8) -> Schedule:
    """Any schedule, small."""
    name = draw(st.sampled_from(names))
    stages = 2 * draw(st.integers(1, most_stages // 2))
    if name in SCHEDULES[:3]:
        stages -= draw(st.booleans())
    least = SMALLEST.get(name, 0) * stages
    microbatches = max(1, least) + draw(st.integers(0, 8))
    if name == "DualPipe":
        microbatches += microbatches % 2
    return schedule(name, stages, microbatches)
