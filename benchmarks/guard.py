"""What the loss-spike guard is worth: faults planted in a small run, with the guard and without, against clean seeds.

A 2-layer model is trained on a part of the Python standard library for 300 steps. Runs that nothing happens to, one
per seed, give the range of end losses that luck alone makes. Then, into the run of one seed, a fault is planted from
outside (around the loop's own functions, never by an option of the product): gradients that are not numbers, poisoned
batches, gradients of the wrong size with clipping on and off. A fault of the data goes with the data, a fault of the
machine strikes once, so that rolling back and passing over mean something. Runs with a fault go on from the last
checkpoint before it of the clean run of their seed, which a resumed run continues bit for bit. The end loss is
that on all held-out text, which all seeds share. `python benchmarks/guard.py --help`.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from harness import describe, environment, table, write_json
from torch import Tensor

from fathom.data.loader import Loader
from fathom.data.prepare import TokenData, prepare
from fathom.errors import FathomError
from fathom.runs import execute
from fathom.runs.recipe import Recipe, load_recipe
from fathom.train import loop
from fathom.train.checkpoint import checkpoints, step_of
from fathom.train.guard import Guard, Verdict

RECIPE = """
name = "guard"
[model]
vocab_size = 1024
hidden_size = 64
intermediate_size = 160
moe_intermediate_size = 32
num_hidden_layers = 2
num_attention_heads = 4
q_lora_rank = 0
kv_lora_rank = 32
qk_nope_head_dim = 16
qk_rope_head_dim = 8
v_head_dim = 16
n_routed_experts = 8
num_experts_per_tok = 2
n_group = 2
topk_group = 1
first_k_dense_replace = 1
num_nextn_predict_layers = 1
max_position_embeddings = 64
initializer_range = 0.02
[checkpoint]
every = 25
keep = 20
[monitor]
eval_every = 10_000
sample_every = 10_000
sample_tokens = 1
[[stages]]
name = "pretrain"
seq_len = 64
batch = 8
steps = 300
lr = 5e-3
lr_end = 5e-4
warmup_steps = 20
decay_steps = 75
gamma = 1e-2
"""
PACKAGES = ("asyncio", "email", "http", "importlib", "json", "logging", "unittest", "urllib", "xml")
"""Of the standard library: 2 MB of text, of which a twentieth is held out."""
STEPS, FAULT_STEP, NEVER = 300, 240, 1e9
COLUMNS = ("fault", "clipping", "guard", "what it did", "end loss", "of the clean range")


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong: what, from which step, for how many, how strongly, and with which clip_norm."""

    title: str
    kind: str = "none"
    step: int = FAULT_STEP
    steps: int = 1
    strength: float = 1.0
    clip_norm: float = 1.0

    def at(self, step: int) -> bool:
        return self.step <= step < self.step + self.steps


CLEAN = Fault("none")
FAULTS = (
    Fault("NaN in the gradient", "scale", strength=math.nan),
    Fault("1 batch of one token", "one token"),
    Fault("8 batches of one token", "one token", steps=8),
    Fault("8 batches of random tokens", "random", steps=8),
    Fault("gradient × 10", "scale", strength=10),
    Fault("gradient × 10", "scale", strength=10, clip_norm=NEVER),
    Fault("8 gradients × 10", "scale", steps=8, strength=10, clip_norm=NEVER),
    Fault("gradient × 1,000", "scale", strength=1e3, clip_norm=NEVER),
    Fault("noise of 10 × the gradient", "noise", strength=10, clip_norm=NEVER),
    Fault("8 × noise of 10 × the gradient", "noise", steps=8, strength=10, clip_norm=NEVER),
)


class Planted:
    """One fault, around the loop's gradients and the loader's batches; strikes a step's machine only once."""

    def __init__(self, fault: Fault) -> None:
        self.fault, self.struck = fault, set[int]()
        self.gradients, self.batch = loop.accumulate_gradients, Loader.batch

    def accumulate(self, model: Any, batch: Tensor, micro_batch: int, moment: Any) -> Any:
        found = self.gradients(model, batch, micro_batch, moment)
        if self.fault.at(moment.step) and moment.step not in self.struck:
            self.struck.add(moment.step)
            self._spoil([p.grad for p in model.parameters() if p.grad is not None], moment.step)
        return found

    def _spoil(self, gradients: list[Tensor], step: int) -> None:
        if self.fault.kind == "scale":
            torch._foreach_mul_(gradients, self.fault.strength)
        if self.fault.kind == "noise":
            random = torch.Generator().manual_seed(step)
            norm = torch.nn.utils.get_total_norm(gradients)
            count = sum(g.numel() for g in gradients)
            for g in gradients:
                noise = torch.randn(g.shape, generator=random)
                g += self.fault.strength * norm / math.sqrt(count) * noise

    def read(self, loader: Loader, first_sequence: int, count: int) -> Tensor:
        """Sequences of the steps' first reading are poisoned, whenever they are read."""
        batch = self.batch(loader, first_sequence, count)
        if not self.fault.at(first_sequence // count + 1):
            return batch
        if self.fault.kind == "one token":
            return torch.full_like(batch, 7)
        if self.fault.kind == "random":
            random = torch.Generator().manual_seed(first_sequence)
            return torch.randint(4, 1024, batch.shape, generator=random)
        return batch

    @contextmanager
    def here(self) -> Iterator[None]:
        planted = self

        def read(loader: Loader, first_sequence: int, count: int) -> Tensor:
            return planted.read(loader, first_sequence, count)

        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(loop, "accumulate_gradients", self.accumulate))
            stack.enter_context(mock.patch.object(Loader, "batch", read))
            yield


class Trial(execute.Run):
    """A run whose data was prepared before; all seeds share text, tokenizer and held-out part."""

    shared: Path

    def _prepare(self) -> TokenData:
        return TokenData.open(self.shared)


@dataclass
class Outcome:
    """How a run ended."""

    fault: Fault
    guard: str
    seed: int
    folder: Path
    losses: list[float]
    """Training loss by step."""
    spikes: list[dict[str, Any]]
    end: float
    """Held-out loss at the end; NaN when it is none or the run did not come to its end."""
    error: str = ""

    def inside(self, low: float, high: float) -> bool:
        return low <= self.end <= high


def recipe_of(place: Path, seed: int, clip_norm: float, action: str) -> Recipe:
    file = place / "guard.toml"
    file.write_text(RECIPE)
    settings = [f"seed={seed}", f"optim.clip_norm={clip_norm}", f"guard.action={action}"]
    return load_recipe(file, settings)


def carry_out(
    place: Path, fault: Fault, guard: str, seed: int, base: Path | None = None
) -> Outcome:
    """One run, from the start or from a copy of `base`. guard: an action of [guard], or "none": learn from anything."""
    recipe = recipe_of(place, seed, fault.clip_norm, "off" if guard == "none" else guard)
    out = place / f"{fault.title} {fault.clip_norm:g} {guard} {seed}".replace(" ", "-")
    if base:
        _begin_from(base, out, fault.step, recipe)
    job = Trial(recipe, out, torch.device("cpu"), lambda p: None, lambda line: None)
    job.shared, error = place / "data", ""
    with Planted(fault).here(), ExitStack() as stack:
        if guard == "none":
            accept = mock.patch.object(Guard, "judge", return_value=Verdict())
            stack.enter_context(accept)
        try:
            job.set_up()
            job.train()
        except FathomError as refused:
            error = str(refused)
        finally:
            job.folder.close()
    losses = [
        math.nan if line["loss"] is None else line["loss"] for line in lines(out / "metrics.jsonl")
    ]
    evals = [line["loss"] for line in lines(out / "evals.jsonl")]
    end = math.nan if error or not evals else evals[-1]
    return Outcome(fault, guard, seed, out, losses, lines(out / "spikes.jsonl"), end, error)


def _begin_from(base: Path, out: Path, step: int, recipe: Recipe) -> None:
    """A run folder that stands where the clean run stood at its last checkpoint before `step`."""
    shutil.copytree(base, out)
    (out / "recipe.toml").write_text(recipe.to_toml())
    for folder in checkpoints(out / "checkpoints"):
        if step_of(folder) >= step:
            shutil.rmtree(folder)


def lines(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def smoothed(losses: list[float], over: int = 9) -> list[float]:
    """Running median, which a single spike does not move."""
    return [statistics.median(losses[max(0, i - over + 1) : i + 1]) for i in range(len(losses))]


def row(outcome: Outcome, low: float, high: float) -> list[str]:
    """One line of the table."""
    fault, actions = outcome.fault, [spike["action"] for spike in outcome.spikes]
    did = ", ".join(f"{actions.count(a)} × {a}" for a in dict.fromkeys(actions)) or "–"
    clipping = "off" if fault.clip_norm == NEVER else f"at {fault.clip_norm:g}"
    verdict = "inside" if outcome.inside(low, high) else f"outside ({outcome.end - high:+.3f})"
    if math.isnan(outcome.end):
        verdict = "outside"
    end = "run ended" if outcome.error else f"{outcome.end:.4f}"
    return [fault.title, clipping, outcome.guard, did, end, verdict]


COLOURS = {"none": "#c1443c", "skip": "#2f6db5", "rollback": "#2e8b57", "off": "#888888"}
NAMES = {"none": "no guard", "skip": "guard: skip", "rollback": "guard: roll back"}


def draw(clean: list[Outcome], faulty: list[Outcome], file: Path) -> None:
    """Training loss around each fault, and all end losses, with what five clean seeds span in grey."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    faults = list(dict.fromkeys(outcome.fault for outcome in faulty))
    columns = 5
    rows = -(-len(faults) // columns)
    figure = pyplot.figure(figsize=(3.1 * columns, 2.6 * rows + 3.4), layout="constrained")
    grid = figure.add_gridspec(rows + 1, columns, height_ratios=[*[1] * rows, 1.25])
    for place, fault in enumerate(faults):
        axes = figure.add_subplot(grid[divmod(place, columns)])
        own = [outcome for outcome in faulty if outcome.fault == fault]
        _draw_fault(axes, clean, own, labelled=place == 0)
    _draw_ends(figure.add_subplot(grid[rows, :]), clean, faulty, faults)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


def _title(fault: Fault) -> str:
    return fault.title + (", no clipping" if fault.clip_norm == NEVER else "")


def _draw_fault(axes: Any, clean: list[Outcome], own: list[Outcome], labelled: bool) -> None:
    first = FAULT_STEP - 40
    curves = [smoothed(outcome.losses)[first:] for outcome in clean]
    steps = range(first + 1, STEPS + 1)
    low, high = (
        [min(v) for v in zip(*curves, strict=True)],
        [max(v) for v in zip(*curves, strict=True)],
    )
    axes.fill_between(steps, low, high, color="#cccccc", label="clean, 5 seeds")
    for outcome in own:
        curve = smoothed(outcome.losses)[first:]
        axes.plot(
            steps[: len(curve)],
            curve,
            color=COLOURS[outcome.guard],
            lw=1.4,
            label=NAMES[outcome.guard],
        )
    axes.axvline(own[0].fault.step, color="#444444", lw=0.7, ls=":")
    axes.set_title(_title(own[0].fault), fontsize=9)
    axes.set_ylim(min(low) - 0.1, max(high) + 1.6)
    if labelled:
        axes.legend(fontsize=7, loc="upper left")
        axes.set_ylabel("training loss, running median")


def _draw_ends(axes: Any, clean: list[Outcome], faulty: list[Outcome], faults: list[Fault]) -> None:
    ends = [outcome.end for outcome in clean]
    axes.axhspan(min(ends), max(ends), color="#cccccc")
    top = max(outcome.end for outcome in faulty if not math.isnan(outcome.end))
    for outcome in faulty:
        x = faults.index(outcome.fault) + 0.18 * (list(NAMES).index(outcome.guard) - 1)
        lost = math.isnan(outcome.end)
        axes.plot(
            x,
            top if lost else outcome.end,
            "x" if lost else "o",
            color=COLOURS[outcome.guard],
            ms=7,
        )
    axes.set_xticks(
        range(len(faults)), [_title(f).replace(", ", ",\n") for f in faults], fontsize=8
    )
    axes.set_ylabel("held-out loss at the end")
    axes.set_title("end losses; grey: five clean seeds; ×: not a number", fontsize=9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seeds", type=int, default=5, help="clean runs; faults go into seed 0")
    parser.add_argument("--figure", type=Path, default=Path("docs/images/guard.png"))
    parser.add_argument("--json", type=Path, help="write every outcome here")
    parser.add_argument("--place", type=Path, help="folder for the runs, kept [default: none]")
    given = parser.parse_args()
    torch.set_num_threads(1)
    facts = environment()
    print(describe(facts), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        place = given.place or Path(folder)
        clean, faulty = experiment(place, given.seeds)
    low, high = min(o.end for o in clean), max(o.end for o in clean)
    print(
        f"clean seeds end between {low:.4f} and {high:.4f}; remarks in them: {sum(len(o.spikes) for o in clean)}"
    )
    print(table(COLUMNS, [row(outcome, low, high) for outcome in faulty]))
    draw(clean, faulty, given.figure)
    found = [{**vars(o), "folder": "", "fault": vars(o.fault)} for o in (*clean, *faulty)]
    write_json(given.json, {"environment": facts, "outcomes": found})


def experiment(place: Path, seeds: int) -> tuple[list[Outcome], list[Outcome]]:
    """Clean runs of all seeds, and each fault in seed 0 with each kind of guard."""
    place.mkdir(parents=True, exist_ok=True)
    library = Path(json.__file__).parent.parent
    sources = [str(library / package) for package in PACKAGES]
    prepare(
        place / "data",
        sources,
        tokenizer="bpe",
        vocab_size=1024,
        held_out=0.05,
        held_out_kind="documents",
        seed=0,
    )
    clean = [said(carry_out(place, CLEAN, "skip", seed)) for seed in range(seeds)]
    unclipped = Fault(CLEAN.title, clip_norm=NEVER)
    bases = {CLEAN.clip_norm: clean[0], NEVER: said(carry_out(place, unclipped, "skip", 0))}
    faulty = [
        said(carry_out(place, fault, guard, 0, bases[fault.clip_norm].folder))
        for fault in FAULTS
        for guard in NAMES
    ]
    return clean, faulty


def said(outcome: Outcome) -> Outcome:
    """The outcome, which is told at once."""
    print(
        f"{_title(outcome.fault)}, {outcome.guard}, seed {outcome.seed}: {outcome.end:.4f} {outcome.error[:90]}",
        flush=True,
    )
    return outcome


if __name__ == "__main__":
    main()
