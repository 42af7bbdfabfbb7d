"""A run folder as several stages leave it: ramp, two sources, spikes, loss by position, needles. Made by hand."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from fathom.train.positions import doubling_edges
from tests.runs.test_report import step_line, write_jsonl, write_run

# name, steps, sequences, seq_len, lr, gamma, mtp_weight, weights of the sources
STAGES: list[tuple[Any, ...]] = [
    ("constant", 200, 10, 256, 2e-3, 1e-2, 0.3, {"en": 3.0, "code": 1.0}),
    ("cosine", 90, 10, 256, 2e-3, 1e-2, 0.1, {"en": 3.0, "code": 1.0}),
    ("low", 8, 10, 256, 2e-4, 0.0, 0.1, {"en": 1.0, "code": 1.0}),
    ("lowest", 4, 10, 256, 6e-5, 0.0, 0.1, {"en": 1.0, "code": 1.0}),
    ("extend-2k", 40, 2, 2048, 2e-4, 0.0, 0.1, {"en": 1.0, "code": 1.0}),
    ("extend-8k", 20, 1, 8192, 2e-4, 0.0, 0.1, {"en": 1.0, "code": 1.0}),
]
SPIKES = [
    {"step": 120, "stage": "constant", "action": "skip", "reason": "loss is not finite", "loss": None,
     "grad_norm": None, "loss_z": None, "grad_norm_z": None,
     "data": {"first_sequence": 1190, "count": 10, "sources": {"en": 7, "code": 3}}},
    {"step": 150, "stage": "constant", "action": "record", "reason": "gradient norm 9.1 above 8", "loss": 4.1,
     "grad_norm": 12.5, "loss_z": 0.3, "grad_norm_z": 9.1, "data": {"first_sequence": 1490, "count": 10}},
    {"step": 230, "stage": "cosine", "action": "rollback", "reason": "<loss> 12.4 above 8", "loss": 7.9,
     "grad_norm": 3.5, "loss_z": 12.4, "grad_norm_z": 2.0,
     "to": 220, "passed_over": 100, "data": {"first_sequence": 2290, "count": 10}},
]  # fmt: skip


def metrics() -> list[dict[str, Any]]:
    """A line for each step; the first twelve of the run grow from 2 to 10 sequences."""
    draw, lines, tokens = random.Random(0), [], 0
    for name, steps, batch, seq_len, lr, gamma, weight, sources in STAGES:
        for number in range(steps):
            step = len(lines) + 1
            size = min(batch, 2 + step // 2) if name == "constant" else batch
            tokens += size * seq_len
            share = sources["en"] / sum(sources.values())
            en = sum(draw.random() < share for _ in range(size))
            rate = lr * min(1, step / 50)
            if name == "cosine":
                rate = 2e-4 + 9e-4 * (1 + math.cos(math.pi * number / steps))
            loss = 3.0 + 6.0 / step**0.5 + draw.gauss(0, 0.08)
            more = {"batch": size, "seq_len": seq_len, "gamma": gamma, "mtp_weight": weight}
            more |= {"lr": rate, "tokens": tokens, "loss": loss, "mtp_loss": loss + 0.6}
            more |= {"stage": name, "grad_norm": 0.5 + abs(draw.gauss(0, 0.2)), "skipped": None}
            lines.append(step_line(step, **more, sources={"en": en, "code": size - en}))
    return lines


def positions() -> list[dict[str, Any]]:
    """Before and after each stage; before the extensions the loss rises where nothing was learnt."""
    lines, step = [], 0
    for name, steps, _, seq_len, *_ in STAGES:
        edges = doubling_edges(seq_len)
        for when, far in (("before", 0.35), ("after", 0.0)):
            at = step if when == "before" else step + steps
            base = 9.0 if at == 0 else 3.0
            loss = [
                base + (1.5 / (i + 1) if at else 0) + far * max(0, i - 8) ** 1.3
                for i in range(len(edges) - 1)
            ]
            lines.append({"step": at, "stage": name, "when": when, "seq_len": seq_len})
            lines[-1] |= {"edges": list(edges), "loss": loss}
        step += steps
    return lines


def needles() -> list[dict[str, Any]]:
    """Found in the last window only, then nearly everywhere."""
    lengths, depths = [256, 512, 1024, 2048, 4096], [i / 10 for i in range(11)]
    poor = [[1.0 if (1 - d) * n <= 256 else 0.1 for d in depths] for n in lengths]
    good = [[1.0 - 0.2 * (n == 4096 and d < 0.3) for d in depths] for n in lengths]
    common = {"lengths": lengths, "depths": depths, "trials": 10}
    return [
        {"step": 302, "stage": "lowest", "when": "after", "found": poor, **common},
        {"step": 342, "stage": "extend-2k", "when": "after", "found": good, **common},
        {"step": 362, "stage": "extend-8k", "when": "after", "found": good, **common},
    ]


def write_staged_run(folder: Path) -> Path:
    """All of it in a run folder."""
    write_run(folder)
    stages = [f'[[stages]]\nname = "{s[0]}"\nweights = {_toml(s[7])}\n' for s in STAGES[2:]]
    common = f'name = "staged"\n[data]\nweights = {_toml(STAGES[0][7])}\n'
    (folder / "recipe.toml").write_text(common + "".join(stages))
    logs = {"metrics": metrics(), "spikes": SPIKES, "positions": positions(), "needle": needles()}
    for name, lines in logs.items():
        write_jsonl(folder / f"{name}.jsonl", lines)
    evals = [{"step": s, "loss": 3.1 + 6 / s**0.5, "bits_per_byte": 2.0} for s in (100, 200, 300)]
    write_jsonl(folder / "evals.jsonl", evals)
    return folder


def _toml(weights: dict[str, float]) -> str:
    return json.dumps(weights).replace(":", " =").replace("{", "{ ").replace("}", " }")
