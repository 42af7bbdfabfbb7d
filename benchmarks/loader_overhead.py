"""What reading costs a training step at the shape of `nano`: making a batch, and waiting for it.

Batches come from memory-mapped files, mixed from three sources. Measured in one process, alternating: steps that read
ahead in a thread, as `fathom run` does; steps that read when they need it; steps that read nothing (one batch over and
over). And reading alone. `python benchmarks/loader_overhead.py --help`.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from harness import describe, environment, table, write_json

import fathom
from fathom.data.loader import Ahead, Batch, Loader, Ring
from fathom.data.mixture import Mixture
from fathom.train.loop import Trainer, accumulate_gradients
from fathom.train.memory import keep_freed_memory

COLUMNS = ("reading", "step, ms", "waiting for the batch, ms", "share of the step")


def loader(place: Path, seq_len: int, tokens: int, vocab: int) -> Loader:
    """Three sources of random tokens in files, mixed."""
    rings = {}
    for number, name in enumerate(("code", "en", "zh")):
        path = place / f"{name}.bin"
        np.random.default_rng(number).integers(0, vocab, tokens, dtype=np.uint16).tofile(path)
        rings[name] = Ring(np.memmap(path, np.uint16, "r"), seq_len, 0, number)
    return Loader(rings, Mixture({"code": 0.3, "en": 0.5, "zh": 0.2}, 0))


class Steps:
    """Training steps, each told how to come by its batch."""

    def __init__(self) -> None:
        recipe = fathom.load_recipe("nano")
        self.moment = recipe.at(step=100)
        torch.manual_seed(0)
        self.trainer = Trainer.start(fathom.Transformer(recipe.model), recipe.optim)

    def run(self, read: Callable[[int], Batch], number: int) -> tuple[float, float]:
        """Seconds of a step and of what it waited for its batch."""
        started = time.perf_counter()
        batch = read(number)
        waited = time.perf_counter() - started
        accumulate_gradients(self.trainer.model, batch, len(batch.tokens), self.moment)
        self.trainer.optimizer.step()
        self.trainer.optimizer.zero_grad()
        return time.perf_counter() - started, waited


def measure(options: argparse.Namespace, place: Path) -> list[list[str]]:
    """One row per way of reading."""
    keep_freed_memory()
    steps = Steps()
    batch, seq_len = steps.moment.batch, steps.moment.seq_len
    source = loader(place, seq_len, options.tokens, steps.trainer.model.config.vocab_size)
    reader, same = Ahead(source), source.batch(0, batch)
    ways: dict[str, Callable[[int], Batch]] = {
        "ahead, in a thread": lambda n: reader.batch((n * batch, batch), ((n + 1) * batch, batch)),
        "when needed": lambda n: source.batch(n * batch, batch),
        "nothing": lambda n: same,
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for number in range(options.rounds):
        for name, read in ways.items():
            found[name].append(steps.run(read, number))
    reader.close()
    rows = []
    for name, times in found.items():
        whole, waited = (statistics.median(column) for column in zip(*times[2:], strict=True))
        rows.append(
            [name, f"{1e3 * whole:.1f}", f"{1e3 * waited:.3f}", f"{100 * waited / whole:.2f} %"]
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=20_000_000, help="of each source")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    facts = environment()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(options, Path(folder))
    print(f"{describe(facts)}\n\n{table(COLUMNS, rows)}")
    write_json(options.json, {"environment": facts, "rows": rows})


if __name__ == "__main__":
    main()
