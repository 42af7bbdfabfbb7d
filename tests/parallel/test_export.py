"""An export from any layout is that of one process, and no rank needs the whole model for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import fathom
from fathom.errors import CheckpointError
from fathom.parallel import export as exporting
from fathom.parallel.export import export
from fathom.runs.saving import resume_run, save_run
from fathom.train.loop import train_stage
from tests.parallel.layouts_of_four import DUAL, EXPERTS, FULL, LAYERS, ONE, PIPE
from tests.parallel.processes import run
from tests.parallel.test_layouts import Case, plan, start


def exports(case: Case, directory: Path, settings: dict[str, Any]) -> None:
    trainer = start(case)
    stage = plan(case)
    stage.last_step = 1
    if case.layout.world > 1:
        resume_run(trainer, directory, {}, print)
    else:
        train_stage(trainer, stage, [])
        save_run(trainer, directory, 1, {})
    export(
        trainer.parallel, directory / f"of {case.layout.world}", max_shard_bytes=20_000, **settings
    )


EXPORTED = [
    pytest.param(DUAL, {}, id="DualPipe"),
    pytest.param(EXPERTS, {"dtype": torch.bfloat16}, id="dp4 ep2 in bfloat16"),
    pytest.param(replace(FULL, tied=True), {}, id="full tied"),
    pytest.param(replace(PIPE, tied=True), {}, id="1F1B tied", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("case", "settings"), EXPORTED)
def test_the_export_is_that_of_one_process(
    case: Case, settings: dict[str, Any], tmp_path: Path
) -> None:
    exports(replace(ONE, tied=case.tied), tmp_path, settings)
    run(exports, case.layout.world, case, tmp_path, settings)
    one, many = tmp_path / "of 1", tmp_path / f"of {case.layout.world}"
    names = sorted(path.name for path in one.iterdir())
    assert sorted(path.name for path in many.iterdir()) == names and len(names) > 6
    for name in names:
        if name.endswith(".safetensors"):
            expected, found = load_file(one / name), load_file(many / name)
            assert expected.keys() == found.keys()
            for tensor in expected:
                assert expected[tensor].dtype == found[tensor].dtype
                assert torch.equal(expected[tensor], found[tensor]), tensor
        else:
            assert (one / name).read_bytes() == (many / name).read_bytes(), name
    assert fathom.load(many).config.num_hidden_layers == LAYERS


def fetched(case: Case, directory: Path) -> list[int]:
    """Bytes that the first rank had from all for each file."""
    sizes: list[int] = []
    real = exporting._Asking.fetch

    def noting(asking: Any, *given: Any) -> dict[str, Tensor]:
        found = real(asking, *given)
        sizes.append(sum(tensor.nbytes for tensor in found.values()))
        return found

    exporting._Asking.fetch = noting  # type: ignore[method-assign]
    export(start(case).parallel, directory / "model", max_shard_bytes=60_000)
    return sizes


@pytest.mark.parametrize(
    "case", [pytest.param(PIPE, id="1F1B"), pytest.param(FULL, id="full", marks=pytest.mark.slow)]
)
def test_nobody_holds_more_than_a_file_besides(case: Case, tmp_path: Path) -> None:
    first, *others = run(fetched, case.layout.world, case, tmp_path)
    assert len(first) > 5 and max(first) <= 60_000 and not any(others)


def exports_to_a_file(case: Case, place: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        export(start(case).parallel, place)
    return str(error.value)


def test_an_export_that_cannot_be_fails_on_all(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for said in run(exports_to_a_file, 2, PIPE, tmp_path / "file"):
        assert "is a file" in said


def exports_without_room(case: Case, directory: Path, where: str) -> str:
    """Memory of the first rank ends in the middle of a file's tensors: of all, or of those that it has itself."""
    parallel = start(case).parallel
    made = [0]

    def short(real: Any) -> Any:
        def making(*given: Any, **named: Any) -> Tensor:
            made[0] += named.get("device") is None and parallel.mesh.rank == 0
            if made[0] == 2:
                raise RuntimeError("can't allocate memory")
            return real(*given, **named)

        return making

    module: Any = exporting
    if where == "all":
        module.torch = SimpleNamespace(**{**vars(torch), "empty": short(torch.empty)})
    else:
        module._part = short(module._part)
    with pytest.raises(RuntimeError, match="can't allocate") as error:
        export(parallel, directory / "model")
    return str(error.value)


@pytest.mark.parametrize("where", ["all", "its own"])
def test_a_first_rank_without_memory_leaves_nobody_waiting(where: str, tmp_path: Path) -> None:
    for said in run(exports_without_room, 2, PIPE, tmp_path, where, seconds=30):
        assert said == "can't allocate memory"
