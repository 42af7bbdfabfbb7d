"""How much of the all-to-all an interleaved pair of chunks hides, on two ranks with a slow network between them.

    python benchmarks/overlap.py [--rounds 15] [--json FILE]

Two processes, one thread each, each pinned to a core of its own. Every rank has half of the experts; a pair is a
forward chunk of one micro-batch and a backward chunk of another through the same layers. Transfers go over gloo and
are there bytes / bandwidth seconds after they were posted (`slow_network.py`).

Cases are the order of operations (one after the other, published, posted early) and the network (no delay; each
transfer by itself; one transfer behind the other, as on one wire). In every round each case runs once, beginning with
another one each round, those without delay at the beginning and at the end. Time is that of the slower rank.

    hidden = 1 - (t_overlap - t_compute) / t_comm

t_compute is the same round's time of the same order without delay, t_comm the sum of bytes / bandwidth. Bandwidth is
set in each round so that t_comm is what the cases without delay took.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import harness
import torch
import torch.distributed as dist
from slow_network import Network, on_two_ranks

from fathom.kernels.put_off import PutOff
from fathom.model import ModelConfig, Transformer
from fathom.model.layers import Linear
from fathom.model.moe import Experts
from fathom.model.objective import Rows
from fathom.parallel import OVERLAPPED_ORDER, POSTED_EARLY, Layout, Mesh, overlapped_time
from fathom.parallel.experts import shard_experts
from fathom.parallel.pipeline.lanes import Lane
from fathom.parallel.pipeline.layers import DenseLayer
from fathom.parallel.pipeline.overlapped import Chunk, interleave
from fathom.parallel.pipeline.stages import Stage, Weights
from fathom.parallel.schedules.overlap import (
    COMMUNICATION,
    NEEDS,
    ONE_AFTER_THE_OTHER,
    Operation,
    Order,
)
from fathom.train.memory import keep_freed_memory

LAYERS = 4
SHAPE: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 256,
    "intermediate_size": 256,
    "moe_intermediate_size": 192,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "q_lora_rank": 128,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 48,
    "qk_rope_head_dim": 16,
    "v_head_dim": 48,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 0,
    "max_position_embeddings": 512,
    "num_nextn_predict_layers": 0,
}
SEQUENCES, POSITIONS = 2, 256
ORDERS: dict[str, Order] = {
    "one after the other": ONE_AFTER_THE_OTHER,
    "published": OVERLAPPED_ORDER,
    "posted early": POSTED_EARLY,
}
NO_DELAY, BY_ITSELF, ONE_WIRE = "no delay", "each by itself", "one wire"
CASES = [(order, kind) for kind in (NO_DELAY, BY_ITSELF, ONE_WIRE) for order in ORDERS]
UNWATCHED = nullcontext()


# --- one rank ----------------------------------------------------------------------------------------


class Rank:
    """Half of the experts, and two micro-batches."""

    def __init__(self) -> None:
        keep_freed_memory()
        self.mesh = Mesh(Layout(dp=2, ep=2))
        torch.manual_seed(0)
        model = Transformer(ModelConfig(**SHAPE)).train()
        shard_experts(model, self.mesh)
        self.put_off = PutOff()
        for module in model.modules():
            if isinstance(module, Linear | Experts):
                module.matmul = partial(module.matmul, put_off=self.put_off)
        self.model, self.stage = model, Stage(model, range(LAYERS), False)
        torch.manual_seed(1 + self.mesh.rank)
        tokens = torch.randint(0, SHAPE["vocab_size"], (SEQUENCES, POSITIONS + 1))
        self.rows = Rows.of(tokens, None)
        self.inputs = torch.randn(2, SEQUENCES, POSITIONS, SHAPE["hidden_size"])

    def pair(
        self, order: Order, network: Network, watched: AbstractContextManager[Any] = UNWATCHED
    ) -> float:
        """Seconds that the slower rank takes for one pair."""
        weights = Weights(mtp=0.0, balance_alpha=1e-4)
        chunks = [
            Chunk(self.stage, self.rows, weights, self.put_off, Lane(None), order) for _ in "FB"
        ]
        ahead, back = chunks
        output = back.forward(self.inputs[1]).output
        assert output is not None
        self.model.zero_grad(set_to_none=False)
        dist.barrier()
        started = time.perf_counter()
        with network.between(), watched:
            ahead.enter(self.inputs[0])
            back.enter_backward(output, 1.0, 1.0)
            interleave(order, ahead, back)
            ahead.leave()
            back.leave_backward()
        return self.slowest(time.perf_counter() - started)

    def slowest(self, seconds: float) -> float:
        found = torch.tensor(seconds, dtype=torch.float64)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return float(found)

    def costs(self) -> dict[Operation, float]:
        """CPU seconds of a layer's computations, each with the posting of what it leaves behind."""
        spent: Counter[Operation] = Counter()
        self.pair(ONE_AFTER_THE_OTHER, Network(), timed_operations(spent))
        return {operation: seconds / LAYERS for operation, seconds in spent.items()}


@contextmanager
def timed_operations(spent: Counter[Operation]) -> Iterator[None]:
    """CPU seconds by computation, without what it waits; to post an all-to-all counts for what that needs."""
    run = Chunk.run

    def timed(chunk: Chunk, layer: DenseLayer, operation: Operation) -> None:
        started = time.thread_time()
        run(chunk, layer, operation)
        if operation == ("B", "combine"):
            operation = ("B", "attention")  # of the layer before, whose gradient it sends
        elif operation[1] in COMMUNICATION:
            operation = NEEDS[operation]
        spent[operation] += time.thread_time() - started

    Chunk.run = timed  # type: ignore[method-assign]
    try:
        yield
    finally:
        Chunk.run = run  # type: ignore[method-assign]


def measure(rounds: int) -> dict[str, Any]:
    """What one rank has to say; all ranks say nearly the same."""
    rank = Rank()
    for _ in range(3):  # memory, compiled products, connections
        rank.pair(ONE_AFTER_THE_OTHER, Network())
    network = Network()
    rank.pair(ONE_AFTER_THE_OTHER, network)
    sent = network.bytes
    found: dict[tuple[str, str], list[float]] = {case: [] for case in CASES}
    communicating, costs = [], []
    for number in range(rounds):
        begun = undelayed(rank, number)
        seconds = statistics.median(begun.values())
        communicating.append(seconds)
        slow = [case for case in CASES if case[1] != NO_DELAY]
        for name, kind in turned(slow, number):
            network = Network(seconds / sent.total(), queued=kind == ONE_WIRE)
            found[name, kind].append(rank.pair(ORDERS[name], network))
        costs.append(rank.costs())
        for name, ended in undelayed(rank, number).items():
            found[name, NO_DELAY].append((begun[name] + ended) / 2)
    return {
        "times": found,
        "costs": {
            operation: statistics.median(one[operation] for one in costs) for operation in costs[0]
        },
        "bytes": sent,
        "communicating": communicating,
        "load": os.getloadavg()[0],
    }


def undelayed(rank: Rank, number: int) -> dict[str, float]:
    """Seconds of each order without delay."""
    names = turned(list(ORDERS), number)
    return {name: rank.pair(ORDERS[name], Network()) for name in names}


def turned(things: list[Any], number: int) -> list[Any]:
    """The same, beginning with another one."""
    turn = number % len(things)
    return things[turn:] + things[:turn]


# --- what came of it -------------------------------------------------------------------------------


def hidden(found: dict[str, Any], case: tuple[str, str], zero: str) -> list[float]:
    """Share of the communication that cost no time, by round, with the time of order `zero` without delay."""
    times, communicating = found["times"], found["communicating"]
    rounds = zip(times[case], times[zero, NO_DELAY], communicating, strict=True)
    return [1 - (slow - fast) / sent for slow, fast, sent in rounds]


def simulated(found: dict[str, Any], name: str) -> float:
    """What the simulator says of the same costs and one wire, with transfers that take as long as the computations."""
    costs, sent = dict(found["costs"]), found["bytes"]
    per_byte = sum(costs.values()) / sent.total()
    costs |= {operation: sent[operation] * per_byte for operation in sent}
    return overlapped_time(ORDERS[name], costs, LAYERS, host_computes=True).hidden


def report(found: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for case in CASES:
        name, kind = case
        row: dict[str, Any] = {"order": name, "network": kind, "seconds": found["times"][case]}
        if kind != NO_DELAY:
            row["hidden"] = hidden(found, case, name)
            row["hidden_against_plain"] = hidden(found, case, "one after the other")
        if kind == ONE_WIRE:
            row["simulated"] = simulated(found, name)
        rows.append(row)
    return rows


def milliseconds(seconds: list[float]) -> str:
    return harness.spread([1000 * one for one in seconds], 1)


def percent(shares: list[float]) -> str:
    return harness.spread([100 * one for one in shares], 1)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="how often each case runs")
    parser.add_argument("--json", type=Path, help="file for every number")
    chosen = parser.parse_args(argv)
    facts = harness.environment()
    found = on_two_ranks(measure, chosen.rounds)[0]
    rows = report(found)
    print(harness.describe(facts))
    sent, seconds = found["bytes"].total(), statistics.median(found["communicating"])
    print(
        f"t_comm {milliseconds(found['communicating'])} ms of a pair: {sent / 1e6:.2f} MB at about "
        f"{sent / seconds / 1e6:.0f} MB/s; load average {found['load']:.1f} at the end\n"
    )
    costs = {f"{what}({kind})": cost for (kind, what), cost in found["costs"].items()}
    each = [(operation, f"{1000 * cost:.2f}") for operation, cost in sorted(costs.items())]
    print(harness.table(["operation", "CPU ms per layer"], each))
    heads = [
        "order",
        "network",
        "ms per pair",
        "hidden, %",
        "with the plain order's t_compute, %",
        "simulator, %",
    ]
    cells = [
        [
            row["order"],
            row["network"],
            milliseconds(row["seconds"]),
            percent(row["hidden"]) if "hidden" in row else "",
            percent(row["hidden_against_plain"]) if "hidden" in row else "",
            f"{100 * row['simulated']:.1f}" if "simulated" in row else "",
        ]
        for row in rows
    ]
    print("\n" + harness.table(heads, cells))
    facts |= {"shape": SHAPE, "costs": costs, "bytes": sent, "cases": rows}
    facts |= {"communicating": found["communicating"]}
    harness.write_json(chosen.json, facts)


if __name__ == "__main__":
    main()
