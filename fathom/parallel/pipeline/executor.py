"""One rank's list of a pipeline schedule, run as it stands (report §3.2.1).

    F   the stage's forward pass; its output goes to the next stage
    B   backward through it; the gradient of its input goes to the stage before
    I   the same, but the products put the gradients of their weights off (`fathom.kernels.put_off`)
    W   what I put off

A stage's graph begins at a leaf, the activation that came, and ends at its output, the losses and the
balance loss of its own routers; the gradient that comes from the next stage enters at the output. Each stage
holds the tokens of all micro-batches, so only hidden states and their gradients travel, and everybody knows
their shape.

Where a schedule overlaps a forward with a backward (`Pair`), the two run interleaved if the plan has an order for it
and experts are spread over ranks (`fathom.parallel.pipeline.overlapped`). Otherwise the forward runs first and then the
backward: without all-to-alls there is nothing to hide, and interleaving would only lengthen the bubble, since an
interleaved pair cannot begin before both of its inputs are there.

torch's own runtime (`torch.distributed.pipelining`) was not taken: it finds shapes by running stages on
memory without values, which counts for the routers; splits a backward by walking the graph twice; and knows nothing of
two copies. What is left to write is this page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from fathom.errors import ParallelError
from fathom.kernels.put_off import PutOff, Task, run_tasks
from fathom.model import Losses, Transformer
from fathom.model.layers import Linear
from fathom.model.moe import Experts
from fathom.model.objective import Rows
from fathom.parallel.mesh import Group
from fathom.parallel.pipeline.lanes import Lane, network_stream
from fathom.parallel.pipeline.mail import Mail
from fathom.parallel.pipeline.overlapped import Chunk, interleave, sends_to_experts
from fathom.parallel.pipeline.plan import Plan
from fathom.parallel.pipeline.stages import Passed, Stage, Weights, Whole, keep_stages, load_rows
from fathom.parallel.schedules import (
    Action,
    Pair,
    Receive,
    Schedule,
    Send,
    Step,
    Transfer,
    program,
    singles,
)
from fathom.parallel.schedules.overlap import Order
from fathom.parallel.schedules.transfers import Item

Program = tuple[Item, ...]


@dataclass(frozen=True)
class MicroBatch:
    """Some rows of the batch, and what share of it they are, by targets and by sequences."""

    tokens: Tensor
    """int64 [B, T + 1]."""
    document_ids: Tensor | None
    targets: float
    sequences: float


@dataclass
class _Held:
    """What a rank keeps of one micro-batch in one part between its actions."""

    run: Whole | Chunk | None = None
    tasks: list[Task] = field(default_factory=list)


class Pipeline:
    """One rank of a pipeline, with the stages it holds."""

    def __init__(self, model: Transformer, plan: Plan, group: Group) -> None:
        """`model` a whole one, of which only this rank's stages stay; its products learn to put gradients off.

        `group`: the pipeline's ranks.
        """
        if group.size != plan.ranks:
            raise ParallelError(
                f"the plan is for {plan.ranks} ranks, the pipeline has {group.size}; make it for as many"
            )
        self.plan, self.group = plan, group
        parts, last = plan.placement[group.place], plan.stages - 1
        self.model = keep_stages(model, {part.stage for part in parts}, plan.layers)
        self.stages = {
            part: Stage(model, plan.layers[part.stage], part.stage == last) for part in parts
        }
        self.put_off = PutOff()
        for module in model.modules():
            if isinstance(module, Linear | Experts):
                module.matmul = _Putting(module.matmul, self.put_off)
        self._programs: dict[int, tuple[Schedule, Program]] = {}
        self.bytes_sent = 0
        """Between ranks, in all steps."""

    @cached_property
    def network(self) -> torch.cuda.Stream | None:
        """The stream that all-to-alls get, where there are any."""
        return network_stream(next(self.model.parameters()).device)

    def run(self, microbatches: Sequence[MicroBatch], weights: Weights) -> Losses:
        """Gradients of the batch's mean loss, added to this rank's parameters; what this rank saw of the losses.

        The losses of all ranks of the pipeline add up to the batch's; so do the loads, [M, E] over all MoE blocks.
        Raises `ScheduleError` where the schedule does not work with so many micro-batches.
        """
        schedule, program = self._program(len(microbatches))
        found = _Running(self, schedule, microbatches, weights).run(program)
        embedding = self.model.model.embed_tokens
        if isinstance(embedding, nn.Embedding) and embedding.weight.grad is None:
            # A copy for MTP in a step without it: the copy of the first stage has one.
            embedding.weight.grad = torch.zeros_like(embedding.weight)
        return found

    def _program(self, microbatches: int) -> tuple[Schedule, Program]:
        if microbatches not in self._programs:
            made = self.plan.schedule(microbatches)
            self._programs[microbatches] = made, program(made)[self.group.place]
        return self._programs[microbatches]


class _Putting:
    """A product's rule that may put its weight's gradient off."""

    def __init__(self, rule: object, put_off: PutOff) -> None:
        self.rule, self.put_off = rule, put_off

    def __call__(self, *arguments: object) -> Tensor:
        return self.rule(*arguments, put_off=self.put_off)  # type: ignore[operator]


class _Running:
    """One step of a pipeline."""

    def __init__(
        self,
        pipeline: Pipeline,
        schedule: Schedule,
        microbatches: Sequence[MicroBatch],
        weights: Weights,
    ) -> None:
        self.pipeline, self.schedule, self.weights = pipeline, schedule, weights
        parameter = next(pipeline.model.parameters())
        self.device = parameter.device
        self.dtype = pipeline.model.compute_dtype or parameter.dtype
        self.mail = Mail(pipeline.group, self.device, self.dtype)
        self.microbatches = microbatches
        self.rows = [Rows.of(m.tokens.to(self.device), m.document_ids) for m in microbatches]
        self.order = pipeline.plan.order if sends_to_experts(pipeline.model) else None
        self.held: dict[tuple[int, int, int], _Held] = {}
        self.load_rows = {part: self._rows_of(stage) for part, stage in pipeline.stages.items()}
        self.total = self._nothing()

    def run(self, program: Program) -> Losses:
        for item in program:
            if isinstance(item, Receive):
                rows = self.rows[item.transfer.microbatch].inputs
                self.mail.receive(
                    item.transfer, (*rows.shape, self.pipeline.model.config.hidden_size)
                )
            elif isinstance(item, Send):
                self.mail.send(item.transfer, self.mail.take(item.transfer))
            else:
                self._step(item)
        self.mail.finish()
        self.pipeline.bytes_sent += self.mail.bytes_sent
        total = self.total
        total.total = total.main + self.weights.mtp * total.mtp + total.balance
        return total

    def _step(self, step: Step) -> None:
        if isinstance(step, Pair) and self.order is not None:
            self._interleaved(step, self.order)
            return
        for action in singles(step):
            match action.kind:
                case "F":
                    self._forward(action)
                case "B":
                    self._backward(action, None)
                case "I":
                    self._backward(action, self._held(action).tasks)
                case "W":
                    run_tasks(self._held(action).tasks)

    def _held(self, action: Action) -> _Held:
        return self.held.setdefault((action.stage, action.copy, action.microbatch), _Held())

    def _forward(self, action: Action) -> None:
        run = self._begin(action)
        self._forward_done(action, run.forward(self._take(self.schedule.receives(action))))

    def _begin(self, action: Action) -> Whole | Chunk:
        """Something that runs the action's micro-batch through its stage."""
        pipeline, rows = self.pipeline, self.rows[action.microbatch]
        stage, held = pipeline.stages[action.part], self._held(action)
        if self.order is None:
            held.run = Whole(stage, rows, self.weights, pipeline.put_off)
        else:
            lane = Lane(pipeline.network)
            held.run = Chunk(stage, rows, self.weights, pipeline.put_off, lane, self.order)
        return held.run

    def _forward_done(self, action: Action, passed: Passed) -> None:
        if passed.output is not None:
            self._give(self.schedule.sends(action), passed.output.detach())
        self._count(action, passed)

    def _backward(self, action: Action, later: list[Task] | None) -> None:
        run, part = self._end(action), self.microbatches[action.microbatch]
        gradient = self._take(self.schedule.receives(action))
        gradient = run.backward(gradient, part.targets, part.sequences, later)
        self._give(self.schedule.sends(action), gradient)

    def _end(self, action: Action) -> Whole | Chunk:
        held = self._held(action)
        run, held.run = held.run, None
        assert run is not None
        return run

    def _interleaved(self, pair: Pair, order: Order) -> None:
        forward, backward = self._begin(pair.forward), self._end(pair.backward)
        assert isinstance(forward, Chunk) and isinstance(backward, Chunk)
        part = self.microbatches[pair.backward.microbatch]
        state = self._take(self.schedule.receives(pair.forward))
        gradient = self._take(self.schedule.receives(pair.backward))
        forward.enter(state)
        backward.enter_backward(gradient, part.targets, part.sequences)
        interleave(order, forward, backward)
        self._forward_done(pair.forward, forward.leave())
        self._give(self.schedule.sends(pair.backward), backward.leave_backward())

    def _take(self, transfer: Transfer | None) -> Tensor | None:
        return None if transfer is None else self.mail.take(transfer)

    def _give(self, transfer: Transfer | None, tensor: Tensor | None) -> None:
        if transfer is not None:
            assert tensor is not None
            self.mail.hand_over(transfer, tensor)

    # --- what was seen -----------------------------------------------------------------------------

    def _nothing(self) -> Losses:
        config = self.pipeline.model.config
        longest = max(rows.inputs.shape[1] for rows in self.rows)
        depths = min(config.num_nextn_predict_layers, longest - 1) if self.weights.mtp > 0 else 0
        zero = torch.zeros((), dtype=torch.float64, device=self.device)
        every = range(config.num_hidden_layers + depths)
        blocks = sum(map(config.is_moe_layer, every))
        load = torch.zeros(blocks, config.n_routed_experts, dtype=torch.int64, device=self.device)
        return Losses(zero, zero, zero, zero, (zero,) * depths, load)

    def _count(self, action: Action, passed: Passed) -> None:
        part, total = self.microbatches[action.microbatch], self.total
        total.balance = total.balance + passed.balance.detach().double() * part.sequences
        if passed.losses is not None:
            found = passed.losses.detached()
            total.main = total.main + found.main.double() * part.targets
            total.mtp = total.mtp + found.mtp.double() * part.targets
            pairs = zip(total.mtp_by_depth, found.mtp_by_depth, strict=True)
            total.mtp_by_depth = tuple(a + b.double() * part.targets for a, b in pairs)
        rows = self.load_rows[action.part][: len(passed.load)]
        total.expert_load.index_add_(0, rows, passed.load)

    def _rows_of(self, stage: Stage) -> Tensor:
        """Of `expert_load`, those that a stage's MoE blocks fill; MTP's last, where it has any.

        On the device, once for a step: with a list as the index, a GPU would be waited for after every forward pass.
        """
        config = self.pipeline.model.config
        rows, depth = load_rows(config), config.num_nextn_predict_layers
        further = range(config.num_hidden_layers, config.num_hidden_layers + depth)
        layers = [*stage.layers, *(further if stage.last else ())]
        filled = [rows[layer] for layer in layers if layer in rows]
        return torch.tensor(filled, dtype=torch.int64, device=self.device)
