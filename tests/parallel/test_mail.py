"""What a rank of a pipeline keeps of its messages."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from fathom.parallel.mesh import Group
from fathom.parallel.pipeline.mail import Mail
from fathom.parallel.schedules import Transfer

TRANSFER = Transfer("activation", 0, 0, from_stage=0, to_stage=1, from_rank=0, to_rank=1)


class Work:
    """A send that is done when the test says so."""

    done, waited = False, False

    def is_completed(self) -> bool:
        return self.done

    def wait(self) -> None:
        self.waited = True


def test_what_has_been_sent_is_not_kept_until_the_end_of_the_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else memory would grow with the number of micro-batches."""
    works: list[Work] = []

    def isend(tensor: torch.Tensor, rank: int, group: object) -> Work:
        works.append(Work())
        return works[-1]

    monkeypatch.setattr(dist, "isend", isend)
    mail = Mail(Group((0, 1), 0), torch.device("cpu"), torch.float32)
    for number in range(3):
        mail.send(TRANSFER, torch.zeros(4))
        works[number].done = number != 1
    mail.send(TRANSFER, torch.zeros(4))
    assert [work for work, _ in mail._going] == [works[1], works[3]]
    assert works[0].waited and works[2].waited and not works[1].waited
    mail.finish()
    assert works[1].waited and not mail._going
