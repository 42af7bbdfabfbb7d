"""Peak memory and time of one training step against sequence length, 1K to 32K tokens, on a CPU.

Each point is a fresh process that builds the shape of `nano` with a longer context, gives AdamW its
moments on a short sequence, and then takes one whole step (forward, backward, clipping, AdamW, bias
update) on one sequence of the length in question, as a run takes it. What is reported is the
highest resident size of the process. Then a line is fitted through the lengths: a T x T mask or
whole logits would bend it.

    python benchmarks/memory_by_length.py --threads 1 --json FILE --plot docs/images/memory-by-length.png
"""

from __future__ import annotations

import argparse
import gc
import itertools
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import (
    MIB,
    Contender,
    available_memory,
    describe,
    environment,
    peak_bytes,
    resident_bytes,
    table,
    write_json,
)
from profiling import shares

from fathom import Transformer, load_recipe
from fathom.data.loader import Batch
from fathom.planning import flops_per_token, training_memory
from fathom.train.loop import Trainer, accumulate_gradients, clip, update_bias
from fathom.train.memory import keep_freed_memory
from fathom.train.optimizer import OptimConfig
from fathom.train.rate import matmul_rate
from fathom.train.schedule import Moment

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
YARN = {
    "type": "yarn",
    "factor": 40.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
POSITIONS = ("plain", "yarn")
WARM_UP = 128
"""Tokens of the step that makes the moments."""


@dataclass(frozen=True)
class Point:
    """One measured step; sizes in bytes."""

    positions: str
    recompute: bool
    length: int
    resident_before: int
    """With weights and moments, before the step."""
    peak: int
    seconds: float
    cpu_seconds: float
    """Of the process; what the step would take on one thread if nobody else used the machine."""
    loss: float
    flops: float
    """Model FLOPs of the step, nothing counted that is computed twice."""
    roof: float
    """FLOP/s of a 1024^3 float32 product in the same process, right after the step."""
    estimate: int
    """Bytes that `fathom.planning` says for the same step."""

    @property
    def of_roof(self) -> float:
        return self.flops / self.seconds / self.roof


class LongStep:
    """A trainer of nano's shape and one sequence; lives in its own process."""

    def __init__(self, length: int, positions: str, recompute: bool) -> None:
        keep_freed_memory()
        self.length = length
        shape = load_recipe("nano").model.replace(max_position_embeddings=max(LENGTHS))
        self.config = shape.replace(rope_scaling=YARN if positions == "yarn" else None)
        torch.manual_seed(0)
        model = Transformer(self.config)
        model.set_recompute(recompute)
        self.recompute = recompute
        self.trainer = Trainer.start(model, OptimConfig())
        self._step(WARM_UP)
        gc.collect()

    def _step(self, length: int) -> float:
        moment = Moment("long", 1, length, 1e-4, 1, length, 1e-3, 0.3, 1e-4, None)
        tokens = torch.randint(self.config.vocab_size, (1, length + 1))
        found = accumulate_gradients(self.trainer.model, Batch(tokens), 1, moment)
        clip(self.trainer.model, self.trainer.optim.clip_norm)
        self.trainer.optimizer.step()
        self.trainer.optimizer.zero_grad()
        update_bias(self.trainer.model, moment.gamma)
        return found.main.item()

    def measure(self) -> dict[str, Any]:
        """Take the step; the fields of a `Point` that only this process knows."""
        before, start, cpu = resident_bytes(), time.perf_counter(), time.process_time()
        loss = self._step(self.length)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        peak = peak_bytes()
        estimate = training_memory(self.config, self.length, 1, recompute=self.recompute).total
        return {
            "resident_before": before,
            "peak": peak,
            "seconds": seconds,
            "cpu_seconds": cpu,
            "loss": loss,
            "flops": flops_per_token(self.config, self.length, True) * self.length,
            "roof": matmul_rate(torch.device("cpu"), torch.float32),
            "estimate": estimate,
        }

    def shares(self) -> dict[str, float]:
        """Where the time of the step goes."""
        return shares(lambda: self._step(self.length))


def measure(length: int, positions: str, recompute: bool, threads: int) -> Point:
    """One point, in a process of its own."""
    arguments = {"length": length, "positions": positions, "recompute": recompute}
    with Contender("step", LongStep, arguments, threads) as step:
        return Point(**arguments, **step.call("measure"))


def say(point: Point) -> None:
    """A word about a point as soon as it is there, since the long ones take minutes."""
    name = label(point.positions, point.recompute)
    print(
        f"  {name}, {point.length:,}: {point.peak / MIB:,.0f} MiB, {point.seconds:.2f} s",
        flush=True,
    )


def profiled(length: int, threads: int) -> dict[str, float]:
    """Where a step with plain RoPE and without recomputation spends its time, shown and returned."""
    arguments = {"length": length, "positions": "plain", "recompute": False}
    with Contender("profile", LongStep, arguments, threads) as step:
        found: dict[str, float] = step.call("shares")
    print(f"\nWhere a step of {length:,} tokens spends its time (plain RoPE, recompute off):")
    for kind, share in list(found.items())[:12]:
        print(f"  {100 * share:5.1f} %  {kind}")
    return found


def line_through(points: Sequence[Point]) -> tuple[float, float, float]:
    """(bytes per token, bytes at length 0, largest distance from the line as a share of the peak)."""
    lengths = np.array([point.length for point in points], float)
    peaks = np.array([point.peak for point in points], float)
    # A relative fit, so that short sequences weigh as much as the longest.
    slope, base = np.polyfit(lengths, peaks, 1, w=1 / peaks)
    return slope, base, float(np.abs((slope * lengths + base) / peaks - 1).max())


def series(points: Sequence[Point]) -> dict[tuple[str, bool], list[Point]]:
    """Points by positions and recompute."""
    found: dict[tuple[str, bool], list[Point]] = {}
    for point in points:
        found.setdefault((point.positions, point.recompute), []).append(point)
    return found


def label(positions: str, recompute: bool) -> str:
    return f"{'YaRN' if positions == 'yarn' else 'plain RoPE'}, recompute {'on' if recompute else 'off'}"


def show(points: Sequence[Point]) -> None:
    """Every point, and the lines through them."""
    rows = [
        (
            label(p.positions, p.recompute),
            f"{p.length:,}",
            f"{p.peak / MIB:,.0f}",
            f"{(p.peak - p.resident_before) / MIB:,.0f}",
            f"{p.estimate / MIB:,.0f}",
            f"{p.seconds:.2f}",
            f"{p.cpu_seconds:.2f}",
            f"{p.length / p.seconds:,.0f}",
            f"{100 * p.of_roof:.0f} %",
        )
        for p in points
    ]
    headers = (
        "",
        "tokens",
        "peak, MiB",
        "of it the step's",
        "planned",
        "s",
        "CPU s",
        "tokens/s",
        "of roof",
    )
    print("\n" + table(headers, rows) + "\n")
    for (positions, recompute), some in series(points).items():
        if len(some) > 2:
            slope, base, off = line_through(some)
            print(
                f"{label(positions, recompute)}: {slope * 1024 / MIB:.1f} MiB per 1,024 tokens over "
                f"{base / MIB:.0f} MiB; no length is farther than {100 * off:.1f} % from the line"
            )


def draw(points: Sequence[Point], path: Path) -> None:
    """Peaks and their lines, on linear axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.2, 4.4), layout="constrained")
    colours = {False: "#2a5c99", True: "#c8501e"}
    for (positions, recompute), some in series(points).items():
        colour, open_mark = colours[recompute], positions == "yarn"
        x = [p.length / 1024 for p in some]
        axes.plot(
            x, [p.peak / 2**30 for p in some], "D" if open_mark else "o", color=colour,
            markersize=9 if open_mark else 5, markerfacecolor="none" if open_mark else colour,
            label=label(positions, recompute),
        )  # fmt: skip
        if positions == "plain" and len(some) > 2:
            slope, base, _ = line_through(some)
            ends = np.array([0, max(x)])
            axes.plot(
                ends, (slope * 1024 * ends + base) / 2**30, color=colour, linewidth=1.2,
                label=f"line: {slope * 1024 / MIB:.0f} MiB per 1K tokens over {base / MIB:.0f} MiB",
            )  # fmt: skip
    axes.set(xlabel="tokens in the sequence, K", ylabel="peak resident memory, GiB")
    axes.set_xticks([n / 1024 for n in LENGTHS if n >= 4096])
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.grid(color="#e6e4de")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    axes.set_title(
        "one training step of nano's shape, batch 1, float32, AdamW", loc="left", size=11
    )
    figure.savefig(path, dpi=144)
    print(f"drawn: {path}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--positions", nargs="+", choices=POSITIONS, default=POSITIONS)
    parser.add_argument("--recompute", nargs="+", choices=("off", "on"), default=("off", "on"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--profile", type=int, help="also where a step of this many tokens spends its time"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args(argv)
    facts = environment() | {"threads": options.threads}
    print(describe(facts) + f"; {options.threads} thread(s)")
    print(f"{available_memory() / 2**30:.1f} GiB available", flush=True)
    points: list[Point] = []
    found: dict[str, Any] = {"points": []}
    for length in sorted(options.lengths):
        for positions, recompute in itertools.product(options.positions, options.recompute):
            points.append(measure(length, positions, recompute == "on", options.threads))
            say(points[-1])
        found["points"] = [asdict(point) for point in points]
        write_json(options.json, {"environment": facts, "result": found})
    show(sorted(points, key=lambda p: (p.positions, p.recompute, p.length)))
    if options.profile:
        found["shares"] = profiled(options.profile, options.threads)
        write_json(options.json, {"environment": facts, "result": found})
    if options.plot:
        draw(points, options.plot)


if __name__ == "__main__":
    main()
