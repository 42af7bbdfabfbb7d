"""Table [parallel] of a recipe: how a run is laid out over processes (report §3.2).

Nothing that is learnt depends on it but for the last bits of sums, so a run may go on in another layout.
`fathom.runs.layout` says whether a layout can be, for so many processes.
"""

from __future__ import annotations

from dataclasses import dataclass

from fathom.errors import RecipeError, did_you_mean
from fathom.parallel import SCHEDULES


@dataclass(frozen=True)
class ParallelConfig:
    """Table [parallel]. Data parallelism is what is left: processes / pp."""

    pp: int = 1
    """Ranks of a pipeline (report: 16)."""
    ep: int = 1
    """Ranks that a layer's routed experts are spread over (report: 64); divides processes / pp."""
    devices_per_node: int | None = None
    """Where `ep` spans several nodes: ranks of each, so that a token is sent to a node once; None sends it directly."""
    schedule: str = "1F1B"
    """Pipeline schedule: GPipe, 1F1B, ZB1P, ZBV, DualPipeV or DualPipe (the report's); read where pp > 1."""
    layers: tuple[int, ...] = ()
    """Layers of each stage, from the embedding on; empty: as even as possible. ZBV and DualPipeV have 2 pp stages."""
    zero1: bool = True
    """Shard AdamW's moments over the ranks that hold the same weights (report §3.2); no matter on one process."""
    full_shard: bool = False
    """Shard weights and gradients too, and gather a block's weights where they are used (FSDP2); for pp = 1."""

    @property
    def processes(self) -> int:
        """The fewest that this can be laid out over; a multiple will do too."""
        return self.pp * self.ep

    def __post_init__(self) -> None:
        for key in ("pp", "ep", "devices_per_node"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise RecipeError(f"parallel.{key} = {value} must be at least 1; raise it")
        if self.schedule not in SCHEDULES:
            near = did_you_mean(self.schedule, SCHEDULES)
            raise RecipeError(
                f"parallel.schedule = {self.schedule!r} is no pipeline schedule; {near}"
            )
        if any(layers < 1 for layers in self.layers):
            raise RecipeError(
                f"parallel.layers = {list(self.layers)} leaves a stage empty; give each at least 1"
            )
        if self.full_shard and self.pp > 1:
            raise RecipeError(
                f"parallel.full_shard = true with parallel.pp = {self.pp} would gather every weight again for each "
                f"micro-batch of the pipeline; leave it out (parallel.zero1 shards the moments there), or set "
                f"parallel.pp = 1"
            )
        if self.layers and self.pp == 1:
            raise RecipeError(
                f"parallel.layers = {list(self.layers)} does nothing with parallel.pp = 1; raise pp or leave it out"
            )
