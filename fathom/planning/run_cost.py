"""Days, device hours and money of a whole run, stage by stage, and what the report publishes (Table 1).

Every stage is walked with its own sequence length and batch, a growing batch in its sizes; a batch that the layout
cannot divide is reckoned with a broken number of micro-batches. The report's context extension has fewer sequences than
its layout has places for (480 of 128K); how it was laid out is not published. Sequences longer than `whole` are
therefore divided among devices, so that a micro-batch keeps its tokens; the traffic of that is not reckoned.
Interruptions are not in a step's time: hours are divided by the share of time that is good (`Rates.good_time`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fathom.model import ModelConfig
from fathom.planning.cluster import Cluster
from fathom.planning.layout import PlannedLayout
from fathom.planning.rates import Rates
from fathom.planning.step_time import StepTime, step_time

HOURS_PER_TRILLION = 180e3
"""Published (report §1): H800 hours for each trillion tokens of pre-training."""
PUBLISHED_HOURS = {"pre-training": 2664e3, "context extension": 119e3, "post-training": 5e3}
"""Published (report Table 1), H800 hours."""
PUBLISHED_PRICE = 2.0
"""Assumed by the report, dollars for an H800 hour."""


def published_hours(tokens: float) -> float:
    """Hours of pre-training at the published rate: 2,664K for 14.8T tokens."""
    return tokens / 1e12 * HOURS_PER_TRILLION


def days(hours: float, devices: int) -> float:
    """Wall-clock days of so many device hours: 180K on 2,048 are 3.7."""
    return hours / devices / 24


def hours(tokens: float, tokens_per_second: float) -> float:
    """Device hours at a rate per device."""
    return tokens / tokens_per_second / 3600


@dataclass(frozen=True)
class Segment:
    """Part of a run with one batch size."""

    stage: str
    """Which stage of the recipe it belongs to."""
    tokens: float
    seq_len: int
    batch: int
    """Sequences in a step."""
    mtp: bool = True
    """Whether MTP modules are trained."""


@dataclass(frozen=True)
class StageCost:
    """A stage of the recipe, whole."""

    stage: str
    tokens: float
    hours: float
    """Device hours, interruptions included."""


@dataclass(frozen=True)
class RunCost:
    """A run, stage by stage."""

    stages: tuple[StageCost, ...]
    devices: int
    price: float | None

    @property
    def hours(self) -> float:
        """Device hours."""
        return sum(stage.hours for stage in self.stages)

    @property
    def tokens(self) -> float:
        """Trained on."""
        return sum(stage.tokens for stage in self.stages)

    @property
    def days(self) -> float:
        """On the wall."""
        return days(self.hours, self.devices)

    @property
    def usd(self) -> float | None:
        """At the device's price; None where there is none."""
        return None if self.price is None else self.hours * self.price


def run_cost(
    config: ModelConfig,
    layout: PlannedLayout,
    cluster: Cluster,
    rates: Rates,
    segments: Sequence[Segment],
    whole: int,
) -> RunCost:
    """Reckon every segment with its own step time; sequences up to `whole` tokens stay on one device."""
    totals: dict[str, StageCost] = {}
    steps: dict[tuple[int, int, bool], StepTime] = {}
    for part in segments:
        key = (part.seq_len, part.batch, part.mtp)
        if key not in steps:
            steps[key] = _step(config, layout, cluster, rates, part, whole)
        rate = steps[key].tokens_per_second * rates.good_time
        before = totals.get(part.stage, StageCost(part.stage, 0.0, 0.0))
        totals[part.stage] = replace(
            before,
            tokens=before.tokens + part.tokens,
            hours=before.hours + hours(part.tokens, rate),
        )
    return RunCost(tuple(totals.values()), cluster.devices, cluster.device.price)


def _step(
    config: ModelConfig,
    layout: PlannedLayout,
    cluster: Cluster,
    rates: Rates,
    part: Segment,
    whole: int,
) -> StepTime:
    return step_time(
        config,
        layout,
        cluster.device,
        rates,
        seq_len=part.seq_len,
        batch=part.batch,
        mtp=part.mtp,
        parts=max(1, round(part.seq_len / whole)),
    )
