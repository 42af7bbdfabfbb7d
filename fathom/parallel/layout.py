"""How many processes there are and what each is for (report §3.2: PP16, EP64 over 8 nodes, ZeRO-1).

World = pp x dp. Experts are sharded over ep ranks, and each shard is held by the dp / ep ranks that
replicate it; everything else is replicated over all dp ranks of a pipeline stage. Rank r is

    r = (stage * replicas + replica) * ep + place,      replicas = dp / ep,

so that consecutive ranks are neighbours in ep: they share a node, where talk is cheap, and a stage's
ranks come before those of the next, which hears from it least. Inside ep the ranks of a node are
consecutive again: place = node * devices_per_node + device.

When ep reaches beyond one node, tokens travel in two hops (`fathom.parallel.dispatcher`).
"""

from __future__ import annotations

from dataclasses import dataclass

from fathom.errors import ParallelError
from fathom.model.config import ModelConfig


@dataclass(frozen=True)
class Layout:
    """The shape of a world. Raises `ParallelError` for one that is none."""

    pp: int = 1
    """Pipeline stages."""
    dp: int = 1
    """Ranks of a stage; each takes its share of the batch's sequences."""
    ep: int = 1
    """Ranks that a layer's routed experts are spread over; divides dp."""
    devices_per_node: int | None = None
    """Ranks of a node. Where ep spans several nodes, a token is sent to each of them at most once; None: one hop."""

    def __post_init__(self) -> None:
        for key in ("pp", "dp", "ep"):
            if getattr(self, key) < 1:
                raise ParallelError(
                    f"parallel.{key} = {getattr(self, key)} must be at least 1; 1 is none of it"
                )
        if self.dp % self.ep:
            raise ParallelError(
                f"parallel.ep = {self.ep} must divide dp = {self.dp}, since experts are spread over ranks of one "
                f"stage; make dp a multiple of ep"
            )
        node = self.devices_per_node
        if node is not None and node < 1:
            raise ParallelError(
                f"parallel.devices_per_node = {node} must be at least 1; leave it out for one hop"
            )
        if node is not None and self.ep % node and node % self.ep:
            raise ParallelError(
                f"parallel.ep = {self.ep} and devices_per_node = {node}: one must divide the other, so that every "
                f"node holds as many ranks of each group; choose ep so, or leave devices_per_node out"
            )

    @property
    def world(self) -> int:
        """Processes in all."""
        return self.pp * self.dp

    @property
    def replicas(self) -> int:
        """Ranks that hold the same experts."""
        return self.dp // self.ep

    @property
    def nodes(self) -> int:
        """Nodes that the ranks of ep lie on, as far as dispatch is concerned; 1 means one hop."""
        node = self.devices_per_node
        return 1 if node is None or node >= self.ep else self.ep // node

    def check(self, config: ModelConfig) -> None:
        """Raise `ParallelError` where a model cannot be laid out so."""
        if config.n_routed_experts % self.ep:
            raise ParallelError(
                f"parallel.ep = {self.ep} must divide n_routed_experts = {config.n_routed_experts}; choose another ep"
            )

    def rows(self, batch: int, dp_rank: int) -> range:
        """Sequences of a batch that one rank of a stage computes: consecutive ones, as many on every rank.

        Raises `ParallelError` when they do not come out even.
        """
        if batch % self.dp:
            raise ParallelError(
                f"a batch of {batch} sequences cannot be shared evenly by dp = {self.dp} ranks; make batch (and "
                f"batch_multiple) a multiple of dp"
            )
        share = batch // self.dp
        return range(dp_rank * share, (dp_rank + 1) * share)
