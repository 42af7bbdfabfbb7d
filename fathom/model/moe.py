"""DeepSeekMoE (report §2.1.2, eq 12): shared experts for every token, K routed experts for each.

A block is four calls, so that two micro-batches can be interleaved from outside: attention,
`dispatch` (rows to their experts), `experts` (grouped products), `combine` (weighted sums back).
The dispatcher is the second seam of the model: locally a stable sort by expert; expert
parallelism puts an all-to-all in its place. No token is dropped and none is padded to a capacity.

A dispatch may still be under way when it returns. The shared experts are computed before its rows
are waited for, so that they hide it (report §3.2.2).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fathom import kernels
from fathom.kernels import few_rows
from fathom.model.config import ModelConfig
from fathom.model.context import Context, RouterRecord
from fathom.model.layers import MLP
from fathom.model.router import Router, affinities, choose


class Sent(Protocol):
    """Rows that are on their way to their experts."""

    def wait(self) -> tuple[Tensor, Tensor]:
        """Rows sorted by expert [R, D] and rows of each expert that is here, int64."""
        ...


class Dispatcher(Protocol):
    """Brings rows to their experts and their results back."""

    def dispatch(
        self, x_ND: Tensor, indices_NK: Tensor, weights_NK: Tensor, counts_E: Tensor
    ) -> Sent:
        """Begin to bring each token's row to its experts."""
        ...

    def combine(self, rows_RD: Tensor, sent: Any) -> Tensor:
        """Weighted sum [N, D] of what the experts made of each token's row."""
        ...


@dataclass
class Dispatched:
    """Rows in expert order [R, D], rows per expert [E], and what `combine` needs to undo it."""

    rows_RD: Tensor
    counts_E: Tensor
    weights_NK: Tensor
    token_R: Tensor
    place_NK: Tensor

    def wait(self) -> tuple[Tensor, Tensor]:
        """Rows and counts, which are there at once."""
        return self.rows_RD, self.counts_E


class LocalDispatcher:
    """All experts on this device: rows sorted stably by expert, summed back in choice order."""

    def dispatch(
        self, x_ND: Tensor, indices_NK: Tensor, weights_NK: Tensor, counts_E: Tensor
    ) -> Dispatched:
        """Gather each token's row once per chosen expert."""
        K = indices_NK.shape[1]
        order = indices_NK.flatten().argsort(stable=True)
        place = torch.empty_like(order)
        place[order] = torch.arange(order.shape[0], device=order.device)
        token_R, place_NK = order // K, place.view(-1, K)
        rows_RD = kernels.scatter_rows(x_ND, token_R, place_NK)
        return Dispatched(rows_RD, counts_E, weights_NK, token_R, place_NK)

    def combine(self, rows_RD: Tensor, sent: Dispatched) -> Tensor:
        """Weighted sum of each token's rows [N, D]."""
        return kernels.gather_rows(rows_RD, sent.weights_NK, sent.token_R, sent.place_NK)


class Experts(nn.Module):
    """A layer's routed experts, stacked.

    gate_up_proj [E, 2I, D], gate rows first; down_proj [E, D, I].
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        E, D, inner = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * inner, D))
        self.down_proj = nn.Parameter(torch.empty(E, D, inner))
        self.matmul: Callable[[Tensor, Tensor, Tensor, torch.dtype | None], Tensor] = (
            kernels.grouped_linear
        )
        self.compute_dtype: torch.dtype | None = None
        self.scales: tuple[Tensor, Tensor] | None = None
        self.recompute = False

    def forward(self, rows_RD: Tensor, counts_E: Tensor) -> Tensor:
        """Rows sorted by expert [R, D] -> [R, D]."""
        hidden = self.matmul(rows_RD, self.gate_up_proj, counts_E, self.compute_dtype)
        hidden = kernels.swiglu(hidden, self.recompute)
        return self.matmul(hidden, self.down_proj, counts_E, self.compute_dtype)


class MoE(nn.Module):
    """Router, routed experts and shared experts of one layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.gate = Router(config)
        self.experts = Experts(config)
        if config.n_shared_experts:
            self.shared_experts = MLP(
                config, config.n_shared_experts * config.moe_intermediate_size
            )
        self.dispatcher: Dispatcher = LocalDispatcher()

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        """[B, T, D] -> [B, T, D] without the residual (eq 12)."""
        x_ND = x_BTD.flatten(0, 1)
        indices_NK, weights_NK, counts_E = self.route(x_BTD, context)
        if self._few(x_ND):
            gate_up, down = self.experts.gate_up_proj, self.experts.down_proj
            scales = self.experts.scales
            routed = few_rows.experts(x_ND, gate_up, down, indices_NK, weights_NK, scales)
            shared = self.shared(x_BTD)
        else:
            sent = self.dispatcher.dispatch(x_ND, indices_NK, weights_NK, counts_E)
            shared = self.shared(x_BTD)
            routed = self.dispatcher.combine(self.experts(*sent.wait()), sent)
        return (routed if shared is None else routed + shared).view_as(x_BTD)

    def shared(self, x_BTD: Tensor) -> Tensor | None:
        """What the shared experts make of every token [N, D], where there are any."""
        if not self.config.n_shared_experts:
            return None
        return self.shared_experts(x_BTD).flatten(0, 1)

    def _few(self, x_ND: Tensor) -> bool:
        """Whether one call can do all of it: few rows, no gradient, and both seams as they came."""
        plain = type(self.dispatcher) is LocalDispatcher
        stored = self.experts.scales is not None
        plain = plain and (stored or self.experts.matmul is kernels.grouped_linear)
        idle = not torch.is_grad_enabled() and self.experts.compute_dtype in (None, torch.float32)
        weight = self.experts.down_proj
        return plain and idle and few_rows.can(x_ND, weight)

    def route(self, x_BTD: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        """Each token's experts and weights [N, K], rows per expert [E]; the load is counted."""
        scores_NE = affinities(self.gate(x_BTD).flatten(0, 1), self.config)
        indices, weights = choose(scores_NE, self.gate.e_score_correction_bias, self.config)
        counts_E = self._count(indices, None)
        load_E = counts_E
        if context.token_mask is not None:
            load_E = self._count(indices, context.token_mask.flatten())
        if self.training:
            self.gate.expert_load += load_E
        kept = scores_NE.view(*x_BTD.shape[:2], -1) if context.keep_scores else None
        context.routers.append(RouterRecord(kept, load_E))
        return indices, weights.to(x_BTD.dtype), counts_E

    def _count(self, indices_NK: Tensor, mask_N: Tensor | None) -> Tensor:
        """Choices per expert [E], of the unmasked tokens only."""
        one = torch.ones_like(indices_NK)
        if mask_N is not None:
            one = one * mask_N[:, None]
        counts_E = one.new_zeros(self.config.n_routed_experts)
        return counts_E.scatter_add_(0, indices_NK.flatten(), one.flatten())
