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
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from guard_faults import FAULTS, NAMES, NEVER, Clean, Fault, Outcome, Planted, title_of
from guard_figure import draw
from harness import describe, environment, table, write_json

from fathom.data import TokenData, prepare
from fathom.errors import FathomError
from fathom.runs import execute
from fathom.runs.recipe import Recipe, load_recipe
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
COLUMNS = ("fault", "clipping", "guard", "what it did", "end loss", "of the clean range")


class Trial(execute.Run):
    """A run whose data was prepared before; all seeds share text, tokenizer and held-out part."""

    shared: Path

    def _prepare(self) -> TokenData:
        return TokenData.open(self.shared)


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
    print(f"{title_of(fault)}, {NAMES[guard]}, seed {seed}: {end:.4f} {error}", flush=True)
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


def row(outcome: Outcome, clean: Clean) -> list[str]:
    """One line of the table."""
    ends = [run.end for run in clean[outcome.fault.clip_norm]]
    low, high = min(ends), max(ends)
    fault, actions = outcome.fault, [spike["action"] for spike in outcome.spikes]
    did = ", ".join(f"{actions.count(a)} × {a}" for a in dict.fromkeys(actions)) or "–"
    clipping = "off" if fault.clip_norm == NEVER else f"at {fault.clip_norm:g}"
    beyond = max(outcome.end - high, 0.0) or min(outcome.end - low, 0.0)
    verdict = "outside" if math.isnan(outcome.end) else f"outside ({beyond:+.3f})"
    verdict = "inside" if low <= outcome.end <= high else verdict
    end = "run ended" if outcome.error else f"{outcome.end:.4f}"
    return [fault.title, clipping, outcome.guard, did, end, verdict]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seeds", type=int, default=5, help="clean runs; faults go into seed 0")
    parser.add_argument("--figure", type=Path, default=Path("docs/images/guard.png"))
    parser.add_argument("--json", type=Path, help="write every outcome here")
    given = parser.parse_args()
    torch.set_num_threads(1)
    facts = environment()
    print(describe(facts), flush=True)
    with tempfile.TemporaryDirectory() as place:
        clean, faulty = experiment(Path(place), given.seeds)
    for clip_norm, runs in clean.items():
        ends, remarks = [outcome.end for outcome in runs], sum(len(o.spikes) for o in runs)
        print(
            f"clip_norm {clip_norm:g}: {len(runs)} clean seeds end between {min(ends):.4f} and {max(ends):.4f}; "
            f"remarkable steps in them: {remarks}"
        )
    print(table(COLUMNS, [row(outcome, clean) for outcome in faulty]))
    draw(clean, faulty, given.figure)
    all_of_them = [outcome for runs in (*clean.values(), faulty) for outcome in runs]
    found = [{**vars(o), "folder": "", "fault": vars(o.fault)} for o in all_of_them]
    write_json(given.json, {"environment": facts, "outcomes": found})


def experiment(place: Path, seeds: int) -> tuple[Clean, list[Outcome]]:
    """Clean runs of all seeds with clipping and without, and each fault in seed 0 with each kind of guard."""
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
    clean = {
        clip_norm: [
            carry_out(place, Fault("no fault", clip_norm=clip_norm), "skip", seed)
            for seed in range(seeds)
        ]
        for clip_norm in (1.0, NEVER)
    }
    faulty = [
        carry_out(place, fault, guard, 0, clean[fault.clip_norm][0].folder)
        for fault in FAULTS
        for guard in NAMES
        if guard != "rollback" or fault.rolled_back
    ]
    return clean, faulty


if __name__ == "__main__":
    main()
