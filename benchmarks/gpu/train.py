"""Share of a GPU's BF16 rate that training reaches (model FLOPs utilisation), on the recipe gpu-1b.

A whole step: forward, backward, fused AdamW on float32 masters, products in BF16. The share is
given against the matrix rate measured beside it and against the maker's figure. `--toy` runs the
same on a CPU in seconds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

from device import configuration, data_sheet, device_name, device_of, matmul_rate, seconds
from harness import describe, environment, table, write_json

import fathom
from fathom.kernels import compile_elementwise
from fathom.model.objective import losses
from fathom.planning.flops import flops_per_token


class Step:
    """One training step on random tokens."""

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        torch.manual_seed(0)
        compile_elementwise(options.compile)
        config = configuration(options.recipe, options.toy)
        with device:
            self.model = fathom.Transformer(config)
        self.model.set_compute_dtype(torch.bfloat16)
        self.model.set_recompute(options.recompute)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        shape = (options.batch, options.seq_len + 1)
        self.tokens = torch.randint(0, config.vocab_size, shape, device=device)

    def __call__(self) -> None:
        losses(self.model, self.tokens).total.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        fathom.update_bias(self.model, 1e-3)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures of one run."""
    device = device_of(options.toy)
    step = Step(options, device)
    times = seconds(step, device, options.steps)
    rate = matmul_rate(device, torch.bfloat16, 64 if options.toy else 8192)
    tokens = options.batch * options.seq_len
    flops = flops_per_token(step.model.config, options.seq_len, mtp=False) * tokens
    achieved = flops / statistics.median(times)
    maker = data_sheet(device)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return {
        "device": device_name(device),
        "parameters": step.model.num_parameters(),
        "batch": options.batch,
        "seq_len": options.seq_len,
        "step_seconds": times,
        "tokens_per_second": tokens / statistics.median(times),
        "flops_per_second": achieved,
        "matmul_flops_per_second": rate,
        "mfu_of_measured": achieved / rate,
        "mfu_of_data_sheet": None if maker is None else achieved / maker,
        "peak_bytes": peak,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="gpu-1b")
    parser.add_argument("--batch", type=int, default=4, help="sequences per step")
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--compile", action="store_true", help="compiled elementwise functions")
    parser.add_argument("--recompute", action="store_true", help="keep fewer activations")
    parser.add_argument("--toy", action="store_true", help="a tiny model on the CPU")
    parser.add_argument("--json", type=Path, help="write every number there")
    options = parser.parse_args(arguments)
    if options.toy:
        options.batch, options.seq_len, options.steps = 2, 32, 2
    facts = environment()
    result = measure(options)
    print(describe(facts))
    print(table(("", result["device"]), _rows(result)))
    write_json(options.json, {"environment": facts, "result": result})


def _rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    times, maker = result["step_seconds"], result["mfu_of_data_sheet"]
    return [
        ("parameters", f"{result['parameters'] / 1e6:.1f} M"),
        ("tokens per step", f"{result['batch']} x {result['seq_len']}"),
        ("step", f"{statistics.median(times):.4f} s ({min(times):.4f}–{max(times):.4f})"),
        ("tokens per second", f"{result['tokens_per_second']:.0f}"),
        ("BF16 product", f"{result['matmul_flops_per_second'] / 1e12:.3f} TFLOP/s"),
        ("MFU against it", f"{result['mfu_of_measured']:.1%}"),
        ("MFU, data sheet", "no figure known" if maker is None else f"{maker:.1%}"),
        ("peak memory", f"{result['peak_bytes'] / 2**30:.2f} GiB"),
    ]


if __name__ == "__main__":
    main()
