"""`fathom.save`: a model becomes a Hugging Face directory in the released style.

Weights go out under the released per-expert names in shards of bounded size, so saving takes the
memory of one shard. The directory appears whole or not at all: it is written beside its place and
renamed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Container, Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from fathom.errors import CheckpointError
from fathom.files import flush
from fathom.interop.config_json import ARCHITECTURES, read_json, to_json
from fathom.interop.names import HEAD, ROUTER_BIAS, Slot, layout
from fathom.interop.shards import INDEX, listed
from fathom.model.config import ModelConfig
from fathom.model.transformer import Transformer

MAX_SHARD_BYTES = 5 * 1000**3
# What an export may consist of; a directory that holds anything else is somebody's work and never replaced.
_EXPORT_FILES = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    INDEX,
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


class SavesItself(Protocol):
    """A tokenizer, as far as an export needs it."""

    def save(self, directory: Path, model_max_length: int) -> None:
        """Write tokenizer.json and what belongs to it, with the length that other programs cut texts to."""


def save(
    model: Transformer,
    directory: str | Path,
    tokenizer: SavesItself | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write `model` as a Hugging Face directory that `transformers` and other tools read.

    Weights are stored as `dtype` (None: as they are), the router's bias always as float32, in files
    of at most `max_shard_bytes` (one larger tensor has a file of its own). An existing directory is
    replaced when it is an export, refused when it is anything else. Raises `CheckpointError`.
    """
    place = Path(directory).resolve()
    _check_replaceable(place)
    made = place.with_name(f".{place.name}.partial")
    try:
        shutil.rmtree(made, ignore_errors=True)  # what a killed save left
        made.mkdir(parents=True)
        _write(model, made, tokenizer, dtype, max_shard_bytes)
        _put_in_place(made, place)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{place} could not be written ({error}); make room, or choose another place, and repeat"
        ) from error
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _write(
    model: Transformer,
    place: Path,
    tokenizer: SavesItself | None,
    dtype: torch.dtype | None,
    limit: int,
) -> None:
    config = model.config
    if tokenizer is not None:
        tokenizer.save(place, config.max_position_embeddings)
    _write_json(place / "config.json", to_json(config, dtype or model.lm_head.weight.dtype))
    ids = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    _write_json(place / "generation_config.json", ids)
    with torch.no_grad():
        _write_weights(model, config, place, dtype, limit)


def _write_weights(
    model: Transformer, config: ModelConfig, place: Path, dtype: torch.dtype | None, limit: int
) -> None:
    tensors = model.state_dict()
    table = layout(config, tensors)
    repeated = {name: slot for name, slot in table.copies.items() if name != HEAD}
    slots = table.slots | repeated
    shards = list(_plan(slots, tensors, dtype, limit))
    weight_map: dict[str, str] = {}
    total = 0
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        parts = {name: slots[name].of(tensors) for name in names}
        total += _write_shard(place / file, parts, dtype, repeated)
        weight_map |= dict.fromkeys(names, file)
    _write_json(place / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_shard(
    file: Path, parts: Mapping[str, Tensor], dtype: torch.dtype | None, repeated: Container[str]
) -> int:
    """Write one file and return the bytes of its tensors.

    The weights themselves are handed over where they can be, since copies take memory; only what
    has a second name is copied, because in one file no memory may have two.
    """
    shard = {
        name: part.to("cpu", _stored_dtype(name, part, dtype), copy=name in repeated).contiguous()
        for name, part in parts.items()
    }
    save_file(shard, file, metadata={"format": "pt"})
    flush(file)
    return sum(tensor.nbytes for tensor in shard.values())


def _stored_dtype(name: str, tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return torch.float32 if ROUTER_BIAS in name else dtype or tensor.dtype


def _plan(
    slots: Mapping[str, Slot], tensors: Mapping[str, Tensor], dtype: torch.dtype | None, limit: int
) -> Iterator[list[str]]:
    """Names for each shard, in the model's order, as many as fit."""
    names: list[str] = []
    held = 0
    for name, slot in slots.items():
        part = slot.of(tensors)
        size = part.numel() * _stored_dtype(name, part, dtype).itemsize
        if names and held + size > limit:
            yield names
            names, held = [], 0
        names.append(name)
        held += size
    yield names


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    flush(path)


def _check_replaceable(place: Path) -> None:
    """Refuse a place that holds something other than an export."""
    if not place.exists() or (place.is_dir() and not any(place.iterdir())):
        return
    if not place.is_dir():
        raise CheckpointError(f"{place} is a file; choose another place for the model")
    family = (
        read_json(place / "config.json").get("model_type")
        if (place / "config.json").exists()
        else None
    )
    foreign = sorted(
        entry.name
        for entry in place.iterdir()
        if entry.is_dir() or not any(fnmatch(entry.name, kind) for kind in _EXPORT_FILES)
    )
    if family not in ARCHITECTURES or foreign:
        found = (
            f"it holds {listed(foreign, 3)}" if foreign else "it has no config.json of this family"
        )
        raise CheckpointError(
            f"{place} exists and is not only an exported model ({found}), so it is not replaced; "
            f"choose another place or remove it yourself"
        )


def _put_in_place(made: Path, place: Path) -> None:
    """Rename `made` to `place`; what was there goes aside first, and away when its successor stands."""
    aside = place.with_name(f".{place.name}.replaced")
    shutil.rmtree(aside, ignore_errors=True)
    if place.exists():
        place.rename(aside)
    try:
        made.rename(place)
    except OSError:
        if aside.exists():
            aside.rename(place)
        raise
    shutil.rmtree(aside, ignore_errors=True)
