"""What making a rank's part of a model needs: peak memory and time, beside the way of building all and keeping a part.

    python benchmarks/building_memory.py [--case experts,…] [--json FILE]

Each rank is made in a process of its own, one at a time, with groups in which nobody answers (making it needs no
message). The peak is that of the resident size, from after the imports on; freed memory is kept as a run keeps it.
"whole" is `Parallel` on a real model, "outline" is what a run on many processes does. `v3` has the released shape in
the report's layout (pp 16, dp 128, ep 64, DualPipe). Its "whole" fits no machine. All of a rank's own tensors are drawn
to one and the same place there, which takes the time and not the memory. Seconds are CPU time of one thread; what
drawing the whole model would take is that of 2^27 numbers, times their share.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from harness import (
    MIB,
    describe,
    environment,
    limit_threads,
    peak_bytes,
    reset_peak,
    resident_bytes,
    table,
    write_json,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from fathom.model import ModelConfig, Transformer
from fathom.model.initial import Run, draw_runs, outline
from fathom.parallel import Layout, Parallel
from fathom.parallel.building import stand_in
from fathom.parallel.experts import shard_experts
from fathom.parallel.pieces import named
from fathom.parallel.pipeline import Plan
from fathom.parallel.pipeline.stages import keep_stages
from fathom.planning.published import V3
from fathom.train.memory import keep_freed_memory
from tests.parallel.paper import on_paper

T = TypeVar("T")
CPU = torch.device("cpu")
SHAPE: dict[str, Any] = {
    "vocab_size": 32768,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "moe_intermediate_size": 704,
    "num_hidden_layers": 7,
    "num_attention_heads": 16,
    "q_lora_rank": 384,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "n_routed_experts": 64,
    "n_shared_experts": 1,
    "num_experts_per_tok": 6,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 4096,
    "num_nextn_predict_layers": 0,
}
SPREAD = ModelConfig(**SHAPE)
CASES: dict[str, tuple[ModelConfig, Layout, str | None]] = {
    "experts": (SPREAD, Layout(dp=4, ep=4), None),
    "pipeline": (SPREAD, Layout(pp=2, dp=2, ep=2), "DualPipe"),
    "v3": (V3, Layout(pp=16, dp=128, ep=64), "DualPipe"),
}


def measure(case: str, way: str, rank: int) -> dict[str, Any]:
    """One rank, in a process of its own."""
    limit_threads(1)
    keep_freed_memory()
    config, layout, name = CASES[case]
    mesh = on_paper(layout, rank)
    plan = Plan(config, layout.pp, name) if name else None
    torch.manual_seed(1)
    torch.zeros(64).normal_()
    reset_peak()
    before, started = resident_bytes(), time.process_time()
    if case == "v3":
        own = draw_only(config, mesh, plan)
    else:
        model = Transformer(config) if way == "whole" else outline(config)
        on = CPU if way == "outline" else None
        parallel = Parallel(model, mesh, plan=plan, outline_on=on)
        own = sum(one.parameter.nbytes for one in parallel.named)
    seconds = time.process_time() - started
    return {
        "case": case,
        "way": way,
        "rank": rank,
        "whole_bytes": 4 * sum(p.numel() for p in outline(config).parameters()),
        "own_bytes": own,
        "peak_bytes": peak_bytes() - before,
        "seconds": seconds,
    }


def seconds_per_number() -> float:
    """Of drawing, in a process of its own."""
    limit_threads(1)
    numbers = torch.zeros(1 << 22)
    numbers.normal_()
    started = time.process_time()
    for _ in range(32):
        numbers.normal_()
    return (time.process_time() - started) / 32 / len(numbers)


def alone(function: Callable[..., T], *arguments: Any) -> T:
    """What a function finds in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def draw_only(config: ModelConfig, mesh: Any, plan: Plan | None) -> int:
    """All that `Parallel` draws for a rank, into one place; its bytes."""
    assert plan is not None
    model = outline(config)
    stages = {part.stage for part in plan.placement[mesh.pp.place]}
    keep_stages(model, stages, plan.layers)
    shard_experts(model, mesh)
    stand_in(model, CPU)
    parameters = named(model, mesh, plan)
    place = torch.empty(max(one.parameter.numel() for one in parameters))
    runs = {one.name: Run(place[: one.parameter.numel()], one.offset) for one in parameters}
    draw_runs(config, runs)
    return sum(one.parameter.nbytes for one in parameters)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--case", default=",".join(CASES))
    arguments.add_argument("--json", type=Path)
    given = arguments.parse_args()
    each, found = alone(seconds_per_number), []
    for case in given.case.split(","):
        world = CASES[case][1].world
        ranks = range(world) if world <= 4 else (0, world // 2, world - 1)
        for way in ("outline",) if case == "v3" else ("whole", "outline"):
            found += [alone(measure, case, way, rank) for rank in ranks]
    print(describe(environment()))
    print(f"{1e-6 / each:,.0f} million numbers/s drawn")
    rows = [
        [
            one["case"], one["way"], str(one["rank"]),
            *(f"{one[key] / MIB:,.0f}" for key in ("whole_bytes", "own_bytes", "peak_bytes")),
            f"{one['seconds']:.1f}", f"{one['whole_bytes'] / 4 * each:,.0f}",
        ]
        for one in found
    ]  # fmt: skip
    heads = ("case", "way", "rank", "whole MiB", "own MiB", "peak MiB", "s", "s for all")
    print(table(heads, rows))
    if given.json:
        write_json(
            given.json, {"environment": environment(), "seconds_per_number": each, "ranks": found}
        )


if __name__ == "__main__":
    main()
