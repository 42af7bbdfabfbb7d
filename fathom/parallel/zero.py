"""ZeRO-1 (report §3.2; Rajbhandari et al. 2020): a parameter's moments live on one of its copies only.

Parameters that the same ranks replicate are laid one behind the other in *buckets* of one piece of
memory each, and each rank of the group gets an equal run of it. After the backward pass
reduce-scatter gives a rank the summed gradient of its run; it updates the run with moments that
nobody else keeps; all-gather brings all runs to everyone. That is as many bytes as the all-reduce of
plain data parallelism. Experts are buckets of their own: only the dp / ep ranks that hold the same
ones share in them.

The update is AdamW's own, on one-dimensional parameters in the same memory as the model's. Every
number is updated by itself, and parameters begin and runs end at multiples of `ALIGN` numbers, so
that a vectorised update takes the same path for a number wherever the cuts fall: with equal sums of
gradients the result is equal bit for bit to AdamW on whole parameters.

A parameter that had no gradient (MTP's at weight 0) is passed over, as AdamW does; which ones these
are is the same on all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from fathom.parallel.pieces import Named, Piece

ALIGN = 64
"""Numbers: a whole number of the registers and cache lines of any processor."""
BUCKET_BYTES = 1 << 26
"""Memory of a bucket, unless one parameter alone needs more; as much again is needed while it is reduced."""


def grouped(parameters: list[Named], largest: int) -> list[list[Named]]:
    """Parameters of one group and dtype, in order, up to `largest` bytes together."""
    found: dict[tuple[tuple[int, ...], torch.dtype], list[list[Named]]] = {}
    for one in parameters:
        lists = found.setdefault((one.copies.ranks, one.parameter.dtype), [[]])
        size = sum(other.parameter.nbytes for other in lists[-1])
        if lists[-1] and size + one.parameter.nbytes > largest:
            lists.append([])
        lists[-1].append(one)
    return [bucket for lists in found.values() for bucket in lists]


class Bucket:
    """Parameters in one piece of memory, of which each rank of the group updates a run."""

    @torch.no_grad()
    def __init__(self, members: list[Named]) -> None:
        self.members, self.group = members, members[0].copies
        self.starts: dict[str, int] = {}
        end = 0
        for one in members:
            self.starts[one.name] = end
            end += _up(one.parameter.numel(), ALIGN)
        self.run = _up(end, ALIGN * self.group.size) // self.group.size
        self.flat = members[0].parameter.new_zeros(self.run * self.group.size)
        for one in members:
            one.parameter.data = self._of(self.flat, one).copy_(one.parameter)
        self.mine = slice(self.group.place * self.run, (self.group.place + 1) * self.run)
        self.pieces = list(self._pieces())

    def _pieces(self) -> Iterator[Piece]:
        """What of each parameter falls into this rank's run."""
        for one in self.members:
            start = self.starts[one.name]
            begin = max(start, self.mine.start)
            end = min(start + one.parameter.numel(), self.mine.stop)
            if begin < end:
                part = nn.Parameter(self.flat[begin:end], one.parameter.requires_grad)
                yield Piece(one, part, begin - start)

    @torch.no_grad()
    def reduce(self) -> None:
        """Sum the gradients over the group; each rank's parts get theirs, and the parameters' own are dropped."""
        whole = torch.zeros_like(self.flat)
        for one in self.members:
            if one.parameter.grad is not None:
                self._of(whole, one).copy_(one.parameter.grad)
        run = self.group.scatter_sum(whole)
        for piece in self.pieces:
            if piece.of.parameter.grad is not None:
                piece.part.grad = self._of_run(run, piece)
        for one in self.members:
            one.parameter.grad = None

    def _of_run(self, run: Tensor, piece: Piece) -> Tensor:
        """The place of a part in this rank's run."""
        begin = self.starts[piece.of.name] + piece.start - self.mine.start
        return run[begin : begin + piece.part.numel()]

    def _of(self, flat: Tensor, one: Named) -> Tensor:
        """The place of a parameter in all runs together, in its shape."""
        start = self.starts[one.name]
        return flat[start : start + one.parameter.numel()].view_as(one.parameter)

    @torch.no_grad()
    def share(self) -> None:
        """Bring every rank's run to all of the group."""
        self.flat.copy_(self.group.gather(self.flat[self.mine].clone()))

    @torch.no_grad()
    def whole(self, read: Callable[[Piece], Tensor | None]) -> Iterator[tuple[Named, Tensor]]:
        """What `read` finds for the parts (their gradients, their moments), put together for this rank's parameters."""
        run = self.flat.new_zeros(self.run)
        for piece in self.pieces:
            found = read(piece)
            if found is not None:
                self._of_run(run, piece).copy_(found.view(-1))
        flat = self.group.gather(run)
        for one in self.members:
            yield one, self._of(flat, one)


def _up(number: int, step: int) -> int:
    return -(-number // step) * step
