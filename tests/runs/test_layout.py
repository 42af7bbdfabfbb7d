"""Table [parallel]: what can be laid out over so many processes, and what is refused before anything starts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fathom.errors import FathomError, RecipeError
from fathom.runs.folder import RunFolder
from fathom.runs.layout import RunLayout, batch_sizes
from fathom.runs.parallel import ParallelConfig
from fathom.runs.recipe import load_recipe
from tests.cli.calling import call, status_of
from tests.runs.tiny import MODEL, STAGE, tiny_recipe

DEEP = {**MODEL, "num_hidden_layers": 8}
RAMP = {"batch": 16, "batch_start": 4, "batch_ramp_tokens": 1000, "steps": 40}


def layout(processes: int, stage: dict[str, Any] | None = None, **parallel: Any) -> RunLayout:
    stages = [{**STAGE, **(stage or {})}]
    return RunLayout(tiny_recipe(model=DEEP, stages=stages, parallel=parallel), processes)


@pytest.mark.parametrize(
    ("processes", "stage", "parallel", "said"),
    [
        (1, {}, {"pp": 2}, "pp = 2 and ep = 1 need 2 processes or a multiple, and there is 1; .*torchrun"),
        (6, {}, {"pp": 2, "ep": 2}, "need 4 processes or a multiple, and there are 6"),
        (1, {}, {"pp": 4, "ep": 4, "devices_per_node": 8}, "need 16 .*torchrun --nnodes 2 --nproc-per-node 8 -m"),
        (3, {"batch": 6}, {"ep": 3}, "ep = 3 must divide n_routed_experts = 8"),
        (3, {}, {}, r"pretrain: a batch of 4 sequences cannot be shared evenly by dp = 3.*a multiple of 3"),
        (4, RAMP, {}, "a batch of 5 sequences .*batch_start, batch and batch_multiple multiples of 4"),
        (2, {}, {"pp": 2, "schedule": "DualPipe"}, r"batch gives a pipeline 4 sequences.*at least 4"),
        (2, {"batch": 5, "micro_batch": 1}, {"pp": 2, "schedule": "DualPipe"}, "an even number"),
        (3, {}, {"pp": 3, "schedule": "DualPipe"}, "DualPipe with 3 stages"),
        (9, {"batch": 9}, {"pp": 9}, "parallel.pp = 9: 9 stages are too many for 8 layers"),
        (2, {}, {"pp": 2, "layers": [4, 5]}, r"parallel.layers = \[4, 5\] must be 2 numbers"),
        (2, {}, {"pp": 2, "schedule": "ZBV", "layers": [4, 4]}, "must be 4 numbers"),
        (4, {}, {"ep": 4, "devices_per_node": 3}, "one must divide the other"),
    ],
)  # fmt: skip
def test_refused(
    processes: int, stage: dict[str, Any], parallel: dict[str, Any], said: str
) -> None:
    with pytest.raises(FathomError, match=said) as refused:
        layout(processes, stage, **parallel)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"pp": 0}, "parallel.pp = 0 must be at least 1"),
        ({"devices_per_node": 0}, "parallel.devices_per_node = 0"),
        ({"schedule": "dualpipe"}, "did you mean 'DualPipe'"),
        ({"layers": (2, 2)}, "does nothing with parallel.pp = 1"),
        ({"pp": 2, "full_shard": True}, "full_shard = true with parallel.pp = 2 .*leave it out"),
        ({"pp": 2, "layers": (2, 0)}, "leaves a stage empty"),
    ],
)
def test_a_table_that_no_number_of_processes_mends(table: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        ParallelConfig(**table)


def test_all_sizes_of_a_growing_batch_are_known() -> None:
    for multiple in (1, 2, 3, 5):
        stage = tiny_recipe(
            stages=[{**STAGE, **RAMP, "batch_multiple": multiple}], model=MODEL
        ).stages[0]
        sizes = {stage.batches.size(sequences) for sequences in range(100)}
        assert sizes <= set(batch_sizes(stage))
    assert list(batch_sizes(tiny_recipe().stages[0])) == [4]
    layout(4, {**RAMP, "batch_multiple": 4})


@pytest.mark.parametrize(
    ("processes", "batch", "parallel", "rows"),
    [
        (1, 12, {}, 12),  # all of it
        (2, 12, {}, 6),
        (2, 12, {"pp": 2}, 3),  # four, two to a stage
        (4, 32, {"pp": 2}, 4),
        (2, 12, {"pp": 2, "schedule": "ZBV"}, 1),  # eight are wanted of four stages, and twelve are the next
        (2, 3, {"pp": 2}, 1),  # as many as there can be
        (2, 12, {"pp": 2, "schedule": "DualPipe"}, 3),
        (2, 10, {"pp": 2, "schedule": "DualPipe"}, 1),  # five are odd
    ],
)  # fmt: skip
def test_micro_batches_of_a_stage_that_names_none(
    processes: int, batch: int, parallel: dict[str, Any], rows: int
) -> None:
    found = layout(processes, {"batch": batch, "micro_batch": None}, **parallel)
    assert found.micro_batch(found.recipe.stages[0]) == rows


def test_bubble_of_a_step() -> None:
    found = layout(2, {"batch": 8, "micro_batch": 2}, pp=2, schedule="GPipe")
    # Huang et al. 2019: (P - 1) / (M + P - 1)
    assert found.bubble(found.recipe.stages[0]) == (4, pytest.approx(1 / 5))
    assert found.name == "pp2 dp1 ep1 GPipe" and layout(4, ep=2).name == "pp1 dp4 ep2"
    assert layout(4, full_shard=True).name == "pp1 dp4 ep1 full_shard"
    assert layout(1, full_shard=True).name == "pp1 dp1 ep1"


def test_which_stages_of_the_report_its_own_layout_can_hold() -> None:
    """§3.1, 3.2: DualPipe over 16 ranks wants 32 micro-batches. On 1,024 devices all of §4.2 have them; nothing of §4.3
    has, nor the first batch on 2,048. So `v3-671b` has no table [parallel]."""
    table = {"pp": 16, "ep": 64, "devices_per_node": 8, "schedule": "DualPipe"}
    whole = load_recipe("v3-671b", [f"parallel.{key}={value}" for key, value in table.items()])
    pre_training = replace(whole, stages=whole.stages[:4])
    found = RunLayout(pre_training, 1024)
    assert found.name == "pp16 dp64 ep64 DualPipe" and found.layout.nodes == 8
    assert found.bubble(whole.stages[3])[0] == 240
    for recipe, processes, said in (
        (pre_training, 2048, "constant.batch gives a pipeline 24 sequences .* at least 32"),
        (whole, 1024, "extend-32k.batch gives a pipeline 30 sequences .* at least 32"),
        (replace(whole, stages=whole.stages[5:]), 1024, "480 sequences cannot be shared evenly by dp = 64"),
        (whole, 1, "need 1024 processes .*torchrun --nnodes 128 --nproc-per-node 8 -m"),
    ):  # fmt: skip
        with pytest.raises(FathomError, match=said):
            RunLayout(recipe, processes)


def test_a_folder_goes_on_with_another_layout(tmp_path: Any) -> None:
    for parallel in ({}, {"pp": 2, "schedule": "ZB1P"}, {"zero1": False}, {"full_shard": True}):
        recipe, folder = tiny_recipe(parallel=parallel), RunFolder(tmp_path / "run")
        folder.claim(recipe)
        (folder.path / "metrics.jsonl").touch()
        folder.close()
        assert load_recipe(folder.recipe_file) == recipe


def test_dry_run_shows_it(capsys: pytest.CaptureFixture[str]) -> None:
    changes = (
        "--set",
        "parallel.pp=2",
        "--set",
        "parallel.ep=2",
        "--set",
        "stages.pretrain.batch=8",
    )
    status, out, _ = call(capsys, "run", "nano", "--dry-run", *changes)
    assert status == 0
    assert "layout pp2 dp2 ep2 1F1B: 4 processes" in out
    assert "4 micro-batches of 1, 20 % of the time idle" in out


def test_dry_run_refuses_to_gather_weights_for_each_micro_batch_of_a_pipeline(
    capsys: pytest.CaptureFixture[str],
) -> None:
    changes = ("--set", "parallel.pp=2", "--set", "parallel.full_shard=true")
    status, out, said = call(capsys, "run", "nano", "--dry-run", *changes)
    assert status == 2 and not out
    assert (
        said.count("\n") == 1 and "leave it out (parallel.zero1 shards the moments there)" in said
    )


def test_many_processes_want_torchrun(capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    out = tmp_path / "run"
    status = status_of("run", "nano", "--set", "parallel.pp=2", "--out", str(out))
    said = capsys.readouterr().err
    assert status == 2 and "torchrun --nproc-per-node 2" in said and not out.exists()
