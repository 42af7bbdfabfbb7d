"""Routing and its balance (report §2.1.2, eqs 13-20).

The router gives each token an affinity s to every expert (eq 15). The K best by s + b are chosen
(eq 16), where b is a bias per expert that only ever takes part in the choice; the weights are the
unbiased affinities, normalised (eq 13). Choice is limited to the best groups, a group's score being
the sum of its two best s + b. Groups not kept are set to -inf and not to 0: biased scores can be
negative.

Two mechanisms keep the load even. After each optimiser step b moves by gamma towards experts that
got less than the mean of the whole batch (auxiliary-loss-free). A very small loss per sequence (eqs
17-20) guards against extremes inside one sequence. It counts the plain top-K of s, neither biased
nor limited to groups (eq 18).

Shapes: N tokens, E experts, K choices, B sequences, T positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fathom import kernels
from fathom.model.config import ModelConfig


def affinities(logits_NE: Tensor, config: ModelConfig) -> Tensor:
    """s of eq 15 in at least float32: sigmoid (V3) or softmax (V2) of the router's logits [..., E]."""
    logits = kernels.at_least_float32(logits_NE)
    return logits.sigmoid() if config.scoring_func == "sigmoid" else logits.softmax(-1)


def _limit_to_groups(choice_NE: Tensor, config: ModelConfig) -> Tensor:
    """Scores with every group but the best `topk_group` at -inf."""
    if config.topk_method == "greedy" or config.topk_group == config.n_group:
        return choice_NE
    grouped = choice_NE.unflatten(-1, (config.n_group, -1))
    if config.topk_method == "noaux_tc":
        group_score = grouped.topk(2, dim=-1).values.sum(-1)
    else:
        group_score = grouped.amax(-1)
    best = group_score.topk(config.topk_group, dim=-1).indices
    dropped = torch.ones_like(group_score, dtype=torch.bool).scatter_(-1, best, False)
    return grouped.masked_fill(dropped[..., None], float("-inf")).flatten(-2)


def choose(scores_NE: Tensor, bias_E: Tensor | None, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Chosen experts [N, K] and their weights [N, K] from affinities (eqs 13, 14, 16)."""
    with torch.no_grad():
        choice = scores_NE if bias_E is None else scores_NE + bias_E
        choice = _limit_to_groups(choice, config)
        indices = choice.topk(config.num_experts_per_tok, dim=-1).indices
    weights = scores_NE.gather(-1, indices)
    if config.norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return indices, weights * config.routed_scaling_factor


def route(logits_NE: Tensor, bias_E: Tensor | None, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Experts and weights of each token: int64 indices [N, K], float32 weights [N, K] (eqs 13-16).

    `logits_NE` are the router's products, `bias_E` the balancing bias (None for V2's routers).
    """
    return choose(affinities(logits_NE, config), bias_E, config)


def sequence_balance_loss(scores_BTE: Tensor, top_k: int, alpha: float) -> Tensor:
    """Eqs 17-20 for each sequence, averaged over sequences: alpha * sum_i f_i P_i.

    f_i = E/(K T) * how many tokens have i among their plain top-K;
    P_i = mean over tokens of s_i / sum_j s_j. Exactly alpha when the load is even.
    """
    B, T, E = scores_BTE.shape
    chosen = scores_BTE.detach().topk(top_k, dim=-1).indices.flatten(1)
    counts_BE = torch.zeros(B, E, dtype=scores_BTE.dtype, device=scores_BTE.device)
    counts_BE.scatter_add_(1, chosen, torch.ones_like(chosen, dtype=scores_BTE.dtype))
    f_BE = counts_BE * (E / (top_k * T))
    P_BE = (scores_BTE / scores_BTE.sum(-1, keepdim=True)).mean(1)
    return alpha * (f_BE * P_BE).sum(-1).mean()


class Router(nn.Module):
    """`mlp.gate`: expert centroids, balancing bias, and the load since the last bias update."""

    e_score_correction_bias: Tensor | None
    expert_load: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        E = config.n_routed_experts
        self.weight = nn.Parameter(torch.empty(E, config.hidden_size))
        bias = torch.zeros(E, dtype=torch.float32) if config.has_router_bias else None
        self.register_buffer("e_score_correction_bias", bias)
        load = torch.zeros(E, dtype=torch.int64)
        self.register_buffer("expert_load", load, persistent=False)

    def forward(self, x_ND: Tensor) -> Tensor:
        """Logits [..., E] of [..., D], in at least float32: near-ties decide where tokens go."""
        return kernels.linear(x_ND, self.weight, kernels.wide_dtype(x_ND.dtype))

    def _apply(self, fn: Any, recurse: bool = True) -> Router:
        """Moves and casts as usual, but the bias never leaves float32."""
        before = self.e_score_correction_bias
        super()._apply(fn, recurse)
        after = self.e_score_correction_bias
        if before is not None and after is not None and after.dtype != before.dtype:
            self.e_score_correction_bias = before.to(after.device)
        return self


@torch.no_grad()
def update_bias_of(router: Router, gamma: float) -> None:
    """b_i += gamma * sign(mean load - load_i) over the load counted so far; then count anew."""
    load = router.expert_load.float()
    if router.e_score_correction_bias is not None and gamma:
        router.e_score_correction_bias += gamma * torch.sign(load.mean() - load)
    router.expert_load.zero_()
