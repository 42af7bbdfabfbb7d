"""What one forward pass of the model carries from block to block besides the hidden states."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fathom import kernels
from fathom.errors import GenerationError
from fathom.model.cache import Cache, LatentCache
from fathom.model.config import ModelConfig
from fathom.model.rope import RotaryTable

LONG = 1024
"""Positions from which padding is told without a T x T mask; short batches are quicker all rows at once."""


@dataclass
class RouterRecord:
    """One router's part in a pass: affinities [B, T, E] if asked for, tokens per expert [E]."""

    scores_BTE: Tensor | None
    load_E: Tensor


@dataclass
class Context:
    """Positions, visibility and cache of one pass; routers write what they did into `routers`."""

    rotation: kernels.Rotation
    visible: kernels.Visible = kernels.ALL
    cache: Cache | None = None
    token_mask: Tensor | None = None
    keep_scores: bool = False
    routers: list[RouterRecord] = field(default_factory=list)

    def shortened(self, length: int) -> Context:
        """The first `length` positions of the same pass, for an MTP module; `routers` is shared."""
        mask = None if self.token_mask is None else self.token_mask[:, :length]
        return Context(
            self.rotation.first(length),
            _shorten(self.visible, length),
            None,
            mask,
            self.keep_scores,
            self.routers,
        )


def _shorten(visible: kernels.Visible, length: int) -> kernels.Visible:
    segments = visible.segments
    if segments is not None:
        segments = tuple(
            tuple((lo, min(hi, length)) for lo, hi in row if lo < length) for row in segments
        )
    mask = None if visible.mask is None else visible.mask[..., :length, :length]
    return kernels.Visible(segments, mask)


def number_documents(document_ids: Tensor, tokens_BT: Tensor) -> Tensor:
    """Ids 0, 1, 2, ... per row: a document is a run of equal ids and gets a number of its own.

    Raises `GenerationError` when there is not one id for each token.
    """
    if document_ids.shape != tokens_BT.shape:
        raise GenerationError(
            f"document_ids of shape {tuple(document_ids.shape)} do not fit tokens of shape "
            f"{tuple(tokens_BT.shape)}; give one id for each token"
        )
    changes = document_ids[:, 1:] != document_ids[:, :-1]
    return torch.nn.functional.pad(changes, (1, 0)).cumsum(1)


def document_segments(document_ids_BT: Tensor) -> tuple[tuple[tuple[int, int], ...], ...]:
    """Runs of equal ids per row as (start, end), the pieces that attend to themselves only."""
    rows = []
    for row in document_ids_BT.tolist():
        cuts = [i for i in range(1, len(row)) if row[i] != row[i - 1]]
        rows.append(tuple(zip([0, *cuts], [*cuts, len(row)], strict=True)))
    return tuple(rows)


def padded_segments(attention_mask_BT: Tensor) -> tuple[tuple[tuple[int, int], ...], ...] | None:
    """Rows with padding before and behind their tokens as pieces that attend to themselves only.

    None when a row has padding in between, which only a mask can say.
    """
    shown = attention_mask_BT.bool()
    begins = torch.nn.functional.pad(shown[:, 1:] & ~shown[:, :-1], (1, 0))
    begins[:, 0] = shown[:, 0]
    return document_segments(shown.long()) if int(begins.sum(1).amax()) <= 1 else None


def visibility(
    attention_mask_BS: Tensor | None,
    document_ids_BT: Tensor | None,
    start: int,
    batch: int,
    T: int,
) -> kernels.Visible:
    """Which keys each query sees, from the caller's padding mask and document ids.

    `start` is how many tokens the cache holds; the padding mask covers those and the T new ones.
    """
    if attention_mask_BS is None:
        if document_ids_BT is None:
            return kernels.ALL
        return kernels.Visible(segments=document_segments(document_ids_BT))
    S = start + T
    if attention_mask_BS.shape != (batch, S):
        raise GenerationError(
            f"attention_mask of shape {tuple(attention_mask_BS.shape)} does not cover {batch} rows "
            f"of {start} cached and {T} new tokens; pass one of shape {(batch, S)}"
        )
    if start == 0 and document_ids_BT is None and T >= LONG:
        runs = padded_segments(attention_mask_BS)
        if runs is not None:
            return kernels.Visible(segments=runs)
    device = attention_mask_BS.device
    query, key = torch.arange(start, S, device=device), torch.arange(S, device=device)
    mask = (key <= query[:, None]) & attention_mask_BS.bool()[:, None, :]
    if document_ids_BT is not None:
        mask &= document_ids_BT[:, :, None] == document_ids_BT[:, None, :]
    # A padding token sees itself, so that no row of the softmax is empty.
    return kernels.Visible(mask=(mask | (key == query[:, None]))[:, None])


def build_context(
    config: ModelConfig,
    table: RotaryTable,
    tokens_BT: Tensor,
    attention_mask: Tensor | None,
    positions: Tensor | None,
    document_ids: Tensor | None,
    cache: LatentCache | None,
    keep_scores: bool = False,
) -> Context:
    """Check the arguments of a forward pass and derive rotation and visibility from them."""
    if tokens_BT.dim() != 2 or not tokens_BT.numel():
        raise GenerationError(
            f"tokens of shape {tuple(tokens_BT.shape)} cannot be read; give int64 [B, T] with T >= 1"
        )
    T = tokens_BT.shape[1]
    start = 0 if cache is None else cache.length
    if start + T > config.max_position_embeddings:
        raise GenerationError(
            f"a context of {start + T} tokens exceeds max_position_embeddings="
            f"{config.max_position_embeddings}; shorten it, or extend the model's context"
        )
    if cache is not None and document_ids is not None:
        raise GenerationError(
            "document_ids cannot be combined with a cache; give each document its own"
        )
    if document_ids is not None:
        document_ids = number_documents(document_ids, tokens_BT)
    if positions is not None and positions.shape[-2:] not in ((1, T), tokens_BT.shape):
        raise GenerationError(
            f"positions of shape {tuple(positions.shape)} do not fit tokens of shape "
            f"{tuple(tokens_BT.shape)}; give [B, T] or [1, T]"
        )
    if positions is None:
        rotation = table.first(T, tokens_BT.device, start)
    else:
        rotation = table.at(positions)
    visible = visibility(attention_mask, document_ids, start, *tokens_BT.shape)
    token_mask = None if attention_mask is None else attention_mask[:, start:].bool()
    return Context(rotation, visible, cache, token_mask, keep_scores)
