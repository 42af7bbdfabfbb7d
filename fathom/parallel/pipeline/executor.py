"""One rank's list of a pipeline schedule, run as it stands (report §3.2.1).

    F   the stage's forward pass; its output goes to the next stage
    B   backward through it; the gradient of its input goes to the stage before
    I   the same, but the products put the gradients of their weights off (`fathom.kernels.put_off`)
    W   what I put off

A stage's graph begins at a leaf, the activation that came, and ends at its output, the losses and the
balance loss of its own routers; the gradient that comes from the next stage enters at the output. Each stage
holds the tokens of all micro-batches, so only hidden states and their gradients travel, and everybody knows
their shape.

Where a schedule overlaps a forward with a backward (`Pair`), the two run one after the other here.

torch's own runtime (`torch.distributed.pipelining`) was not taken: it finds shapes by running stages on
memory without values, which counts for the routers; splits a backward by walking the graph twice; and knows nothing of
two copies. What is left to write is this page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fathom.errors import ParallelError
from fathom.kernels.put_off import PutOff, Task, run_tasks
from fathom.model import Losses, Transformer
from fathom.model.layers import Linear
from fathom.model.moe import Experts
from fathom.model.objective import Rows
from fathom.parallel.mesh import Group
from fathom.parallel.pipeline.mail import Mail
from fathom.parallel.pipeline.plan import Plan
from fathom.parallel.pipeline.stages import Passed, Stage, Weights, keep_stages, load_rows
from fathom.parallel.schedules import (
    Action,
    Receive,
    Schedule,
    Send,
    Step,
    program,
    singles,
)

Program = tuple[Step | Send | Receive, ...]


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

    passed: Passed | None = None
    leaf: Tensor | None = None
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
        self.held: dict[tuple[int, int, int], _Held] = {}
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
        return self.total

    def _step(self, step: Step) -> None:
        for action in singles(step):
            held = self.held.setdefault((action.stage, action.copy, action.microbatch), _Held())
            match action.kind:
                case "F":
                    self._forward(action, held)
                case "B":
                    self._backward(action, held)
                case "I":
                    with self.pipeline.put_off.collecting() as held.tasks:
                        self._backward(action, held)
                case "W":
                    run_tasks(held.tasks)

    def _forward(self, action: Action, held: _Held) -> None:
        source, target = self.schedule.receives(action), self.schedule.sends(action)
        if source is not None:
            held.leaf = self.mail.take(source).detach().requires_grad_()
        stage = self.pipeline.stages[action.part]
        held.passed = stage.forward(held.leaf, self.rows[action.microbatch], self.weights)
        if target is not None:
            assert held.passed.output is not None
            self.mail.hand_over(target, held.passed.output.detach())
        self._count(action, held.passed)

    def _backward(self, action: Action, held: _Held) -> None:
        source, target = self.schedule.receives(action), self.schedule.sends(action)
        passed, part = held.passed, self.microbatches[action.microbatch]
        assert passed is not None
        roots, gradients = [], []
        if passed.losses is not None:
            predicted = passed.losses.main + self.weights.mtp * passed.losses.mtp
            roots.append(predicted * part.targets + passed.balance * part.sequences)
            gradients.append(torch.ones_like(roots[-1]))
        else:
            assert source is not None and passed.output is not None
            roots.append(passed.output)
            gradients.append(self.mail.take(source))
            if passed.balance.requires_grad:
                roots.append(passed.balance)
                gradients.append(torch.full_like(passed.balance, part.sequences))
        torch.autograd.backward(roots, gradients)
        if target is not None:
            assert held.leaf is not None and held.leaf.grad is not None
            self.mail.hand_over(target, held.leaf.grad)
        held.passed = held.leaf = None

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
        total.total = total.main + self.weights.mtp * total.mtp + total.balance
        total.expert_load[self._rows_of(action)[: len(passed.load)]] += passed.load

    def _rows_of(self, action: Action) -> list[int]:
        """Of `expert_load`, those that the stage's MoE blocks fill; MTP's last, where it has any."""
        stage, config = self.pipeline.stages[action.part], self.pipeline.model.config
        rows, depth = load_rows(config), config.num_nextn_predict_layers
        further = range(config.num_hidden_layers, config.num_hidden_layers + depth)
        layers = [*stage.layers, *(further if stage.last else ())]
        return [rows[layer] for layer in layers if layer in rows]
