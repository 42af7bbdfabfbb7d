"""An axis of tokens on which short stages can be seen beside long ones.

The report trains on 14.8T tokens, warms up within the first 25B of them and extends the context in the last 126B: on a
plain axis both ends are a hairline. Between two marks the axis is linear, and each piece is as wide as its share of all
tokens, but no narrower than a least width. A run of even stages has a plain axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from fathom.planning.describe import human

LEAST_PIECE, LEAST_STAGE = 0.06, 0.09
"""Shares of the axis that a piece between two marks, and a whole stage, take at least."""


@dataclass(frozen=True)
class TokenAxis:
    """`stages`: (first token, name) in order; `end`: all tokens; `marks`: where else something begins or ends."""

    stages: tuple[tuple[float, str], ...]
    end: float
    marks: tuple[float, ...] = ()

    @property
    def knots(self) -> list[float]:
        """Borders of all pieces, from 0 to the end."""
        inside = {0.0, self.end, *(begin for begin, _ in self.stages), *self.marks}
        return sorted(knot for knot in inside if 0 <= knot <= self.end)

    @property
    def places(self) -> list[float]:
        """Where each knot lies on the axis, from 0 to 1."""
        knots = np.array(self.knots)
        widths = np.maximum(np.diff(knots) / self.end, LEAST_PIECE)
        borders = [*(begin for begin, _ in self.stages), self.end]
        for low, high in pairwise(borders):
            inside = (knots[:-1] >= low) & (knots[1:] <= high)
            if 0 < widths[inside].sum() < LEAST_STAGE:
                widths[inside] *= LEAST_STAGE / widths[inside].sum()
        return [0.0, *np.cumsum(widths / widths.sum()).tolist()]

    @property
    def is_plain(self) -> bool:
        """Whether nothing had to be widened."""
        return bool(np.allclose(self.places, np.array(self.knots) / self.end, atol=0.01))

    def samples(self, count: int) -> np.ndarray:
        """Tokens at which a curve is to be taken: `count` in each piece, both sides of every border among them."""
        pieces = [
            np.linspace(low + (high - low) * 1e-6, high, count)
            for low, high in pairwise(self.knots)
        ]
        return np.concatenate([np.zeros(1), *pieces])

    def apply(self, axes: Any, labels: bool) -> None:
        """Give `axes` this scale and dotted borders of stages; `labels`: the tokens' numbers too."""
        from matplotlib.ticker import FixedLocator, NullLocator

        knots, places = self.knots, self.places
        axes.set_xscale(
            "function",
            functions=(
                lambda tokens: np.interp(tokens, knots, places),
                lambda place: np.interp(place, places, knots),
            ),
        )
        axes.set_xlim(0, self.end)
        axes.xaxis.set_major_locator(FixedLocator(self._ticks()))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(lambda value, _: human(value, 4) if labels else "")
        axes.tick_params(axis="x", labelsize=9)

    def _ticks(self) -> list[float]:
        """The knots, and round numbers in pieces with room for them."""
        from matplotlib.ticker import MaxNLocator

        ticks = list(self.knots)
        for (low, high), width in zip(pairwise(self.knots), np.diff(self.places), strict=True):
            between = MaxNLocator(max(int(width / 0.09), 1)).tick_values(low, high)
            room = (high - low) * 0.05 / width
            ticks += [t for t in between if width > 0.15 and low + room < t < high - room]
        return sorted(ticks)


def name_stages(axes: Any, axis: TokenAxis, colour: str) -> None:
    """The stages' names above `axes`, slanted, for some are narrow."""
    if len(axis.stages) < 2:
        return
    for begin, name in axis.stages:
        axes.annotate(
            name, (begin, 1.0), xycoords=axes.get_xaxis_transform(), xytext=(2, 5),
            textcoords="offset points", rotation=18, ha="left", va="bottom", fontsize=9, color=colour,
        )  # fmt: skip


def border_stages(axes: Any, axis: TokenAxis, colour: str) -> None:
    """A dotted line where each stage but the first begins."""
    for begin, _ in axis.stages[1:]:
        axes.axvline(begin, color=colour, linewidth=0.8, linestyle=(0, (2, 3)))


def stages_of(names: Sequence[str], tokens: Sequence[float]) -> tuple[tuple[float, str], ...]:
    """(first token, name) of runs of equal names, from what was trained on at the end of each step."""
    found: list[tuple[float, str]] = []
    for number, name in enumerate(names):
        if not found or found[-1][1] != name:
            found.append((float(tokens[number - 1]) if number else 0.0, name))
    return tuple(found)
