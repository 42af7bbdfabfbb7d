"""Whole runs, tiny: everything is there at the end, and whatever happens on the way leaves no trace in it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fathom
from fathom.data import TokenData, Tokenizer
from fathom.errors import CheckpointError, FathomError
from fathom.runs import execute
from fathom.runs.recipe import Recipe, load_recipe
from fathom.runs.tables import to_toml
from fathom.train import checkpoint, loop
from fathom.train.ema import averaged
from tests.cli.calling import call, status_of
from tests.runs.killing import forked_runs
from tests.runs.tiny import (
    LOGS,
    SECOND_STAGE,
    STAGE,
    logged,
    tiny_dict,
    weights,
    write_corpus,
)

YARN = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}
STEPS = 16


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stages, the second under YaRN and with the other settings changed too."""
    folder = tmp_path_factory.mktemp("recipe")
    corpus = write_corpus(folder / "corpus.txt")
    stages = [STAGE, {**SECOND_STAGE, "rope_scaling": YARN}]
    (folder / "tiny.toml").write_text(to_toml(tiny_dict(corpus, stages=stages)))
    return folder / "tiny.toml"


@pytest.fixture(scope="module")
def recipe(recipe_file: Path) -> Recipe:
    return load_recipe(recipe_file)


@pytest.fixture(scope="module")
def finished(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to, report and all."""
    return execute.run(recipe, tmp_path_factory.mktemp("runs") / "finished")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the report, which takes longer than the run."""
    monkeypatch.setattr(execute, "_report", lambda job: None)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C as a person's shell has it; what runs in the background of a script ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def assert_same(run: Path, reference: Path) -> None:
    """Logs, samples and final weights are those of the reference, to the last bit."""
    found, expected = logged(run), logged(reference)
    for log in LOGS:
        assert found[log] == expected[log], log
    assert weights(run) == weights(reference)


# --- a run -----------------------------------------------------------------------------------------


def test_everything_is_there(finished: Path, recipe: Recipe) -> None:
    names = {path.name for path in finished.iterdir() if not path.name.startswith(".")}
    files = {"recipe.toml", "environment.json", "report.html", *LOGS}
    assert names == {*files, "checkpoints", "data", "model"}
    assert load_recipe(finished / "recipe.toml") == recipe
    assert json.loads((finished / "environment.json").read_text())["torch"] == torch.__version__
    kept = [path.name for path in checkpoint.checkpoints(finished / "checkpoints")]
    assert kept == ["step-12", f"step-{STEPS}"]


def test_each_step_has_its_line(finished: Path, recipe: Recipe) -> None:
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for line in lines:
        moment = recipe.at(step=line["step"])
        assert (line["stage"], line["lr"], line["gamma"]) == (moment.stage, moment.lr, moment.gamma)
        assert line["tokens"] == moment.tokens and line["mtp_weight"] == moment.mtp_weight
        assert len(line["expert_load"]) == 2 and line["max_load"] == max(line["expert_load"]) >= 1
        assert line["seconds"] > 0 < line["mfu"]
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_the_other_logs_come_when_they_are_due(finished: Path) -> None:
    found = logged(finished)
    assert [line["step"] for line in found["evals.jsonl"]] == [5, 10, 12, 15, 16]
    assert [line["step"] for line in found["samples.jsonl"]] == [6, 12, 16]
    assert [line["step"] for line in found["load.jsonl"]] == [3, 6, 9, 12, 15, 16]
    seen = [line["held_out_tokens"] for line in found["evals.jsonl"]]
    assert seen[:2] == [39, 39] and seen[2] == seen[4] > 50, "all at the end of a stage"
    blocks = found["load.jsonl"][0]["load"]
    assert [sum(block) for block in blocks] == [4 * 32 * 2, 4 * 31 * 2]


def test_loss_by_position_before_and_after_each_stage(finished: Path, recipe: Recipe) -> None:
    lines = logged(finished)["positions.jsonl"]
    assert [(line["step"], line["stage"], line["when"]) for line in lines] == [
        (0, "pretrain", "before"),
        (12, "pretrain", "after"),
        (12, "anneal", "before"),
        (STEPS, "anneal", "after"),
    ]
    for line, stage in zip(lines, (s for s in recipe.stages for _ in range(2)), strict=True):
        assert line["seq_len"] == stage.seq_len == line["edges"][-1]
        assert len(line["loss"]) == len(line["edges"]) - 1
    start, end, with_yarn, _ = (line["loss"][-1] for line in lines)
    assert end < start and with_yarn != end, "the next stage's rotary settings hold already"


def test_the_export_is_the_model_at_the_end(finished: Path, recipe: Recipe) -> None:
    model = fathom.load(finished / "model")
    assert model.config.rope_scaling is not None and model.config.rope_scaling["factor"] == 2.0
    kept = execute.Run(recipe, finished, torch.device("cpu"), lambda p: None, lambda line: None)
    kept.data = TokenData.open(finished / "data")
    kept.trainer = loop.Trainer.start(kept._build_model(None), recipe.optim)
    execute.resume_run(
        kept.trainer, finished / "checkpoints", kept._data_marks(), lambda line: None
    )
    for name, tensor in kept.trainer.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert Tokenizer.load(finished / "model").vocab_size == recipe.model.vocab_size


@pytest.mark.usefixtures("quick")
def test_running_again_changes_nothing(finished: Path, recipe: Recipe, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    before = {p: p.stat().st_mtime_ns for p in (run / "checkpoints").rglob("*")}
    said: list[str] = []
    shutil.rmtree(run / "model")  # as if killed before the export
    (run / ".model.partial").mkdir()
    execute.run(recipe, run, say=said.append)
    assert_same(run, finished)
    assert (run / "model" / "config.json").read_text() == (
        finished / "model" / "config.json"
    ).read_text(), "the last stage's rope_scaling must be found again"
    assert {p: p.stat().st_mtime_ns for p in (run / "checkpoints").rglob("*")} == before
    assert any("all steps are done" in line for line in said)
    assert not (run / ".model.partial").exists()


# --- what happens on the way -------------------------------------------------------------------------


def test_killed_again_and_again_it_ends_the_same(
    recipe_file: Path, finished: Path, tmp_path: Path
) -> None:
    """One run killed eight times, SIGKILL, each time at another kind of instant (a line's number is of its own run)."""
    points = [
        ("while the tokens are written", 1),
        ("before the weights change", 3),  # nothing saved yet
        ("tensors written, no manifest", 1),  # the first checkpoint
        ("half a line of a log", 11),
        ("between weights and router bias", 3),
        ("before a checkpoint is dropped", 4),
        ("checkpoint not yet flushed", 5),
        ("while the model is exported", 1),
    ]
    run = tmp_path / "killed"
    statuses = forked_runs(recipe_file, [*((run, point) for point in points), (run, None)])
    assert statuses == [-signal.SIGKILL] * len(points) + [0]
    assert_same(run, finished)
    left = [path.name for path in run.rglob(".*") if path.name != ".lock"]
    assert left == [], "leftovers of killed writers"


@pytest.mark.usefixtures("quick")
def test_a_damaged_checkpoint_is_named_and_made_again(
    finished: Path, recipe: Recipe, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    shard = next((run / "checkpoints" / f"step-{STEPS}").glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 0x10
    shard.write_bytes(content)
    said: list[str] = []
    execute.run(recipe, run, say=said.append)
    assert any(f"step-{STEPS} is damaged: {shard.name}" in line for line in said)
    assert any("step 12" in line for line in said)
    assert_same(run, finished)
    assert checkpoint.problem_with(shard.parent) is None


@pytest.mark.usefixtures("quick")
def test_a_full_disk_loses_nothing(
    finished: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full at the second checkpoint, and once more while a log is written."""
    real, calls = checkpoint._write_tensors, []

    def full(building: Path, *rest: Any) -> None:
        calls.append(building)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(building, *rest)

    monkeypatch.setattr(checkpoint, "_write_tensors", full)
    with pytest.raises(FathomError, match=r"step-8.*No space left on device.*step-4"):
        execute.run(recipe, tmp_path / "run")
    log = tmp_path / "run" / "samples.jsonl"
    log.rename(tmp_path / "samples")
    log.symlink_to("/dev/full")
    monkeypatch.setattr(execute.RunFolder, "forget_after", lambda folder, step, spikes: None)
    with pytest.raises(FathomError, match=r"samples\.jsonl could not be written: No space left"):
        execute.run(recipe, tmp_path / "run")
    log.unlink()
    (tmp_path / "samples").rename(log)
    monkeypatch.undo()
    monkeypatch.setattr(execute, "_report", lambda job: None)
    execute.run(recipe, tmp_path / "run")
    assert_same(tmp_path / "run", finished)


@pytest.mark.usefixtures("quick", "interruptible")
def test_ctrl_c_saves_says_how_to_go_on_and_leaves_with_130(
    recipe_file: Path,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["run", str(recipe_file), "--out", str(tmp_path / "run"), "--device", "cpu"]
    real, steps = loop.clip, []

    def press_ctrl_c(*given: Any) -> Any:
        steps.append(len(steps) + 1)
        if len(steps) == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*given)

    monkeypatch.setattr(loop, "clip", press_ctrl_c)
    status, said, _ = call(capsys, *command)
    assert status == 130
    assert "the same command goes on from step 6" in said
    kept = checkpoint.checkpoints(tmp_path / "run" / "checkpoints")
    assert [path.name for path in kept] == ["step-4", "step-6"]
    assert status_of(*command) == 0 and len(steps) == STEPS, "no step twice"
    assert_same(tmp_path / "run", finished)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("interruptible")
def test_a_second_ctrl_c_leaves_at_once(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def press_twice(*given: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(loop, "clip", press_twice)
    said: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        execute.run(recipe, tmp_path / "run", say=said.append)
    assert not checkpoint.checkpoints(tmp_path / "run" / "checkpoints")
    assert "goes on from the start" in said[-1]


@pytest.mark.usefixtures("quick")
def test_with_every_checkpoint_damaged_it_says_so_and_begins_anew(
    finished: Path, recipe: Recipe, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    for folder in checkpoint.checkpoints(run / "checkpoints"):
        (folder / "state.json").write_text("{}")
    said: list[str] = []
    execute.run(recipe, run, say=said.append)
    assert "no checkpoint is whole: beginning anew" in said
    assert_same(run, finished)


def test_other_data_under_a_checkpoint_is_refused(
    finished: Path, recipe: Recipe, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    shutil.rmtree(run / "data")
    corpus = Path(recipe.data.sources[0])
    before = corpus.read_text()
    corpus.write_text(before.replace("return", "yield"))
    try:
        with pytest.raises(CheckpointError, match="trained on another tokenizer and text"):
            execute.run(recipe, run)
    finally:
        corpus.write_text(before)


def test_ctrl_c_inside_the_checkpoint_library_is_ctrl_c(
    finished: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.distributed import checkpoint as dcp

    def press(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    model = fathom.Transformer(recipe.model)
    newest = checkpoint.checkpoints(finished / "checkpoints")[-1]
    monkeypatch.setattr(dcp.HuggingFaceStorageReader, "read_data", press)
    weights = {f"model.{name}": tensor for name, tensor in averaged(model).items()}
    with pytest.raises(KeyboardInterrupt):
        checkpoint.read_tensors(newest, weights)


def test_a_file_that_does_not_belong_to_a_checkpoint_is_found(
    finished: Path, tmp_path: Path
) -> None:
    newest = checkpoint.checkpoints(finished / "checkpoints")[-1]
    copy = Path(shutil.copytree(newest, tmp_path / newest.name))
    (copy / "extra.safetensors").write_bytes(b"")
    assert checkpoint.problem_with(copy) == "extra.safetensors does not belong to it"


def test_another_recipe_leaves_the_run_untouched(finished: Path, recipe_file: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*")}
    with pytest.raises(FathomError, match=r"stages\.pretrain\.lr: 0\.003 → 1\.0"):
        execute.run(load_recipe(recipe_file, ["stages.pretrain.lr=1"]), finished)
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*")} == before
