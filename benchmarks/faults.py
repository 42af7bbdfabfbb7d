"""Faults in runs of four processes: torchrun starts anew by itself, and the end is compared bit for bit.

A small recipe is run undisturbed in two layouts, one of them a pipeline. Then come the trials, half of them in each
layout, some saving behind the training: a rank killed or stopped (SIGKILL, SIGSTOP) at an instant of a step,
or at a file operation of a save; a disk that something else has filled, with a random number of bytes left,
when a save begins; a gradient or a loss of one rank that is not a number. Where the guard only records that,
the run ends, is started anew by torchrun, and must be the undisturbed one; where it skips the step, all ranks
must have skipped it, so the run must be the one in which the first rank met it.

Compared: every line of every log without what the clock decides, all files of the last checkpoint, the exported model.
A full disk is a file system of its own in memory, so mounting must be allowed: as root, or under
`unshare --map-root-user --mount`. `python benchmarks/faults.py --help`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import MIB, describe, environment, table, write_json
from kill_and_resume import differing, outcome
from small_model import MODEL

import fathom

RECIPE = """
name = "faults"
{model}[data]
sources = [{source}]
[ema]
decay = 0.99
[checkpoint]
every = 5
[monitor]
eval_every = 10
eval_tokens = 2000
sample_every = 1000
load_every = 5
[[stages]]
name = "pretrain"
steps = {steps}
seq_len = 64
batch = 16
micro_batch = 2
lr = 3e-3
warmup_steps = 5
"""
RANKS = 4
LAYOUTS = {
    "dp4 ep2 zero1": ("parallel.ep=2",),
    "pp2 dp2 ep2 DualPipe": ("parallel.pp=2", "parallel.ep=2", "parallel.schedule=DualPipe"),
}
KINDS = {"SIGKILL": 6, "SIGSTOP": 4, "disk full": 5, "not a number": 5}
"""Trials of each when there are twenty."""
EVERY = 5
COLUMNS = (
    "",
    "fault",
    "layout",
    "saving",
    "where",
    "said",
    "went on from",
    "lost steps",
    "outcome",
)
DISK = 48 * MIB


@dataclass
class Bench:
    """Where things are."""

    place: Path
    recipe: Path
    steps: int
    step_seconds: float = 0.1

    def run(self, out: Path, fault: dict[str, Any], *changes: str) -> tuple[int, str]:
        """torchrun to its end, one restart allowed; status, and all that was said."""
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        torchrun += [f"--nproc-per-node={RANKS}", "--shutdown-timeout=10", "--max-restarts=1"]
        sets = [word for change in changes for word in ("--set", change)]
        script = str(Path(__file__).with_name("faulty_rank.py"))
        command = [*torchrun, script, "run", str(self.recipe), "--out", str(out), *sets]
        paths = os.pathsep.join([str(Path(fathom.__file__).parents[1]), *sys.path])
        variables = {**os.environ, "OMP_NUM_THREADS": "1", "FAULT": json.dumps(fault)}
        done = subprocess.run(
            command,
            env=variables | {"PYTHONPATH": paths},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
        )
        return done.returncode, done.stdout


@dataclass
class Trial:
    """One fault."""

    number: int
    kind: str
    layout: str
    asynchronous: bool
    fault: dict[str, Any]
    where: str
    guard: str = "record"

    @property
    def changes(self) -> tuple[str, ...]:
        saving = (f"checkpoint.asynchronous={str(self.asynchronous).lower()}",)
        return (*LAYOUTS[self.layout], *saving, f"guard.action='{self.guard}'")


def trials(bench: Bench, count: int, seed: int) -> Iterator[Trial]:
    """So many, of every kind in turn; layouts and ways of saving alternate."""
    of_kind = [kind for kind, share in KINDS.items() for _ in range(share)]
    for index in range(count):
        number = seed + index
        chance, kind = random.Random(number), of_kind[index * len(of_kind) // count]
        layout = list(LAYOUTS)[index % 2]
        step, rank = chance.randrange(3, bench.steps - 1), chance.randrange(RANKS)
        fault: dict[str, Any] = {"rank": rank, "step": step}
        asynchronous, guard = index % 4 > 1, "record"
        if kind.startswith("SIG") and index % 3:
            after = chance.uniform(0, 2 * bench.step_seconds)
            fault |= {"kind": "signal", "signal": kind, "after": after}
            where = f"rank {rank}, {1000 * after:.0f} ms into step {step}"
        elif kind.startswith("SIG"):
            step = EVERY * chance.randrange(1, bench.steps // EVERY)
            operation = chance.randrange(1, 5)
            fault |= {"kind": "signal", "signal": kind, "step": step, "operation": operation}
            where = f"rank {rank}, operation {operation} of the save of step {step}"
        elif kind == "disk full":
            step, free = (
                EVERY * chance.randrange(2, bench.steps // EVERY),
                chance.randrange(2 * MIB),
            )
            fault |= {"kind": "disk", "step": step, "free": free}
            where = f"{free:,} bytes left at step {step}"
        else:
            of = chance.choice(("loss", "gradient"))
            guard = ("skip", "record")[index % 2 if index % 4 < 2 else 1 - index % 2]
            fault |= {"kind": "nan", "of": of, "parameter": chance.randrange(1000)}
            where = f"a {of} of rank {rank} at step {step}, guard {guard}"
        yield Trial(number, kind, layout, asynchronous, fault, where, guard)


@contextmanager
def small_disk(place: Path) -> Iterator[Path]:
    """A file system of `DISK` bytes in memory."""
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "faults", str(place)]
    if subprocess.run(mount, capture_output=True).returncode:
        sys.exit(
            "a small file system cannot be mounted here; run this as root, or under "
            "`unshare --map-root-user --mount`"
        )
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def attempt(bench: Bench, trial: Trial, expected: dict[str, Any]) -> list[str]:
    """One row: strike, let torchrun go on, compare."""
    began = time.monotonic()
    if trial.kind == "disk full":
        with small_disk(bench.place / f"disk-{trial.number}") as disk:
            row = _attempt(bench, trial, disk / "run", {**trial.fault, "disk": str(disk)}, expected)
    else:
        row = _attempt(bench, trial, bench.place / f"run-{trial.number}", trial.fault, expected)
    took = time.monotonic() - began
    print(f"{' | '.join(row)} ({took:.0f} s)", flush=True)
    return row


def _attempt(
    bench: Bench, trial: Trial, out: Path, fault: dict[str, Any], expected: dict[str, Any]
) -> list[str]:
    status, said = bench.run(out, fault, *trial.changes)
    resumed = re.findall(r"checkpoint of step (\d+) found", said)
    first = int(resumed[0]) if resumed else 0
    began_anew = said.count("stage pretrain: ") - 1
    if trial.guard == "skip":
        first = trial.fault["step"] - 1
    lost = trial.fault["step"] - 1 - first
    if status:
        wrong = f"ended with status {status}"
        print(said, flush=True)
    elif began_anew != (trial.guard != "skip"):
        wrong = f"began anew {began_anew} times"
    elif lost > EVERY * (1 + trial.asynchronous):
        wrong = f"{lost} steps were lost"
    else:
        wrong = differing(outcome(out), expected)
    shutil.rmtree(out, ignore_errors=True)
    errors = re.findall(r"^error: (.*)$", said, re.MULTILINE)
    return [
        str(trial.number),
        trial.kind,
        trial.layout,
        "behind" if trial.asynchronous else "waited for",
        trial.where,
        "; ".join(sorted({_short(error) for error in errors})) or "—",
        "the same attempt" if trial.guard == "skip" else f"step {first}" if first else "the start",
        str(lost),
        f"**{wrong}**" if wrong else "identical",
    ]


def _short(error: str) -> str:
    """What an error says before its remedy, without the paths of this machine."""
    return re.sub(r"\S*/", "", error.split(";")[0])[:120]


def references(bench: Bench, every: list[Trial]) -> dict[tuple[Any, ...], dict[str, Any]]:
    """What must come out: of undisturbed runs, and of runs whose first rank met what is not a number."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for trial in every:
        key = _key(trial)
        if key not in found:
            out = bench.place / f"reference-{len(found)}"
            fault = {**trial.fault, "rank": 0} if trial.guard == "skip" else {}
            began = time.monotonic()
            status, said = bench.run(out, fault, *trial.changes)
            if status:
                sys.exit(f"the run to compare with ended with status {status}:\n{said}")
            found[key] = outcome(out)
            lines = (out / "metrics.jsonl").read_text().splitlines()
            seconds = [json.loads(line)["seconds"] for line in lines]
            bench.step_seconds = statistics.median(seconds)
            took = time.monotonic() - began
            print(f"to compare with: {trial.layout}, {'struck' if fault else 'undisturbed'}: {took:.0f} s, "
                  f"{bench.step_seconds:.2f} s a step", flush=True)  # fmt: skip
    return found


def _key(trial: Trial) -> tuple[Any, ...]:
    step = trial.fault["step"] if trial.guard == "skip" else None
    return trial.layout, trial.guard, step


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--steps", type=int, default=30, help="steps of the run")
    parser.add_argument("--seed", type=int, default=0, help="number of the first trial, its seed")
    parser.add_argument("--json", type=Path, help="write every row there")
    options = parser.parse_args()
    facts = environment()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder).resolve()
        source, recipe = place / "text", place / "recipe.toml"
        shutil.copytree(Path(fathom.__file__).parent, source)  # a text that nobody edits meanwhile
        sizes = {"source": json.dumps(str(source)), "steps": options.steps}
        recipe.write_text(RECIPE.format(model=MODEL.format(layers=4), **sizes))
        bench = Bench(place, recipe, options.steps)
        every = list(trials(bench, options.trials, options.seed))
        expected = references(bench, every)
        every = list(trials(bench, options.trials, options.seed))  # steps are timed now
        rows = [attempt(bench, trial, expected[_key(trial)]) for trial in every]
    print(f"\n{describe(facts)}\n")
    print(table(COLUMNS, rows))
    found = [dict(zip(COLUMNS[1:], row[1:], strict=True)) for row in rows]
    write_json(options.json, {"environment": facts, "steps": options.steps, "trials": found})
    if any(row[-1] != "identical" for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
