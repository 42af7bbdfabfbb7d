"""Layouts: what can be, how layers are split, what is refused and how."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fathom.errors import PlanError
from fathom.planning.cluster import read_cluster
from fathom.planning.layer_split import even_split
from fathom.planning.layout import REPORT, PlannedLayout, check, micro_batches, stages
from fathom.planning.published import V3
from fathom.planning.rank_memory import held, rank_parameters

H800 = read_cluster("h800x2048")


def test_the_report_s_layout() -> None:
    """Report §3.1: PP 16, EP 64 over 8 nodes; 2,048 / 16 = 128 devices to a stage, two expert groups."""
    check(REPORT, V3, H800, 15360)
    assert REPORT.world == 2048 and REPORT.dp // REPORT.ep == 2
    assert micro_batches(REPORT, 15360) == 120
    parts = stages(REPORT, V3)
    assert [layer for part in parts for layer in part.layers] == list(range(62))
    assert parts[0].first and parts[-1].last and 61 in parts[-1].layers
    assert max(len(part.layers) for part in parts) == 4


@pytest.mark.parametrize("name", ["1F1B", "ZB1P", "DualPipe", "DualPipeV", "ZBV"])
def test_a_pipeline_holds_the_model_once_or_twice(name: str) -> None:
    """Parameters over all ranks: the model, twice for two directions, and MTP's second embedding."""
    from fathom.planning import count_parameters

    layout = PlannedLayout(pp=8, dp=8, ep=8, schedule=name, fp8=False)
    total = sum(
        part.shared + part.experts * layout.ep
        for part in (rank_parameters(V3, layout, rank) for rank in range(layout.pp))
    )
    model = count_parameters(V3)
    again = {"1F1B": 1, "ZB1P": 1}.get(name, 0) * model.vocabulary
    assert total == layout.traits.copies * model.trained + again
    every = [held(V3, layout, [part], mtp=False) for part in stages(layout, V3)]
    assert sum(p.shared + p.experts * layout.ep for p in every) == model.trained


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=12),
    st.integers(0, 20),
    st.integers(1, 6),
)
def test_even_splits(weights: list[int], tail: int, count: int) -> None:
    """Every layer once; the heaviest part no heavier than in any other split."""
    if count > len(weights) + 1:
        return
    parts = even_split(tuple(map(float, weights)), float(tail), count)
    assert len(parts) == count and sum(parts) == len(weights)

    def heaviest(counts: tuple[int, ...]) -> float:
        sums, start = [], 0
        for part in counts:
            sums.append(sum(weights[start : start + part]))
            start += part
        return max(*sums[:-1], sums[-1] + tail) if len(sums) > 1 else sums[0] + tail

    assert heaviest(parts) == min(heaviest(other) for other in _splits(len(weights), count))


def _splits(layers: int, count: int) -> list[tuple[int, ...]]:
    """Every split in which only the last part may be empty."""
    if count == 1:
        return [(layers,)]
    return [
        (first, *rest)
        for first in range(1, layers + 1)
        for rest in _splits(layers - first, count - 1)
    ]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pp": 8}, "pp 8 x dp 128 = 1024 devices, but h800x2048 has 2048"),
        ({"ep": 48}, "ep = 48 must divide dp = 128"),
        ({"pp": 4, "dp": 512, "ep": 512}, "must divide the 256 routed experts"),
        ({"pp": 128, "dp": 16, "ep": 16}, "128 stages are more than the 61 layers"),
        ({"micro_batch": 7}, "a batch of 15360 sequences must be a multiple"),
        ({"micro_batch": 5}, "needs 32 micro-batches, and a batch of 15360 has 24"),
        ({"pp": 1, "dp": 2048, "schedule": "ZBV", "interleave": 2}, "interleave = 2 is for 1F1B"),
        ({"split": (1, 2)}, "split = 1,2 must be 16 numbers that make 61"),
        ({"recompute": "some"}, "recompute = 'some' must be one of none, report, full"),
        ({"moment_bytes": 3}, "moment_bytes = 3 must be 2"),
        ({"pp": 0}, "pp = 0 must be at least 1"),
    ],
)
def test_refused(changes: dict, said: str) -> None:
    with pytest.raises(PlanError, match=said):
        check(replace(REPORT, **changes), V3, H800, 15360)


def test_an_odd_number_of_micro_batches_is_for_one_direction() -> None:
    """As `fathom.parallel.schedule` has it: only DualPipe halves them."""
    with pytest.raises(
        PlanError, match="DualPipe needs an even number of micro-batches and has 33"
    ):
        micro_batches(REPORT, 33 * 128)
    assert micro_batches(replace(REPORT, schedule="DualPipeV"), 33 * 128) == 33


def test_a_dense_model_has_no_experts_to_divide() -> None:
    dense = V3.replace(first_k_dense_replace=61, num_nextn_predict_layers=0)
    with pytest.raises(PlanError, match="no experts to divide"):
        check(PlannedLayout(dp=8, ep=2), dense, read_cluster("h800x8"), 8)


def test_a_split_of_one_s_own() -> None:
    own = (3, *[4] * 14, 2)
    layout = replace(REPORT, split=own)
    check(layout, V3, H800, 15360)
    counts = [len(part.layers) for part in stages(layout, V3)]
    assert counts == [3, *[4] * 14, 3]  # MTP's block with the last
