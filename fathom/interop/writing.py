"""`fathom.save`: a model becomes a Hugging Face directory in the released style.

Weights go out under the released per-expert names in shards of bounded size, so saving takes the
memory of one shard. The directory appears whole or not at all: it is written beside its place and
renamed.

Where the tensors come from is a seam: `Source` says what there is and fetches what a shard needs, so a
model that is spread over many ranks is written by the same lines (`fathom.parallel.export`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
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
from fathom.interop.names import EMBEDDING, HEAD, ROUTER_BIAS, Slot, layout
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


@dataclass(frozen=True)
class Source:
    """A model to be written."""

    config: ModelConfig
    tensors: Mapping[str, Tensor]
    """All of them by their names in memory, whole; only shapes and dtypes are read, so they may be on "meta"."""
    fetch: Callable[[Mapping[str, Slot], Mapping[str, torch.dtype]], dict[str, Tensor]]
    """The tensors of one file by their names on disk, given what each is of `tensors`, and as what it is stored."""

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights."""
        return self.tensors[EMBEDDING].dtype


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
    tensors = model.state_dict()

    def fetch(slots: Mapping[str, Slot], kinds: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
        return {name: slot.of(tensors) for name, slot in slots.items()}

    source = Source(model.config, tensors, fetch)
    write_directory(source, directory, tokenizer, dtype, max_shard_bytes)


def write_directory(
    source: Source,
    directory: str | Path,
    tokenizer: SavesItself | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """The same for a model that may be elsewhere. One process writes."""
    place = Path(directory).resolve()
    _check_replaceable(place)
    made = place.with_name(f".{place.name}.partial")
    try:
        shutil.rmtree(made, ignore_errors=True)  # what a killed save left
        made.mkdir(parents=True)
        _write(source, made, tokenizer, dtype, max_shard_bytes)
        _put_in_place(made, place)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{place} could not be written ({error}); make room, or choose another place, and repeat"
        ) from error
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _write(
    source: Source,
    place: Path,
    tokenizer: SavesItself | None,
    dtype: torch.dtype | None,
    limit: int,
) -> None:
    config = source.config
    if tokenizer is not None:
        tokenizer.save(place, config.max_position_embeddings)
    _write_json(place / "config.json", to_json(config, dtype or source.dtype))
    ids = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    _write_json(place / "generation_config.json", ids)
    with torch.no_grad():
        _write_weights(source, place, dtype, limit)


def _write_weights(source: Source, place: Path, dtype: torch.dtype | None, limit: int) -> None:
    tensors = source.tensors
    table = layout(source.config, tensors)
    repeated = {name: slot for name, slot in table.copies.items() if name != HEAD}
    slots = table.slots | repeated
    kinds = {name: _stored_dtype(name, tensors[slot.name], dtype) for name, slot in slots.items()}
    shards = list(_plan(slots, tensors, kinds, limit))
    weight_map: dict[str, str] = {}
    total = 0
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        parts = source.fetch({name: slots[name] for name in names}, kinds)
        total += _write_shard(place / file, parts, kinds, repeated)
        weight_map |= dict.fromkeys(names, file)
    _write_json(place / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_shard(
    file: Path,
    parts: Mapping[str, Tensor],
    kinds: Mapping[str, torch.dtype],
    repeated: Container[str],
) -> int:
    """Write one file and return the bytes of its tensors.

    The weights themselves are handed over where they can be, since copies take memory; only what
    has a second name is copied, because in one file no memory may have two.
    """
    shard = {
        name: part.to("cpu", kinds[name], copy=name in repeated).contiguous()
        for name, part in parts.items()
    }
    save_file(shard, file, metadata={"format": "pt"})
    flush(file)
    return sum(tensor.nbytes for tensor in shard.values())


def _stored_dtype(name: str, tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return torch.float32 if ROUTER_BIAS in name else dtype or tensor.dtype


def _plan(
    slots: Mapping[str, Slot],
    tensors: Mapping[str, Tensor],
    kinds: Mapping[str, torch.dtype],
    limit: int,
) -> Iterator[list[str]]:
    """Names for each shard, in the model's order, as many as fit."""
    names: list[str] = []
    held = 0
    for name, slot in slots.items():
        size = slot.of(tensors).numel() * kinds[name].itemsize
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
