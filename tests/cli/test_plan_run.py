"""From a plan to a run: the line that `fathom plan` ends with is a command that runs what was planned."""

from __future__ import annotations

import json
import shlex

import pytest

from fathom.runs.layout import RunLayout
from fathom.runs.recipe import load_recipe
from tests.cli.calling import call

MINI = ("mini", "--cluster", "h200x8", "--no-fp8")


def run_line(capsys: pytest.CaptureFixture[str], *words: str) -> list[str] | None:
    """The command's words; None where there is none."""
    status, text, _ = call(capsys, "plan", *words)
    assert status == 0
    last = text.splitlines()[-1]
    return shlex.split(last.removeprefix("run it: ")) if last.startswith("run it: ") else None


def as_run(command: list[str], devices: int) -> RunLayout:
    """What the command would be laid out as."""
    words = command[command.index("run") + 1 :]
    assert words[1::2] == ["--set"] * (len(words) // 2)
    return RunLayout(load_recipe(words[0], words[2::2]), devices)


@pytest.mark.parametrize(
    ("devices", "words"),
    [
        (8, (*MINI, "--pp", "2", "--ep", "2", "--schedule", "DualPipe", "--micro-batch", "2")),
        (8, (*MINI, "--pp", "4", "--split", "4,4,3,1", "--micro-batch", "4", "--no-zero1")),
        (8, (*MINI, "--full-shard", "--pp", "1", "--micro-batch", "4", "--recompute", "report")),
        (4, ("nano", "--cluster", "h200x4", "--no-fp8", "--pp", "2", "--schedule", "GPipe")),
        (2, ("nano", "--cluster", "laptopx2", "--set", "parallel.pp=2")),
        (64, ("v3-16b", "--cluster", "h200x64", "--no-fp8")),
    ],
)
def test_the_command_runs_what_was_planned(
    capsys: pytest.CaptureFixture[str], devices: int, words: tuple[str, ...]
) -> None:
    command = run_line(capsys, *words)
    assert command is not None
    found = json.loads(call(capsys, "plan", *words, "--json")[1])
    planned, run = found["layout"], as_run(command, devices)
    asked = run.recipe.parallel
    assert (run.layout.pp, run.layout.dp, run.layout.ep) == (
        planned["pp"], planned["dp"], planned["ep"],
    )  # fmt: skip
    assert (asked.zero1, asked.full_shard) == (planned["zero1"], planned["full_shard"])
    assert run.recipe.precision.recompute == (planned["recompute"] == "report")
    stage = max(run.recipe.stages, key=lambda one: one.tokens_asked)
    assert run.micro_batch(stage) == planned["micro_batch"]
    if run.plan:
        assert run.plan.name == planned["schedule"]
        if planned["split"]:
            assert [len(layers) for layers in run.plan.layers] == planned["split"]


def test_the_command_names_what_differs_and_nothing_else(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_line(capsys, "nano", "--cluster", "laptop") == ["fathom", "run", "nano"]
    asked = ("--set", "optim.clip_norm=2.0", "--set", "parallel.ep=4")
    found = run_line(capsys, *MINI, "--pp", "1", "--ep", "8", "--micro-batch", "4", *asked)
    assert found == [
        "torchrun", "--nproc-per-node", "8", "-m", "fathom", "run", "mini",
        "--set", "optim.clip_norm=2.0", "--set", "parallel.ep=8",
        "--set", "stages.pretrain.micro_batch=4",
    ]  # fmt: skip
    found = run_line(capsys, "v3-16b", "--cluster", "h200x16", "--no-fp8", "--ep", "16")
    assert found is not None and found[1:5] == ["--nnodes", "2", "--nproc-per-node", "8"]
    assert "parallel.devices_per_node=8" in found


def test_a_stage_without_a_layer_gets_one(capsys: pytest.CaptureFixture[str]) -> None:
    """ZBV's last stage has head and MTP alone in the plan; the line before says what a run has instead."""
    wish = ("nano", "--cluster", "laptopx2", "--pp", "2", "--schedule", "ZBV")
    command = run_line(capsys, *wish)
    assert command is not None
    plan = as_run(command, 2).plan
    assert plan is not None
    split = ",".join(str(len(layers)) for layers in plan.layers)
    before = call(capsys, "plan", *wish)[1].splitlines()[-2]
    assert f"{split} instead of " in before
    _, out, _ = call(capsys, "plan", *wish, "--split", split, "--json")
    assert f"{json.loads(out)['tokens_per_second_per_gpu']:,.0f} tokens/s" in before


@pytest.mark.parametrize(
    "words",
    [
        ("mini", "--cluster", "h200x8", "--ep", "8", "--micro-batch", "4"),
        (*MINI, "--pp", "2", "--schedule", "1F1B", "--interleave", "2"),
        (*MINI, "--pp", "2", "--recompute", "full"),
        (*MINI, "--pp", "2", "--schedule", "DualPipe", "--micro-batch", "2", "--no-overlap"),
        ("v3-671b", "--cluster", "laptop"),
    ],
)
def test_no_command_for_what_cannot_be_run(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    assert run_line(capsys, *words) is None
