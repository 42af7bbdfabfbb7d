"""Schedules over tokens, and the axis on which short stages are seen beside long ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fathom import load_recipe
from fathom.errors import FathomError
from fathom.planning.describe import human
from fathom.runs.recipe import recipe_names
from fathom.runs.schedule_panels import Schedules, draw_panels
from fathom.runs.schedule_plot import INK, draw_schedule, schedules_of
from fathom.runs.token_axis import (
    LEAST_PIECE,
    LEAST_STAGE,
    TokenAxis,
    border_stages,
    stages_of,
)


def test_even_stages_have_a_plain_axis() -> None:
    axis = TokenAxis(((0.0, "a"), (400.0, "b")), 1000.0)
    assert axis.places == pytest.approx([0.0, 0.4, 1.0]) and axis.is_plain


def test_short_pieces_are_widened_and_the_order_kept() -> None:
    axis = TokenAxis(((0.0, "a"), (9e12, "b"), (9.9e12, "c"), (9.99e12, "d")), 1e13, (2e10,))
    widths = np.diff(axis.places)
    assert axis.knots == [0.0, 2e10, 9e12, 9.9e12, 9.99e12, 1e13] and not axis.is_plain
    assert axis.places[-1] == pytest.approx(1.0) and (widths > 0).all()
    assert widths[0] > LEAST_PIECE / 1.3 and widths[[3, 4]].min() > LEAST_STAGE / 1.3
    assert widths[1] == widths.max()


def test_both_sides_of_every_border_are_sampled() -> None:
    axis = TokenAxis(((0.0, "a"), (100.0, "b")), 200.0)
    points = axis.samples(5)
    assert points[0] == 0 and points[-1] == 200 and (np.diff(points) > 0).all()
    assert 100.0 in points and np.any((points > 100) & (points < 100.001))


def test_stages_begin_where_the_one_before_ended() -> None:
    assert stages_of(["a", "a", "b", "a"], [10, 20, 35, 50]) == (
        (0.0, "a"),
        (20.0, "b"),
        (35.0, "a"),
    )


@pytest.mark.parametrize("name", recipe_names())
def test_curves_are_the_recipe(name: str) -> None:
    recipe = load_recipe(name)
    found = schedules_of(recipe)
    assert found.tokens[0] == 0 and found.tokens[-1] == recipe.total_tokens
    assert [stage for _, stage in found.axis.stages] == [stage.name for stage in recipe.stages]
    for place in range(0, len(found.tokens), 97):
        moment = recipe.at(tokens=found.tokens[place])
        assert found.values["lr"][place] == moment.lr
        assert found.values["tokens_per_step"][place] == moment.batch * moment.seq_len


def test_the_report_s_own_marks_are_knots() -> None:
    """Warm-up, ramp, 10T, 14.3T, 14.633T, 14.8T and the two extensions, each wide enough to see."""
    axis = schedules_of(load_recipe("v3-671b")).axis
    marks = [human(knot, 4) for knot in axis.knots]
    assert marks[2:7] == ["469B", "10T", "14.3T", "14.63T", "14.8T"]
    assert len(marks) == 9 and np.diff(axis.places).min() > 0.04


def rate_axis(values: list[float]) -> tuple[str, list[str]]:
    """Scale and labels of the learning rate's axis."""
    drawing = Figure()
    axes = drawing.subplots()
    axis = TokenAxis(((0.0, "a"),), float(len(values)))
    found = Schedules(axis, [float(i) for i in range(len(values))], {"lr": values})
    draw_panels([axes], found, ["lr"], INK)
    FigureCanvasAgg(drawing).draw()
    labels = [label.get_text() for label in axes.get_yticklabels()]
    return axes.get_yscale(), labels


def test_the_report_s_rates_that_hold_have_ticks() -> None:
    scale, labels = rate_axis(list(schedules_of(load_recipe("v3-671b")).values["lr"]))
    assert scale == "log" and sorted(labels) == ["2.2e-4", "2.2e-5", "7.3e-6"]


def test_a_rate_that_falls_below_all_that_hold_has_an_axis_from_zero() -> None:
    falling = [2e-3 * step / 9 for step in range(9)] + [2e-3] * 9 + [2e-4] * 9 + [1e-4, 5e-5, 0.0]
    scale, labels = rate_axis(falling)
    assert scale == "linear" and {"0", "2e-3", "1e-3"} <= set(labels)
    assert "2e-4" not in labels, "no room above 0"


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_a_picture_is_written(tmp_path: Path, suffix: str) -> None:
    path = draw_schedule(load_recipe("nano-full"), tmp_path / f"schedule{suffix}")
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG" if suffix == ".png" else b"<?xml")
    if suffix == ".svg":
        text = content.decode()
        for expected in (
            "extend-8k",
            "λ, weight of the MTP loss",
            "α, weight of the balance loss",
            "short stretches are drawn wider",
        ):
            assert expected in text


@pytest.mark.parametrize("name", ["missing/schedule.png", "schedule.nonsense"])
def test_a_file_that_cannot_be_drawn_is_one_clear_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(FathomError, match=r"could not be drawn .* name a \.png, \.svg or \.pdf"):
        draw_schedule(load_recipe("nano"), tmp_path / name)


def test_borders_are_drawn_between_stages_only() -> None:
    axes = Figure().subplots()
    border_stages(axes, TokenAxis(((0.0, "a"), (1.0, "b"), (2.0, "c")), 3.0), "black")
    assert [line.get_xdata()[0] for line in axes.lines] == [1.0, 2.0]
