"""A schedule's lists with their sends and receives in them, so that any transport can run them as they stand.

Two ranks have to agree on the order of the messages between them: NCCL pairs a send with a receive by their order
alone, and works off one after the other. Each transfer is therefore put into both lists at the same moment of one
run of the schedule (`order_of_running`): the send behind the step that makes it, the receive wherever the other rank
is by then. So both ranks have the operations between them, of both directions, in one and the same order, and a
receive is posted about when the message comes, neither late nor long before.

All of them are to be started without waiting. The only wait is before a step, for its inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

from fathom.parallel.schedules.actions import Schedule, Step, Transfer
from fathom.parallel.schedules.legality import order_of_running, outputs


@dataclass(frozen=True, slots=True)
class Send:
    """Start to send, without waiting."""

    transfer: Transfer


@dataclass(frozen=True, slots=True)
class Receive:
    """Start to receive, without waiting; the step that needs it waits."""

    transfer: Transfer


Item = Step | Send | Receive


def program(schedule: Schedule) -> tuple[tuple[Item, ...], ...]:
    """Every rank's steps, sends and receives. What stays on its rank (`Transfer.local`) needs neither.

    Raises `ScheduleError` for a schedule that would not run.
    """
    lists: list[list[Item]] = [[] for _ in range(schedule.ranks)]
    for rank, step in order_of_running(schedule):
        lists[rank].append(step)
        for transfer in outputs(schedule, step):
            if not transfer.local:
                lists[rank].append(Send(transfer))
                lists[transfer.to_rank].append(Receive(transfer))
    return tuple(map(tuple, lists))
