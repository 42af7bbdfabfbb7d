"""The report's whole pre-training and context extension at laptop size, killed once in every stage.

The recipe `nano-full` runs in a folder without interruption. Then the same command runs in a second folder and is
killed (SIGKILL) at a random step of every stage, and given again each time. Compared, bit for bit: every line of
every log without what the clock decides, all tensors of the last checkpoint, the exported model. Both folders stay,
for their reports; what is whole already is not run again.

`python benchmarks/nano_full.py --en BOOKS --zh TEXTS --out FOLDER`
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from harness import describe, environment, table, write_json
from kill_and_resume import differing, outcome

from fathom.runs.recipe import Recipe, load_recipe

COLUMNS = ("stage", "steps", "killed after step", "went on from", "held-out loss at its end")


def start(options: argparse.Namespace, out: Path) -> subprocess.Popen[str]:
    """`fathom run` in a process of its own, its words into a file beside the folder."""
    sources = [f"en={options.en}", f"zh={options.zh}", "code=stdlib"]
    data = [word for source in sources for word in ("--data", source)]
    changed = [word for change in options.set for word in ("--set", change)]
    command = ["run", options.recipe, "--out", str(out), "--device", "cpu", *data, *changed]
    with out.with_suffix(".log").open("a") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "fathom", *command],
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
        )


def finish(options: argparse.Namespace, out: Path) -> float:
    """The command to its end; seconds."""
    begun = time.perf_counter()
    if start(options, out).wait() != 0:
        raise SystemExit(f"the run failed; see {out.with_suffix('.log')}")
    return time.perf_counter() - begun


def steps_done(out: Path) -> int:
    """Lines of the log, which are steps."""
    metrics = out / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def kill_at(options: argparse.Namespace, out: Path, step: int) -> int:
    """Run until `step` is in the log, kill; the step that was reached."""
    process = start(options, out)
    while steps_done(out) < step:
        if process.poll() is not None:
            raise SystemExit(f"the run ended before step {step}; see {out.with_suffix('.log')}")
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return steps_done(out)


def newest_checkpoint(out: Path) -> int:
    """Step of the newest checkpoint, 0 without one."""
    found = (out / "checkpoints").glob("step-*")
    return max((int(folder.name.removeprefix("step-")) for folder in found), default=0)


def kills(recipe: Recipe, seed: int) -> list[int]:
    """A step of every stage, not its last."""
    chance = random.Random(seed)
    return [chance.randint(span.first_step + 1, span.last_step - 1) for span in recipe.spans]


def held_out_at(out: Path, step: int) -> float:
    """Held-out loss after a step."""
    lines = [json.loads(line) for line in (out / "evals.jsonl").read_text().splitlines()]
    return next(line["loss"] for line in lines if line["step"] == step)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--en", required=True, help="English text, a file or folder")
    parser.add_argument("--zh", required=True, help="Chinese text")
    parser.add_argument("--out", type=Path, required=True, help="where both run folders go")
    parser.add_argument("--recipe", default="nano-full")
    parser.add_argument("--set", action="append", default=[], help="as for `fathom run`")
    parser.add_argument("--seed", type=int, default=0, help="of the instants")
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    whole, killed = options.out / "whole", options.out / "killed"
    recipe = load_recipe(options.recipe, options.set)
    seconds = finish(options, whole)
    print(f"uninterrupted: {seconds / 60:.1f} min", flush=True)
    rows = []
    for span, step in zip(recipe.spans, kills(recipe, options.seed), strict=True):
        reached = (
            kill_at(options, killed, step) if steps_done(killed) < step else steps_done(killed)
        )
        row = [span.stage.name, str(span.steps), str(reached), str(newest_checkpoint(killed))]
        rows.append([*row, f"{held_out_at(whole, span.last_step):.4f}"])
        print(" · ".join(row), flush=True)
    finish(options, killed)
    wrong = differing(outcome(killed), outcome(whole))
    facts = environment()
    print(f"\n{describe(facts)}\n\n{table(COLUMNS, rows)}\n")
    print(f"killed {len(rows)} times and whole: {wrong or 'identical'}")
    result: dict[str, Any] = {"seconds": seconds, "rows": rows, "differs": wrong}
    write_json(options.json, {"environment": facts, **result})
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
