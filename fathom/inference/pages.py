"""The engine's cache: blocks of latents, and attention of many texts' new tokens over them at once.

One pass of the model reads rows of any number of texts, one behind the other: [1, N, D]. A `Piece`
says which rows are one text's and where in the cache all lie that they see. Linear layers and
experts see N rows and know nothing of it; only attention does, through the model's `Cache` seam.

Expanded or absorbed is decided here, piece by piece, by counting multiplications (`absorbing_pays`).
For a text's first tokens and for long chunks expanding is cheaper, for decoding and for checking a
few drafts absorbing is, by up to hundreds of times.

Shapes: N rows, T rows of a piece, S tokens it sees, H heads, P nope, R rotary, V value dims, C rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fathom import kernels
from fathom.kernels.paged_attention import (
    absorb,
    expand,
    expanded_attention_behind,
    latent_attention,
)
from fathom.model import ModelConfig
from fathom.model.attention import Attention
from fathom.model.context import Context

Run = tuple[int, int]


@dataclass(frozen=True)
class Piece:
    """Rows [lo, hi) of a pass are one text's; `runs` are the slots of all tokens they see, in order."""

    lo: int
    hi: int
    runs: tuple[Run, ...]

    @property
    def rows(self) -> slice:
        return slice(self.lo, self.hi)

    @property
    def queries(self) -> int:
        return self.hi - self.lo

    @property
    def keys(self) -> int:
        return sum(end - start for start, end in self.runs)


def runs_of(blocks: Sequence[int], size: int, first: int, end: int) -> tuple[Run, ...]:
    """Slots of the positions [first, end) of a text that holds `blocks`, neighbours joined."""
    found: list[Run] = []
    for number in range(first // size, (end - 1) // size + 1):
        base = blocks[number] * size
        lo = base + max(first - number * size, 0)
        hi = base + min(end - number * size, size)
        if found and found[-1][1] == lo:
            found[-1] = (found[-1][0], hi)
        else:
            found.append((lo, hi))
    return tuple(found)


def absorbing_pays(config: ModelConfig, queries: int, keys: int) -> bool:
    """Whether attention in the latent space takes fewer multiplications than expanding, per head.

    Expanded: every key's latent is expanded, then each query meets keys and values of their own
    sizes. Absorbed: every query is absorbed and every result expanded, and both meet the latent.
    """
    C, R = config.kv_lora_rank, config.qk_rope_head_dim
    P, V = config.qk_nope_head_dim, config.v_head_dim
    expanded = keys * C * (P + V) + queries * keys * (P + R + V)
    absorbed = queries * C * (P + V) + queries * keys * (2 * C + R)
    return absorbed < expanded


class Pages:
    """Latents of all blocks, [blocks * size, C + R] for each layer, MTP modules' layers last."""

    def __init__(
        self, config: ModelConfig, slots: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.config = config
        layers = config.num_hidden_layers + config.num_nextn_predict_layers
        # Not zeroed: memory is taken from the system as texts come to fill it.
        self.layers = [
            torch.empty(slots, config.cache_dim, dtype=dtype, device=device) for _ in range(layers)
        ]

    @staticmethod
    def bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
        """Of one cached token in all layers."""
        layers = config.num_hidden_layers + config.num_nextn_predict_layers
        return layers * config.cache_dim * dtype.itemsize

    def views(self, layer: int, runs: Sequence[Run]) -> list[Tensor]:
        """The runs' entries without a copy."""
        return [self.layers[layer][start:end] for start, end in runs]

    def gather(self, layer: int, runs: Sequence[Run]) -> Tensor:
        """The runs' entries [S, X] as one tensor, copied where they are several."""
        views = self.views(layer, runs)
        return views[0] if len(views) == 1 else torch.cat(views)


class PagedPass:
    """`Cache` of one pass: where its rows go, and what each piece of them sees."""

    def __init__(self, pages: Pages, slots_N: Tensor, pieces: Sequence[Piece]) -> None:
        self.pages, self.slots_N = pages, slots_N
        absorbing = [p for p in pieces if absorbing_pays(pages.config, p.queries, p.keys)]
        self.expanding = [p for p in pieces if p not in absorbing]
        self.absorbing = absorbing

    def attend(
        self, layer: Attention, q_raw: Tensor, latent: Tensor, k_rope: Tensor, context: Context
    ) -> Tensor:
        """Heads side by side [1, N, H*V]."""
        cache_SX = self.pages.layers[layer.layer]
        cache_SX[self.slots_N] = torch.cat((latent, k_rope), dim=-1)[0].to(cache_SX.dtype)
        shape = layer.shape
        out = q_raw.new_empty(1, q_raw.shape[1], shape.heads * shape.value)
        for piece in self.expanding:
            out[:, piece.rows] = self._expanded(layer, q_raw, context, piece)
        if self.absorbing:
            self._absorbed(layer, q_raw, context, out)
        return out

    def _expanded(
        self, layer: Attention, q_raw: Tensor, context: Context, piece: Piece
    ) -> Tensor:
        """One piece, over keys and values made from all the latents that it sees."""
        entries = self.pages.gather(layer.layer, piece.runs)[None].to(q_raw.dtype)
        latent, k_rope = entries.split((layer.config.kv_lora_rank, layer.shape.rope), dim=-1)
        layout = kernels.Expansion(layer.shape, context.rotation.rows(piece.rows), layer.scale)
        kv_raw, q_piece = layer.kv_b_proj(latent), q_raw[:, piece.rows]
        if piece.keys == piece.queries:
            return kernels.expanded_attention(q_piece, kv_raw, k_rope, layout)
        return expanded_attention_behind(q_piece, kv_raw, k_rope, layout)

    def _absorbed(self, layer: Attention, q_raw: Tensor, context: Context, out: Tensor) -> None:
        """All other pieces: their queries are absorbed and their results expanded together."""
        shape, up_HUC = layer.shape, layer.up_by_head(q_raw.dtype)
        rows = self._rows(q_raw.device)
        whole = rows is None
        q = q_raw.view(1, -1, shape.heads, shape.qk)
        rotation = context.rotation
        if not whole:
            q, rotation = q[:, rows], rotation.rows(rows)
        q_rope = kernels.rotate(q[..., shape.nope :], rotation)[0]
        query_NHX = torch.cat((absorb(q[0, ..., : shape.nope], up_HUC), q_rope), -1) * layer.scale
        parts, at = [], 0
        for piece in self.absorbing:
            views = self.pages.views(layer.layer, piece.runs)
            if views[0].dtype != query_NHX.dtype:
                views = [view.to(query_NHX.dtype) for view in views]
            parts.append(latent_attention(query_NHX[at : at + piece.queries], views))
            at += piece.queries
        attended = parts[0] if len(parts) == 1 else torch.cat(parts)
        values = expand(attended[..., : layer.config.kv_lora_rank], up_HUC, shape.nope)
        if whole:
            out[0] = values
        else:
            out[0, rows] = values

    def _rows(self, device: torch.device) -> Tensor | None:
        """Numbers of the absorbed rows; None when they are all rows, in order."""
        if not self.expanding:
            return None
        numbers = [row for piece in self.absorbing for row in range(piece.lo, piece.hi)]
        return torch.tensor(numbers, device=device)


class TextPages:
    """One text's blocks as the cache of `Step`: `length` tokens are held, the next goes behind them."""

    def __init__(self, pages: Pages, blocks: Sequence[int], size: int, length: int) -> None:
        self.pages, self.length = pages, length
        self.slot = blocks[length // size] * size + length % size
        self.runs = runs_of(blocks, size, 0, length + 1)

    def append(self, layer: int, entries_BTX: Tensor) -> Tensor:
        """Write the entry [1, 1, X]; all entries [1, S, X], copied only if they lie apart."""
        self.pages.layers[layer][self.slot] = entries_BTX[0, 0]
        return self.pages.gather(layer, self.runs)[None]

    def advance(self, tokens: int) -> None:
        """Count the token."""
        self.length += tokens
