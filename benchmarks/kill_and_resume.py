"""Kill and resume: SIGKILL at random instants, the same command again, everything compared bit for bit.

A small recipe (two stages, accumulation, MTP switched on late, checkpoints often) is run once without
interruption. Then, at each of many points, a fresh run is killed and the same command is given again
until it ends. Kills come from outside at a random time; or at a random file operation of the
process's own, for instance in the middle of writing a checkpoint; or many times in one run; or the
newest checkpoint is damaged after the kill. Compared with the uninterrupted run: every line of every
log without what the clock decides, all tensors of the last checkpoint, the exported model.
`python benchmarks/kill_and_resume.py --help`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import describe, environment, table, write_json
from safetensors.torch import load_file
from small_model import MODEL

import fathom
from fathom.runs.folder import LOGS, SPIKES

RECIPE = """
name = "kill-and-resume"
{model}initializer_range = 0.02
[data]
sources = [{source}]
[checkpoint]
every = 7
[monitor]
eval_every = 10
eval_tokens = 2000
sample_every = 20
sample_tokens = 20
load_every = 5
[[stages]]
name = "first"
steps = {first}
seq_len = 64
batch = 8
micro_batch = 3
lr = 3e-3
warmup_steps = 10
mtp_weight = 0.0
[[stages]]
name = "second"
steps = {second}
seq_len = 96
batch = 4
lr = 3e-3
lr_end = 3e-4
decay_steps = {second}
"""
COLUMNS = ("", "killed", "where", "lines then", "went on from", "outcome")
OF_THE_CLOCK = ("seconds", "tokens_per_second", "mfu", "slowest_rank", "slowest_ratio")

CHILD = """
import os, signal, sys
folder, count_file, last = sys.argv[1], sys.argv[2], int(sys.argv[3])
events = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"}
seen = 0
def watch(event, arguments):
    global seen
    if event in events and str(arguments[0]).startswith(folder):
        seen += 1
        if seen == last:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(watch)
from fathom.cli import main
try:
    main(sys.argv[4:])
finally:
    open(count_file, "w").write(str(seen))
"""
"""The command line, dying at file operation number `last` on a path below `folder` (0: never), or counting them."""


@dataclass
class Bench:
    """Where things are, and the command whose runs are killed."""

    place: Path
    recipe: Path
    seconds: float = 0.0
    """How long the uninterrupted run took."""

    def start(self, out: Path, watched: str = "", last: int = 0) -> subprocess.Popen[str]:
        """`fathom run` in a process of its own, output kept."""
        command = ["run", str(self.recipe), "--out", str(out), "--device", "cpu"]
        hook = [str(out / watched), str(self.place / "events"), str(last)]
        return subprocess.Popen(
            [sys.executable, "-c", CHILD, *hook, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def finish(self, out: Path) -> str:
        """The same command, undisturbed, to its end; what it said."""
        process = self.start(out)
        said = process.communicate()[0]
        if process.returncode != 0:
            raise SystemExit(f"the run did not go on (status {process.returncode}):\n{said}")
        return said

    def count(self, out: Path, watched: str) -> int:
        """File operations of a whole run below out/watched."""
        process = self.start(out, watched)
        said = process.communicate()[0]
        if process.returncode != 0:
            raise SystemExit(f"the run that counts file operations failed:\n{said}")
        return int((self.place / "events").read_text())


def any_instant(bench: Bench, out: Path, chance: random.Random) -> str:
    """Killed from outside after a random time."""
    process, delay = bench.start(out), chance.uniform(0.2, 1.0) * bench.seconds
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return f"after {delay:.2f} s"


def file_operation(watched: str, total: int) -> Callable[[Bench, Path, random.Random], str]:
    """Killed at a random file operation below out/watched."""

    def kill(bench: Bench, out: Path, chance: random.Random) -> str:
        last = chance.randint(1, total)
        bench.start(out, watched, last).communicate()
        return f"operation {last} of {total}"

    return kill


def again_and_again(bench: Bench, out: Path, chance: random.Random) -> str:
    """Killed eight times in one run, each time somewhere in what a process manages in the while."""
    for _ in range(8):
        any_instant(bench, out, chance)
    return "8 times"


def then_damaged(bench: Bench, out: Path, chance: random.Random) -> str:
    """Killed after its second checkpoint, and one byte of the newest checkpoint turned over."""
    process = bench.start(out)
    while len(_checkpoints(out)) < 2:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    newest = _checkpoints(out)[-1]
    victim = chance.choice(sorted(newest.iterdir()))
    content = bytearray(victim.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    victim.write_bytes(content)
    return f"a bit of {newest.name}/{victim.name}"


def _checkpoints(out: Path) -> list[Path]:
    found = (out / "checkpoints").glob("step-*")
    return sorted(found, key=lambda folder: int(folder.name.removeprefix("step-")))


def outcome(out: Path) -> dict[str, Any]:
    """Everything that must not depend on interruptions."""
    written = [log for log in (*LOGS, SPIKES) if (out / log).exists()]
    logs = {
        log: [_timeless(line) for line in (out / log).read_text().splitlines()] for log in written
    }
    model = {path.name: _hash(path.read_bytes()) for path in sorted((out / "model").iterdir())}
    return {**logs, "model": model, "last checkpoint": _tensors(_checkpoints(out)[-1])}


def _tensors(checkpoint: Path) -> dict[str, str]:
    """Hashes of all tensors, not of files: safetensors writes its own remarks in an order that varies."""
    found = {"folder": checkpoint.name, "state": (checkpoint / "state.json").read_text()}
    for path in sorted(checkpoint.glob("*.safetensors")):
        tensors = load_file(path)
        hashes = {name: _hash(tensor.numpy().tobytes()) for name, tensor in tensors.items()}
        found |= {f"{path.name}/{name}": each for name, each in hashes.items()}
    return found


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def differing(found: dict[str, Any], expected: dict[str, Any]) -> str:
    """Logs and files that are not the same, with the first line that is not."""
    wrong = []
    for key, value in expected.items():
        other = found.get(key)
        if other != value and isinstance(value, list) and other is not None:
            first = next((a for a, b in zip(value, other, strict=False) if a != b), value[-1])
            wrong.append(f"{key} at step {first['step']} ({len(other)} lines for {len(value)})")
        elif other != value:
            names = [name for name in value if other is None or other.get(name) != value[name]]
            wrong.append(f"{key}: {', '.join(names[:3])}")
    return ", ".join(wrong)


def _timeless(line: str) -> dict[str, Any]:
    return {key: value for key, value in json.loads(line).items() if key not in OF_THE_CLOCK}


def trial(
    bench: Bench, kind: str, kill: Callable[..., str], number: int, expected: dict[str, Any]
) -> list[str]:
    """One row: kill, resume, compare."""
    out = bench.place / f"run-{number}"
    how = kill(bench, out, random.Random(number))
    metrics = out / "metrics.jsonl"
    reached = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
    said = bench.finish(out)
    resumed = re.search(r"checkpoint of step (\d+) found", said)
    named = re.search(r"is damaged: (.*?)[;(]", said)
    wrong = differing(outcome(out), expected)
    print(f"{number}: {kind}, {how}: {wrong or 'identical'}", flush=True)
    return [
        str(number),
        kind,
        how + (f" → “{named[1].strip()}”" if named else ""),
        str(reached),
        f"step {resumed[1]}" if resumed else "the start",
        f"**differs: {wrong}**" if wrong else "identical",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--points", type=int, default=6, help="kills of each of the first three kinds"
    )
    parser.add_argument("--steps", type=int, default=60, help="steps of the run")
    parser.add_argument("--seed", type=int, default=0, help="number of the first trial, its seed")
    parser.add_argument("--json", type=Path, help="write every row there")
    options = parser.parse_args()
    facts = environment()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder).resolve(), options)
    print(f"\n{describe(facts)}\n")
    print(table(COLUMNS, rows))
    trials = [dict(zip(COLUMNS[1:], row[1:], strict=True)) for row in rows]
    sizes = {"steps": options.steps, "points": options.points, "seed": options.seed}
    write_json(options.json, {"environment": facts, **sizes, "trials": trials})
    if any("differs" in row[-1] for row in rows):
        sys.exit(1)


def measure(place: Path, options: argparse.Namespace) -> list[list[str]]:
    """All trials, after the uninterrupted run."""
    recipe, source = place / "recipe.toml", place / "text"
    shutil.copytree(Path(fathom.__file__).parent, source)  # a text that nobody edits meanwhile
    first = options.steps // 2
    sizes = {"source": json.dumps(str(source)), "first": first, "second": options.steps - first}
    recipe.write_text(RECIPE.format(model=MODEL.format(layers=3), **sizes))
    bench = Bench(place, recipe)
    started = time.perf_counter()
    bench.finish(place / "whole")
    bench.seconds = time.perf_counter() - started
    expected = outcome(place / "whole")
    in_checkpoints = bench.count(place / "counted", "checkpoints")
    anywhere = bench.count(place / "counted-too", "")
    if wrong := differing(outcome(place / "counted"), expected):
        raise SystemExit(f"two uninterrupted runs differ in {wrong}: nothing can be shown here")
    print(f"uninterrupted: {bench.seconds:.1f} s, {anywhere} file operations", flush=True)
    kinds: list[tuple[str, Callable[..., str], int]] = [
        ("at any instant", any_instant, options.points),
        ("writing a checkpoint", file_operation("checkpoints", in_checkpoints), options.points),
        ("at a file operation", file_operation("", anywhere), options.points),
        ("again and again", again_and_again, 1),
        ("then damaged", then_damaged, max(1, options.points // 2)),
    ]
    trials = [(kind, kill) for kind, kill, count in kinds for _ in range(count)]
    return [
        trial(bench, kind, kill, options.seed + number, expected)
        for number, (kind, kill) in enumerate(trials, start=1)
    ]


if __name__ == "__main__":
    main()
