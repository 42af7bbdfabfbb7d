"""Tiny Shakespeare by character: the recipe `shakespeare-char` against the same shape trained through
`transformers`, on the same windows in the same order.

Whole programs are timed, in turn: ours with preparing the data, four evaluations, samples,
checkpoints and report, theirs with training and one evaluation; and the steps alone. Also: held-out
loss over all held-out characters in windows of 64, and how evenly experts are used at the end (most
loaded over mean, worst layer, mean of the last 100 steps), with and without the bias update.
nanoGPT publishes 1.88 for 4 layers of width 128 on this budget.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from harness import (
    Contender,
    alternate,
    describe,
    environment,
    spread,
    table,
    write_json,
)
from shakespeare_transformers import WATCHED, Plain, warm_up
from shapes import fields_of

import fathom
from fathom.data import prepare
from fathom.runs.execute import run
from fathom.runs.recipe import Recipe

BACK_ENDS = ("grouped_mm", "eager", "batched_mm")
PROBE_STEPS = 6


class Ours:
    """Runs of the recipe, to live in a worker."""

    def __init__(self, text: str) -> None:
        self.text = text

    def train(self, seed: int, steps: int, gamma: float = 1e-3) -> dict[str, float]:
        """A whole run in a folder of its own, and what its files say."""
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "run"
            run(recipe(self.text, seed, steps, gamma), out)
            return _outcome(out)


def recipe(text: str, seed: int, steps: int, gamma: float) -> Recipe:
    """The recipe on this text with this seed; shorter runs have a shorter warm-up."""
    rising = warm_up(steps)
    settings = {
        "seed": seed,
        "data.sources": json.dumps([text]),
        "stages.pretrain.steps": steps,
        "stages.pretrain.warmup_steps": rising,
        "stages.pretrain.decay_steps": steps - rising,
        "stages.pretrain.gamma": gamma,
    }
    return fathom.load_recipe("shakespeare-char", [f"{k}={v}" for k, v in settings.items()])


def _outcome(out: Path) -> dict[str, float]:
    metrics, evaluations = (
        [json.loads(line) for line in (out / name).read_text(encoding="utf-8").splitlines()]
        for name in ("metrics.jsonl", "evals.jsonl")
    )
    return {
        "held_out_loss": evaluations[-1]["loss"],
        "load": statistics.mean(line["max_load"] for line in metrics[-WATCHED:]),
        "steps_s": sum(line["seconds"] for line in metrics),
    }


def fastest_back_end(data: str, fields: dict[str, Any], threads: int) -> str:
    """Which experts back end of theirs trains this shape fastest, by a few steps of each in turn."""
    contenders = [
        Contender(name, Plain, {"data": data, "fields": fields, "experts": name}, threads)
        for name in BACK_ENDS
    ]
    try:
        times = alternate(contenders, "train", 2, 0, PROBE_STEPS)
    finally:
        for contender in contenders:
            contender.close()
    for name, t in times.items():
        print(f"  {name}: {t.text(per=PROBE_STEPS / 1e3)} ms per step")
    return min(times, key=lambda name: times[name].median)


def compare(options: argparse.Namespace, folder: str) -> dict[str, Any]:
    """All seeds of ours, as many of theirs as asked for, in turn."""
    text = str(options.text.resolve())
    shape = recipe(text, 0, options.steps, 1e-3)
    settings = shape.data
    prepare(
        folder,
        settings.sources,
        settings.tokenizer,
        shape.model.vocab_size,
        settings.held_out,
        settings.held_out_kind,
    )
    fields = fields_of(shape.model)
    print("their experts back ends:")
    experts = fastest_back_end(folder, fields, options.threads)
    theirs_arguments = {"data": folder, "fields": fields, "experts": experts}
    with (
        Contender("fathom", Ours, {"text": text}, options.threads) as ours,
        Contender("transformers", Plain, theirs_arguments, options.threads) as theirs,
    ):
        rounds = [_round(ours, theirs, seed, options) for seed in range(options.seeds)]
        unbalanced = [ours.call("train", s, options.steps, 0.0) for s in range(options.gamma_zero)]
    return {"back_end": experts, "rounds": rounds, "gamma_zero": unbalanced}


def _round(
    ours: Contender, theirs: Contender, seed: int, options: argparse.Namespace
) -> dict[str, Any]:
    """One seed on both sides (ours only, once theirs has had its runs)."""
    found: dict[str, Any] = {"seed": seed}
    sides = [("ours", ours)] + ([("theirs", theirs)] if seed < options.their_seeds else [])
    for name, contender in sides if seed % 2 else reversed(sides):
        result, wall, cpu = contender.timed("train", seed, options.steps)
        if name == "theirs":
            steps_s = wall
            result, more_wall, more_cpu = contender.timed("result")
            wall, cpu = wall + more_wall, cpu + more_cpu
            result["steps_s"] = steps_s
        found[name] = {**result, "wall_s": wall, "cpu_s": cpu}
        print(f"  seed {seed} {name}: " + _short(found[name]), flush=True)
    return found


def _short(side: dict[str, float]) -> str:
    return (
        f"loss {side['held_out_loss']:.4f}, load {side['load']:.2f}, {side['wall_s']:.1f} s, "
        f"of which steps {side['steps_s']:.1f} s"
    )


def report(result: dict[str, Any]) -> str:
    rounds = result["rounds"]
    both = [r for r in rounds if "theirs" in r]
    rows = []
    for name, chosen in (("fathom", rounds), ("transformers", both)):
        sides = [r["ours" if name == "fathom" else "theirs"] for r in chosen]
        rows.append(_row(name, sides))
    if result["gamma_zero"]:
        rows.append(_row("fathom, γ = 0", result["gamma_zero"]))
    lines = [table(("", "seeds", "held-out loss", "load", "seconds", "of which steps"), rows)]
    for what, key in (("whole programs", "wall_s"), ("steps alone", "steps_s")):
        shares = [r["ours"][key] / r["theirs"][key] for r in both]
        if shares:
            lines.append(f"our time over theirs, {what}: {spread(shares)} ({result['back_end']})")
    return "\n".join(lines)


def _row(name: str, sides: list[dict[str, float]]) -> list[str]:
    def of(key: str, digits: int) -> str:
        return spread([side[key] for side in sides], digits) if key in sides[0] else ""

    found = [of("held_out_loss", 3), of("load", 2), of("wall_s", 1), of("steps_s", 1)]
    return [name, str(len(sides)), *found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path, help="tinyshakespeare.txt")
    parser.add_argument("--seeds", type=int, default=5, help="runs of ours")
    parser.add_argument("--their-seeds", type=int, default=3, help="runs of theirs")
    parser.add_argument(
        "--gamma-zero", type=int, default=1, help="runs of ours without bias update"
    )
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write every number there")
    options = parser.parse_args()
    facts = environment()
    print(describe(facts), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        result = compare(options, str(Path(folder) / "data"))
    print(report(result))
    write_json(options.json, {"environment": facts, "steps": options.steps, "result": result})


if __name__ == "__main__":
    main()
