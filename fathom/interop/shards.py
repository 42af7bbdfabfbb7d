"""What a directory of safetensors files holds, learnt from their headers; no tensor is read here.

Only safetensors are opened: a pickle (`.bin`, `.pt`) can run code when it is read, so it is
refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from fathom.errors import CheckpointError
from fathom.interop.config_json import read_json
from fathom.interop.fp8 import FP8

INDEX = "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": FP8,
}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_LEFTOVERS = (".rotary_emb.inv_freq",)  # rotary tables that old files carry; computed, not learnt


@dataclass(frozen=True)
class Stored:
    """One tensor of a file, as its header describes it."""

    file: Path
    dtype: torch.dtype | None
    """None for a type that no weight of this family has."""
    shape: tuple[int, ...]


def find_directory(source: str | Path) -> Path:
    """The directory at `source`, or a snapshot of the Hugging Face Hub repository of that id."""
    path = Path(source)
    if path.is_dir():
        return path
    if path.exists() or not _HUB_ID.fullmatch(str(source)):
        raise CheckpointError(
            f"{source} is not a directory; give a Hugging Face directory or a Hub id"
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CheckpointError(
            f"there is no directory {source}, and fetching it from the Hugging Face Hub needs the package "
            f"huggingface_hub; install it (pip install huggingface_hub), or give a directory"
        ) from None
    try:
        return Path(snapshot_download(str(source), allow_patterns=["*.json", "*.safetensors"]))
    # The Hub's client raises many kinds, and its own are no common class.
    except Exception as error:
        raise CheckpointError(
            f"there is no directory {source}, and the Hugging Face Hub does not give it "
            f"({type(error).__name__}: {error}); check the name and the connection"
        ) from error


def read_headers(directory: Path) -> dict[str, Stored]:
    """Every tensor of the directory's safetensors files by name. Raises `CheckpointError`."""
    found: dict[str, Stored] = {}
    for file in _files(directory):
        with open_shard(file) as shard:
            for name in shard.keys():  # noqa: SIM118 (it is no dict)
                if name.endswith(_LEFTOVERS):
                    continue
                if name in found:
                    raise CheckpointError(
                        f"{name} is in both {found[name].file} and {file}; remove the one that is left over"
                    )
                part = shard.get_slice(name)
                found[name] = Stored(file, DTYPES.get(part.get_dtype()), tuple(part.get_shape()))
    return found


@contextmanager
def open_shard(file: Path) -> Iterator[Any]:
    """A safetensors file, mapped and read as needed; a damaged one is named."""
    try:
        with safe_open(str(file), framework="pt", device="cpu") as shard:
            yield shard
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} cannot be read ({error}); fetch or export it again"
        ) from error


def _files(directory: Path) -> list[Path]:
    """The files that make up the model: those of the index, else model.safetensors, else all."""
    index, single = directory / INDEX, directory / "model.safetensors"
    if index.exists():
        return _indexed(directory, read_json(index))
    files = [single] if single.exists() else sorted(directory.glob("*.safetensors"))
    if files:
        return files
    pickles = sorted(
        path.name for kind in ("*.bin", "*.pt", "*.pth") for path in directory.glob(kind)
    )
    if pickles:
        raise CheckpointError(
            f"{directory} holds {pickles[0]}, which can run code when it is read; convert it to safetensors "
            f"first (save_pretrained of transformers writes them)"
        )
    raise CheckpointError(f"{directory} holds no .safetensors file; fetch the weights too")


def _indexed(directory: Path, index: dict[str, Any]) -> list[Path]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{directory / INDEX} has no weight_map; fetch it again")
    names = sorted({str(name) for name in weight_map.values()})
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise CheckpointError(
            f"{directory / INDEX} points outside its directory ({outside[0]}); fetch it again"
        )
    absent = [name for name in names if not (directory / name).exists()]
    if absent:
        raise CheckpointError(
            f"{directory} lacks {listed(absent)} of its {len(names)} shards; fetch them"
        )
    return [directory / name for name in names]


def listed(names: list[str], most: int = 8) -> str:
    """Up to `most` names, then how many more there are."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
