"""One layer of one micro-batch, operation by operation (report §3.2.1, Figure 4).

    F attention    norm, attention, norm, routing                    waits for what the layer before combines
    F dispatch     rows begin their way to their experts
    F mlp          shared experts; then, once the rows are here, routed experts
    F combine      their results begin their way back
    B combine      the gradient of the sum begins its way to the experts
    B mlp          shared experts; then, once that gradient is here, routed experts: inputs only
    W mlp          the weights that B mlp put off
    B dispatch     the rows' gradients begin their way home
    B attention    norm, attention, norm, routing: inputs only        waits for those gradients
    W attention    the weights that B attention put off

Each F is a graph of its own between seams, except that a departure belongs to the graph before it and an
arrival to the graph behind it: so it is autograd's nodes of `fathom.parallel.all_to_all` that post and wait in both
directions. Products, norms and their order are those of `Block.forward`, and so are the bits of all gradients.

A dense layer has neither dispatch nor combine. Its operations and those of a layer with experts are found in
`operations`, by the names of `fathom.parallel.schedules.overlap`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

from torch import Tensor

from fathom.kernels.put_off import PutOff, Task, run_tasks
from fathom.model.block import Block
from fathom.model.context import Context
from fathom.model.layers import MLP
from fathom.model.moe import MoE
from fathom.parallel.dispatcher import ExpertParallelDispatcher, SentToExperts
from fathom.parallel.pipeline.lanes import Lane
from fathom.parallel.pipeline.seams import Seam, differentiate
from fathom.parallel.schedules.overlap import Operation


class DenseLayer:
    """A layer without experts, and what layers with experts share with it."""

    def __init__(self, block: Block, context: Context, put_off: PutOff, lane: Lane) -> None:
        self.block, self.context, self.put_off, self.lane = block, context, put_off, lane
        self.before: Callable[[], Tensor]
        """Gives the states that the layer begins with."""
        self.behind: Callable[[], Tensor]
        """Gives the gradient of its output."""
        self.input, self.past, self.normed, self.fed = Seam(), Seam(), Seam(), Seam()
        self.state: Tensor | None = None
        self.x: Tensor | None = None
        self.later: dict[str, list[Task]] = {"mlp": [], "attention": []}

    @property
    def operations(self) -> Mapping[Operation, Callable[[], None]]:
        """What there is to do."""
        return {
            ("F", "attention"): self.attend,
            ("F", "mlp"): self.feed,
            ("B", "mlp"): self.feed_backward,
            ("W", "mlp"): self.feed_weights,
            ("B", "attention"): self.attend_backward,
            ("W", "attention"): self.attend_weights,
        }

    # --- forward -----------------------------------------------------------------------------------

    def attend(self) -> None:
        h_BTD, x_BTD = self.block.attend(self.input.cut(self.before()), self.context)
        self.state, self.x = self.past.end(h_BTD), self.normed.cut(x_BTD)

    def feed(self) -> None:
        out = self.fed.end(cast(MLP, self.block.mlp)(self.x))
        assert self.state is not None
        self.state, self.x = self.state + out, None

    def output(self) -> Tensor:
        """States for the layer behind [B, T, D]."""
        assert self.state is not None
        state, self.state = self.state, None
        return state

    # --- backward ----------------------------------------------------------------------------------

    def feed_backward(self) -> None:
        self.past.gradient = self.fed.gradient = self.behind()
        with self.put_off.collecting() as self.later["mlp"]:
            differentiate(self.fed)

    def feed_weights(self) -> None:
        run_tasks(self.later["mlp"])

    def attend_backward(self) -> None:
        with self.put_off.collecting() as self.later["attention"]:
            differentiate(self.normed, self.past)

    def attend_weights(self) -> None:
        run_tasks(self.later["attention"])


class SparseLayer(DenseLayer):
    """A layer with experts, which are spread over ranks."""

    def __init__(self, block: Block, context: Context, put_off: PutOff, lane: Lane) -> None:
        super().__init__(block, context, put_off, lane)
        self.moe = cast(MoE, block.mlp)
        self.dispatcher = cast(ExpertParallelDispatcher, self.moe.dispatcher)
        self.scores, self.dispatched, self.arrived = Seam(), Seam(), Seam()
        self.weighed, self.combined, self.shared = Seam(), Seam(), Seam()
        self.routed: tuple[Tensor, ...] = ()
        self.sent: SentToExperts | None = None
        self.results: Tensor | None = None
        self.shared_ND: Tensor | None = None

    @property
    def operations(self) -> Mapping[Operation, Callable[[], None]]:
        return {
            **super().operations,
            ("F", "dispatch"): self.dispatch,
            ("F", "combine"): self.combine,
            ("B", "combine"): self.combine_backward,
            ("B", "dispatch"): self.dispatch_backward,
        }

    # --- forward -----------------------------------------------------------------------------------

    def attend(self) -> None:
        h_BTD, x_BTD = self.block.attend(self.input.cut(self.before()), self.context)
        x_ND = x_BTD.flatten(0, 1)
        self.routed = (x_ND, *self.moe.route(x_BTD, self.context))
        record = self.context.routers[-1]
        if record.scores_BTE is not None:
            record.scores_BTE = self.scores.cut(record.scores_BTE)
        self.state, self.x = self.past.end(h_BTD), self.normed.cut(x_BTD)

    def dispatch(self) -> None:
        with self.lane.beside(*self.routed):
            self.sent = self.dispatcher.dispatch(*self.routed)
            flight = self.sent.legs[0].rows
            flight.arriving = self.dispatched.cut(flight.arriving)
        self.routed = ()

    def feed(self) -> None:
        assert self.x is not None
        shared = self.moe.shared(self.x)
        self.shared_ND, self.x = None if shared is None else self.shared.end(shared), None
        self.results = self.moe.experts(*self._arrive())

    def _arrive(self) -> tuple[Tensor, Tensor]:
        """Rows in the order of the experts, and how many each has."""
        assert self.sent is not None
        with self.lane.beside():
            rows, counts = self.sent.wait()
        self.lane.join(rows, counts)
        self.sent.weights_L = self.weighed.cut(self.sent.weights_L)
        return self.arrived.cut(rows), counts

    def combine(self) -> None:
        assert self.sent is not None and self.results is not None
        with self.lane.beside(self.results):
            self.dispatcher.begin_combine(self.results, self.sent)
            flight = self.sent.legs[0].results
            flight.arriving = self.combined.cut(flight.arriving)
        self.results = None

    def output(self) -> Tensor:
        assert self.sent is not None and self.state is not None
        with self.lane.beside():
            fed = self.fed.end(self.dispatcher.end_combine(self.sent))
        self.lane.join(fed)
        if self.shared_ND is not None:
            fed = fed + self.shared_ND
        state = self.state + fed.view_as(self.state)
        self.sent = self.state = self.shared_ND = None
        return state

    # --- backward ----------------------------------------------------------------------------------

    def combine_backward(self) -> None:
        gradient = self.behind()
        self.past.gradient = gradient
        self.fed.gradient = gradient.flatten(0, 1)
        if self.shared.edge is not None:
            self.shared.gradient = self.fed.gradient
        with self.lane.beside(gradient):
            differentiate(self.fed)

    def feed_backward(self) -> None:
        with self.put_off.collecting() as self.later["mlp"]:
            if self.shared.gradient is not None:
                differentiate(self.shared)
            differentiate(self.combined)

    def dispatch_backward(self) -> None:
        rows, weights = self.arrived.gradient, self.weighed.gradient
        assert rows is not None and weights is not None
        with self.lane.beside(rows, weights):
            differentiate(self.arrived, self.weighed)

    def attend_backward(self) -> None:
        there = [seam for seam in (self.normed, self.scores) if seam.gradient is not None]
        with self.put_off.collecting() as self.later["attention"]:
            differentiate(*there, self.dispatched, self.past)
