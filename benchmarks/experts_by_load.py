"""The load of devices when a real router's experts are placed by load (report §3.4), and when they are not.

The router is a trained run's: loads of every tenth step stand in its `load.jsonl`. Experts are placed by the mean of
the last steps but one, and judged by the last one, as in serving, where the future is guessed from the past.

    python benchmarks/experts_by_load.py RUN --devices 4 --redundant 0,4,8
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from harness import table
from torch import Tensor

from fathom.parallel import loads_by_gpu, rebalance_experts
from fathom.runs.folder import RunFolder

HEADERS = ("slots", "placed", "worst layer: fullest over mean", "median layer")


def loads(run: Path, last: int) -> tuple[Tensor, Tensor]:
    """Of the MoE blocks [L, E]: the mean of `last` logged steps before the last one, and the last one."""
    lines = (run / "load.jsonl").read_text(encoding="utf-8").splitlines()
    steps = torch.tensor([json.loads(line)["load"] for line in lines[-last - 1 :]]).double()
    return steps[:-1].mean(0), steps[-1]


def unevenness(load_LE: Tensor, phy2log_LS: Tensor, devices: int) -> tuple[str, str]:
    by_device = loads_by_gpu(load_LE, phy2log_LS, devices)
    ratios = (by_device.amax(1) / by_device.mean(1)).sort().values
    return f"{ratios[-1]:.3f}", f"{ratios[len(ratios) // 2]:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run", type=Path, help="run folder of a model with experts")
    parser.add_argument("--devices", type=int, default=4)
    parser.add_argument("--nodes", type=int, default=2, help="for the hierarchical placement")
    parser.add_argument("--redundant", default="0,4,8", help="slots beyond one for each expert")
    parser.add_argument("--last", type=int, default=8, help="logged steps that are averaged")
    options = parser.parse_args()
    past, now = loads(options.run, options.last)
    groups = RunFolder(options.run).read_recipe().model.n_group
    layers, experts = now.shape
    in_order = torch.arange(experts).expand(layers, experts)
    rows = [(str(experts), "in order", *unevenness(now, in_order, options.devices))]
    for more in map(int, options.redundant.split(",")):
        for name, nodes, grouped in (("global", 1, 1), ("hierarchical", options.nodes, groups)):
            placed, _, _ = rebalance_experts(past, experts + more, grouped, nodes, options.devices)
            rows.append((str(experts + more), name, *unevenness(now, placed, options.devices)))
    print(table(HEADERS, rows))


if __name__ == "__main__":
    main()
