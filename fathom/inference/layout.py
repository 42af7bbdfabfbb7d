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


def lay_out(model: Transformer, pages: Pages, size: int, spans: Sequence[Span]) -> Context:
    """Context of one pass over the spans, one behind the other."""
    slots: list[int] = []
    positions: list[int] = []
    pieces = []
    for span in spans:
        end = span.start + span.count
        places = range(span.start, end)
        lo = len(positions)
        positions += places
        slots += [span.blocks[i // size] * size + i % size for i in places]
        pieces.append(Piece(lo, len(positions), runs_of(span.blocks, size, span.first, end)))
    device = model.lm_head.weight.device
    cache = PagedPass(pages, torch.tensor(slots, device=device), pieces)
    return Context(model.rotary.at(torch.tensor([positions], device=device)), cache=cache)
