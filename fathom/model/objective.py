"""What training minimises (report eqs 17-25): next-token loss, MTP losses, sequence-wise balance.

A row of T + 1 tokens is T inputs and T targets. Depth k of MTP has targets for T - k positions, and
its sum is divided by T all the same (eq 24). No logits exist whole: head and cross-entropy are one
chunked rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fathom.errors import FathomError
from fathom.kernels import IGNORE, linear_cross_entropy
from fathom.model.context import RouterRecord, number_documents
from fathom.model.router import sequence_balance_loss, update_bias_of
from fathom.model.transformer import Transformer, Trunk


@dataclass
class Losses:
    """Scalars, all differentiable.

    main: mean next-token cross-entropy. mtp: mean over depths of eq 24 (zero without MTP modules).
    balance: eq 17 with its alpha, summed over MoE blocks.
    total = main + mtp_weight * mtp + balance (eq 25).
    """

    main: Tensor
    mtp: Tensor
    balance: Tensor
    total: Tensor
    mtp_by_depth: tuple[Tensor, ...]
    expert_load: Tensor

    def detached(self) -> Losses:
        """The same numbers without the graph behind them."""
        return Losses(
            self.main.detach(),
            self.mtp.detach(),
            self.balance.detach(),
            self.total.detach(),
            tuple(depth.detach() for depth in self.mtp_by_depth),
            self.expert_load,
        )


def losses(
    model: Transformer,
    tokens: Tensor,
    document_ids: Tensor | None = None,
    *,
    mtp_weight: float = 0.3,
    balance_alpha: float = 1e-4,
) -> Losses:
    """Losses of int64 tokens [B, T + 1].

    With `document_ids` [B, T + 1] attention stays inside documents and no target lies in another
    one. A weight of zero leaves the MTP modules or the balance loss out of the computation.
    """
    rows = Rows.of(tokens, document_ids)
    keep_scores = balance_alpha > 0
    trunk = model.trunk(
        rows.inputs, document_ids=rows.ids, mtp=mtp_weight > 0, keep_scores=keep_scores
    )
    return losses_of(model, trunk, rows, mtp_weight=mtp_weight, balance_alpha=balance_alpha)


@dataclass(frozen=True)
class Rows:
    """Rows of T + 1 tokens as inputs and targets."""

    tokens: Tensor
    """int64 [B, T + 1]."""
    document_ids: Tensor | None
    """[B, T + 1], numbered within the row."""
    targets: Tensor
    """The next token of each input [B, T], `IGNORE` where it lies in another document."""

    @classmethod
    def of(cls, tokens: Tensor, document_ids: Tensor | None) -> Rows:
        """Raises `FathomError` for tokens that hold no input and target."""
        if tokens.dim() != 2 or tokens.shape[1] < 2:
            raise FathomError(
                f"tokens of shape {tuple(tokens.shape)} hold no input and target; give [B, T + 1], T >= 1"
            )
        targets = tokens[:, 1:]
        if document_ids is not None:
            document_ids = number_documents(document_ids.to(tokens.device), tokens)
            targets = targets.masked_fill(document_ids[:, 1:] != document_ids[:, :-1], IGNORE)
        return cls(tokens, document_ids, targets)

    @property
    def inputs(self) -> Tensor:
        """[B, T]."""
        return self.tokens[:, :-1]

    @property
    def ids(self) -> Tensor | None:
        """Document ids of the inputs."""
        return None if self.document_ids is None else self.document_ids[:, :-1]

    def further_targets(self, depth: int) -> Tensor:
        """Token i + depth + 1 for i = 1 .. T - depth, ignored when it is in another document."""
        targets = self.tokens[:, depth + 1 :]
        if self.document_ids is None:
            return targets
        here = self.document_ids[:, : targets.shape[1]]
        return targets.masked_fill(self.document_ids[:, depth + 1 :] != here, IGNORE)


def losses_of(
    model: Transformer, trunk: Trunk, rows: Rows, *, mtp_weight: float, balance_alpha: float
) -> Losses:
    """`losses` of a pass that was made."""
    counted = (rows.targets != IGNORE).sum().clamp_min(1)
    main = _cross_entropy(model, trunk.hidden, rows.targets) / counted
    by_depth = tuple(
        _cross_entropy(model, hidden, rows.further_targets(depth)) / counted
        for depth, hidden in enumerate(trunk.mtp_hidden, start=1)
    )
    depths = max(model.config.num_nextn_predict_layers, 1)
    mtp = torch.stack(by_depth).sum() / depths if by_depth else main.new_zeros(())
    balance = balance_loss(model, trunk.routers, balance_alpha)
    total = main + mtp_weight * mtp + balance
    load = model.stack_loads(trunk.routers)
    return Losses(main, mtp, balance, total, by_depth, load)


def _cross_entropy(model: Transformer, hidden_BTD: Tensor, targets_BT: Tensor) -> Tensor:
    head = model.lm_head
    return linear_cross_entropy(
        hidden_BTD.flatten(0, 1), head.weight, targets_BT.flatten(), head.compute_dtype
    )


def balance_loss(model: Transformer, routers: Sequence[RouterRecord], alpha: float) -> Tensor:
    """Eq 17 of the routers' affinities as far as they were kept, summed; a float32 scalar."""
    top_k = model.config.num_experts_per_tok
    parts = [
        sequence_balance_loss(record.scores_BTE, top_k, alpha)
        for record in routers
        if record.scores_BTE is not None and alpha > 0
    ]
    if not parts:
        return torch.zeros((), device=next(model.parameters()).device)
    return torch.stack(parts).sum()


def update_bias(model: Transformer, gamma: float) -> None:
    """Auxiliary-loss-free balancing, once after each optimiser step (report §2.1.2).

    Every router's bias (MTP's too) moves by gamma up where an expert got less than the mean of the
    tokens counted since the last call, down where it got more. Counting happens in training mode,
    over all micro-batches of the step.
    """
    for router in model.routers():
        update_bias_of(router, gamma)
