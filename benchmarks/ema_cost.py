"""What the average of the weights costs a training step: steps with and without it, in turn, at the shape of a recipe.

The unit that is timed is all that happens between two optimiser steps, the second included. With the average it
begins with an update, which its thread computes beside the forward and backward pass, and waits for it before the
weights change. The update by itself, waited for at once, is timed too: what it would cost if nothing ran beside it.
Wall time is what a user waits; CPU time, of all threads of the process, is what is left to compare on a busy machine.
`python benchmarks/ema_cost.py --help`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from harness import describe, environment, table, write_json

from fathom.data.loader import Batch
from fathom.model import Transformer
from fathom.runs.recipe import load_recipe
from fathom.train.ema import Ema, EmaConfig
from fathom.train.loop import Trainer, accumulate_gradients, learn
from fathom.train.memory import keep_freed_memory

CLOCKS = ("wall", "CPU")
HEADERS = ("threads", "clock", "step without, ms", "with, ms", "difference, ms", "share")
HEADERS += ("update alone, ms", "share")


class Step:
    """Training steps on random tokens, with an average or without."""

    def __init__(self, recipe_name: str) -> None:
        recipe = load_recipe(recipe_name)
        torch.manual_seed(recipe.seed)
        self.stage, self.moment = recipe.stages[0], recipe.at(step=1)
        self.trainer = Trainer.start(Transformer(recipe.model), recipe.optim)
        self.ema = Ema(self.trainer.model, EmaConfig(decay=0.999))
        shape = (self.stage.batch, self.stage.seq_len + 1)
        self.tokens = torch.randint(recipe.model.vocab_size, shape)
        self.averaged_bytes = sum(t.nbytes for t in self.ema.tensors().values())

    def unit(self, with_average: bool) -> None:
        """One step; an update belongs to the step beside whose passes it runs."""
        if with_average:
            self.ema.update(1)
        rows = self.stage.micro_batch or self.stage.batch
        accumulate_gradients(self.trainer.model, Batch(self.tokens), rows, self.moment)
        if with_average:
            self.ema.wait()
        learn(self.trainer, self.moment)

    def update_alone(self) -> None:
        self.ema.update(1)
        self.ema.wait()


Times = dict[str, list[tuple[float, float]]]
"""(wall, CPU) seconds by kind of unit, in the order of the rounds."""


def timed(unit: Callable[[], None]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    unit()
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(recipe: str, rounds: int, threads: int) -> Times:
    """Every other round begins with the other kind."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    step = Step(recipe)
    for with_average in (False, True):
        step.unit(with_average)
    times: Times = {"without": [], "with": [], "alone": []}
    for number in range(rounds):
        for with_average in (number % 2 == 0, number % 2 == 1):
            took = timed(partial(step.unit, with_average))
            times["with" if with_average else "without"].append(took)
        times["alone"].append(timed(step.update_alone))
    print(f"{threads} thread(s): the average holds {step.averaged_bytes / 2**20:.1f} MiB")
    return times


def row(threads: int, clock: str, times: Times) -> list[str]:
    """Medians with quartiles in ms; the difference is the median over rounds of with minus without."""
    which = CLOCKS.index(clock)
    without, along, alone = (
        [pair[which] for pair in times[k]] for k in ("without", "with", "alone")
    )

    def text(seconds: list[float]) -> str:
        low, middle, high = statistics.quantiles(seconds, n=4)
        return f"{1e3 * middle:.1f} ({1e3 * low:.1f}–{1e3 * high:.1f})"

    more = [a - b for a, b in zip(along, without, strict=True)]
    share = statistics.median(more) / statistics.median(without)
    alone_share = statistics.median(alone) / statistics.median(without)
    columns = [*map(text, (without, along, more)), f"{100 * share:.1f} %"]
    return [str(threads), clock, *columns, text(alone), f"{100 * alone_share:.2f} %"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--recipe", default="nano", help="whose shape and batch")
    parser.add_argument("--rounds", type=int, default=20, help="steps of each kind")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--json", type=Path, help="write every time here")
    given = parser.parse_args()
    facts = environment()
    print(describe(facts))
    times = {threads: measure(given.recipe, given.rounds, threads) for threads in given.threads}
    rows = [row(threads, clock, found) for threads, found in times.items() for clock in CLOCKS]
    print(table(HEADERS, rows))
    write_json(given.json, {"environment": facts, "recipe": given.recipe, "seconds": times})


if __name__ == "__main__":
    main()
