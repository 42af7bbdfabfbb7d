"""Where a run was made: what someone needs to know to repeat its figures."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import fathom
from fathom.kernels.cpu_gemm import onednn_is_better

DECISIVE = (
    "torch",
    "device",
    "compute",
    "processor",
    "threads",
    "float32_products",
    "capability",
    "layout",
)
"""What the last bits of a result depend on."""


def environment(device: torch.device, dtype: torch.dtype | None) -> dict[str, Any]:
    """Versions, processor, threads and source state, as plain values."""
    return {
        "fathom": fathom.__version__,
        "source": _source_state(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "compute": str(dtype or torch.float32).removeprefix("torch."),
        "float32_products": "oneDNN" if onednn_is_better() else "torch's default",
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def what_changed(before: dict[str, Any], now: dict[str, Any]) -> str:
    """In words, what of `DECISIVE` is not as it was; nothing where all is, or where there is no before."""
    keys = [key for key in DECISIVE if before and before.get(key, now[key]) != now[key]]
    if not keys:
        return ""
    only_layout = keys == ["layout"]
    other = "laid out otherwise than" if only_layout else "not the machine this run was on"
    return f"{other} before ({'; '.join(f'{key}: {before[key]} → {now[key]}' for key in keys)})"


def processor() -> str:
    """The processor's name, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        return names[0] if names else platform.processor()
    except OSError:
        return platform.processor() or platform.machine()


def _source_state() -> str:
    """Commit of a source checkout and whether it was changed, or "installed"."""
    root = Path(fathom.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return "installed"
    try:
        say = ["git", "-C", str(root)]
        commit = subprocess.run(
            [*say, "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        )
        status = subprocess.run([*say, "status", "--porcelain"], capture_output=True, text=True)
    except OSError:
        return "unknown (no git)"
    return commit.stdout.strip() + ("" if not status.stdout.strip() else " with changes")
