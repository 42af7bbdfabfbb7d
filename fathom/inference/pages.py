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
from itertools import accumulate, chain

import torch
from torch import Tensor

from fathom import kernels
from fathom.kernels import few_rows, huge_pages
from fathom.kernels.paged_attention import (
    absorb,
    expand,
    expanded_attention_behind,
    latent_attention,
    padded_latent_attention,
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


EXPANDED = 1 << 26
"""Numbers of keys and values that exist at a time in the expanded form: 256 MiB in float32."""


def absorbing_pays(config: ModelConfig, queries: int, keys: int) -> bool:
    """Whether attention in the latent space takes fewer multiplications than expanding, per head.

    Expanded: every key's latent is expanded, then each query meets keys and values of their own
    sizes. Absorbed: every query is absorbed and every result expanded, and both meet the latent.
    Whatever that says, no more than `EXPANDED` numbers are expanded: behind a long text they would
    take more memory than the cache.
    """
    C, R = config.kv_lora_rank, config.qk_rope_head_dim
    P, V = config.qk_nope_head_dim, config.v_head_dim
    if keys * config.num_attention_heads * (2 * P + R + 2 * V) > EXPANDED:
        return True
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
            huge_pages.prefer(torch.empty(slots, config.cache_dim, dtype=dtype, device=device))
            for _ in range(layers)
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


SHORT = 512
"""Keys up to which texts are attended to all at once, their entries copied side by side.

A call costs some microseconds whatever it does, a copied key one more reading and a writing.
"""
FEW = 8
"""Queries up to which a piece may be one of those."""


class Crowd:
    """Pieces with few queries and few keys each, padded to one shape: row b is piece b."""

    def __init__(self, pieces: Sequence[Piece], device: torch.device) -> None:
        T, S = (max(map(of, pieces)) for of in (lambda p: p.queries, lambda p: p.keys))
        slots = torch.empty(len(pieces), S, dtype=torch.int64)
        place = torch.zeros(len(pieces), T, dtype=torch.int64)
        last = torch.zeros(len(pieces), T, dtype=torch.int64)
        self.kept: list[int] = []
        for b, piece in enumerate(pieces):
            numbers = [slot for start, end in piece.runs for slot in range(start, end)]
            padding = [numbers[0]] * (
                S - len(numbers)
            )  # 0 times what is there, so it must be a number
            slots[b] = torch.tensor(numbers + padding)
            first = piece.keys - piece.queries
            for t in range(piece.queries):
                place[b, t], last[b, t] = len(self.kept) + t, first + t
            self.kept += [b * T + t for t in range(piece.queries)]
        self.slots_BS, self.place_BT = slots.to(device), place.to(device)
        self.seen_BTS = (torch.arange(S) <= last[..., None]).to(device)
        self.padded = len(self.kept) < len(pieces) * T
        self.kept_M = torch.tensor(self.kept, device=device)

    def attend(self, query_MHX: Tensor, cache_SX: Tensor) -> Tensor:
        """Queries of the pieces one behind the other [M, H, X] -> what each attends to, likewise."""
        cache_BSX = cache_SX[self.slots_BS].to(query_MHX.dtype)
        out = padded_latent_attention(query_MHX[self.place_BT], cache_BSX, self.seen_BTS)
        out = out.flatten(0, 1)
        return out[self.kept_M] if self.padded else out


def texts_of(pieces: Sequence[Piece]) -> few_rows.Texts | None:
    """The pieces as `few_rows.attend` takes them; None for none."""
    if not pieces:
        return None
    runs = [run for piece in pieces for run in piece.runs]
    starts, ends = zip(*runs, strict=True)
    rows_at = [0, *accumulate(piece.queries for piece in pieces)]
    runs_at = [0, *accumulate(len(piece.runs) for piece in pieces)]
    lists = (rows_at, runs_at, starts, ends)
    joined = torch.tensor([*chain(*lists)])  # one tensor takes a quarter of the time of four
    return few_rows.Texts(*joined.split([len(each) for each in lists]))


class PagedPass:
    """`Cache` of one pass: where its rows go, and what each piece of them sees."""

    def __init__(self, pages: Pages, slots_N: Tensor, pieces: Sequence[Piece]) -> None:
        self.pages, self.slots_N = pages, slots_N
        self.expanding: list[Piece] = []
        short, long = [], []
        for piece in pieces:
            if not absorbing_pays(pages.config, piece.queries, piece.keys):
                self.expanding.append(piece)
            elif piece.queries <= FEW and piece.keys <= SHORT:
                short.append(piece)
            else:
                long.append(piece)
        if len(short) == 1:
            long, short = short + long, []
        self.texts = texts_of(short + long) if few_rows.can_attend(*self._samples()) else None
        self.crowd = Crowd(short, slots_N.device) if short and self.texts is None else None
        self.long, self.absorbing = long, short + long
        self.rows_M = self._rows(len(slots_N), slots_N.device)

    def _samples(self) -> tuple[Tensor, Tensor]:
        """A query as it will come, and a layer of the cache."""
        cache_SX = self.pages.layers[0]
        return cache_SX[:0], cache_SX

    def _rows(self, total: int, device: torch.device) -> Tensor | None:
        """Numbers of the absorbed rows; None when they are all rows, in order."""
        numbers = [row for piece in self.absorbing for row in range(piece.lo, piece.hi)]
        in_order = numbers == list(range(total))
        return None if in_order else torch.tensor(numbers, dtype=torch.int64, device=device)

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

    def _expanded(self, layer: Attention, q_raw: Tensor, context: Context, piece: Piece) -> Tensor:
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
        q, rotation = q_raw.view(1, -1, shape.heads, shape.qk), context.rotation
        if self.rows_M is not None:
            q, rotation = q[:, self.rows_M], rotation.rows(self.rows_M)
        q_rope = kernels.rotate(q[..., shape.nope :], rotation)[0]
        query_MHX = torch.cat((absorb(q[0, ..., : shape.nope], up_HUC), q_rope), -1) * layer.scale
        attended = self._attended(query_MHX, layer.layer)[..., : layer.config.kv_lora_rank]
        values = expand(attended, up_HUC, shape.nope)
        if self.rows_M is None:
            out[0] = values
        else:
            out[0, self.rows_M] = values

    def _attended(self, query_MHX: Tensor, layer: int) -> Tensor:
        """The crowd at once, then every long piece over its runs: [M, H, C or X]; all in one call where we can."""
        if self.texts is not None:
            cache_SX = self.pages.layers[layer]
            out = few_rows.attend(
                query_MHX.to(cache_SX.dtype), cache_SX, self.texts, self.pages.config.kv_lora_rank
            )
            return out.to(query_MHX.dtype)
        parts, at = [], 0
        if self.crowd is not None:
            at = len(self.crowd.kept)
            parts.append(self.crowd.attend(query_MHX[:at], self.pages.layers[layer]))
        for piece in self.long:
            views = self.pages.views(layer, piece.runs)
            if views[0].dtype != query_MHX.dtype:
                views = [view.to(query_MHX.dtype) for view in views]
            parts.append(latent_attention(query_MHX[at : at + piece.queries], views))
            at += piece.queries
        return parts[0] if len(parts) == 1 else torch.cat(parts)
