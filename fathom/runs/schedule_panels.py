"""All that a schedule sets (report §4.2, §4.3), one panel under another over one axis of tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from fathom.planning.describe import human
from fathom.runs.token_axis import TokenAxis, border_stages, name_stages

LABELS = {
    "lr": "learning rate",
    "batch": "sequences in a step",
    "tokens_per_step": "tokens in a step",
    "seq_len": "tokens in a sequence",
    "gamma": "γ, speed of router biases",
    "mtp_weight": "λ, weight of the MTP loss",
    "balance_alpha": "α, weight of the balance loss",
}
POWERS = ("batch", "tokens_per_step", "seq_len")
"""Quantities on a logarithmic axis."""
HEIGHT = 1.25
"""Inches of a panel."""
HELD = 3
"""So often in a row a rate must stand there to be one that holds."""
FAR = 4
"""Rates that hold are drawn on a logarithmic axis where the largest is so many times the smallest."""


@dataclass(frozen=True)
class Colours:
    """Ink of the drawing: on a page they are stand-ins for the page's own."""

    line: str
    text: str
    border: str


@dataclass(frozen=True)
class Schedules:
    """What held up to each of `tokens`, by the keys of `LABELS`."""

    axis: TokenAxis
    tokens: Sequence[float]
    values: Mapping[str, Sequence[float]]

    def changing(self) -> list[str]:
        """The learning rate, and whatever else did not stay the same."""
        return [
            k for k in LABELS if k in self.values and (k == "lr" or len(set(self.values[k])) > 1)
        ]


def draw_panels(panels: Sequence[Any], found: Schedules, keys: Sequence[str], ink: Colours) -> None:
    """One of `keys` in each of `panels`, from the top."""
    for panel, key in zip(panels, keys, strict=True):
        panel.plot(
            found.tokens, found.values[key], color=ink.line, linewidth=1.8, drawstyle="steps-pre"
        )
        _scale(panel, key, found.values[key])
        found.axis.apply(panel, labels=panel is panels[-1])
        border_stages(panel, found.axis, ink.border)
        names_above = panel is panels[0] and len(found.axis.stages) > 1
        panel.set_title(
            _title(panel, key), color=ink.text, fontsize=10, pad=38 if names_above else 3
        )
    name_stages(panels[0], found.axis, ink.text)
    scale = "" if found.axis.is_plain else " (short stretches are drawn wider)"
    panels[-1].set_xlabel(f"tokens trained on{scale}")


def _title(panel: Any, key: str) -> str:
    logarithmic = key == "lr" and panel.get_yscale() == "log"
    return LABELS[key] + (" (logarithmic axis)" if logarithmic else "")


def _scale(panel: Any, key: str, values: Sequence[float]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    if key == "lr":
        _scale_rates(panel, values)
        return
    if key in POWERS and min(values) > 0:
        panel.set_yscale("log", base=2)
        panel.set_ylim(min(values) / 1.3, max(values) * 1.3)
        panel.yaxis.set_major_locator(FixedLocator(_apart(values)))
        panel.yaxis.set_minor_locator(NullLocator())
        in_tokens = key == "tokens_per_step"
        panel.yaxis.set_major_formatter(
            FuncFormatter(lambda value, _: human(value, 4) if in_tokens else f"{value:,.0f}")
        )
        return
    panel.set_ylim(bottom=0, top=1.12 * max(values) or 1)
    panel.locator_params(axis="y", nbins=4)
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _rate(value)))


def _scale_rates(panel: Any, values: Sequence[float]) -> None:
    """A tick at each rate that holds; a linear axis has round ones too where there is room.

    The report's rates, 2.2e-4, 2.2e-5 and 7.3e-6, lie too far apart for a linear axis. A logarithmic one begins below
    the lowest of them, so it is only for rates that, once warm, never fall below.
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

    held, top = held_values(values), max(values)
    if _is_wide(values, held):
        panel.set_yscale("log")
        panel.set_ylim(min(held) / 1.6, 1.6 * top)
        ticks = _apart(held)
    else:
        panel.set_ylim(bottom=0, top=1.12 * top or 1)
        ticks = [0.0]
        for rate in (*dict.fromkeys(held), *MaxNLocator(4).tick_values(0, top or 1)):
            if all(abs(rate - other) > 0.15 * top for other in ticks):
                ticks.append(rate)
    panel.yaxis.set_major_locator(FixedLocator(ticks))
    panel.yaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _rate(value)))


def held_values(values: Sequence[float]) -> list[float]:
    """The values that stay the same for a while, as often as they stand there."""
    runs = (list(run) for _, run in groupby(values))
    return [value for run in runs if len(run) >= HELD for value in run]


def _is_wide(values: Sequence[float], held: Sequence[float]) -> bool:
    warm = values[list(values).index(max(values)) :]
    return bool(held) and max(held) > FAR * min(held) > 0 and min(warm) > 0.99 * min(held)


def _rate(value: float) -> str:
    """2.2e-4, where Python writes 0.00022."""
    if value == 0 or value >= 0.01:
        return f"{value:.3g}"
    digits, exponent = f"{value:.2e}".split("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"


def _apart(values: Sequence[float]) -> list[float]:
    """Values that held, the smallest, the largest, then the longest held, with room for a label at each."""
    held = Counter(values)
    room = (max(values) / min(values)) ** 0.25
    found = [min(values)]
    for value in (max(values), *(value for value, _ in held.most_common())):
        if all(max(value / other, other / value) > max(room, 1.01) for other in found):
            found.append(value)
    return found
