"""What the planner says a training step holds, beside what it holds: live tensor bytes by class, and at the peak.

For each recipe one real step of its first stage is taken on a CPU with random tokens: two micro-batches of the recipe's
size, so that the second one's activations meet the first one's gradients, then clipping and AdamW. Weights, gradients
and moments are the bytes of the tensors that the trainer holds. Activations are the storages that autograd keeps
between forward and backward, each once, as far as they grow with the rows of a micro-batch. What does not grow are the
head's gradients that the losses make on the way; with the largest tensor of logits they are "logits". The peak is the
running sum of every allocation and release that torch's profiler records in the step, on top of what lay there before.

    python benchmarks/planner_memory.py --json FILE
"""

from __future__ import annotations

import argparse
import gc
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from harness import MIB, describe, environment, limit_threads, table, write_json
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fathom import Transformer, load_recipe, losses
from fathom.data.loader import Batch
from fathom.planning import training_memory
from fathom.planning.cluster import DEVICES
from fathom.planning.layout import PlannedLayout
from fathom.planning.rank_memory import fullest_rank
from fathom.runs.recipe import Recipe
from fathom.train.loop import Trainer, accumulate_gradients, clip, update_bias
from fathom.train.optimizer import OptimConfig
from fathom.train.schedule import Moment

CLASSES = ("weights", "gradients", "moments", "activations", "logits", "peak")
GOAL = 0.10


@dataclass(frozen=True)
class Row:
    """One class of one recipe, in bytes."""

    recipe: str
    recompute: bool
    what: str
    planned: float
    measured: float

    @property
    def error(self) -> float:
        """Signed, of the measured bytes."""
        return self.planned / self.measured - 1


class Step:
    """A trainer at a recipe's shape, its moments made by a first short step."""

    def __init__(self, recipe: Recipe, recompute: bool) -> None:
        stage = recipe.stages[0]
        self.config, self.seq_len = recipe.model, stage.seq_len
        self.micro_batch = stage.micro_batch or stage.batch
        torch.manual_seed(0)
        model = Transformer(self.config)
        model.set_recompute(recompute)
        self.trainer = Trainer.start(model, OptimConfig())
        self.moment = Moment(stage.name, 1, 1, 1e-4, 1, self.seq_len, 1e-3, 0.3, 1e-4, None)
        self.gradients(rows=1, seq_len=32)
        self.update()

    def tokens(self, rows: int, seq_len: int) -> torch.Tensor:
        return torch.randint(self.config.vocab_size, (rows, seq_len + 1))

    def gradients(self, rows: int, seq_len: int) -> None:
        """Forward and backward, a micro-batch at a time."""
        batch = Batch(self.tokens(rows, seq_len))
        accumulate_gradients(self.trainer.model, batch, self.micro_batch, self.moment)

    def update(self) -> None:
        """Clip, AdamW, router biases."""
        clip(self.trainer.model, self.trainer.optim.clip_norm)
        self.trainer.optimizer.step()
        self.trainer.optimizer.zero_grad()
        update_bias(self.trainer.model, 1e-3)

    def held(self) -> dict[str, int]:
        """Weights, and moments of the optimiser."""
        weights = sum(p.nbytes for p in self.trainer.model.parameters())
        states = self.trainer.optimizer.state.values()
        moments = sum(state[key].nbytes for state in states for key in ("exp_avg", "exp_avg_sq"))
        return {"weights": weights, "moments": moments}

    def kept(self) -> dict[str, float]:
        """What autograd keeps of one micro-batch: what grows with its rows, and what does not (heads' gradients)."""
        rows = self.micro_batch
        whole, one = self._saved(rows), self._saved(1)
        fixed = (rows * one - whole) / (rows - 1)
        return {"activations": whole - fixed, "heads": fixed}

    def _saved(self, rows: int) -> int:
        """Bytes of storages that autograd keeps, weights aside, each once."""
        own = {p.untyped_storage().data_ptr() for p in self.trainer.model.parameters()}
        seen: dict[int, torch.UntypedStorage] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                seen[storage.data_ptr()] = storage
            return tensor

        tokens = self.tokens(rows, self.seq_len)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            found = losses(self.trainer.model, tokens, mtp_weight=0.3, balance_alpha=1e-4)
        assert found.total.requires_grad
        return sum(storage.nbytes() for storage in seen.values())

    def logits(self) -> int:
        """Bytes of the largest tensor of logits in one forward pass."""
        with Largest(self.config.vocab_size) as seen:
            losses(self.trainer.model, self.tokens(self.micro_batch, self.seq_len), mtp_weight=0.3)
        return seen.bytes

    def run(self) -> tuple[int, int]:
        """(gradient bytes, highest live bytes beyond those before the step) of a whole step."""
        gc.collect()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            self.gradients(2 * self.micro_batch, self.seq_len)
            gradients = sum(
                p.grad.nbytes for p in self.trainer.model.parameters() if p.grad is not None
            )
            self.update()
        return gradients, highest(seen)


class Largest(TorchDispatchMode):
    """Within: the largest [rows, vocabulary] that a softmax returns (the head transposed has such a shape too)."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size, self.bytes = vocab_size, 0

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        found = function(*arguments, **(options or {}))
        for leaf in tree_leaves(found) if "softmax" in str(function) else ():
            if isinstance(leaf, torch.Tensor) and leaf.shape[-1:] == (self.vocab_size,):
                self.bytes = max(self.bytes, leaf.nbytes)
        return found


def highest(seen: Any) -> int:
    """Highest running sum of the allocations and releases that the profiler recorded."""
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = top = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        top = max(top, now)
    return top


def compare(name: str, recompute: bool) -> list[Row]:
    """All classes of one recipe."""
    recipe = load_recipe(name)
    step = Step(recipe, recompute)
    planned = training_memory(step.config, step.seq_len, step.micro_batch, recompute=recompute)
    measured = step.held() | step.kept()
    logits = step.logits()
    gradients, peak = step.run()
    measured["gradients"] = gradients
    measured["logits"] = measured.pop("heads") + logits
    measured["peak"] = measured["weights"] + measured["moments"] + peak
    plans = asdict(planned) | {"peak": planned.total}
    layout = PlannedLayout(
        micro_batch=step.micro_batch,
        recompute="report" if recompute else "none",
        fp8=False,
        moment_bytes=4,
    )
    _, rank = fullest_rank(
        step.config, layout, DEVICES["laptop"], seq_len=step.seq_len, micro_batches=1
    )
    if rank.total != planned.total:
        raise SystemExit(
            f"{name}: fathom plan says {rank.total:,.0f} bytes, --dry-run {planned.total:,}"
        )
    return [Row(name, recompute, what, plans[what], measured[what]) for what in CLASSES]


def alone(name: str, recompute: bool, threads: int) -> list[Row]:
    """`compare` in a process of its own: a profile's events take memory that is not given back."""
    with ProcessPoolExecutor(1, get_context("spawn"), limit_threads, (threads,)) as pool:
        return pool.submit(compare, name, recompute).result()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--recipes", nargs="+", default=["nano", "mini"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    limit_threads(options.threads)
    facts = environment()
    print(describe(facts))
    rows = [
        row
        for name in options.recipes
        for recompute in (False, True)
        for row in alone(name, recompute, options.threads)
    ]
    print(
        table(
            ("recipe", "recompute", "class", "planned, MiB", "measured, MiB", "error"),
            [
                (
                    row.recipe,
                    "on" if row.recompute else "off",
                    row.what,
                    f"{row.planned / MIB:,.1f}",
                    f"{row.measured / MIB:,.1f}",
                    f"{row.error:+.1%}",
                )
                for row in rows
            ],
        )
    )
    worst = max(rows, key=lambda row: abs(row.error))
    verdict = "within" if abs(worst.error) <= GOAL else "NOT within"
    print(f"\n{verdict} {GOAL:.0%}: the worst is {worst.recipe}'s {worst.what}, {worst.error:+.1%}")
    write_json(
        options.json,
        {
            "environment": facts,
            "rows": [asdict(row) | {"error": row.error} for row in rows],
        },
    )


if __name__ == "__main__":
    main()
