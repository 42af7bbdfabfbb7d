"""DualPipe and DualPipeV: forwards and backwards of different micro-batches overlapped (report §3.2.1, Figure 5).

In a model of experts, half of a chunk's time is all-to-all. One chunk alone can hide little of it; two chunks that
need nothing from each other hide each other's. DualPipe therefore keeps a forward and a backward in every rank's
hands at nearly all times: micro-batches come in from both ends, through two copies of the parameters, and when those
from one end begin their backward, those from the other are still in their forward.

Each rank goes through eight steps. Let h be half the ranks, r' the rank's distance from its nearer end, and 0 and 1
its two parts: 0 is the one nearer to the model's input (stage r'), 1 the one nearer to the output (stage P - 1 -
r'). With n micro-batches for each part:

    1.  2(h - r' - 1) times     F0
    2.  r' + 1 times            F0, F1
    3.  h - r' - 1 times        I1, W, F1
    4.  n - 2h + r' + 1 times   F0 with B1, F1 with B0
    5.  h - r' - 1 times        B1, F1 with B0
    6.  r' + 1 times            B1, B0; the second half I instead of B
    7.  h - r' - 1 times        W, I0
    8.  the W that are left

The two middle ranks (r' = h - 1) run the first pair of step 4 one after the other, which shortens the bubble. W
always means the oldest weight gradient put off.

DualPipeV (Sea AI Lab's "cut in half", in DeepSeek's repository, not in the report) is the same list on half of the
ranks: part 1 is the other arm of a V instead of the second copy's stage, and every micro-batch goes through both.
"""

from __future__ import annotations

from collections import deque

from fathom.parallel.schedules.actions import Action, Kind, Pair, Part, Schedule, Step
from fathom.parallel.schedules.v_shape import v_placement


def dualpipe(stages: int, microbatches: int) -> Schedule:
    """Bidirectional DualPipe: as many ranks as stages, half of the micro-batches from each end."""
    half, each = stages // 2, microbatches // 2
    placement, steps = [], []
    for rank in range(stages):
        near = min(rank, stages - 1 - rank)
        copy = 0 if rank < half else 1  # of the micro-batches that come from the nearer end
        parts = (Part(near, copy), Part(stages - 1 - near, 1 - copy))
        first = (copy * each, (1 - copy) * each)
        placement.append(parts)
        steps.append(tuple(_eight_steps(near, half, each, parts, first)))
    return Schedule("DualPipe", stages, microbatches, tuple(placement), tuple(steps))


def dualpipev(stages: int, microbatches: int) -> Schedule:
    """DualPipeV: half as many ranks as stages, one copy, placed in a V."""
    ranks = stages // 2
    placement = v_placement(ranks)
    steps = [
        tuple(_eight_steps(rank, ranks, microbatches, placement[rank], (0, 0)))
        for rank in range(ranks)
    ]
    return Schedule("DualPipeV", stages, microbatches, placement, tuple(steps))


class _Writer:
    """Writes a rank's list; knows the next micro-batch of each part and which weight gradients were put off."""

    def __init__(self, parts: tuple[Part, ...], first: tuple[int, int]) -> None:
        self.steps: list[Step] = []
        self._parts = parts
        self._next = {"F": list(first), "B": list(first)}
        self._put_off: deque[Action] = deque()

    def forward(self, part: int) -> None:
        self.steps.append(self._action("F", part))

    def backward(self, part: int) -> None:
        self.steps.append(self._action("B", part))

    def input_grad(self, part: int) -> None:
        action = self._action("I", part)
        self.steps.append(action)
        self._put_off.append(Action("W", action.stage, action.microbatch, action.copy))

    def weight_grad(self) -> None:
        self.steps.append(self._put_off.popleft())

    def pair(self, forward: int, backward: int) -> None:
        self.steps.append(Pair(self._action("F", forward), self._action("B", backward)))

    def weight_grads_left(self) -> None:
        self.steps += self._put_off

    def _action(self, kind: Kind, part: int) -> Action:
        numbers = self._next["F" if kind == "F" else "B"]
        numbers[part] += 1
        where = self._parts[part]
        return Action(kind, where.stage, numbers[part] - 1, where.copy)


def _eight_steps(
    near: int, half: int, microbatches: int, parts: tuple[Part, ...], first: tuple[int, int]
) -> list[Step]:
    """The list of a rank `near` = r' away from its end; `microbatches` per part, numbered from `first`."""
    behind, write = half - near - 1, _Writer(parts, first)
    for _ in range(2 * behind):  # 1
        write.forward(0)
    for _ in range(near + 1):  # 2
        write.forward(0)
        write.forward(1)
    for _ in range(behind):  # 3
        write.input_grad(1)
        write.weight_grad()
        write.forward(1)
    _main(write, microbatches - 2 * half + near + 1, apart=behind == 0)  # 4
    for _ in range(behind):  # 5
        write.backward(1)
        write.pair(1, 0)
    for i in range(2 * (near + 1)):  # 6
        grad = write.backward if i <= near else write.input_grad
        grad(1 - i % 2)
    for _ in range(behind):  # 7
        write.weight_grad()
        write.input_grad(0)
    write.weight_grads_left()  # 8
    return write.steps


def _main(write: _Writer, rounds: int, apart: bool) -> None:
    """Step 4; `apart`: the first forward and backward are not overlapped."""
    for i in range(rounds):
        if apart and i == 0:
            write.forward(0)
            write.backward(1)
        else:
            write.pair(0, 1)
        write.pair(1, 0)
