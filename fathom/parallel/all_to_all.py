"""Rows on their way to other ranks, as an autograd rule in two halves (report §3.2.2).

`send` posts the transfer and returns; `Flight.wait` gives the rows once they are there. Whatever
is computed in between hides the transfer. The two halves are two nodes of the graph, and so the way
back is as asynchronous as the way out: the backward of the second posts the gradients' transfer on
the reverse route, the backward of the first waits for it. Autograd runs the nodes that are ready
latest-made first, so what was computed between the halves is differentiated between them as well.

Splits are uneven; every rank of the group must take part, with no rows if it has none. Float32,
BF16 and float64 rows travel as they are.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from fathom.parallel.mesh import Group
from fathom.parallel.waiting import waiting


@dataclass
class Traffic:
    """Bytes that this rank sent to others, by hop and by what they were.

    Hops are "ep" where there is one only, else "across" nodes and then inside the "node". Loads are "routing" (which
    experts are wanted), "dispatch" and "combine", and the gradients of the latter two, "dispatch gradient" and "combine
    gradient". What a rank sends to itself does not count.
    """

    bytes: Counter[tuple[str, str]] = field(default_factory=Counter)

    def count(self, hop: str, load: str, sent: int) -> None:
        """Add `sent` bytes."""
        self.bytes[hop, load] += sent


@dataclass(frozen=True)
class Route:
    """How many rows go to each rank of a group, and how many come from each."""

    group: Group
    out: tuple[int, ...]
    back: tuple[int, ...]
    hop: str
    traffic: Traffic

    @classmethod
    def agree(cls, group: Group, out_G: Tensor, hop: str, traffic: Traffic) -> Route:
        """The route of rows in the order of the group's ranks, `out_G` (int64) to each; everyone is told."""
        back_G = torch.empty_like(out_G)
        with waiting():
            dist.all_to_all_single(back_G, out_G, group=group.handle)
        traffic.count(hop, "routing", (group.size - 1) * out_G.element_size())
        out, back = torch.stack((out_G, back_G)).tolist()
        return cls(group, tuple(out), tuple(back), hop, traffic)

    def reverse(self) -> Route:
        """The way back."""
        return Route(self.group, self.back, self.out, self.hop, self.traffic)

    def post(self, rows: Tensor, load: str) -> tuple[Tensor, Any]:
        """Begin to send rows [sum(out), ...]; where they come in [sum(back), ...] and what to wait for."""
        rows = rows.contiguous()
        arriving = rows.new_empty(sum(self.back), *rows.shape[1:])
        work = dist.all_to_all_single(
            arriving,
            rows,
            list(self.back),
            list(self.out),
            group=self.group.handle,
            async_op=True,
        )
        others = sum(self.out) - self.out[self.group.place]
        row_bytes = rows[:1].nbytes if rows.shape[0] else 0
        self.traffic.count(self.hop, load, others * row_bytes)
        return arriving, (work, rows)  # the rows have to live until they are sent


class Flight:
    """Rows under way."""

    def __init__(self, route: Route, load: str) -> None:
        self.route, self.load = route, load
        self.under_way: Any = None
        self.returning: Any = None
        self.arriving: Tensor

    def wait(self) -> Tensor:
        """The rows [sum(back), ...], in the order of the ranks that they come from."""
        arrived = _Arrive.apply(self.arriving, self)
        del self.arriving
        return arrived


def send(rows: Tensor, route: Route, load: str) -> Flight:
    """Begin to send rows [sum(out), ...] on their route; differentiable."""
    flight = Flight(route, load)
    flight.arriving = _Depart.apply(rows, flight)
    return flight


def _finish(under_way: Any) -> None:
    work, _ = under_way
    with waiting():
        work.wait()


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, flight: Flight) -> Tensor:
        ctx.flight = flight
        arriving, flight.under_way = flight.route.post(rows, flight.load)
        return arriving

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        returned, under_way = ctx.flight.returning
        ctx.flight.returning = None
        _finish(under_way)
        return returned, None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, arriving: Tensor, flight: Flight) -> Tensor:
        ctx.flight = flight
        _finish(flight.under_way)
        flight.under_way = None
        return arriving.view_as(arriving)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        flight = ctx.flight
        flight.returning = flight.route.reverse().post(grad, f"{flight.load} gradient")
        return grad, None  # only a token for `_Depart`, whose gradient comes from the other ranks
