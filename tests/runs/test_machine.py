"""What is refused for want of memory: one process, and ranks that share a machine or have a device each."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fathom import ModelConfig
from fathom.errors import FathomError, ParallelError
from fathom.parallel import Layout
from fathom.parallel.building import Holding, holdings
from fathom.planning import count_parameters
from fathom.runs import execute, machine
from fathom.runs.layout import RunLayout
from fathom.runs.machine import _Rank, check_memory, check_memory_of_ranks, least_memory
from fathom.runs.recipe import Recipe
from tests.parallel.processes import run
from tests.runs.tiny import tiny_recipe, write_corpus

MIB = 1 << 20
CPU = torch.device("cpu")


def check(told: list[_Rank], processes: int = 2) -> None:
    """One rank's view, where the others say what is given."""
    first = SimpleNamespace(place=0)
    mesh = SimpleNamespace(pp=first, dp=first)
    crew: Any = SimpleNamespace(mesh=mesh, everyone=lambda mine: told)
    check_memory_of_ranks(RunLayout(tiny_recipe(), processes), crew, CPU)


def test_ranks_of_a_machine_share_its_memory() -> None:
    one, other = (_Rank(name, "cpu", 6 * MIB, 10 * MIB) for name in ("a", "b"))
    check([one, other])
    with pytest.raises(ParallelError, match=r"2 ranks take 12 MiB .* cpu of a has 10 MiB; raise"):
        check([one, other, one])


def test_each_gpu_has_its_own() -> None:
    ranks = [_Rank("a", f"cuda:{number}", 6 * MIB, 10 * MIB) for number in range(4)]
    check(ranks, 4)
    short = ranks[2]._replace(there=5 * MIB)
    with pytest.raises(ParallelError, match=r"one rank takes 6 MiB .* cuda:2 of a has 5 MiB"):
        check([*ranks[:2], short, ranks[3]], 4)


def test_a_system_that_does_not_tell_is_not_asked_again() -> None:
    check([_Rank("a", "cpu", 6 * MIB, None)] * 2)


def test_moments_are_shared_among_those_who_hold_the_same() -> None:
    """16 bytes a number where nobody has the same, 8 and a share of 8 where others do."""
    recipe = tiny_recipe(parallel={"ep": 2, "zero1": False})
    alone = 16 * count_parameters(recipe.model).trained
    (whole,) = holdings(recipe.model, RunLayout(tiny_recipe(), 1).layout)
    assert least_memory(whole) == alone
    layout = RunLayout(recipe, 4).layout
    (kept,), (shared,) = (holdings(recipe.model, layout, zero1=z) for z in (False, True))
    assert kept.weights == kept.updated == shared.weights < whole.weights
    experts = 2 * (whole.weights - kept.weights)
    dense = whole.weights - experts
    assert shared.updated == pytest.approx(dense / 4 + experts / 2 / 2, rel=1e-3)
    assert least_memory(Holding(3, 1)) == 32


def test_experts_fewer_than_ranks_lie_whole_on_the_first_ones() -> None:
    """Full sharding cuts rows, and an expert is one row: of eight over sixteen ranks half get none."""
    layout, config = Layout(dp=16), tiny_recipe().model
    shares = [holdings(config, layout, full_shard=True, place=place)[0] for place in range(16)]
    sizes = [share.weights for share in shares]
    assert sum(sizes) == count_parameters(config).trained
    experts = sizes[0] - sizes[8]
    assert experts >= 3 * config.moe_intermediate_size * config.hidden_size
    assert shares[0].updated == sizes[0] > sum(sizes) / 16


def test_one_process_is_told_of_a_smaller_recipe() -> None:
    with pytest.raises(FathomError, match=r"take 10,\d+ GiB and this cpu has .* smaller recipe"):
        check_memory(ModelConfig(), CPU)


def refused(recipe: Recipe, folder: Path) -> str:
    try:
        execute.run(recipe, folder)
    except FathomError as error:
        return str(error)
    return ""


def test_all_ranks_refuse_alike_before_anything_is_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "memory_of", lambda device: 1 << 10)
    recipe = tiny_recipe(write_corpus(tmp_path / "corpus.txt"))
    first, second = run(refused, 2, recipe, tmp_path / "run")
    assert first == second and first.startswith("2 ranks take 1 MiB for weights")
    assert not (tmp_path / "run").exists()
    assert "\n" not in first
