"""The report's arithmetic of cost, and the planner's errors against published runs, as they are."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fathom.planning.cluster import DEVICES, Cluster, read_cluster
from fathom.planning.layout import REPORT, check
from fathom.planning.published import POINTS, V3, Point, predictions
from fathom.planning.rates import Rates
from fathom.planning.run_cost import (
    HOURS_PER_TRILLION,
    PUBLISHED_HOURS,
    PUBLISHED_PRICE,
    Segment,
    days,
    hours,
    published_hours,
    run_cost,
)


def test_the_report_s_arithmetic() -> None:
    """Report §1 and Table 1."""
    assert published_hours(14.8e12) == PUBLISHED_HOURS["pre-training"] == 2_664_000
    total = sum(PUBLISHED_HOURS.values())
    assert (total, total * PUBLISHED_PRICE) == (2_788_000, 5_576_000)
    assert round(days(HOURS_PER_TRILLION, 2048), 1) == 3.7
    assert round(1e12 / HOURS_PER_TRILLION / 3600) == 1543
    assert hours(1543.21 * 3600, 1543.21) == 1


def test_predictions_are_what_the_documents_say() -> None:
    """docs/planning.md and docs/experiments/015 quote these; the first was to be within 15 %."""
    errors = {one.point.who: one.error for one in predictions()}
    assert abs(errors["DeepSeek"]) <= 0.15
    assert {who: round(100 * error) for who, error in errors.items()} == {
        "DeepSeek": 14,
        "Megatron-Bridge": 45,
        "NeMo Automodel": -11,
        "torchtitan 16B": 63,
    }


@pytest.mark.parametrize("point", POINTS, ids=lambda point: point.who)
def test_published_layouts_can_be(point: Point) -> None:
    check(point.layout, point.config, read_cluster(point.cluster), point.batch)


def test_segments_add_up() -> None:
    parts = [
        Segment("a", 1e12, 4096, 15360),
        Segment("a", 2e12, 4096, 7680),
        Segment("b", 1e12, 32768, 1920),
    ]
    cluster = read_cluster("h800x2048")
    cost = run_cost(V3, REPORT, cluster, Rates(), parts, whole=4096)
    assert [stage.stage for stage in cost.stages] == ["a", "b"]
    assert cost.tokens == 4e12 and cost.hours == sum(s.hours for s in cost.stages)
    assert cost.usd == 2 * cost.hours and cost.days == pytest.approx(cost.hours / 2048 / 24)
    assert cost.stages[1].hours > cost.stages[0].hours / 3
    sure = run_cost(V3, REPORT, cluster, replace(Rates(), good_time=1.0), parts, whole=4096)
    assert cost.hours == pytest.approx(sure.hours / 0.97)


def test_a_device_without_a_price() -> None:
    cost = run_cost(
        V3, REPORT, Cluster(DEVICES["h100"], 2048), Rates(), [Segment("a", 1e9, 4096, 15360)], 4096
    )
    assert cost.usd is None
