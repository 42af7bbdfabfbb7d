"""Which positions of which texts one pass reads, and the context the model reads them in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fathom.inference.pages import PagedPass, Pages, Piece, runs_of
from fathom.model import Transformer
from fathom.model.context import Context


@dataclass(frozen=True)
class Span:
    """Positions [start, start + count) of a text that holds `blocks`; they see from `first` on."""

    blocks: Sequence[int]
    first: int
    start: int
    count: int


@dataclass(frozen=True)
class Places:
    """Of the rows of a pass: their positions, the cache's slots they go to, and what each text's see."""

    positions: list[int]
    slots: list[int]
    pieces: list[Piece]


def places_of(size: int, spans: Sequence[Span]) -> Places:
    """Of spans that stand one behind the other; `size`: tokens of a block."""
    places = Places([], [], [])
    for span in spans:
        lo, end = len(places.positions), span.start + span.count
        within = range(span.start, end)
        places.positions.extend(within)
        places.slots.extend(span.blocks[i // size] * size + i % size for i in within)
        runs = runs_of(span.blocks, size, span.first, end)
        places.pieces.append(Piece(lo, lo + span.count, runs))
    return places


def lay_out(model: Transformer, pages: Pages, size: int, spans: Sequence[Span]) -> Context:
    """Context of one pass over the spans, one behind the other."""
    places, device = places_of(size, spans), model.lm_head.weight.device
    cache = PagedPass(pages, torch.tensor(places.slots, device=device), places.pieces)
    positions = torch.tensor([places.positions], device=device)
    return Context(model.rotary.at(positions), cache=cache)
