"""Spikes, averages and TensorBoard in whole runs, and that a kill changes nothing of what is decided or kept."""

from __future__ import annotations

import json
import math
import shutil
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

import fathom
from fathom.data.loader import Batch, Loader
from fathom.errors import FathomError
from fathom.runs import execute
from fathom.runs.recipe import Recipe, recipe_from_dict
from fathom.runs.saving import newest_model
from fathom.train import checkpoint, loop
from tests.cli.calling import call
from tests.runs.tiny import SECOND_STAGE, STAGE, logged, tiny_dict, weights, write_corpus

BATCH, STEPS = 4, 16
POISON = range(6 * BATCH, 7 * BATCH)
"""Sequences of the first stage's step 7."""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the report and the measurement of this machine, which take longer than the run."""
    monkeypatch.setattr(execute, "_report", lambda job: None)
    monkeypatch.setattr(execute, "matmul_rate", lambda *given: 1e9)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("text") / "corpus.txt")


def recipe(corpus: Path, **tables: Any) -> Recipe:
    """Two stages and checkpoints at 4, 8, 12 and 16; a guard that acts after four steps on what is far out of line."""
    monitor = {"eval_every": 5, "eval_tokens": 40, "sample_every": 99, "sample_tokens": 1}
    content = tiny_dict(corpus, stages=[STAGE, SECOND_STAGE], **{"monitor": monitor, **tables})
    content["guard"] = {"window": 8, "warmup": 4, "threshold_z": 20.0, **tables.get("guard", {})}
    return recipe_from_dict(content)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sequences of POISON make a loss that is not a number, whichever step takes them; all that was taken.

    What is only read ahead does not count.
    """
    read_batch, real, taken = Loader.batch, loop.accumulate_gradients, list[int]()
    batches: list[tuple[Batch, range]] = []

    def reading(loader: Loader, first_sequence: int, count: int) -> Batch:
        batch = read_batch(loader, first_sequence, count)
        batches.append((batch, range(first_sequence, first_sequence + count)))
        return batch

    def spoilt(model: Any, batch: Batch, micro_batch: int, at: Any, *more: Any) -> Any:
        sequences = next(found for other, found in batches if other is batch)
        taken.append(sequences.start)
        found = real(model, batch, micro_batch, at, *more)
        if at.stage == "pretrain" and set(sequences) & set(POISON):
            found.total = found.total * math.nan
        return found

    monkeypatch.setattr(Loader, "batch", reading)
    monkeypatch.setattr(loop, "accumulate_gradients", spoilt)
    return taken


def spikes(run: Path) -> list[dict[str, Any]]:
    log = run / "spikes.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def metrics(run: Path, key: str) -> list[Any]:
    return [line[key] for line in logged(run)["metrics.jsonl"]]


class Killed(BaseException):
    """What nothing catches."""


def killed_after(monkeypatch: pytest.MonkeyPatch, step: int, wanted: Recipe, run: Path) -> None:
    """Run until the given step's metrics are written (for the last time that they are), then die."""
    real = execute.RunFolder.append

    def deadly(folder: Any, log: str, line: dict[str, Any]) -> None:
        real(folder, log, line)
        if log == "metrics.jsonl" and line["step"] == step and not line["skipped"]:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(execute.RunFolder, "append", deadly)
        with pytest.raises(Killed):
            execute.run(wanted, run)


def assert_same(run: Path, reference: Path) -> None:
    assert logged(run) == logged(reference)
    assert spikes(run) == spikes(reference)
    assert weights(run) == weights(reference)


def test_a_quiet_run_computes_the_same_with_the_guard_and_without(
    corpus: Path, tmp_path: Path
) -> None:
    for action in ("skip", "off"):
        execute.run(recipe(corpus, guard={"action": action}), tmp_path / action)
    assert weights(tmp_path / "skip") == weights(tmp_path / "off")
    assert not (tmp_path / "skip" / "spikes.jsonl").exists()
    assert metrics(tmp_path / "skip", "loss") == metrics(tmp_path / "off", "loss")
    scored = [z is not None for z in metrics(tmp_path / "skip", "loss_z")]
    assert scored == [False] * 4 + [True] * 8 + [False] * 4, "each stage warms up for itself"
    assert metrics(tmp_path / "off", "loss_z") == [None] * STEPS
    assert metrics(tmp_path / "skip", "seq_len") == [32] * STEPS


def test_a_skipped_step_is_logged_with_its_data_and_after_a_kill_again(
    corpus: Path, tmp_path: Path, poisoned: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = recipe(corpus)
    run = execute.run(wanted, tmp_path / "run")
    (line,) = spikes(run)
    assert (line["step"], line["action"], line["stage"]) == (7, "skip", "pretrain")
    sources = {"all": BATCH}
    assert line["data"] == {"first_sequence": 6 * BATCH, "count": BATCH, "sources": sources}
    assert line["loss_z"] is None and "loss nan" in line["reason"]
    assert [reason is not None for reason in metrics(run, "skipped")] == [
        step == 7 for step in range(1, STEPS + 1)
    ]
    assert poisoned[:12] == list(range(0, 12 * BATCH, BATCH)), "data goes on"
    for step in (8, 10):
        killed_after(monkeypatch, step, wanted, tmp_path / f"killed-{step}")
        assert_same(execute.run(wanted, tmp_path / f"killed-{step}"), run)


def test_rolled_back_the_data_since_the_checkpoint_is_passed_over(
    corpus: Path, tmp_path: Path, poisoned: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 5 to 7 are undone; step 5 reads on where 7 ended, in both stages, and a kill after it repeats it all."""
    wanted = recipe(corpus, guard={"action": "rollback"}, ema={"decay": 0.9})
    run = execute.run(wanted, tmp_path / "run")
    (line,) = spikes(run)
    assert (line["step"], line["action"], line["to"], line["passed_over"]) == (7, "rollback", 4, 12)
    assert [first // BATCH for first in poisoned] == [*range(7), *range(7, 15), *range(4)]
    assert metrics(run, "step") == list(range(1, STEPS + 1))
    assert metrics(run, "skipped") == [None] * STEPS
    for step in (6, 10):  # before and after the next checkpoint
        killed_after(monkeypatch, step, wanted, tmp_path / f"killed-{step}")
        assert_same(execute.run(wanted, tmp_path / f"killed-{step}"), run)


def test_without_a_checkpoint_it_goes_back_to_the_start(
    corpus: Path, tmp_path: Path, poisoned: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And computes what a run computes that never saw the first seven batches. What there was is gone before."""
    changes: dict[str, Any] = {"guard": {"action": "rollback"}, "ema": {"decay": 0.9}}
    changes["checkpoint"] = {"every": 100, "keep": 2}
    there: list[weakref.ref[torch.nn.Parameter]] = []
    start = execute.Run._start

    def noting(job: execute.Run) -> loop.Trainer:
        assert not any(parameter() is not None for parameter in there)
        trainer = start(job)
        there.extend(map(weakref.ref, trainer.model.parameters()))
        return trainer

    with monkeypatch.context() as patch:
        patch.setattr(execute.Run, "_start", noting)
        run = execute.run(recipe(corpus, **changes), tmp_path / "run")
    assert [spike["to"] for spike in spikes(run)] == [0]
    job = execute.Run(
        recipe(corpus, **changes), tmp_path / "other", torch.device("cpu"), *[print] * 2
    )
    job.set_up()
    job.trainer.passed_over = {STAGE["name"]: 7 * BATCH}
    job.train()
    job.export()
    job.folder.close()
    assert weights(tmp_path / "other") == weights(run)
    assert logged(tmp_path / "other") == logged(run)


def test_roll_backs_that_lead_nowhere_end_the_run(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = loop.clip
    step = iter(range(1, 100))
    monkeypatch.setattr(
        loop, "clip", lambda *given: real(*given) * (math.nan if next(step) > 6 else 1)
    )
    wanted = recipe(corpus, guard={"action": "rollback", "max_rollbacks": 2})
    with pytest.raises(FathomError, match=r"2 roll-backs to step 4 did not lead past .*step-4"):
        execute.run(wanted, tmp_path / "run")
    assert [line["to"] for line in spikes(tmp_path / "run")] == [4, 4, 4]


def test_a_run_that_ends_lets_its_last_checkpoint_reach_the_disk(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is free for the next start then, which would remove what is half written."""
    clip, write, step = loop.clip, checkpoint._write_tensors, iter(range(1, 100))

    def slowly(*given: Any) -> None:
        time.sleep(1.0)
        write(*given)

    monkeypatch.setattr(
        loop, "clip", lambda *given: clip(*given) * (math.nan if next(step) > 4 else 1)
    )
    monkeypatch.setattr(checkpoint, "_write_tensors", slowly)
    wanted = recipe(corpus, guard={"action": "off"}, checkpoint={"every": 4, "asynchronous": True})
    with pytest.raises(FathomError, match="not finite at step 5"):
        execute.run(wanted, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-4"]


# --- the average -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def averaged_run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(execute, "_report", lambda job: None)
        return execute.run(
            recipe(corpus, ema={"decay": 0.9}), tmp_path_factory.mktemp("ema") / "run"
        )


def test_the_average_is_evaluated_beside_the_weights(averaged_run: Path, corpus: Path) -> None:
    evals = logged(averaged_run)["evals.jsonl"]
    assert all(line["ema_loss"] != line["loss"] for line in evals)
    model, _ = newest_model(fathom.runs.folder.RunFolder(averaged_run), print, ema=True)
    data = fathom.data.TokenData.open(averaged_run / "data")
    found = fathom.train.evaluate.evaluate(model, data, 32, 2)
    assert found.loss == pytest.approx(evals[-1]["ema_loss"], abs=1e-6)


def test_an_average_changes_nothing_of_the_run(
    averaged_run: Path, corpus: Path, tmp_path: Path
) -> None:
    plain = execute.run(recipe(corpus), tmp_path / "plain")
    assert weights(plain) == weights(averaged_run)
    assert logged(plain)["metrics.jsonl"] == logged(averaged_run)["metrics.jsonl"]


def test_export_of_the_average(
    averaged_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = call(capsys, "export", averaged_run, tmp_path / "out", "--ema")
    assert status == 0, err
    newest = checkpoint.checkpoints(averaged_run / "checkpoints")[-1]
    exported, last = fathom.load(tmp_path / "out").state_dict(), fathom.load(averaged_run / "model")
    held = {f"ema.{name}": torch.empty_like(t) for name, t in exported.items()}
    checkpoint.read_tensors(newest, held)
    assert all(torch.equal(exported[name], held[f"ema.{name}"]) for name in exported)
    assert not torch.equal(exported["model.norm.weight"], last.state_dict()["model.norm.weight"])
    asked = ("--prompt", "def ", "--ema", "--max-new-tokens", 3)
    status, out, err = call(capsys, "generate", averaged_run, *asked)
    assert status == 0 and out.count("def ") >= 1, err


@pytest.mark.parametrize("kind", ["no average", "no run folder"])
def test_an_average_that_is_not_there_is_refused(
    kind: str, averaged_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = averaged_run / "model"
    if kind == "no average":
        where = tmp_path / "run"
        shutil.copytree(averaged_run, where)
        text = (where / "recipe.toml").read_text().replace("decay = 0.9\n", "decay = 0.0\n")
        (where / "recipe.toml").write_text(text)
    status, _, err = call(capsys, "export", where, tmp_path / "out", "--ema")
    assert status == 2 and "leave --ema out" in err


# --- TensorBoard -------------------------------------------------------------------------------------


def test_tensorboard_has_the_numbers_of_the_logs_once(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when the run was killed behind a checkpoint."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monitor = {"eval_every": 5, "sample_every": 99, "sample_tokens": 1, "tensorboard": True}
    wanted, run = recipe(corpus, monitor=monitor), tmp_path / "run"
    killed_after(monkeypatch, 7, wanted, run)
    execute.run(wanted, run)
    events = accumulator.EventAccumulator(str(run / "tensorboard"), purge_orphaned_data=True)
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert [step for step, _ in found] == list(range(1, STEPS + 1))
    assert [value for _, value in found] == pytest.approx(metrics(run, "loss"), rel=1e-6)
    held_out = [line["loss"] for line in logged(run)["evals.jsonl"]]
    assert [event.value for event in events.Scalars("held_out/loss")] == pytest.approx(held_out)
    assert {"train/grad_norm", "train/lr", "train/max_load"} <= set(events.Tags()["scalars"])
    writing = [t for t in threading.enumerate() if type(t).__name__ == "_AsyncWriterThread"]
    assert not writing, "a writer was left open"


def test_tensorboard_missing_is_told_before_anything_is_written(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    wanted = recipe(corpus, monitor={"tensorboard": True})
    with pytest.raises(FathomError, match=r"needs the package tensorboard.*fathom\[tensorboard\]"):
        execute.run(wanted, tmp_path / "run")
    assert not (tmp_path / "run").exists()
