"""Layouts that are none, who belongs to which group, and the helper that forks ranks."""

from __future__ import annotations

import gc
import os
import time

import pytest
import torch
import torch.distributed as dist

from fathom.errors import ParallelError
from fathom.parallel import Layout, Mesh
from tests.model.tiny import tiny_config
from tests.parallel.processes import run


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pp": 0}, "pp = 0 must be at least 1"),
        ({"dp": 4, "ep": 3}, "ep = 3 must divide dp = 4"),
        ({"dp": 6, "ep": 6, "devices_per_node": 4}, "one must divide the other"),
        ({"devices_per_node": 0}, "devices_per_node = 0"),
    ],
)
def test_impossible_layouts(fields: dict, message: str) -> None:
    with pytest.raises(ParallelError, match=message):
        Layout(**fields)


def test_the_model_and_the_batch_have_a_say() -> None:
    with pytest.raises(ParallelError, match="n_routed_experts = 8"):
        Layout(dp=3, ep=3).check(tiny_config())
    with pytest.raises(ParallelError, match="a batch of 6 sequences"):
        Layout(dp=4).rows(6, 0)
    assert [list(Layout(dp=2).rows(6, rank)) for rank in range(2)] == [[0, 1, 2], [3, 4, 5]]


def test_as_many_processes_as_the_layout_needs() -> None:
    with pytest.raises(ParallelError, match="needs 2 processes, but there are 1"):
        Mesh(Layout(dp=2))


def test_the_reports_layout_has_two_expert_groups_of_eight_nodes_a_stage() -> None:
    layout = Layout(pp=16, dp=128, ep=64, devices_per_node=8)
    assert (layout.world, layout.replicas, layout.nodes) == (2048, 2, 8)
    assert Layout(dp=8, ep=4, devices_per_node=8).nodes == 1


def groups() -> dict[str, tuple[int, ...]]:
    mesh = Mesh(Layout(pp=1, dp=8, ep=4, devices_per_node=2))
    names = ("world", "pp", "dp", "ep", "replicas", "node", "across")
    found = {}
    for name in names:
        group = getattr(mesh, name)
        assert group.ranks[group.place] == mesh.rank == dist.get_rank()
        assert group.sum(torch.tensor(mesh.rank)).item() == sum(group.ranks)
        assert group.gather(torch.tensor([mesh.rank])).tolist() == list(group.ranks)
        part = group.scatter_sum(torch.arange(group.size) + mesh.rank)
        assert part.tolist() == [group.place * group.size + sum(group.ranks)]
        found[name] = group.ranks
    return found


def test_groups_of_eight_ranks() -> None:
    """dp 8 = 2 replicas x 2 nodes x 2 devices; consecutive ranks share a node."""
    everyone = run(groups, 8)
    assert everyone[5] == {
        "world": tuple(range(8)),
        "pp": (5,),
        "dp": tuple(range(8)),
        "ep": (4, 5, 6, 7),
        "replicas": (1, 5),
        "node": (4, 5),
        "across": (5, 7),
    }


def stage_groups() -> tuple[tuple[int, ...], ...]:
    mesh = Mesh(Layout(pp=2, dp=2, ep=2))
    return mesh.pp.ranks, mesh.dp.ranks, mesh.ep.ranks


def test_stages_keep_their_experts_to_themselves() -> None:
    assert run(stage_groups, 4)[3] == ((1, 3), (2, 3), (2, 3))


def second_rank_fails() -> None:
    if dist.get_rank() == 1:
        raise ValueError("as planned")
    if dist.get_rank() == 2:
        os._exit(1)


def test_every_failing_rank_is_told() -> None:
    with pytest.raises(AssertionError) as failure:
        run(second_rank_fails, 3)
    assert "rank 1:" in str(failure.value) and "ValueError: as planned" in str(failure.value)
    assert "rank 2:\nended without a word" in str(failure.value)


def collects_garbage() -> int:
    gc.collect()
    return int(Mesh(Layout(dp=2)).world.sum(torch.tensor(dist.get_rank())))


def test_what_failed_before_cannot_hang_the_next() -> None:
    """A store that a child found among its garbage would be waited for by the child for ever."""
    gc.disable()
    try:
        failures: list[object] = []
        try:
            run(second_rank_fails, 3)
        except AssertionError as failure:
            failures += [failure, failures]
        del failures
        assert run(collects_garbage, 2, seconds=20) == [1, 1]
    finally:
        gc.enable()


def first_rank_sleeps() -> None:
    if dist.get_rank() == 0:
        time.sleep(60)


def test_a_hanging_rank_is_named() -> None:
    with pytest.raises(AssertionError, match="rank 0 of 2 not done in 2 s"):
        run(first_rank_sleeps, 2, seconds=2)
