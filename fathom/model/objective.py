"""What training minimises (report eqs 17-25): next-token loss, MTP losses, sequence-wise balance.

A row of T + 1 tokens is T inputs and T targets. Depth k of MTP has targets for T - k positions, and
its sum is divided by T all the same (eq 24). No logits exist whole: head and cross-entropy are one
chunked rule.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fathom.errors import FathomError
from fathom.kernels import IGNORE, linear_cross_entropy
from fathom.model.context import number_documents
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
    if tokens.dim() != 2 or tokens.shape[1] < 2:
        raise FathomError(
            f"tokens of shape {tuple(tokens.shape)} hold no input and target; give [B, T + 1], T >= 1"
        )
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    if document_ids is not None:
        document_ids = number_documents(document_ids, tokens)
    ids = None if document_ids is None else document_ids[:, :-1]
    trunk = model.trunk(inputs, document_ids=ids, mtp=mtp_weight > 0, keep_scores=balance_alpha > 0)
    if document_ids is not None:
        targets = targets.masked_fill(document_ids[:, 1:] != document_ids[:, :-1], IGNORE)
    counted = (targets != IGNORE).sum().clamp_min(1)
    main = _cross_entropy(model, trunk.hidden, targets) / counted
    by_depth = tuple(
        _cross_entropy(model, hidden, _further_targets(tokens, document_ids, depth)) / counted
        for depth, hidden in enumerate(trunk.mtp_hidden, start=1)
    )
    zero = main.new_zeros(())
    depths = max(model.config.num_nextn_predict_layers, 1)
    mtp = torch.stack(by_depth).sum() / depths if by_depth else zero
    balance = _balance(model, trunk, balance_alpha) if balance_alpha > 0 else zero
    total = main + mtp_weight * mtp + balance
    load = model.stack_loads(trunk.routers)
    return Losses(main, mtp, balance, total, by_depth, load)


def _cross_entropy(model: Transformer, hidden_BTD: Tensor, targets_BT: Tensor) -> Tensor:
    head = model.lm_head
    return linear_cross_entropy(
        hidden_BTD.flatten(0, 1), head.weight, targets_BT.flatten(), head.compute_dtype
    )


def _further_targets(tokens: Tensor, document_ids: Tensor | None, depth: int) -> Tensor:
    """Token i + depth + 1 for i = 1 .. T - depth, ignored when it is in another document."""
    targets = tokens[:, depth + 1 :]
    if document_ids is None:
        return targets
    here = document_ids[:, : targets.shape[1]]
    return targets.masked_fill(document_ids[:, depth + 1 :] != here, IGNORE)


def _balance(model: Transformer, trunk: Trunk, alpha: float) -> Tensor:
    top_k = model.config.num_experts_per_tok
    parts = [
        sequence_balance_loss(record.scores_BTE, top_k, alpha)
        for record in trunk.routers
        if record.scores_BTE is not None
    ]
    return torch.stack(parts).sum() if parts else trunk.hidden.new_zeros(())


def update_bias(model: Transformer, gamma: float) -> None:
    """Auxiliary-loss-free balancing, once after each optimiser step (report §2.1.2).

    Every router's bias (MTP's too) moves by gamma up where an expert got less than the mean of the
    tokens counted since the last call, down where it got more. Counting happens in training mode,
    over all micro-batches of the step.
    """
    for router in model.routers():
        update_bias_of(router, gamma)
