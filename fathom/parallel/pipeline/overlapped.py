"""A forward chunk of one micro-batch and a backward chunk of another, interleaved (report §3.2.1, Figure 4).

A chunk is what a stage does to a micro-batch. Here it is taken apart into operations
(`fathom.parallel.pipeline.layers`), and two chunks are worked off layer by layer in one order, which is data:
`OVERLAPPED_ORDER` as published, or any other that `check_overlapped_order` accepts. While an all-to-all of one is
under way, the other computes.

The forward chunk meets its layers from the first, the backward chunk from the last. What they meet at the same time is
a pair; where one chunk has more layers, the rest of them run alone. Embedding, head, losses and MTP modules are at
a chunk's ends and run whole: they belong to two stages of many.

A chunk by itself (where the schedule has no pair) takes its operations from the same order. Gradients are those of
`Stage.forward` differentiated as one graph, to the bit.
"""

from __future__ import annotations

from itertools import pairwise, zip_longest
from typing import cast

from torch import Tensor

from fathom.kernels.put_off import PutOff, Task, run_tasks
from fathom.model import Transformer
from fathom.model.block import Block
from fathom.model.moe import MoE
from fathom.model.objective import Rows
from fathom.parallel.dispatcher import ExpertParallelDispatcher
from fathom.parallel.pipeline.lanes import Lane
from fathom.parallel.pipeline.layers import DenseLayer, SparseLayer
from fathom.parallel.pipeline.seams import Seam, differentiate
from fathom.parallel.pipeline.stages import Passed, Stage, Weights
from fathom.parallel.schedules.overlap import COMMUNICATION, Operation, Order


def sends_to_experts(model: Transformer) -> bool:
    """Whether tokens travel to experts on other ranks, so that there is something to hide."""
    return any(
        isinstance(module, MoE) and isinstance(module.dispatcher, ExpertParallelDispatcher)
        for module in model.modules()
    )


class Chunk:
    """A micro-batch in a stage, operation by operation: forward once, then backward once.

    `forward` and `backward` are those of `Whole`. For a pair: `enter`, `enter_backward` of the other, `interleave`,
    `leave`, `leave_backward` of the other.
    """

    def __init__(
        self,
        stage: Stage,
        rows: Rows,
        weights: Weights,
        put_off: PutOff,
        lane: Lane,
        order: Order,
    ) -> None:
        self.stage, self.rows, self.weights = stage, rows, weights
        self.put_off, self.lane, self.order = put_off, lane, order
        self.context = stage.context(rows, weights.balance_alpha > 0)
        blocks = (cast(Block, stage.model.model.layers[layer]) for layer in stage.layers)
        self.layers = [self._layer(block) for block in blocks]
        for one, following in pairwise(self.layers):
            following.before, one.behind = one.output, following.input.take
        self.exit = Seam()
        self.passed: Passed | None = None

    def _layer(self, block: Block) -> DenseLayer:
        kind = SparseLayer if isinstance(block.mlp, MoE) else DenseLayer
        return kind(block, self.context, self.put_off, self.lane)

    def run(self, layer: DenseLayer, operation: Operation) -> None:
        """One operation, where the layer has it."""
        work = layer.operations.get(operation)
        if work is not None:
            work()
            if operation[0] != "W" and operation[1] not in COMMUNICATION:
                self.lane.mark()

    # --- alone -------------------------------------------------------------------------------------

    def forward(self, x_BTD: Tensor | None) -> Passed:
        """Of the output of the stage before."""
        self.enter(x_BTD)
        interleave(self.order, self, None)
        return self.leave()

    def backward(
        self, gradient: Tensor | None, targets: float, sequences: float, later: list[Task] | None
    ) -> Tensor | None:
        """The gradient of the stage's input, of that of its output; those of weights go to `later` where there is one.

        `targets` and `sequences`: what share of the batch the micro-batch is.
        """
        self.enter_backward(gradient, targets, sequences, later)
        order = self.order if later is None else [one for one in self.order if one[0] != "W"]
        interleave(order, None, self)
        if later is not None:
            for layer in self.layers:
                for tasks in layer.later.values():
                    later.extend(tasks)
        return self.leave_backward()

    # --- ends --------------------------------------------------------------------------------------

    def enter(self, x_BTD: Tensor | None) -> None:
        """What comes before the first layer."""
        state = self.stage.begin(x_BTD, self.rows)
        self.layers[0].before = lambda: state

    def leave(self) -> Passed:
        """What comes behind the last layer, forward."""
        state = self.layers[-1].output()
        state = self.exit.cut(state) if self.stage.last else state
        self.passed = self.stage.end(state, self.rows, self.context, self.weights)
        return self.passed

    def enter_backward(
        self,
        gradient: Tensor | None,
        targets: float,
        sequences: float,
        later: list[Task] | None = None,
    ) -> None:
        """What comes behind the last layer, backward."""
        assert self.passed is not None
        with self.put_off.collecting() as tasks:
            self.passed.backward(gradient, self.weights.mtp, targets, sequences)
        if later is None:
            run_tasks(tasks)
        else:
            later.extend(tasks)
        self.passed = None
        output = self.exit.take() if self.stage.last else cast(Tensor, gradient)
        self.layers[-1].behind = lambda: output
        self.lane.mark()

    def leave_backward(self) -> Tensor | None:
        """The gradient of what came from the stage before; the embedding differentiates its own."""
        entry = self.layers[0].input
        if entry.edge is None:
            return entry.take()
        differentiate(entry)
        return None


def interleave(order: Order, forward: Chunk | None, backward: Chunk | None) -> None:
    """The layers of two chunks, or of one, in the order of their operations."""
    ahead = forward.layers if forward else []
    back = backward.layers[::-1] if backward else []
    for first, second in zip_longest(ahead, back):
        for operation in order:
            chunk, layer = (forward, first) if operation[0] == "F" else (backward, second)
            if chunk is not None and layer is not None:
                chunk.run(layer, operation)
