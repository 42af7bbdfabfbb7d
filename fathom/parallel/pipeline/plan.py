"""How a model lies in a pipeline: which schedule, which layers on which rank, and who holds what."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from fathom.model import ModelConfig
from fathom.parallel.pipeline.stages import embeds_again, share_layers
from fathom.parallel.schedules import (
    Part,
    Schedule,
    check_overlapped_order,
    schedule,
    traits,
)
from fathom.parallel.schedules.overlap import Order


@dataclass(frozen=True)
class Plan:
    """A model's pipeline over `ranks` ranks. Raises `ParallelError` or `ScheduleError` where that cannot be."""

    config: ModelConfig
    ranks: int
    name: str = "1F1B"
    """The schedule (`fathom.parallel.SCHEDULES`)."""
    counts: tuple[int, ...] | None = None
    """Layers of each stage; None: as even as possible."""
    order: Order | None = None
    """Of the operations of an overlapped pair where experts are spread over ranks: `OVERLAPPED_ORDER` on GPUs,
    `POSTED_EARLY` where the host computes. None: a pair's forward, then its backward."""

    def __post_init__(self) -> None:
        self.placement, self.layers  # noqa: B018  (they refuse what cannot be)
        if self.order is not None:
            check_overlapped_order(self.order)

    @property
    def stages(self) -> int:
        return traits(self.name).stages(self.ranks)

    @cached_property
    def layers(self) -> tuple[range, ...]:
        """The layers of each stage."""
        return share_layers(self.config, self.stages, self.counts)

    def schedule(self, microbatches: int) -> Schedule:
        """The lists for a batch of so many micro-batches."""
        return schedule(self.name, self.stages, microbatches)

    @cached_property
    def placement(self) -> tuple[tuple[Part, ...], ...]:
        """The parts of each rank; they do not depend on the number of micro-batches."""
        return self.schedule(2 * self.stages).placement

    def holders(self, name: str) -> tuple[int, ...]:
        """The ranks that hold the parameter or buffer of that name: several in DualPipe, and of an embedding that
        the last stage has too."""
        stages = self._stages_with(name)
        return tuple(
            rank
            for rank, parts in enumerate(self.placement)
            if any(part.stage in stages for part in parts)
        )

    @cached_property
    def shared(self) -> set[tuple[int, ...]]:
        """All sets of several ranks that hold the same."""
        layers = (f"model.layers.{stage[0]}." for stage in self.layers)
        names = (*layers, "model.embed_tokens.", "model.norm.")
        return {ranks for ranks in map(self.holders, names) if len(ranks) > 1}

    def _stages_with(self, name: str) -> set[int]:
        inner = name.removeprefix("model.")
        if inner.startswith("layers."):
            layer = int(inner.split(".")[1])
            return {stage for stage, layers in enumerate(self.layers) if layer in layers}
        last = self.stages - 1
        if inner.startswith("embed_tokens."):
            return {0, last} if embeds_again(self.config) else {0}
        return {last}
