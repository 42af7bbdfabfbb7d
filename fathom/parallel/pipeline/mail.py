"""Activations and gradients between the ranks of a pipeline.

Sends and receives are started where `program` has put them and waited for as late as possible: a receive
before the step that needs it, a send at the end. Between any two ranks both have them in one order, so that
NCCL, which knows no tags, pairs them rightly; gloo does the same.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from fathom.parallel.mesh import Group
from fathom.parallel.schedules import Transfer
from fathom.parallel.waiting import waiting


class Mail:
    """One rank's letters of one step."""

    def __init__(self, group: Group, device: torch.device, dtype: torch.dtype) -> None:
        self.group, self.device, self.dtype = group, device, dtype
        self._here: dict[Transfer, Tensor] = {}
        self._coming: dict[Transfer, dist.Work] = {}
        self._going: list[tuple[dist.Work, Tensor]] = []
        self.bytes_sent = 0

    def hand_over(self, transfer: Transfer, tensor: Tensor) -> None:
        """What stays on this rank."""
        self._here[transfer] = tensor

    def send(self, transfer: Transfer, tensor: Tensor) -> None:
        """Start to send."""
        letter = tensor.contiguous()
        work = dist.isend(letter, self.group.ranks[transfer.to_rank], group=self.group.handle)
        assert work is not None
        self._let_go()
        self._going.append((work, letter))  # which must live as long as the work
        self.bytes_sent += letter.nbytes

    def _let_go(self) -> None:
        """Drop what has been sent, as far as the transport tells (NCCL does; gloo only to those who wait)."""
        going, self._going = self._going, []
        for work, letter in going:
            if work.is_completed():
                work.wait()
            else:
                self._going.append((work, letter))

    def receive(self, transfer: Transfer, shape: tuple[int, ...]) -> None:
        """Start to receive."""
        buffer = torch.empty(shape, dtype=self.dtype, device=self.device)
        source = self.group.ranks[transfer.from_rank]
        work = dist.irecv(buffer, source, group=self.group.handle)
        assert work is not None
        self._here[transfer], self._coming[transfer] = buffer, work

    def take(self, transfer: Transfer) -> Tensor:
        """What has come; waits for it."""
        work = self._coming.pop(transfer, None)
        if work is not None:
            with waiting():
                work.wait()
        return self._here.pop(transfer)

    def finish(self) -> None:
        """Wait until everything was sent."""
        with waiting():
            for work, _ in self._going:
                work.wait()
        self._going.clear()
