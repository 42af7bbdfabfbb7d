"""Pictures of schedules: every box where the simulation has it, numbers only where there is room."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from fathom.errors import FathomError
from fathom.parallel import SCHEDULES, Costs, draw, schedule, simulate
from fathom.parallel.draw import COLOURS, draw_timeline

pytest.importorskip("matplotlib")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Figures that were to be saved, kept instead."""
    figures: list[Any] = []
    monkeypatch.setattr(draw, "save_picture", lambda figure, path, dpi: figures.append(figure))
    return figures


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_action_has_its_box(name: str, drawn: list[Any]) -> None:
    found = simulate(schedule(name, 4, 8), Costs(pair=2.5))
    draw_timeline(found, "unused.png")
    from matplotlib.colors import to_rgba

    kind_of = {to_rgba(colour): kind for kind, colour in COLOURS.items()}
    boxes = [
        (kind_of[colour], path.get_extents())
        for collection in drawn[0].axes[0].collections
        for colour, path in zip(
            map(tuple, collection.get_facecolor()), collection.get_paths(), strict=True
        )
        if colour in kind_of
    ]
    per_stage = [len([k for k, _ in boxes if k in kinds]) for kinds in ("F", "BI", "BW")]
    assert per_stage == [4 * 8] * 3
    assert max(extent.x1 for _, extent in boxes) == pytest.approx(found.makespan)
    for rank, spans in enumerate(found.timeline):
        row = [e for _, e in boxes if abs((e.y0 + e.y1) / 2 - rank) < 0.4]
        assert {round(e.x0, 6) for e in row} == {round(span.start, 6) for span in spans}


def test_numbers_where_there_is_room(drawn: list[Any]) -> None:
    for microbatches in (8, 200):
        draw_timeline(simulate(schedule("1F1B", 2, microbatches)), "unused.png", title="A title")
    short, long = ([text.get_text() for text in figure.axes[0].texts] for figure in drawn)
    assert sorted(short) == sorted([str(i) for i in range(8)] * 4) and not long
    assert drawn[0].axes[0].get_title(loc="left") == "A title"
    assert drawn[0].get_figwidth() < drawn[1].get_figwidth()


def test_colours_differ_in_grey() -> None:
    """By a tenth of the range at least."""
    from matplotlib.colors import to_rgb

    shades = sorted(0.299 * r + 0.587 * g + 0.114 * b for r, g, b in map(to_rgb, COLOURS.values()))
    assert all(b - a > 0.1 for a, b in pairwise(shades))


def test_files(tmp_path: Path) -> None:
    found = simulate(schedule("DualPipe", 2, 4))
    draw_timeline(found, tmp_path / "plan.svg")
    assert "DualPipe: 2 stages on 2 ranks, 4 micro-batches" in (tmp_path / "plan.svg").read_text()
    with pytest.raises(FathomError, match="no format of pictures"):
        draw_timeline(found, tmp_path / "plan.txt")
