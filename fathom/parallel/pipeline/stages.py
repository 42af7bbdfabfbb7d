"""Cutting a model into stages.

Stage 0 begins with the embedding, the last one ends with norm, head and MTP modules. What a rank holds
stays one `Transformer` with the released names; the layers of other ranks are `Absent` in it. So optimiser,
average, router biases and checkpoints work on it as on a whole one, and two stages of one rank
share what both use: where first and last stage are on one rank (V placements, DualPipe), MTP has
the embedding and the head of the main model physically (report §3.2.3). Otherwise the last rank holds a copy of the
embedding for MTP, and gradients of the copies are added.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor, nn

from fathom.errors import ParallelError
from fathom.kernels.put_off import PutOff, Task
from fathom.model import ModelConfig, Transformer
from fathom.model.context import Context, build_context
from fathom.model.objective import Losses, Rows, balance_loss, losses_of
from fathom.model.transformer import Trunk


class Absent(nn.Module):
    """A part of the model that another rank holds."""

    def forward(self, *_: object) -> NoReturn:
        raise ParallelError(
            "this part of the model is on another rank; run it through its Pipeline, or put the model "
            "together first"
        )


def share_layers(
    config: ModelConfig, stages: int, counts: Sequence[int] | None = None
) -> tuple[range, ...]:
    """The layers of each stage, by `counts` or as evenly as possible.

    What cannot be shared evenly goes to the middle first: the ends have embedding, head and MTP besides.
    Raises `ParallelError` where a stage would be empty or `counts` do not fit.
    """
    layers = config.num_hidden_layers
    if counts is None:
        if stages > layers:
            raise ParallelError(
                f"{stages} stages are too many for {layers} layers, each needs one; use fewer stages (in a V there "
                f"are two to a rank)"
            )
        least, more = divmod(layers, stages)
        first = (stages - more) // 2
        counts = [least + (first <= stage < first + more) for stage in range(stages)]
    if len(counts) != stages or sum(counts) != layers or min(counts) < 1:
        raise ParallelError(
            f"parallel.layers = {list(counts)} must be {stages} numbers, each at least 1, that make "
            f"{layers} layers together; it has {len(counts)} that make {sum(counts)}"
        )
    ends = [sum(counts[: stage + 1]) for stage in range(stages)]
    return tuple(range(end - count, end) for end, count in zip(ends, counts, strict=True))


def keep_stages(
    model: Transformer, stages: Collection[int], layers: Sequence[range]
) -> Transformer:
    """Remove from a whole model, in place, what does not belong to some stages."""
    held = {layer for stage in stages for layer in layers[stage]}
    first, last = 0 in stages, len(layers) - 1 in stages
    inner, config = model.model, model.config
    for layer in set(range(config.num_hidden_layers)) - held:
        inner.layers[layer] = Absent()
    if not (first or (last and embeds_again(config))):
        inner.embed_tokens = Absent()  # type: ignore[assignment]
    if not last:
        inner.norm = Absent()  # type: ignore[assignment]
        inner.mtp = nn.ModuleList(Absent() for _ in inner.mtp)
        model.lm_head = Absent()  # type: ignore[assignment]
    return model


def embeds_again(config: ModelConfig) -> bool:
    """Whether the last stage needs the embedding too: MTP reads it, a tied head is it."""
    return config.num_nextn_predict_layers > 0 or config.tie_word_embeddings


def load_rows(config: ModelConfig) -> dict[int, int]:
    """Which row of `expert_load` each MoE layer fills: main layers first, then MTP's."""
    layers = range(config.num_hidden_layers + config.num_nextn_predict_layers)
    return {layer: row for row, layer in enumerate(filter(config.is_moe_layer, layers))}


@dataclass(frozen=True)
class Weights:
    """What the losses of a step are multiplied with."""

    mtp: float
    balance_alpha: float


@dataclass
class Passed:
    """A forward pass of one stage: its output [B, T, D], or the losses where it is the last; and its routers'."""

    output: Tensor | None
    losses: Losses | None
    balance: Tensor
    """Balance loss of this stage's routers."""
    load: Tensor
    """int64 [M, E] of this stage's MoE blocks."""

    def backward(
        self, gradient: Tensor | None, mtp: float, targets: float, sequences: float
    ) -> None:
        """Differentiate a micro-batch that is such a share of the batch's targets and sequences.

        `gradient` is that of the output, which is left out where it has no graph.
        """
        roots, gradients = [], []
        if self.losses is not None:
            predicted = self.losses.main + mtp * self.losses.mtp
            roots.append(predicted * targets + self.balance * sequences)
            gradients.append(torch.ones_like(roots[-1]))
        elif self.output is not None and self.output.requires_grad:
            assert gradient is not None
            roots.append(self.output)
            gradients.append(gradient)
        if self.losses is None and self.balance.requires_grad:
            roots.append(self.balance)
            gradients.append(torch.full_like(self.balance, sequences))
        if roots:
            torch.autograd.backward(roots, gradients)


@dataclass(frozen=True)
class Stage:
    """One stage of a model that is there at least as far."""

    model: Transformer
    layers: range
    last: bool

    def context(self, rows: Rows, keep_scores: bool) -> Context:
        """Positions and visibility of a micro-batch; every stage has its tokens and makes its own."""
        model = self.model
        return build_context(
            model.config, model.rotary, rows.inputs, None, None, rows.ids, None, keep_scores
        )

    def through(self, x_BTD: Tensor | None, rows: Rows, context: Context) -> Tensor:
        """From the output of the stage before ([B, T, D]; None for the first) to that of its own last layer."""
        state = self.begin(x_BTD, rows)
        for layer in self.layers:
            state = self.model.model.layers[layer](state, context)
        return state

    def finish(self, state_BTD: Tensor, rows: Rows, context: Context, mtp: bool) -> Trunk:
        """What comes behind the last layer, in the last stage."""
        model = self.model
        embedded = model.embed(rows.inputs) if mtp and len(model.model.mtp) > 0 else None
        return model.finish(state_BTD, embedded, context)

    def forward(self, x_BTD: Tensor | None, rows: Rows, weights: Weights) -> Passed:
        """From the output of the stage before ([B, T, D]; None for the first) to the next one's input or the losses."""
        context = self.context(rows, weights.balance_alpha > 0)
        return self.end(self.through(x_BTD, rows, context), rows, context, weights)

    def begin(self, x_BTD: Tensor | None, rows: Rows) -> Tensor:
        """What the first layer reads [B, T, D]."""
        return self.model.embed(rows.inputs) if x_BTD is None else x_BTD

    def end(self, state: Tensor, rows: Rows, context: Context, weights: Weights) -> Passed:
        """What comes of the last layer's output [B, T, D]."""
        model = self.model
        if not self.last:
            balance = balance_loss(model, context.routers, weights.balance_alpha)
            return Passed(state, None, balance, model.stack_loads(context.routers))
        trunk = self.finish(state, rows, context, weights.mtp > 0)
        found = losses_of(
            model, trunk, rows, mtp_weight=weights.mtp, balance_alpha=weights.balance_alpha
        )
        return Passed(None, found, found.balance, found.expert_load)


class Whole:
    """A micro-batch in a stage as one graph: forward once, then backward once."""

    def __init__(self, stage: Stage, rows: Rows, weights: Weights, put_off: PutOff) -> None:
        self.stage, self.rows, self.weights, self.put_off = stage, rows, weights, put_off
        self.leaf: Tensor | None = None
        self.passed: Passed | None = None

    def forward(self, x_BTD: Tensor | None) -> Passed:
        """Of the output of the stage before."""
        self.leaf = None if x_BTD is None else x_BTD.detach().requires_grad_()
        self.passed = self.stage.forward(self.leaf, self.rows, self.weights)
        return self.passed

    def backward(
        self, gradient: Tensor | None, targets: float, sequences: float, later: list[Task] | None
    ) -> Tensor | None:
        """The gradient of the stage's input, of that of its output; those of weights go to `later` where there is one.

        `targets` and `sequences`: what share of the batch the micro-batch is.
        """
        assert self.passed is not None
        with nullcontext() if later is None else self.put_off.collecting() as tasks:
            self.passed.backward(gradient, self.weights.mtp, targets, sequences)
        if later is not None:
            later.extend(tasks or [])
        self.passed, leaf, self.leaf = None, self.leaf, None
        return None if leaf is None else leaf.grad
