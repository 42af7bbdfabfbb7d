"""The command itself under torchrun: ends that all share, a rank that is killed, a rank that hangs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fathom.runs.tables import to_toml
from fathom.train.checkpoint import checkpoints
from tests.runs.test_parallel_run import lines
from tests.runs.tiny import STAGE, tiny_dict, weights, write_corpus

pytestmark = [
    pytest.mark.dist,
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="NCCL wants a GPU of its own for each process"
    ),
]
STEPS = 60
QUIET = {"eval_every": 1000, "sample_every": 1000, "load_every": 20}


class Command:
    """`torchrun … -m fathom run`, and what became of it."""

    def __init__(
        self, recipe: Path, out: Path, *options: str, ranks: int = 2, program: str = ""
    ) -> None:
        """options: restarts and changes of the recipe; program: a script to run in place of `-m fathom`."""
        self.out = out
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        torchrun += [f"--nproc-per-node={ranks}", "--shutdown-timeout=10", "--max-restarts"]
        restarts, *changes = options
        sets = [word for change in changes for word in ("--set", change)]
        start = [program] if program else ["-m", "fathom"]
        command = [*torchrun, restarts, *start, "run", str(recipe), "--out", str(out), *sets]
        root = str(Path(__file__).parents[2])
        environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()

    def until(self, step: int) -> None:
        """Return once a step is logged."""
        log, deadline = self.out / "metrics.jsonl", time.monotonic() + 60
        while not log.exists() or len(log.read_text().splitlines()) < step:
            assert time.monotonic() < deadline and self.process.poll() is None
            time.sleep(0.02)

    def rank(self, rank: int) -> int:
        """The process of a rank."""
        return next(pid for pid, number in self._children() if number == rank)

    def _children(self) -> Iterator[tuple[int, int]]:
        pids = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        for pid in map(int, pids.split()):
            words = Path(f"/proc/{pid}/environ").read_text().split("\0")
            found = [word for word in words if word.startswith("RANK=")]
            if found:
                yield pid, int(found[0].removeprefix("RANK="))

    def end(self) -> tuple[int, str, str]:
        """Status, and what was said."""
        out, err = self.process.communicate(timeout=150)
        return self.process.returncode, out, err


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    corpus = write_corpus(folder / "corpus.txt")
    content = tiny_dict(
        corpus, stages=[{**STAGE, "steps": STEPS}], parallel={"ep": 2}, monitor=QUIET
    )
    (folder / "tiny.toml").write_text(to_toml(content))
    return folder / "tiny.toml"


@pytest.fixture(scope="module")
def undisturbed(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    with Command(recipe, out, "0") as command:
        status, said, trouble = command.end()
    assert status == 0, trouble
    assert said.count("stage pretrain: steps") == 1, "one rank speaks"
    return out


def assert_same(run: Path, reference: Path) -> None:
    assert lines(run / "metrics.jsonl") == lines(reference / "metrics.jsonl")
    assert weights(run) == weights(reference) and weights(run)


@pytest.mark.parametrize(
    ("number", "says"),
    [(signal.SIGKILL, "gone without a word"), (signal.SIGSTOP, "no sign of life for 30 s")],
)
def test_after_a_lost_rank_torchrun_goes_on_by_itself(
    number: signal.Signals, says: str, recipe: Path, undisturbed: Path, tmp_path: Path
) -> None:
    with Command(recipe, tmp_path / "run", "1") as command:
        command.until(10)
        os.kill(command.rank(1), number)
        status, said, trouble = command.end()
    assert status == 0, trouble
    assert re.search(
        rf"error: rank 1 is {'gone: ' if number == signal.SIGSTOP else ''}{says}", trouble
    )
    assert re.search(r"checkpoint of step \d+ found: going on from there", said)
    assert_same(tmp_path / "run", undisturbed)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_it_saves_once_and_the_same_command_goes_on(
    number: signal.Signals, recipe: Path, undisturbed: Path, tmp_path: Path
) -> None:
    with Command(recipe, tmp_path / "run", "0") as command:
        command.until(10)
        command.process.send_signal(number)
        status, said, _ = command.end()
    last = len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert status != 0 and f"stopped; the same command goes on from step {last}" in said
    assert checkpoints(tmp_path / "run" / "checkpoints")[-1].name == f"step-{last}"
    with Command(recipe, tmp_path / "run", "0") as command:
        assert command.end()[0] == 0
    assert_same(tmp_path / "run", undisturbed)


def test_what_all_refuse_is_said_once(recipe: Path, tmp_path: Path) -> None:
    with Command(recipe, tmp_path / "run", "0", "parallel.ep=3") as command:
        status, _, trouble = command.end()
    told = [line for line in trouble.splitlines() if line.startswith("error: ")]
    assert status != 0 and len(told) == 1 and "ep = 3 need 3 processes" in told[0]
    assert trouble.count("exitcode  : 2") == 1 and not (tmp_path / "run").exists()
    assert "need 3 processes" in trouble.split("Root Cause")[1], "torchrun says it too, at the end"


def test_what_all_ranks_meet_is_said_once(recipe: Path, tmp_path: Path) -> None:
    """A loss that is not finite stops the guard on all of them, once: they have met the same."""
    changes = ("stages.pretrain.lr=1e30", "guard.action='record'", "optim.clip_norm=1e30")
    with Command(recipe, tmp_path / "run", "0", *changes) as command:
        status, _, trouble = command.end()
    told = [line for line in trouble.splitlines() if line.startswith("error: ")]
    assert status != 0 and len(told) == 1 and "are not finite at step" in told[0]
    found = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert found["layout"] == "pp1 dp2 ep2"


SPOILT = """
import os
from fathom.cli import main
from fathom.errors import FathomError
from fathom.train import loop

real = loop.train_step

def spoilt(trainer, plan, reader, step):
    if step == 5 and os.environ["RANK"] == "1":
        raise {error}
    return real(trainer, plan, reader, step)

loop.train_step = spoilt
main()
"""


@pytest.mark.parametrize(
    ("error", "says", "status"),
    [
        ("FathomError('this one alone')", "error: rank 1: this one alone", 2),
        ("ValueError('a fault of ours')", "error: rank 1: ValueError: a fault of ours", 1),
    ],
)
def test_what_one_rank_meets_is_said_with_its_number(
    error: str, says: str, status: int, recipe: Path, tmp_path: Path
) -> None:
    program = tmp_path / "spoilt.py"
    program.write_text(SPOILT.format(error=error))
    began = time.monotonic()
    with Command(recipe, tmp_path / "run", "0", program=str(program)) as command:
        _, _, trouble = command.end()
    told = [line for line in trouble.splitlines() if line.startswith("error: ")]
    assert told == [says] and f"exitcode  : {status}" in trouble
    assert ("Traceback" in trouble.split("error: ")[0]) == (status == 1)
    assert time.monotonic() - began < 40, "nobody waits for the one that is gone"
