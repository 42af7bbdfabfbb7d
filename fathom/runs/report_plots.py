"""The report's figures: matplotlib drawings as SVG text that takes its ink from the page, so that dark mode works.

Lines and letters are drawn in stand-in colours, which become CSS variables in the SVG; letters stay letters.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from fathom.errors import FathomError
from fathom.runs.report_data import RunData, even, series

INK = {
    "#010101": "var(--ink)",
    "#020202": "var(--faint)",
    "#030303": "var(--grid)",
    "#040404": "var(--one)",
    "#050505": "var(--two)",
    "#060606": "var(--three)",
}
"""Stand-in colours of the drawings and what the page makes of them."""
TEXT, FAINT, GRID, ONE, TWO, THREE = INK
WIDE, HALF, THIRD = (10.4, 4.4), (5.4, 3.3), (4.2, 3.0)
"""Sizes of figures in inches, by their share of the page's width."""
MOST_BLOCKS = 9
"""Blocks of which the report draws every expert."""


def pyplot() -> Any:
    """matplotlib without a display. Raises `FathomError` when it is not installed."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise FathomError(
            "the report's figures need matplotlib, which is not installed; run: pip install 'fathom[report]'"
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _style() -> dict[str, Any]:
    return {
        "svg.fonttype": "none",
        "font.size": 11,
        "axes.titlesize": 11,
        "axes.titlelocation": "left",
        "axes.labelsize": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": FAINT,
        "axes.labelcolor": TEXT,
        "text.color": TEXT,
        "xtick.color": FAINT,
        "ytick.color": FAINT,
        "xtick.labelcolor": TEXT,
        "ytick.labelcolor": TEXT,
        "axes.grid": True,
        "grid.color": GRID,
        "grid.linewidth": 0.8,
        "axes.axisbelow": True,
        "legend.frameon": False,
        "legend.fontsize": 11,
        "legend.handlelength": 1.4,
        "figure.constrained_layout.use": True,
    }


def _figure(
    draw: Callable[[Any], None],
    size: tuple[float, float],
    name: str,
    rows: int = 1,
    columns: int = 1,
) -> str:
    """SVG text of a drawing; `name` keeps its ids apart from those of other figures in the page."""
    plt = pyplot()
    with plt.rc_context({**_style(), "svg.hashsalt": name}):
        figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
        draw(axes if rows * columns > 1 else axes[0, 0])
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
        plt.close(figure)
    return _inline(out.getvalue(), name)


def _inline(svg: str, name: str) -> str:
    """The <svg> element alone, in the page's colours and fonts, without fixed size, its ids its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r'\1 role="img"', svg, count=1)
    svg = re.sub(r"(font: [^;\"]*?px )[^;\"]*", r"\1inherit-font", svg).replace(
        "inherit-font", "var(--font)"
    )
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg).replace("url(#", f"url(#{name}-")
    for stand_in, variable in INK.items():
        svg = svg.replace(stand_in, variable)
    return svg


def smoothed(values: list[float], share: float = 0.02) -> np.ndarray:
    """Centred moving average over about a `share` of the points, over fewer at the ends."""
    reach = int(share * len(values) / 2)
    sums = np.concatenate(([0.0], np.cumsum(values)))
    middle = np.arange(len(values))
    low, high = np.maximum(middle - reach, 0), np.minimum(middle + reach + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def _two_lines(axes: Any, run: RunData, key: str, color: str, label: str) -> None:
    steps, values = run.series(key)
    if not steps:
        return
    axes.plot(steps, values, color=color, linewidth=0.7, alpha=0.28)
    axes.plot(steps, smoothed(values), color=color, linewidth=2, label=label)


def _finish(axes: Any, run: RunData, label: str, legend: str | None = "upper right") -> None:
    axes.set_title(label, color=TEXT)
    axes.set_xlabel("step")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.locator_params(axis="x", nbins=6)
    axes.margins(x=0.01)
    stages = run.stages()
    for step, name in stages if len(stages) > 1 else []:
        axes.axvline(step, color=FAINT, linewidth=0.8, linestyle=(0, (2, 3)))
        axes.text(step, 1.0, f" {name}", transform=axes.get_xaxis_transform(), va="top", fontsize=9)
    if legend and axes.get_legend_handles_labels()[0]:
        axes.legend(loc=legend)


def loss(run: RunData) -> str:
    """Training loss, held-out loss and MTP loss over steps."""

    def draw(axes: Any) -> None:
        _two_lines(axes, run, "mtp_loss", THREE, "MTP")
        _two_lines(axes, run, "loss", ONE, "training")
        part, whole = run.evals_by_coverage()
        kinds = [(part, "o-", "held out, a part"), (whole, "D", "held out, all")]
        for lines, form, label in kinds if part else [(whole, "o-", "held out")]:
            if lines:
                points = series(lines, "loss")
                axes.plot(*points, form, color=TWO, linewidth=1.6, markersize=5, label=label)
        axes.set_yscale("log")
        _plain_ticks(axes)
        _finish(axes, run, "loss, nats per token (logarithmic axis)")

    return _figure(draw, WIDE, "loss")


def learning_rate(run: RunData) -> str:
    """The schedule as it was run."""

    def draw(axes: Any) -> None:
        axes.plot(*run.series("lr"), color=ONE, linewidth=2)
        axes.set_ylim(bottom=0)
        _plain_ticks(axes)
        _finish(axes, run, "learning rate")

    return _figure(draw, THIRD, "lr")


def grad_norm(run: RunData) -> str:
    """Gradient norm before clipping, on a logarithmic axis."""

    def draw(axes: Any) -> None:
        _two_lines(axes, run, "grad_norm", ONE, "")
        if any(value > 0 for value in run.series("grad_norm")[1]):
            axes.set_yscale("log")
        _plain_ticks(axes)
        _finish(axes, run, "gradient norm before clipping", legend=None)

    return _figure(draw, THIRD, "grad")


def _plain_ticks(axes: Any) -> None:
    """Numbers written out; on a logarithmic axis 1, 2, 3, 5 of every decade, or evenly when there is less than one."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    if axes.get_yscale() == "log":
        low, high = axes.get_ylim()
        narrow = high < 5 * low
        axes.yaxis.set_major_locator(MaxNLocator(5) if narrow else LogLocator(subs=(1, 2, 3, 5)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))


def speed(run: RunData) -> str:
    """Tokens per second."""

    def draw(axes: Any) -> None:
        _two_lines(axes, run, "tokens_per_second", ONE, "")
        axes.set_ylim(bottom=0)
        _plain_ticks(axes)
        _finish(axes, run, "tokens per second", legend=None)

    return _figure(draw, THIRD, "speed")


def balance(run: RunData, wide: bool) -> str:
    """Load of the busiest expert over the mean load: the worst block at each step, and the ideal."""

    def draw(axes: Any) -> None:
        _two_lines(axes, run, "max_load", ONE, "worst block")
        axes.axhline(1.0, color=TWO, linewidth=1.6, linestyle=(0, (4, 3)), label="ideal")
        axes.set_ylim(bottom=0.9)
        _finish(axes, run, "busiest expert / mean load", legend="best")

    return _figure(draw, (10.4, 3.6) if wide else HALF, "balance")


def bias_range(run: RunData) -> str:
    """Smallest and largest router bias."""

    def draw(axes: Any) -> None:
        steps, low, high = run.bias_range()
        axes.fill_between(steps, low, high, color=ONE, alpha=0.25, linewidth=0)
        for edge in (low, high):
            axes.plot(steps, edge, color=ONE, linewidth=1.6)
        _finish(axes, run, "router bias, smallest to largest", legend=None)

    return _figure(draw, HALF, "bias")


def _colours() -> Any:
    """Below the mean blue, at the mean pale, above it orange to red; told apart by colour-blind readers too."""
    from matplotlib.colors import LinearSegmentedColormap

    stops = ["#2a5c99", "#8fb4d6", "#f1efe9", "#f0a860", "#b3341f"]
    return LinearSegmentedColormap.from_list("load", stops)


def _bar(image: Any, axes: Any) -> Any:
    """The scale of colours beside an image, or beside all the panels that share it."""
    bar = image.figure.colorbar(image, ax=axes, pad=0.015, fraction=0.045, aspect=28)
    bar.outline.set_visible(False)
    return bar


def block_heat_map(run: RunData) -> str:
    """max/mean load of every MoE block (rows) over steps (columns)."""
    lines = [line for line in run.metrics if line.get("expert_load")]
    width = min(len(lines), 400)
    groups = np.array_split(np.array(even([line["expert_load"] for line in lines])), width)
    image_MS = np.stack([group.mean(0) for group in groups], axis=1)
    blocks = image_MS.shape[0]

    def draw(axes: Any) -> None:
        from matplotlib.colors import LinearSegmentedColormap

        colours = LinearSegmentedColormap.from_list(
            "excess", ["#f1efe9", "#f0a860", "#b3341f", "#5d0f16"]
        )
        shown = axes.imshow(
            image_MS, aspect="auto", interpolation="nearest", cmap=colours, vmin=1,
            vmax=max(2.0, float(np.nanquantile(image_MS, 0.98))),
            extent=(lines[0]["step"], lines[-1]["step"] + 1, blocks + 0.5, 0.5),
        )  # fmt: skip
        axes.grid(False)
        axes.set_yticks(range(1, blocks + 1, max(1, math.ceil(blocks / 16))))
        axes.set_ylabel("MoE block")
        _bar(shown, axes)
        _finish(axes, run, "busiest expert / mean load", legend=None)

    return _figure(draw, (10.4, 1.6 + 0.24 * min(blocks, 16)), "blocks")


def chosen_blocks(count: int) -> list[int]:
    """At most `MOST_BLOCKS` block numbers, evenly spread from the first to the last."""
    if count <= MOST_BLOCKS:
        return list(range(count))
    return [round(i * (count - 1) / (MOST_BLOCKS - 1)) for i in range(MOST_BLOCKS)]


def expert_heat_maps(run: RunData) -> str:
    """Every expert's share over time, one panel per MoE block: load over mean load, on a logarithmic colour scale."""
    loads_SME = np.array(even([line["load"] for line in run.loads]), dtype=float)
    shares = loads_SME / np.maximum(loads_SME.mean(-1, keepdims=True), 1e-9)
    steps = [line["step"] for line in run.loads]
    blocks = chosen_blocks(shares.shape[1])
    columns = min(3, len(blocks))
    rows = math.ceil(len(blocks) / columns)

    def draw(axes: Any) -> None:
        panels = list(np.atleast_1d(axes).flat)
        for panel in panels[len(blocks) :]:
            panel.set_axis_off()
        for panel, block in zip(panels, blocks, strict=False):
            octaves = np.log2(np.maximum(shares[:, block].T, 1 / 4))
            image = panel.imshow(
                octaves, aspect="auto", interpolation="nearest", cmap=_colours(), vmin=-2, vmax=2,
                extent=(steps[0], steps[-1] + 1, shares.shape[2] - 0.5, -0.5),
            )  # fmt: skip
            panel.grid(False)
            panel.set_title(f"block {block + 1}", color=TEXT)
        for panel in panels[::columns]:
            panel.set_ylabel("expert")
        for panel in panels[max(0, len(blocks) - columns) : len(blocks)]:
            panel.set_xlabel("step")
        bar = _bar(image, panels)
        bar.set_ticks([-2, -1, 0, 1, 2], labels=["¼", "½", "1", "2", "4"])
        bar.set_label("load / mean")

    return _figure(draw, (10.4, 0.5 + 2.0 * rows), "experts", rows, columns)
