"""Drafts from the model's own MTP modules (report §2.2, §5.4.3).

After a pass has given the states h^0 of newly read tokens, module 1 reads them together with the
tokens one further on, module 2 its output with the tokens two further on, and so on: D drafts
behind the last certain token. More drafts come from the last module reading its own state again,
one position on ("recycling", after the norm of its head if that is what the model was trained
with). The next pass of the model reads the drafts along with the certain token and makes its own
choice at each; since both draw with the same noise (`fathom.inference.noise`), drafts that are equal
to the choices were right, and the first choice that differs counts in the draft's place.

Each module has its own layer in the cache, written at the position i of the state it read. Module
d's entry at i needs token i + d; where that was a draft, it is made again once the token is certain.
What is final by depth, and the states needed to go on from there, are a request's `Trail`. Wrong
entries could only make drafts worse, never change what is said.

Shapes: N rows, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from fathom.inference.choice import choose_of_finite, finite
from fathom.inference.few import FewRows
from fathom.inference.layout import Span, lay_out
from fathom.inference.pages import Pages
from fathom.inference.request import Request
from fathom.model import Transformer
from fathom.model.mtp import MTPModule


@dataclass
class Trail:
    """How far the modules have followed one request."""

    blocks: list[int]
    """Where their entries are: the request's blocks, unless it has lost them since."""
    first: int
    """Position from which on the cache holds their entries."""
    done: list[int]
    """By depth: entries before this position are final."""
    tails: list[Tensor | None]
    """By depth: the states it read or is yet to read from there on, as far as those are final."""
    covered: int
    """Blocks before this number hold final entries of all modules, from `first` on."""


@dataclass
class Fresh:
    """States [N, D] that a pass gave for the positions from `start` on of a request."""

    request: Request
    start: int
    states_ND: Tensor


@dataclass
class _Rows:
    """What one module reads of one request: states from position `first` on, the first `count` of them."""

    fresh: Fresh
    trail: Trail
    first: int
    states_ND: Tensor
    count: int
    raw: Tensor = field(init=False)
    normed: Tensor = field(init=False)

    def followed(self, post_norm: bool) -> Tensor:
        return self.normed if post_norm else self.raw


class Drafter:
    """The MTP modules of one model at work for many requests."""

    def __init__(
        self,
        model: Transformer,
        pages: Pages,
        block_size: int,
        drafts: int,
        few: FewRows | None = None,
    ) -> None:
        """`few`: what reads few rows faster."""
        self.model, self.pages, self.size, self.drafts = model, pages, block_size, drafts
        self.few = few
        self.modules = [cast(MTPModule, module) for module in model.model.mtp][:drafts]
        self.post_norm = model.config.mtp_hidden == "post_norm"
        self.trails: dict[Request, Trail] = {}
        self._covered: set[int] = set()

    def _trail(self, request: Request, start: int) -> Trail:
        """The request's, if the modules have followed it up to `start`; else a new one from there on.

        Of the blocks before, as it may have found them in the prefix cache, those count that modules have followed.
        """
        trail = self.trails.get(request)
        if trail and trail.blocks is request.blocks and trail.done[0] == start:
            return trail
        found, rest = divmod(start, self.size)
        if rest or request.published < found:
            found = 0
        covered = found
        while covered and request.blocks[covered - 1] in self._covered:
            covered -= 1
        first = covered * self.size if found else start
        depth = len(self.modules)
        trail = Trail(
            request.blocks, first, [start] * depth, [None] * depth, -(-first // self.size)
        )
        self.trails[request] = trail
        return trail

    def forget(self, request: Request) -> None:
        """A request has ended."""
        self.trails.pop(request, None)

    def published(self, request: Request, before: int) -> None:
        """Blocks from number `before` on were published, not followed yet: what they held before is gone."""
        self._covered.difference_update(request.blocks[before : request.published])

    def _cover(self, row: _Rows) -> None:
        """Note which of the request's blocks hold final entries of all modules."""
        trail, final = row.trail, min(row.trail.done) // self.size
        self._covered.update(row.fresh.request.blocks[trail.covered : final])
        trail.covered = max(trail.covered, final)

    def follow(self, fresh: Sequence[Fresh], drafting: set[Request]) -> None:
        """Let the modules read what the model has read, and set `drafts` of those in `drafting`."""
        rows = [self._first_rows(each) for each in fresh]
        wishing = [row for row in rows if row.fresh.request in drafting]
        for depth, module in enumerate(self.modules, start=1):
            if depth > 1:
                rows = [self._next_rows(row, depth) for row in rows]
                wishing = [row for row in rows if row.fresh.request in drafting]
            self._run(module, depth, [row for row in rows if row.count > 0])
            for row in rows:
                self._settle(row, depth)
            self._draft([row for row in wishing if self._is_last(row)])
        for row in rows:
            self._cover(row)
        self._recycle([row for row in wishing if self._is_last(row)])

    def _is_last(self, row: _Rows) -> bool:
        """Whether the row read the last state there is."""
        return row.count > 0 and row.first + row.count == row.fresh.request.computed

    def _first_rows(self, fresh: Fresh) -> _Rows:
        request = fresh.request
        trail = self._trail(request, fresh.start)
        states = fresh.states_ND
        count = min(len(states), len(request.ids) - 1 - fresh.start)
        return _Rows(fresh, trail, fresh.start, states, count)

    def _next_rows(self, before: _Rows, depth: int) -> _Rows:
        """For module `depth`: the states it has kept, and those the module before has just made."""
        trail, request = before.trail, before.fresh.request
        first, tail = trail.done[depth - 1], trail.tails[depth - 1]
        made = before.followed(self.post_norm) if before.count > 0 else before.states_ND[:0]
        states = made if tail is None else torch.cat((tail, made))
        count = min(len(states), len(request.known) - depth - first)
        return _Rows(before.fresh, trail, first, states, count)

    def _settle(self, row: _Rows, depth: int) -> None:
        """Note which entries are final, and keep the states that the rest needs again."""
        trail, request = row.trail, row.fresh.request
        final = max(row.first, min(row.first + row.count, len(request.ids) - depth))
        certain = request.computed if depth == 1 else trail.done[depth - 2]
        tail = row.states_ND[final - row.first : max(certain - row.first, 0)]
        trail.done[depth - 1] = final
        trail.tails[depth - 1] = tail.clone() if len(tail) else None

    def _run(self, module: MTPModule, depth: int, rows: Sequence[_Rows]) -> None:
        """One module over all rows (eqs 21-22)."""
        if not rows:
            return
        spans, tokens, states = [], [], []
        for row in rows:
            request = row.fresh.request
            spans.append(Span(request.blocks, row.trail.first, row.first, row.count))
            tokens += request.known[row.first + depth : row.first + depth + row.count]
            states.append(row.states_ND[: row.count])
        raw, normed = self._predict(module, spans, tokens, torch.cat(states))
        counts = [row.count for row in rows]
        for row, a, b in zip(rows, raw.split(counts), normed.split(counts), strict=True):
            row.raw, row.normed = a, b

    def _predict(
        self, module: MTPModule, spans: Sequence[Span], tokens: list[int], states_ND: Tensor
    ) -> tuple[Tensor, Tensor]:
        if self.few is not None and len(tokens) <= self.few.most:
            raw_ND = self.few.predict(module, states_ND, tokens, spans)
            return raw_ND, module.normed(raw_ND)
        context = lay_out(self.model, self.pages, self.size, spans)
        embedded = self.model.embed(torch.tensor([tokens], device=states_ND.device))
        raw = module.predict(states_ND[None], embedded, context)
        return raw[0], module.normed(raw)[0]

    def _draft(self, rows: Sequence[_Rows]) -> None:
        """One draft for each row, from its last state."""
        rows = [row for row in rows if self._wants(row.fresh.request)]
        if rows:
            self._add_drafts(
                [row.fresh.request for row in rows], torch.stack([row.normed[-1] for row in rows])
            )

    def _add_drafts(self, requests: Sequence[Request], states_ND: Tensor) -> None:
        logits_NV = self.model.lm_head(states_ND)
        # A guess must never stop an answer: modules that overflow make a poor guess instead.
        if not all(finite(logits_NV)):
            logits_NV = torch.where(logits_NV.isfinite(), logits_NV, torch.zeros_like(logits_NV))
        draws = [request.draw(len(request.drafts)) for request in requests]
        for request, token in zip(requests, choose_of_finite(logits_NV, draws).tokens, strict=True):
            request.drafts.append(token)

    def _wants(self, request: Request) -> bool:
        """Whether another draft could be of use: the answer has room for it and a token behind it."""
        most = min(self.drafts, request.limit - len(request.ids) - 1)
        return len(request.drafts) < most

    def _recycle(self, rows: Sequence[_Rows]) -> None:
        """Drafts beyond the modules' number: the last one reads its own last state, a position on."""
        module, depth = self.modules[-1], len(self.modules)
        states = {row.fresh.request: row.followed(self.post_norm)[-1] for row in rows}
        trails = {row.fresh.request: row.trail for row in rows}
        while True:
            going = [r for r in states if self._wants(r) and self._has_slot(r, depth)]
            if not going:
                return
            spans = [
                Span(r.blocks, trails[r].first, r.computed + len(r.drafts) - depth, 1)
                for r in going
            ]
            tokens = [request.drafts[-1] for request in going]
            joined = torch.stack([states[request] for request in going])
            raw, normed = self._predict(module, spans, tokens, joined)
            self._add_drafts(going, normed)
            for number, request in enumerate(going):
                states[request] = (normed if self.post_norm else raw)[number]

    def _has_slot(self, request: Request, depth: int) -> bool:
        """Whether the position that recycling would write to is in the request's blocks."""
        position = request.computed + len(request.drafts) - depth
        return position < len(request.blocks) * self.size
