"""Experts placed by load: DeepSeek's example and recorded cases, and what holds for any load."""

from __future__ import annotations

import json
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.errors import ParallelError
from fathom.parallel import loads_by_gpu, rebalance_experts
from tests.shared_data import shared_data

README_LOADS = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]
README_SLOTS = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]


def test_the_example_of_the_repository() -> None:
    """README of deepseek-ai/EPLB: two layers of 12 experts, 16 slots, 4 groups, 2 nodes, 8 devices."""
    phy2log, log2phy, logcnt = rebalance_experts(torch.tensor(README_LOADS), 16, 4, 2, 8)
    assert phy2log.tolist() == README_SLOTS
    assert logcnt[0].tolist() == [1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1]
    assert log2phy[0, 0].tolist() == [12, -1] and sorted(log2phy[0, 1].tolist()) == [13, 15]
    assert log2phy.shape == (2, 12, 2) and {t.dtype for t in (phy2log, log2phy, logcnt)} == {
        torch.int64
    }


def test_recorded_cases() -> None:
    """Seven runs of the published policy, hierarchical and global, up to 256 experts."""
    cases = json.loads(shared_data("golden/eplb_cases.json").read_text())
    assert len(cases) >= 7
    for case in cases:
        numbers = [case[k] for k in ("num_replicas", "num_groups", "num_nodes", "num_gpus")]
        phy2log, _, logcnt = rebalance_experts(torch.tensor(case["weight"]), *numbers)
        assert phy2log.tolist() == case["phy2log"], numbers
        assert logcnt.tolist() == case["logcnt"], numbers


def test_load_before_and_after() -> None:
    """On four devices, the example's busiest ones carry 1.28 and 1.79 times the mean with one slot for each expert."""
    loads = torch.tensor(README_LOADS)
    before = loads_by_gpu(loads, torch.arange(12).expand(2, 12), 4)
    assert before.tolist() == [[262, 330, 116, 325], [231, 280, 516, 129]]
    by_node = loads_by_gpu(loads, rebalance_experts(loads, 16, 4, 2, 4)[0], 4)
    anywhere = loads_by_gpu(loads, rebalance_experts(loads, 16, 1, 1, 4)[0], 4)
    assert by_node[0].tolist() == [211.5, 234.5, 287.5, 299.5]
    found = [(load.amax(1) / load.mean(1)).tolist() for load in (before, by_node, anywhere)]
    expected = [[1.278, 1.785], [1.160, 1.194], [1.067, 1.010]]
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


@st.composite
def cases(draw: st.DrawFn) -> tuple[torch.Tensor, int, int, int, int]:
    """Loads and numbers that divide; sometimes the groups do not divide among the nodes."""
    nodes, per_node = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    groups = nodes * draw(st.integers(1, 3)) if draw(st.booleans()) else draw(st.integers(1, 4))
    experts = groups * draw(st.integers(1, 4))
    gpus = nodes * per_node
    slots = gpus * (-(-experts // gpus) + draw(st.integers(0, 3)))
    high = draw(st.sampled_from([1, 20, 5000]))
    flat = draw(st.lists(st.integers(0, high), min_size=2 * experts, max_size=2 * experts))
    return torch.tensor(flat).view(2, experts), slots, groups, nodes, gpus


@settings(max_examples=200, deadline=None)
@given(cases())
def test_what_holds_for_any_load(case: tuple[torch.Tensor, int, int, int, int]) -> None:
    loads, _, groups, nodes, gpus = case
    experts = loads.shape[1]
    phy2log, log2phy, logcnt = rebalance_experts(*case)
    for layer in range(2):
        counted = torch.bincount(phy2log[layer], minlength=experts)
        assert torch.equal(counted, logcnt[layer]) and int(counted.min()) >= 1
        for expert in range(experts):
            mine = log2phy[layer, expert]
            assert (
                sorted(mine[mine >= 0].tolist())
                == (phy2log[layer] == expert).nonzero().flatten().tolist()
            )
            assert int((mine >= 0).sum()) == int(counted[expert])
    by_gpu = loads_by_gpu(loads, phy2log, gpus)
    torch.testing.assert_close(by_gpu.sum(1), loads.sum(1).double())
    per_slot = (loads / logcnt).gather(1, phy2log).double()
    hierarchical = groups % nodes == 0
    units = nodes if hierarchical else 1  # packed apart from each other
    spread = by_gpu.view(2, units, -1)
    largest = per_slot.view(2, units, -1).amax(2)
    assert ((spread.amax(2) - spread.amin(2)) <= largest * (1 + 1e-5)).all()
    if hierarchical:
        node_of = [
            set((row // (experts // groups)).tolist()) for row in phy2log.view(2 * nodes, -1)
        ]
        assert all(len(held) == groups // nodes for held in node_of)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=4), st.integers(0, 4))
def test_replicas_are_handed_out_as_well_as_can_be(loads: list[int], more: int) -> None:
    """No other counts have a smaller maximum of load per replica: every one of them is tried."""
    experts, slots = len(loads), len(loads) + more
    _, _, logcnt = rebalance_experts(torch.tensor([loads]), slots, 1, 1, 1)
    counts = (c for c in product(range(1, more + 2), repeat=experts) if sum(c) == slots)
    best = min(max(load / n for load, n in zip(loads, c, strict=True)) for c in counts)
    assert max(
        load / n for load, n in zip(loads, logcnt[0].tolist(), strict=True)
    ) == pytest.approx(best)


def test_layers_do_not_disturb_each_other() -> None:
    loads = torch.randint(0, 1000, (5, 32))
    together = rebalance_experts(loads, 40, 8, 4, 8)[0]
    alone = [rebalance_experts(loads[i : i + 1], 40, 8, 4, 8)[0] for i in range(5)]
    assert torch.equal(together, torch.cat(alone))


def test_groups_that_do_not_divide_are_ignored() -> None:
    """Global: as with one group on one node."""
    loads = torch.randint(0, 1000, (2, 24))
    assert torch.equal(
        rebalance_experts(loads, 32, 3, 2, 8)[0], rebalance_experts(loads, 32, 1, 1, 8)[0]
    )


@pytest.mark.parametrize(
    ("loads", "numbers", "why"),
    [
        (torch.ones(8), (8, 1, 1, 2), r"loads of shape \[8\]"),
        (torch.ones(0, 8), (8, 1, 1, 2), r"loads of shape \[0, 8\]"),
        (torch.tensor([[1.0, float("nan")]]), (2, 1, 1, 2), "negative, infinite or no number"),
        (torch.tensor([[1, -1]]), (2, 1, 1, 2), "negative, infinite or no number"),
        (torch.ones(1, 8), (6, 1, 1, 2), "6 slots for 8 experts"),
        (torch.ones(1, 8), (9, 1, 1, 2), "9 slots on 2 devices of 1 nodes"),
        (torch.ones(1, 8), (9, 1, 2, 3), "9 slots on 3 devices of 2 nodes"),
        (torch.ones(1, 8), (8, 3, 1, 2), "num_groups = 3 with 8 experts"),
        (torch.ones(1, 8), (8, 0, 1, 2), "num_groups = 0 with 8 experts"),
        (torch.ones(1, 8), (8, 1, 0, 2), "0 nodes"),
    ],
)
def test_what_is_refused(loads: torch.Tensor, numbers: tuple[int, ...], why: str) -> None:
    with pytest.raises(ParallelError, match=why):
        rebalance_experts(loads, *numbers)


def test_loads_of_other_layers_are_refused() -> None:
    for loads, gpus in ((torch.ones(3, 12), 8), (torch.ones(2, 12), 3)):
        with pytest.raises(ParallelError, match="16 slots of 2 layers"):
            loads_by_gpu(loads, torch.tensor(README_SLOTS), gpus)
