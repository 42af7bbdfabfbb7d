"""Output head and cross-entropy in one rule, a chunk of positions at a time (report §2.2, §4).

Logits of a batch are its largest tensor (positions x vocabulary) and are needed for a moment only.
Each chunk's logits are made, turned into its loss and, in place, into its gradient (softmax minus
one-hot), and multiplied on into the gradients of hidden states and head while they are still in
cache. So the forward pass already holds the gradients for a loss gradient of 1, and backward scales
them. Sums are in float32, in float64 where the product is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fathom.kernels.cpu_gemm import fast_products
from fathom.kernels.wide import at_least_float32, wide_dtype

IGNORE = -100
"""Target of a position that does not count."""

_CHUNK_NUMBERS, _CHUNK_NUMBERS_ON_A_GPU, _CHUNK_ROWS = 1 << 22, 1 << 28, 256
"""Logits made at a time (16 MiB of float32 fit a CPU's last cache), and at least so many rows."""


def linear_cross_entropy_reference(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor
) -> Tensor:
    """Sum of cross-entropies from whole logits."""
    logits = at_least_float32(hidden_ND) @ at_least_float32(weight_VD).T
    return torch.nn.functional.cross_entropy(
        logits, targets_N, ignore_index=IGNORE, reduction="sum"
    )


def _chunk_loss(logits_CV: Tensor, targets_C: Tensor, valid_C: Tensor) -> Tensor:
    """Sum of the chunk's losses; leaves softmax - one_hot in `logits_CV`.

    logsumexp = max - log(largest softmax), which never underflows; so one softmax serves loss and
    gradient.
    """
    picked = targets_C.clamp_min(0)[:, None]
    target_logit = logits_CV.gather(1, picked)[:, 0]
    largest_C = logits_CV.amax(1)
    torch.softmax(logits_CV, dim=1, out=logits_CV)
    lse_C = largest_C - logits_CV.amax(1).log()
    loss = (lse_C - target_logit).masked_fill(~valid_C, 0.0).sum()
    logits_CV.scatter_add_(1, picked, logits_CV.new_full(picked.shape, -1.0))
    return loss


def _one_chunk(
    hidden_CD: Tensor,
    weight_VD: Tensor,
    targets_C: Tensor,
    grad_hidden_CD: Tensor | None,
    grad_weight_VD: Tensor | None,
) -> Tensor:
    """Loss of one chunk; writes its `grad_hidden_CD` and adds to `grad_weight_VD`."""
    valid_C = targets_C >= 0
    logits = at_least_float32(hidden_CD @ weight_VD.T)
    loss = _chunk_loss(logits, targets_C, valid_C)
    if grad_hidden_CD is None and grad_weight_VD is None:
        return loss
    grad_logits = logits.masked_fill_(~valid_C[:, None], 0.0).to(hidden_CD.dtype)
    if grad_hidden_CD is not None:
        grad_hidden_CD.copy_(grad_logits @ weight_VD)
    if grad_weight_VD is not None:
        _add_product(grad_weight_VD, grad_logits, hidden_CD)
    return loss


def chunk_rows(vocab: int, on_cpu: bool) -> int:
    """Positions at a time: what a CPU's cache holds, or a GiB of logits elsewhere."""
    numbers = _CHUNK_NUMBERS if on_cpu else _CHUNK_NUMBERS_ON_A_GPU
    return max(_CHUNK_ROWS, numbers // vocab)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        dtype: torch.dtype,
        wants_grads: bool,
    ) -> Tensor:
        weight = weight_VD.to(dtype)
        wants_hidden, wants_weight = ctx.needs_input_grad[:2] if wants_grads else (False, False)
        grad_hidden = torch.empty_like(hidden_ND) if wants_hidden else None
        wide = wide_dtype(dtype)
        grad_weight = torch.zeros_like(weight_VD, dtype=wide) if wants_weight else None
        total = torch.zeros((), dtype=wide, device=hidden_ND.device)
        chunk = chunk_rows(weight.shape[0], weight.device.type == "cpu")
        for start in range(0, hidden_ND.shape[0], chunk):
            rows = slice(start, start + chunk)
            with fast_products(chunk, hidden_ND.device):
                total += _one_chunk(
                    hidden_ND[rows].to(dtype),
                    weight,
                    targets_N[rows],
                    None if grad_hidden is None else grad_hidden[rows],
                    grad_weight,
                )
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight_VD.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * grad,
            None if grad_weight is None else (grad_weight * grad).to(ctx.weight_dtype),
            None,
            None,
            None,
        )


def _add_product(total_VD: Tensor, grad_CV: Tensor, hidden_CD: Tensor) -> None:
    """total += grad^T hidden, in at least float32 whatever the product's dtype."""
    if grad_CV.dtype == total_VD.dtype:
        total_VD.addmm_(grad_CV.T, hidden_CD)
    else:
        total_VD += grad_CV.T @ hidden_CD


def linear_cross_entropy(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """Sum over positions of -log softmax(hidden W^T)[target], a scalar in at least float32.

    hidden [N, D], weight [V, D], targets int64 [N] with `IGNORE` (or any negative number) where a
    position does not count. The product is computed in `dtype` (default: the weight's), the softmax
    in float32.
    """
    dtype = dtype or weight_VD.dtype
    wants_grads = torch.is_grad_enabled()
    return _LinearCrossEntropy.apply(hidden_ND, weight_VD, targets_N, dtype, wants_grads)
