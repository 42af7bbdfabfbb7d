"""How long a schedule takes, who waits, and how much is held, from the costs of its actions. Nothing is run.

A rank runs its list in order. A step starts when the rank is free and what it needs has arrived; a result arrives
`transfer` after its step ended, or at once on the same rank. Transfers do not disturb each other or the computation.

What a rank holds follows from its list alone. A forward's activations are held until B, which frees them at its end,
or until W. What is left of them between I and W depends on the model: every linear layer's input, with the gradient
of its output beside it, must stay; what attention, norms and activation functions kept is free. So two peaks are
given: `peak_activations` counts a micro-batch in a part from F until B or W, `peak_before_input_grad` from F until B
or I.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from fathom.errors import ScheduleError
from fathom.parallel.schedules.actions import Pair, Schedule, Step, Transfer, singles
from fathom.parallel.schedules.legality import inputs, order_of_running, outputs


@dataclass(frozen=True, slots=True)
class Costs:
    """Durations of the actions of one stage, in any unit of time."""

    forward: float = 1.0
    input_grad: float = 1.0
    weight_grad: float = 1.0
    backward: float | None = None
    """Of the whole backward; None: the sum of its two halves."""
    pair: float | None = None
    """Of an overlapped forward and backward; None: they are run one after the other."""
    transfer: float = 0.0
    """From one rank to another."""

    stage_factors: tuple[float, ...] = ()
    """How many times these durations each stage takes, for uneven splits; empty: 1 everywhere."""

    def __post_init__(self) -> None:
        named = {name: getattr(self, name) for name in self.__slots__ if name != "stage_factors"}
        factors = {f"stage_factors[{i}]": value for i, value in enumerate(self.stage_factors)}
        for name, value in {**named, **factors}.items():
            if value is not None and not 0 <= value < float("inf"):
                raise ScheduleError(f"cost {name} = {value}: it must be a finite number, 0 or more")

    @property
    def whole_backward(self) -> float:
        """Duration of B."""
        return self.input_grad + self.weight_grad if self.backward is None else self.backward

    def of(self, step: Step) -> float:
        """Duration of a step. A pair of stages with factors saves the same share as one without."""
        if isinstance(step, Pair):
            apart = self.of(step.forward) + self.of(step.backward)
            usually = self.forward + self.whole_backward
            return apart if self.pair is None or not usually else self.pair * (apart / usually)
        by_kind = {
            "F": self.forward,
            "B": self.whole_backward,
            "I": self.input_grad,
            "W": self.weight_grad,
        }
        factor = self.stage_factors[step.stage] if self.stage_factors else 1.0
        return factor * by_kind[step.kind]


@dataclass(frozen=True, slots=True)
class Span:
    """When a step ran. A pair that is not overlapped is two spans."""

    step: Step
    start: float
    end: float


@dataclass(frozen=True)
class Simulation:
    """What `simulate` found. Times are in the unit of the costs; sequences are by rank."""

    schedule: Schedule
    costs: Costs
    timeline: tuple[tuple[Span, ...], ...]

    @cached_property
    def makespan(self) -> float:
        """From the first rank's start to the last one's end."""
        return max(spans[-1].end for spans in self.timeline)

    @cached_property
    def busy(self) -> tuple[float, ...]:
        return tuple(sum(span.end - span.start for span in spans) for spans in self.timeline)

    @cached_property
    def idle(self) -> tuple[float, ...]:
        """The bubble: what of the makespan a rank does nothing in, before its first action and after its last too."""
        return tuple(self.makespan - busy for busy in self.busy)

    @property
    def bubble_fraction(self) -> float:
        """Idle time of all ranks as a share of all their time."""
        return sum(self.idle) / (self.makespan * self.schedule.ranks) if self.makespan else 0.0

    @cached_property
    def peak_activations(self) -> tuple[int, ...]:
        """Most micro-batches, counted once per part, held between F and the end of B or W."""
        return tuple(_peak(steps, "BW") for steps in self.schedule.steps)

    @cached_property
    def peak_before_input_grad(self) -> tuple[int, ...]:
        """Most micro-batches, counted once per part, held between F and the end of B or I."""
        return tuple(_peak(steps, "BI") for steps in self.schedule.steps)


def simulate(schedule: Schedule, costs: Costs | None = None) -> Simulation:
    """Run a schedule on paper. `costs` None: F, I and W take 1 each and transfers nothing.

    Raises `ScheduleError`, naming rank and action, for a schedule that would not run.
    """
    costs = costs or Costs()
    if costs.stage_factors and len(costs.stage_factors) != schedule.stages:
        raise ScheduleError(
            f"{len(costs.stage_factors)} stage_factors for the {schedule.stages} stages of {schedule.name}; "
            "give each stage one"
        )
    arrived: dict[Transfer, float] = {}
    timeline: list[list[Span]] = [[] for _ in range(schedule.ranks)]
    for rank, step in order_of_running(schedule):
        for part, duration in _durations(step, costs):
            free = timeline[rank][-1].end if timeline[rank] else 0.0
            start = max([free, *(arrived[t] for t in inputs(schedule, part))])
            span = Span(part, start, start + duration)
            timeline[rank].append(span)
            for sent in outputs(schedule, part):
                arrived[sent] = span.end + (0.0 if sent.local else costs.transfer)
    return Simulation(schedule, costs, tuple(map(tuple, timeline)))


def _durations(step: Step, costs: Costs) -> Iterator[tuple[Step, float]]:
    if isinstance(step, Pair) and costs.pair is not None:
        yield step, costs.of(step)
    else:
        for action in singles(step):
            yield action, costs.of(action)


def _peak(steps: tuple[Step, ...], freed_by: str) -> int:
    held = peak = 0
    for step in steps:
        kinds = [action.kind for action in singles(step)]
        held += kinds.count("F")
        peak = max(peak, held)
        held -= sum(kind in freed_by for kind in kinds)
    return peak
