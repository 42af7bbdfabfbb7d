"""How close absorbed decoding comes to a GPU's memory rate, on the recipe gpu-1b.

One greedy step has to read the weights that its tokens use and the latent cache. Those bytes over
the step's time, as a share of what a plain copy reaches on the same device. The cache holds random
latents; weights are BF16. `--toy` runs the same on a CPU in seconds.
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

from device import configuration, copy_rate, device_name, device_of, seconds
from harness import describe, environment, table, write_json

import fathom
from fathom import ModelConfig
from fathom.model import LatentCache
from fathom.planning.parameters import count_parameters, expert

DTYPE = torch.bfloat16


class Step:
    """One decoded token for each sequence of a batch, always behind the same context."""

    def __init__(self, config: ModelConfig, batch: int, context: int, device: torch.device) -> None:
        torch.manual_seed(0)
        with device:
            self.model = fathom.Transformer(config).eval()
        for parameter in self.model.parameters():  # the router's bias, a buffer, stays float32
            parameter.data = parameter.data.to(DTYPE)
        self.cache = LatentCache(config, batch, context + 1, DTYPE, device)
        for entries in self.cache.tensors:
            entries.normal_()
        self.cache.advance(context)
        self.context = context
        self.token = torch.zeros(batch, 1, dtype=torch.int64, device=device)

    @torch.no_grad()
    def __call__(self) -> None:
        logits = self.model(self.token, cache=self.cache, mtp=False).logits
        self.token = logits[:, -1:].argmax(-1)
        self.cache.truncate(self.context)


def bytes_touched(config: ModelConfig, batch: int, context: int) -> dict[str, float]:
    """Weights (experts as many as `batch` tokens hit on average, were routing uniform) and cache."""
    counted = count_parameters(config)
    share = config.num_experts_per_tok / config.n_routed_experts
    hit = config.n_routed_experts * (1 - (1 - share) ** batch)
    moe_layers = sum(config.is_moe_layer(i) for i in range(config.num_hidden_layers))
    further = moe_layers * (hit - config.num_experts_per_tok) * expert(config)
    size = DTYPE.itemsize
    return {
        "weights": size * (counted.active_with_head + further),
        "cache": size * float(batch * context * config.num_hidden_layers * config.cache_dim),
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Every batch at every context."""
    device = device_of(options.toy)
    config = configuration(options.recipe, options.toy)
    longest = max(options.contexts) + 1
    config = config.replace(max_position_embeddings=max(longest, config.max_position_embeddings))
    rate = copy_rate(device, 1 << 20 if options.toy else 4 << 30)
    rows = []
    for batch in options.batches:
        for context in options.contexts:
            times = seconds(Step(config, batch, context, device), device, options.steps)
            touched = bytes_touched(config, batch, context)
            median = statistics.median(times)
            rows.append(
                {
                    "batch": batch,
                    "context": context,
                    "step_seconds": times,
                    "tokens_per_second": batch / median,
                    "bytes": touched,
                    "share_of_copy_rate": sum(touched.values()) / median / rate,
                }
            )
    return {"device": device_name(device), "copy_bytes_per_second": rate, "rows": rows}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="gpu-1b")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 4096, 16384])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--toy", action="store_true", help="a tiny model on the CPU")
    parser.add_argument("--json", type=Path, help="write every number there")
    options = parser.parse_args(arguments)
    if options.toy:
        options.batches, options.contexts, options.steps = [1, 2], [16], 2
    facts = environment()
    result = measure(options)
    print(describe(facts))
    print(f"{result['device']}: copies at {result['copy_bytes_per_second'] / 1e9:.0f} GB/s")
    headers = ("batch", "context", "ms per step", "tokens/s", "MB per step", "of copy rate")
    print(table(headers, [_row(row) for row in result["rows"]]))
    write_json(options.json, {"environment": facts, "result": result})


def _row(row: dict[str, Any]) -> list[str]:
    ms = [1e3 * t for t in row["step_seconds"]]
    return [
        str(row["batch"]),
        str(row["context"]),
        f"{statistics.median(ms):.2f} ({min(ms):.2f}–{max(ms):.2f})",
        f"{row['tokens_per_second']:.0f}",
        f"{sum(row['bytes'].values()) / 1e6:.1f}",
        f"{row['share_of_copy_rate']:.1%}",
    ]


if __name__ == "__main__":
    main()
