"""Tensor names: the released ones on disk, those of `transformers` 5 in memory, and a table of both.

    in memory                                                   on disk
    model.layers.3.mlp.experts.gate_up_proj [E, 2I, D]          model.layers.3.mlp.experts.{e}.gate_proj.weight [I, D]
                                                                model.layers.3.mlp.experts.{e}.up_proj.weight [I, D]
    model.layers.3.mlp.experts.down_proj [E, D, I]              model.layers.3.mlp.experts.{e}.down_proj.weight [D, I]
    model.mtp.{k}.* (eqs 21-23)                                 model.layers.{L+k}.*, L the main model's layers
    model.embed_tokens.weight                                   the same, and for each MTP module again as
                                                                model.layers.{L+k}.embed_tokens.weight
    lm_head.weight                                              the same (absent when tied), and again as
                                                                model.layers.{L+k}.shared_head.head.weight

Everything else has one name. Reading and writing use the same table, so they cannot disagree.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from fathom.model.config import ModelConfig

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ROUTER_BIAS = "e_score_correction_bias"
_MTP = re.compile(r"model\.mtp\.(\d+)\.")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_EXPERT = re.compile(r"(.*\.mlp\.experts\.)\d+\.(gate_proj|up_proj|down_proj)\.weight")


@dataclass(frozen=True)
class Slot:
    """The part of an in-memory tensor that one tensor on disk holds."""

    name: str
    index: tuple[int | slice, ...] = ()

    def of(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """A view of that part."""
        return tensors[self.name][self.index]


@dataclass(frozen=True)
class Layout:
    """Where each tensor on disk belongs in memory."""

    slots: dict[str, Slot]
    """Released name -> slot; together they cover the model exactly once."""
    copies: dict[str, Slot]
    """Names of tensors that are stored again, or may be: what they must equal."""
    stacked: dict[str, Slot]
    """Names of expert stacks as in memory, which some directories hold instead of single experts."""


def layout(config: ModelConfig, tensors: Mapping[str, Tensor]) -> Layout:
    """The table for a model with these in-memory tensors (of which only names and shapes are read)."""
    head = EMBEDDING if config.tie_word_embeddings else HEAD
    copies = {HEAD: Slot(EMBEDDING)} if config.tie_word_embeddings else {}
    slots: dict[str, Slot] = {}
    stacked: dict[str, Slot] = {}
    for name, tensor in tensors.items():
        if name in copies:
            continue
        stored = disk_name(name, config.num_hidden_layers)
        if ".mlp.experts." in name:
            stacked[stored] = Slot(name)
            slots.update(_experts(name, stored, tensor))
        else:
            slots[stored] = Slot(name)
    for depth in range(config.num_nextn_predict_layers):
        prefix = f"model.layers.{config.num_hidden_layers + depth}."
        copies[prefix + "embed_tokens.weight"] = Slot(EMBEDDING)
        copies[prefix + "shared_head.head.weight"] = Slot(head)
    return Layout(slots, copies, stacked)


def disk_name(name: str, num_hidden_layers: int) -> str:
    """An in-memory name with MTP modules numbered as the layers after the last."""
    return _MTP.sub(lambda match: f"model.layers.{num_hidden_layers + int(match[1])}.", name)


def stack_name(stored: str) -> str | None:
    """The stack that a single expert's tensor belongs to, named as in `Layout.stacked`; None for others."""
    match = _EXPERT.fullmatch(stored)
    if match is None:
        return None
    return match[1] + ("down_proj" if match[2] == "down_proj" else "gate_up_proj")


def layer_number(stored: str) -> int:
    """The layer that a tensor on disk belongs to, -1 outside the layers."""
    match = _LAYER.match(stored)
    return int(match[1]) if match else -1


def _experts(name: str, stored: str, tensor: Tensor) -> Iterator[tuple[str, Slot]]:
    """Each expert's tensors of a stack [E, 2I, D] (gate rows first) or [E, D, I]."""
    stem, kind = stored.rsplit(".", 1)
    half = tensor.shape[1] // 2
    for expert in range(tensor.shape[0]):
        if kind == "down_proj":
            yield f"{stem}.{expert}.down_proj.weight", Slot(name, (expert,))
        else:
            yield f"{stem}.{expert}.gate_proj.weight", Slot(name, (expert, slice(0, half)))
            yield f"{stem}.{expert}.up_proj.weight", Slot(name, (expert, slice(half, None)))
