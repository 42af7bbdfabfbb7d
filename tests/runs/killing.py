"""Runs that die: `die_at` plants a SIGKILL, `forked_runs` has a process of its own go through a list of such runs.

That process imports everything once and forks for each run, so that a run costs what it computes and no more.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
Point = tuple[str, int]
"""Where to die, and at which time of coming by there."""


def forked_runs(recipe: Path, runs: Sequence[tuple[Path, Point | None]]) -> list[int]:
    """Run `recipe` in each folder in turn, to its end or to the given point; wait statuses (-9: killed)."""
    plan = json.dumps([(str(folder), point) for folder, point in runs])
    command = [sys.executable, "-Wignore", "-m", "tests.runs.killing", str(recipe), plan]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def serve(recipe: str, plan: str) -> None:
    """The other side of `forked_runs`."""
    import torch
    import torch.distributed.checkpoint  # now, not in every run

    import fathom.runs.execute  # noqa: F401

    torch.set_num_threads(1)
    statuses = []
    for folder, point in json.loads(plan):
        process = os.fork()
        if process == 0:
            _one_run(recipe, folder, point)
        statuses.append(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
    print(json.dumps(statuses))


def _one_run(recipe: str, folder: str, point: Point | None) -> None:
    """In the fork: run, and leave without coming back to the caller."""
    from fathom.runs import execute
    from fathom.runs.recipe import load_recipe

    status = 1
    try:
        execute._report = lambda job: None  # takes longer than the run
        if point:
            die_at(*point)
        execute.run(load_recipe(recipe), folder)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def die() -> None:
    """SIGKILL to this process: no handler, no flush, no finally."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(where: str, time: int) -> None:
    """Be killed when this process comes by `where` for the `time`-th time."""
    from fathom.data.pipeline import packing
    from fathom.interop import writing
    from fathom.runs.folder import RunFolder
    from fathom.train import checkpoint, loop

    points: dict[str, tuple[Any, str]] = {
        "before the weights change": (loop, "set_learning_rate"),
        "between weights and router bias": (loop, "update_bias"),
        "tensors written, no manifest": (checkpoint, "sha256_of"),
        "checkpoint not yet flushed": (checkpoint, "flush"),
        "before a checkpoint is dropped": (checkpoint, "_set_aside"),
        "half a line of a log": (RunFolder, "append"),
        "while the tokens are written": (packing, "_write"),
        "while the model is exported": (writing, "_write_shard"),
    }
    owner, name = points[where]
    left, real = time, getattr(owner, name)

    def deadly(*given: Any, **named: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0 and where.startswith("half"):
            _half_a_line(real, *given)
        if left == 0:
            die()
        return real(*given, **named)

    setattr(owner, name, deadly)


def _half_a_line(append: Callable[..., None], folder: Any, log: str, line: dict[str, Any]) -> None:
    """What a kill in the middle of a write leaves."""
    append(folder, log, line)
    path = folder.path / log
    path.write_bytes(path.read_bytes()[:-25])


if __name__ == "__main__":
    serve(*sys.argv[1:])
