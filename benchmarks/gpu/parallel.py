"""Training on many devices, as far as one GPU can show it: NCCL, and two streams under an interleaved pair.

    python benchmarks/gpu/parallel.py [--json FILE]

A world of one process over NCCL, in which tokens are sent to their experts by an all-to-all with itself: every
rule, split, event and stream of the real thing, without a wire. Shown are

* gradients of an interleaved pair (report §3.2.1), with all-to-alls on a stream of their own, beside those of
  the same layers without a dispatcher, differentiated as one graph, in float32;
* milliseconds for a pair in each order, with one stream and with two, in turn;
* from a profile of a pair with two streams: for what share of the time in which the network's streams were busy
  computations were running too. An all-to-all with itself is a copy in the GPU's memory, so this tells whether
  streams run side by side, not what a network would take;
* `torchrun -m fathom run`, one process, NCCL: trains, saves, stops, resumes and exports.

`--toy` does the same over gloo on a CPU at toy size, without streams.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

from device import device_name, device_of
from harness import describe, environment, spread, table, write_json
from small_model import MODEL
from streams import beside

from fathom import ModelConfig, Transformer
from fathom.kernels.put_off import PutOff
from fathom.model.layers import Linear
from fathom.model.moe import Experts, LocalDispatcher, MoE
from fathom.model.objective import Rows
from fathom.parallel import OVERLAPPED_ORDER, POSTED_EARLY, launch
from fathom.parallel.all_to_all import Traffic
from fathom.parallel.dispatcher import ExpertParallelDispatcher, Hop
from fathom.parallel.mesh import Group
from fathom.parallel.pipeline.lanes import Lane, network_stream
from fathom.parallel.pipeline.overlapped import Chunk, interleave
from fathom.parallel.pipeline.stages import Stage, Weights
from fathom.parallel.schedules.overlap import ONE_AFTER_THE_OTHER, Order

SHAPE: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 2048,
    "intermediate_size": 2048,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "q_lora_rank": 1024,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 32,
    "n_shared_experts": 1,
    "num_experts_per_tok": 6,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 0,
    "max_position_embeddings": 4096,
    "num_nextn_predict_layers": 0,
}
TOY = SHAPE | {
    "hidden_size": 64,
    "moe_intermediate_size": 32,
    "num_attention_heads": 2,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 8,
}
ORDERS: dict[str, Order] = {
    "one after the other": ONE_AFTER_THE_OTHER,
    "published": OVERLAPPED_ORDER,
    "posted early": POSTED_EARLY,
}
CLOSE = 1e-5
"""‖difference‖ / ‖gradient‖ in float32, sums in another order."""
RECIPE = """
name = "smoke"
{model}[data]
sources = ["stdlib"]
[checkpoint]
every = 5
asynchronous = true
[[stages]]
name = "pretrain"
steps = 20
seq_len = 64
batch = 8
lr = 3e-3
warmup_steps = 5
"""


class ToItself(ExpertParallelDispatcher):
    """The dispatcher of many ranks, all of which are this one."""

    def __init__(self, group: Group, experts: int) -> None:
        self.traffic, self.here = Traffic(), experts
        self.hops = [Hop("ep", group, experts, self.traffic)]


class Layers:
    """Some MoE layers and two micro-batches."""

    def __init__(self, config: ModelConfig, rows: tuple[int, int], device: torch.device) -> None:
        torch.manual_seed(0)
        with device:
            self.model = Transformer(config).train()
            tokens = torch.randint(0, config.vocab_size, (rows[0], rows[1] + 1))
            self.inputs = torch.randn(2, *rows, config.hidden_size)
        self.device, self.put_off = device, PutOff()
        self.stage = Stage(self.model, range(config.num_hidden_layers), False)
        self.rows = Rows.of(tokens, None)
        self.network = network_stream(device)
        self.group = Group((0,), 0, dist.group.WORLD)

    def send(self, to_itself: bool) -> None:
        """Whether tokens travel; then products put gradients off as well, as they do in a pipeline."""
        for module in self.model.modules():
            if isinstance(module, MoE):
                experts = self.model.config.n_routed_experts
                module.dispatcher = (
                    ToItself(self.group, experts) if to_itself else LocalDispatcher()
                )
            if to_itself and isinstance(module, Linear | Experts):
                rule = getattr(module.matmul, "func", module.matmul)
                module.matmul = partial(rule, put_off=self.put_off)

    def chunk(self, order: Order, streams: int) -> Chunk:
        lane = Lane(self.network if streams == 2 else None)
        return Chunk(self.stage, self.rows, Weights(0.0, 1e-4), self.put_off, lane, order)

    def pair(self, order: Order, streams: int, profiled: Any = None) -> Tensor:
        """A forward chunk of one micro-batch with the backward of another; seconds, or the input's gradient."""
        ahead, back = self.chunk(order, streams), self.chunk(order, streams)
        output = back.forward(self.inputs[1].to(self.dtype)).output
        assert output is not None
        gradient = torch.ones_like(output)
        self.model.zero_grad(set_to_none=False)
        self.wait()
        with profiled or _nothing():
            began = time.perf_counter()
            ahead.enter(self.inputs[0].to(self.dtype))
            back.enter_backward(gradient, 1.0, 1.0)
            interleave(order, ahead, back)
            ahead.leave()
            found = back.leave_backward()
            self.wait()
            self.seconds = time.perf_counter() - began
        assert found is not None
        return found

    @property
    def dtype(self) -> torch.dtype:
        return self.model.compute_dtype or torch.float32

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def whole(self) -> Tensor:
        """The same gradients by autograd over the whole stage, without a dispatcher."""
        x = self.inputs[1].clone().requires_grad_()
        passed = self.stage.forward(x, self.rows, Weights(0.0, 1e-4))
        assert passed.output is not None
        (passed.output.sum() + passed.balance).backward()
        assert x.grad is not None
        return x.grad


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def equal(layers: Layers) -> dict[str, float]:
    """Largest ‖g − g₁‖ / ‖g₁‖ over all tensors, by order and number of streams, in float32."""
    layers.send(to_itself=False)
    layers.model.zero_grad()
    expected = {"input": layers.whole()} | _gradients(layers)
    layers.send(to_itself=True)
    found = {}
    for name, order in ORDERS.items():
        for streams in (1, 2):
            got = {"input": layers.pair(order, streams)} | _gradients(layers)
            found[f"{name}, {streams}"] = max(
                float((got[key] - one).norm() / one.norm().clamp(min=1e-30))
                for key, one in expected.items()
            )
    return found


def _gradients(layers: Layers) -> dict[str, Tensor]:
    named = layers.model.model.layers.named_parameters()
    return {name: one.grad.clone() for name, one in named if one.grad is not None}


def timed(layers: Layers, rounds: int) -> dict[str, list[float]]:
    """Seconds of a pair by order and number of streams, in turn."""
    cases = [(name, streams) for name in ORDERS for streams in (1, 2)]
    found: dict[str, list[float]] = {f"{name}, {streams}": [] for name, streams in cases}
    for number in range(-2, rounds):  # two to warm up
        turn = number % len(cases)
        for name, streams in cases[turn:] + cases[:turn]:
            layers.pair(ORDERS[name], streams)
            if number >= 0:
                found[f"{name}, {streams}"].append(layers.seconds)
    return found


def side_by_side(layers: Layers, order: Order) -> dict[str, float]:
    """Seconds in which the network's streams were busy, and in which computations ran meanwhile, in one pair."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    profile = torch.profiler.profile(activities=activities)
    layers.pair(order, 2, profile)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return beside(events)


def smoke(device: torch.device) -> dict[str, Any]:
    """`torchrun -m fathom run` with one process: 20 steps, then 20 more with the same command."""
    with tempfile.TemporaryDirectory() as folder:
        recipe, out = Path(folder) / "smoke.toml", Path(folder) / "run"
        recipe.write_text(RECIPE.format(model=MODEL.format(layers=3)))
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [*torchrun, "--nproc-per-node=1", "-m", "fathom", "run", str(recipe)]
        command += ["--out", str(out)]
        variables = {**os.environ}
        for name in (*launch.WANTED, "LOCAL_RANK"):
            variables.pop(name, None)
        root = str(Path(__file__).parents[2])
        for _ in range(2):
            done = subprocess.run(
                command,
                env=variables | {"PYTHONPATH": root},
                capture_output=True,
                text=True,
                timeout=300,
            )
            if done.returncode:
                raise SystemExit(f"error: {' '.join(command)}\n{done.stdout}{done.stderr}")
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        exported = sorted(path.name for path in (out / "model").iterdir())
    return {"steps": len(lines), "losses": [line["loss"] for line in lines], "exported": exported}


def join() -> torch.device:
    """A world of this process."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return launch.join()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything."""
    device_of(options.toy)
    device = join()
    config = ModelConfig(**(TOY if options.toy else SHAPE))
    rows = (2, 64) if options.toy else (2, 2048)
    small = config.replace(num_hidden_layers=2)
    found: dict[str, Any] = {"device": device_name(device), "backend": dist.get_backend()}
    found["difference"] = equal(Layers(small, (2, 64 if options.toy else 512), device))
    layers = Layers(config, rows, device)
    if device.type == "cuda":
        layers.model.set_compute_dtype(torch.bfloat16)
    layers.send(to_itself=True)
    found["seconds"] = timed(layers, options.rounds)
    if device.type == "cuda":
        found["side_by_side"] = {
            name: side_by_side(layers, order) for name, order in ORDERS.items()
        }
    found["run"] = smoke(device)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10, help="how often each case is timed")
    parser.add_argument("--toy", action="store_true", help="gloo on the CPU at toy size")
    parser.add_argument("--json", type=Path, help="write every number there")
    options = parser.parse_args(arguments)
    if options.toy:
        torch.set_num_threads(1)
    facts = environment()
    found = measure(options)
    print(describe(facts))
    print(f"{found['device']}, {found['backend']}\n")
    print(table(HEADS, _rows(found)))
    run = found["run"]
    print(f"\ntorchrun -m fathom run: {run['steps']} steps, loss {run['losses'][0]:.3f} to "
          f"{run['losses'][-1]:.3f}, exported {', '.join(run['exported'])}")  # fmt: skip
    write_json(options.json, {"environment": facts, "result": found})
    worst = max(found["difference"].values())
    if worst > CLOSE:
        raise SystemExit(f"error: gradients differ by {worst:.1e}, more than {CLOSE:.0e}")
    launch.leave()


HEADS = ("order", "streams", "gradients differ by", "ms a pair", "network busy, ms", "beside it")


def _rows(found: dict[str, Any]) -> list[list[str]]:
    rows = []
    for case, seconds in found["seconds"].items():
        name, streams = case.rsplit(", ", 1)
        beside = found.get("side_by_side", {}).get(name) if streams == "2" else None
        row = [name, streams, f"{found['difference'][case]:.1e}"]
        row += [spread([1000 * one for one in seconds], 2)]
        row += [f"{beside['network_ms']:.2f}", f"{beside['share']:.0%}"] if beside else ["", ""]
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
