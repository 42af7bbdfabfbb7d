"""What is interleaved inside an overlapped pair, and how much of the all-to-all that hides (report §3.2.1, Figure 4).

One layer of a forward chunk is attention, dispatch, MLP, combine; of a backward chunk combine, MLP, dispatch,
attention, the two computations split into input and weight gradients. Dispatch and combine are all-to-alls and need
the network, the others need the device's units; so while one chunk communicates, the other computes. The order is the
one in which DeepSeek's published trace (the profile-data repository, training, H800) issues them.

`overlapped_time` runs such an order on paper. A device has a stream for computation and one for communication; each
works off its own operations in order, and an operation starts when those of its chunk that it needs are done. On a
GPU the host only issues and runs far ahead. On a CPU the host computes itself, so that an all-to-all cannot start
before the host has come to its place in the order; `host_computes` tells which.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fathom.errors import ScheduleError

Operation = tuple[str, str]
"""(kind, what): kind F, B (gradients of inputs) or W (of weights); what attention, dispatch, mlp or combine."""

Order = Sequence[Operation]

OVERLAPPED_ORDER: tuple[Operation, ...] = (
    ("B", "combine"),
    ("F", "attention"),
    ("B", "mlp"),
    ("F", "dispatch"),
    ("B", "dispatch"),
    ("W", "mlp"),
    ("F", "mlp"),
    ("B", "attention"),
    ("W", "attention"),
    ("F", "combine"),
)
"""One layer of a forward chunk and one of a backward chunk, in the published order."""

POSTED_EARLY: tuple[Operation, ...] = (
    ("B", "combine"),
    ("F", "attention"),
    ("F", "dispatch"),
    ("B", "mlp"),
    ("B", "dispatch"),
    ("W", "mlp"),
    ("F", "mlp"),
    ("F", "combine"),
    ("B", "attention"),
    ("W", "attention"),
)
"""The published order of the computations, and each all-to-all right behind the computation that it needs.

Where the host only issues, this takes as long as the published order. Where it computes itself, it hides nearly twice
as much: the published order posts combine(F) last, when there is nothing left to hide it behind.
"""

ONE_AFTER_THE_OTHER: tuple[Operation, ...] = (
    ("F", "attention"),
    ("F", "dispatch"),
    ("F", "mlp"),
    ("F", "combine"),
    ("B", "combine"),
    ("B", "mlp"),
    ("W", "mlp"),
    ("B", "dispatch"),
    ("B", "attention"),
    ("W", "attention"),
)
"""The same ten operations without interleaving."""

NEEDS: Mapping[Operation, Operation] = {
    ("F", "dispatch"): ("F", "attention"),
    ("F", "mlp"): ("F", "dispatch"),
    ("F", "combine"): ("F", "mlp"),
    ("B", "mlp"): ("B", "combine"),
    ("B", "dispatch"): ("B", "mlp"),
    ("B", "attention"): ("B", "dispatch"),
    ("W", "mlp"): ("B", "mlp"),
    ("W", "attention"): ("B", "attention"),
}
"""What each operation needs of its own layer. A layer's first one needs the last of the layer before in its chunk."""

FROM_LAYER_BEFORE: Mapping[Operation, Operation] = {
    ("F", "attention"): ("F", "combine"),
    ("B", "combine"): ("B", "attention"),
}
COMMUNICATION = ("dispatch", "combine")


def check_overlapped_order(order: Sequence[Operation]) -> None:
    """Raise `ScheduleError` unless `order` has every operation once, each after what it needs."""
    everything = set(OVERLAPPED_ORDER)
    if len(order) != len(everything) or set(order) != everything:
        wrong = sorted(everything.symmetric_difference(order)) or "one of them twice"
        raise ScheduleError(
            f"an overlapped layer has ten operations, each once; to be mended: {wrong}"
        )
    for operation, needed in NEEDS.items():
        if order.index(operation) < order.index(needed):
            raise ScheduleError(
                f"{_named(operation)} stands before {_named(needed)}, whose result it needs; put it behind"
            )


@dataclass(frozen=True, slots=True)
class OverlappedTime:
    """Times of a pair of chunks, in the unit of the costs."""

    total: float
    computing: float
    communicating: float

    @property
    def hidden(self) -> float:
        """Share of the communication that costs no time: 1 - (total - computing) / communicating."""
        return 1 - (self.total - self.computing) / self.communicating if self.communicating else 1.0


def overlapped_time(
    order: Sequence[Operation],
    costs: Mapping[Operation, float],
    layers: int,
    host_computes: bool = False,
) -> OverlappedTime:
    """Time of `layers` layers of a pair of chunks whose operations are issued in `order`, layer by layer."""
    check_overlapped_order(order)
    ended: dict[tuple[int, Operation], float] = {}
    free = {"compute": 0.0, "network": 0.0}
    for layer in range(layers):
        for operation in order:
            stream = "network" if operation[1] in COMMUNICATION else "compute"
            needed = (layer, NEEDS[operation]) if operation in NEEDS else None
            if operation in FROM_LAYER_BEFORE:
                needed = (layer - 1, FROM_LAYER_BEFORE[operation])
            start = max(free[stream], ended.get(needed, 0.0) if needed else 0.0)
            if host_computes:
                start = max(start, free["compute"])
            free[stream] = ended[layer, operation] = start + costs[operation]
    network = layers * sum(costs[o] for o in order if o[1] in COMMUNICATION)
    computing = layers * sum(costs[o] for o in order if o[1] not in COMMUNICATION)
    return OverlappedTime(max(free.values()), computing, network)


def _named(operation: Operation) -> str:
    return f"{operation[1]}({operation[0]})"
