"""Does context extension reach its whole length, and does YaRN do it: the recipe `nano-needle`, seeds times variants.

Every seed is trained twice, as the recipe says and with plain RoPE in all stages (the control), each in a run folder of
its own below --out; a folder that is whole is not run again, one that was stopped goes on. The grids are the runs' own
(needle.jsonl): before, the model of the first stage; switched, the same weights with the next stage's rotary settings;
after, the model at the end of each extension. Prints shares found for each seed and draws the means over seeds.

`python benchmarks/needle.py --out FOLDER --picture needle.png`
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from harness import describe, environment, table, write_json

from fathom.evaluation.heat_map import draw
from fathom.evaluation.needle import Grid
from fathom.runs.recipe import Recipe, Stage, load_recipe

VARIANTS = {"yarn": "YaRN from the extension on", "plain": "plain RoPE throughout (control)"}
COLUMNS = ("variant", "seed", "before", "switched", "after", "after, all", "minutes")


def without_yarn(recipe: Recipe) -> Recipe:
    """The control: the same stages, rotary settings never touched."""
    stages = tuple(replace(stage, rope_scaling=None) for stage in recipe.stages)
    return replace(recipe, name=f"{recipe.name}-plain", stages=stages)


def train(recipe: Recipe, folder: Path, threads: int) -> None:
    """`fathom run` in a process of its own, unless the folder is whole; its words go into a file beside the folder."""
    if (folder / "report.html").exists():
        return
    file = folder.with_suffix(".toml")
    file.write_text(recipe.to_toml(), encoding="utf-8")
    command = [sys.executable, "-m", "fathom", "run", str(file), "--out", str(folder)]
    with folder.with_suffix(".log").open("a") as log:
        threading = os.environ | {"OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(
            [*command, "--device", "cpu"], stdout=log, stderr=subprocess.STDOUT, env=threading
        )
    if done.returncode:
        raise SystemExit(f"the run failed; see {folder.with_suffix('.log')}")


def lines(folder: Path, log: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / log).read_text().splitlines()]


def grids(recipe: Recipe, folder: Path) -> dict[tuple[str, str], Grid]:
    """The run's grids by stage and moment."""
    return {
        (line["stage"], line["when"]): Grid(
            tuple(line["lengths"]),
            tuple(line["depths"]),
            tuple(map(tuple, line["found"])),
            line["trials"],
        )
        for line in lines(folder, "needle.jsonl")
    }


def mean_grid(several: Iterable[Grid]) -> Grid:
    """Cell by cell."""
    several = list(several)
    found = tuple(
        tuple(mean(cells) for cells in zip(*rows, strict=True))
        for rows in zip(*(grid.found for grid in several), strict=True)
    )
    first = several[0]
    return Grid(first.lengths, first.depths, found, first.trials * len(several))


def row(recipe: Recipe, variant: str, seed: int, found: dict[Any, Grid], folder: Path) -> list[Any]:
    """One run's figures: shares beyond the first stage's length, and of the whole grid at the end."""
    first, second, *_, last = [stage.name for stage in recipe.stages]
    short = recipe.stages[0].seq_len
    seconds = sum(line["seconds"] for line in lines(folder, "metrics.jsonl"))
    moments = [(first, "after"), (second, "before"), (last, "after")]
    shares = [found[moment].share(beyond=short) for moment in moments]
    return [variant, seed, *shares, found[(last, "after")].share(), seconds / 60]


def shown(figures: list[Any]) -> list[str]:
    variant, seed, *shares, minutes = figures
    return [variant, str(seed), *(f"{100 * share:.1f} %" for share in shares), f"{minutes:.1f}"]


def picture(recipe: Recipe, found: dict[str, list[dict[Any, Grid]]], path: Path) -> None:
    """Stages downwards, the control beside YaRN; each panel the mean over the seeds."""
    first, second = recipe.stages[0], recipe.stages[1]
    panels = [panel(recipe, next(iter(found.values())), first, "after", "plain RoPE")]
    if "yarn" in found:
        panels.append(panel(recipe, found["yarn"], second, "before", "YaRN switched on, untrained"))
    for stage in recipe.stages[1:]:
        for variant in sorted(found):
            settings = "YaRN" if variant == "yarn" else "plain RoPE"
            panels.append(panel(recipe, found[variant], stage, "after", settings))
    draw(panels, path)


def panel(
    recipe: Recipe, runs: list[dict[Any, Grid]], stage: Stage, when: str, settings: str
) -> tuple[str, Grid]:
    """The mean over the runs at one moment, and what stands above it."""
    grid = mean_grid(run[(stage.name, when)] for run in runs)
    short = recipe.stages[0].seq_len
    trained = stage.seq_len if when == "after" else short
    share = f"{100 * grid.share(beyond=short):.0f} %"
    return f"trained to {trained:,}, {settings}: {share} beyond {short}", grid


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="where the run folders go")
    parser.add_argument("--recipe", default="nano-needle")
    parser.add_argument("--set", action="append", default=[], help="as for `fathom run`")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--picture", type=Path, help="draw the heat maps there (.png, .svg)")
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    recipe = load_recipe(options.recipe, options.set)
    rows: list[list[Any]] = []
    found: dict[str, list[dict[Any, Grid]]] = {}
    for seed in range(options.seeds):
        for variant in options.variants:
            chosen = replace(recipe if variant == "yarn" else without_yarn(recipe), seed=seed)
            folder = options.out / f"{variant}-{seed}"
            train(chosen, folder, options.threads)
            run = grids(chosen, folder)
            found.setdefault(variant, []).append(run)
            rows.append(row(chosen, variant, seed, run, folder))
            print(" · ".join(shown(rows[-1])), flush=True)
    facts = environment()
    print(f"\n{describe(facts)}\n\n{table(COLUMNS, [shown(figures) for figures in rows])}")
    if options.picture:
        picture(recipe, found, options.picture)
    write_json(options.json, {"environment": facts, "columns": COLUMNS, "rows": rows})


if __name__ == "__main__":
    main()
