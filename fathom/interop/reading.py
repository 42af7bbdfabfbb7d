"""`fathom.load`: a Hugging Face directory becomes a model.

Everything is checked against the headers before a weight is read: an error names all that is wrong
at once. Then the model, built without memory on the meta device, gets one tensor after the other
from the mapped files, experts straight into their stack; beside the model itself no more than one
shard is ever in memory.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fathom.errors import CheckpointError
from fathom.interop.config_json import fp8_block, from_json, read_json
from fathom.interop.fp8 import FP8, SCALE, dequantize, grid
from fathom.interop.names import ROUTER_BIAS, Layout, Slot, layer_number, layout, stack_name
from fathom.interop.shards import Stored, find_directory, listed, open_shard, read_headers
from fathom.kernels import huge_pages
from fathom.model.config import ModelConfig
from fathom.model.transformer import Transformer


def load(
    source: str | Path,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    mtp: bool | None = None,
) -> Transformer:
    """The model in a Hugging Face directory, or of a Hub id, in evaluation mode.

    `dtype` is what the weights become; None keeps the file's (FP8 becomes bfloat16). The router's
    bias stays float32. `mtp=False` leaves the MTP modules out, `mtp=True` insists on them; None
    takes them when they are there and warns when config.json promises some but the files hold none.
    Only safetensors are read: nothing here can run code. Raises `ConfigError` or `CheckpointError`,
    which names the tensors at fault.
    """
    directory = find_directory(source)
    content = read_json(directory / "config.json")
    stored = read_headers(directory)
    config = _with_mtp(from_json(content), stored, mtp, directory)
    if not config.num_nextn_predict_layers and mtp is False:
        stored = {name: s for name, s in stored.items() if not _is_mtp(name, config)}
    with torch.device("meta"):
        model = Transformer(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    table, block = layout(config, model.state_dict()), fp8_block(content)
    _check(stored, table, model, block, directory)
    tensors = {
        name: huge_pages.prefer(torch.empty(shapes[name], dtype=kind, device=device))
        for name, kind in _dtypes(stored, table, dtype).items()
    }
    _fill(tensors, stored, table, block)
    _compare_copies(tensors, stored, table)
    return _adopt(model, tensors, device)


def _is_mtp(name: str, config: ModelConfig) -> bool:
    return layer_number(name) >= config.num_hidden_layers


def _with_mtp(
    config: ModelConfig, stored: Mapping[str, Stored], mtp: bool | None, directory: Path
) -> ModelConfig:
    """The configuration with the MTP depth that is asked for and there."""
    depth = config.num_nextn_predict_layers
    shared = (".embed_tokens.weight", ".shared_head.head.weight")
    present = any(_is_mtp(name, config) and not name.endswith(shared) for name in stored)
    if mtp and not (depth and present):
        raise CheckpointError(
            f"{directory} has no MTP module (num_nextn_predict_layers={depth}) but mtp=True asks for it; "
            f"load without mtp=True, or fetch the files that hold it"
        )
    if depth and mtp is None and not present:
        warnings.warn(
            f"{directory} promises num_nextn_predict_layers={depth} but holds no MTP tensor "
            f"(save_pretrained of transformers drops them); loading without MTP",
            stacklevel=3,
        )
    return (
        config
        if depth and mtp is not False and present
        else config.replace(num_nextn_predict_layers=0)
    )


def _find(table: Layout, name: str) -> Slot | None:
    return table.slots.get(name) or table.stacked.get(name) or table.copies.get(name)


def _check(
    stored: Mapping[str, Stored],
    table: Layout,
    model: Transformer,
    block: tuple[int, int],
    directory: Path,
) -> None:
    """Raise one `CheckpointError` that names every missing, extra, misshapen or unreadable tensor."""
    tensors = model.state_dict()
    missing = [
        name for name in table.slots if name not in stored and stack_name(name) not in stored
    ]
    extra, wrong = [], []
    for name, found in stored.items():
        slot = _find(table, name)
        if slot is None or (name in table.slots and stack_name(name) in stored):
            if not _is_scale(name, stored):
                extra.append(name)
        elif problem := _problem(name, found, tuple(slot.of(tensors).shape), stored, block):
            wrong.append(f"{name} {problem}")
    findings = (("missing", missing), ("not part of the model", extra), ("unusable", wrong))
    if any(names for _, names in findings):
        said = "; ".join(
            f"{len(names)} {kind}: {listed(names)}" for kind, names in findings if names
        )
        beyond = any(_is_mtp(name, model.config) for name in extra)
        raise CheckpointError(
            f"{directory} does not hold the model that its config.json describes: {said}. Fetch or export "
            f"it again, or correct config.json"
            + ("; mtp=False leaves MTP layers out" if beyond else "")
        )


def _is_scale(name: str, stored: Mapping[str, Stored]) -> bool:
    owner = stored.get(name.removesuffix(SCALE)) if name.endswith(SCALE) else None
    return owner is not None and owner.dtype == FP8


def _problem(
    name: str,
    found: Stored,
    shape: tuple[int, ...],
    stored: Mapping[str, Stored],
    block: tuple[int, int],
) -> str | None:
    """What is wrong with one tensor, or None."""
    if found.shape != shape:
        return f"is {list(found.shape)} instead of {list(shape)}"
    if found.dtype is None:
        return "has a dtype that is neither floating point nor FP8"
    if found.dtype != FP8:
        return None
    scale = stored.get(name + SCALE)
    if scale is None:
        return f"is FP8 without its {name.rsplit('.', 1)[-1]}{SCALE}"
    if len(shape) < 2 or scale.shape != grid(shape, block):
        return f"has scales {list(scale.shape)} that do not fit blocks of {block[0]}x{block[1]}"
    return None


def _dtypes(
    stored: Mapping[str, Stored], table: Layout, dtype: torch.dtype | None
) -> dict[str, torch.dtype]:
    """The dtype of every tensor of the model: the asked one or the file's, float32 for the router's bias."""
    kinds: dict[str, torch.dtype] = {}
    for name, found in stored.items():
        slot = _find(table, name)
        if slot is None or name in table.copies or found.dtype is None:
            continue
        kind = dtype or (torch.bfloat16 if found.dtype == FP8 else found.dtype)
        kind = torch.float32 if ROUTER_BIAS in name else kind
        kinds[slot.name] = torch.promote_types(kinds.get(slot.name, kind), kind)
    return kinds


def _by_file(names: Iterable[str], stored: Mapping[str, Stored]) -> dict[Path, list[str]]:
    files: dict[Path, list[str]] = {}
    for name in names:
        files.setdefault(stored[name].file, []).append(name)
    return files


def _fill(
    tensors: Mapping[str, Tensor],
    stored: Mapping[str, Stored],
    table: Layout,
    block: tuple[int, int],
) -> None:
    """Copy every stored tensor into its slot, one mapped file after the other."""
    slots = {n: slot for n in stored if n not in table.copies and (slot := _find(table, n))}
    for file, names in _by_file(slots, stored).items():
        with open_shard(file) as shard:
            for name in names:
                target = slots[name].of(tensors)
                value = shard.get_tensor(name)
                if value.dtype == FP8:
                    scale = _read(name + SCALE, stored, {file: shard})
                    where = target.device if target.is_cuda else "cpu"  # no other device knows FP8
                    value = dequantize(value.to(where), scale.to(where), block)
                target.copy_(value)


def _read(name: str, stored: Mapping[str, Stored], opened: Mapping[Path, Any]) -> Tensor:
    """One tensor, from the open shard or, as FP8 scales may lie, from another."""
    file = stored[name].file
    if file in opened:
        return opened[file].get_tensor(name)
    with open_shard(file) as shard:
        return shard.get_tensor(name).clone()


def _compare_copies(
    tensors: Mapping[str, Tensor], stored: Mapping[str, Stored], table: Layout
) -> None:
    """Warn when a tensor that is stored twice differs: the model shares one, as training did (report §2.2)."""
    present = [name for name in table.copies if name in stored]
    for file, names in _by_file(present, stored).items():
        with open_shard(file) as shard:
            for name in names:
                target = table.copies[name].of(tensors)
                if not torch.equal(shard.get_tensor(name).to(target.device, target.dtype), target):
                    warnings.warn(
                        f"{name} differs from {table.copies[name].name}, which is used for both",
                        stacklevel=4,
                    )


def _adopt(
    model: Transformer, tensors: dict[str, Tensor], device: torch.device | str
) -> Transformer:
    """The model with these tensors in place of the meta ones, for evaluation."""
    model.load_state_dict(tensors, strict=False, assign=True)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight  # type: ignore[assignment]
    for router in model.routers():
        router.expert_load = torch.zeros_like(router.expert_load, device=device)
    return model.eval()
