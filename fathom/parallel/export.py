"""One Hugging Face directory from a model that is spread over many ranks.

The first rank writes it with the lines that write a whole model (`fathom.interop.writing`), one file after
the other, and asks for what a file needs: it tells everyone, and each sends what it has. A
released tensor (one expert, one matrix) is whole on some rank; with full sharding each may have some rows of it. So no
rank ever holds more than what it trains, and the first one a file's tensors besides.

Messages go from CPU memory in the dtype that is stored, over a group of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from fathom import interop
from fathom.errors import CheckpointError
from fathom.interop.names import Slot
from fathom.interop.writing import MAX_SHARD_BYTES, SavesItself, Source, write_directory
from fathom.model import Transformer
from fathom.parallel.together import Together, lost_ranks
from fathom.parallel.training import Parallel


def export(
    parallel: Parallel,
    directory: str | Path,
    tokenizer: SavesItself | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write the model as `fathom.save` would write it in one process, tensor for tensor. All ranks together.

    The first rank writes; `tokenizer` and `directory` are its. Raises on all ranks what `fathom.save` raises.
    """
    if parallel.alone:
        interop.save(parallel.model, directory, tokenizer, dtype, max_shard_bytes)
        return
    ranks = Together(parallel.mesh.beside("export"))
    here = _runs(parallel)
    told = ranks.each(lambda: [run.told for run in here.values()])
    if not ranks.leads:
        while (wanted := ranks.lead(lambda: None)) is not None:
            _send(wanted, here, ranks)
        return
    error: Exception | None = None
    try:
        asking = _Asking(parallel, here, told, ranks)
        source = Source(parallel.model.config, asking.tensors, asking.fetch)
        write_directory(source, directory, tokenizer, dtype, max_shard_bytes)
    except Exception as met:
        error = met
    ranks.lead(lambda: _end(error))


def _end(error: Exception | None) -> None:
    """The last that the others hear: nothing more is wanted, or why not."""
    if error:
        raise error


@dataclass(frozen=True)
class _Told:
    """What a rank has of a tensor: rows along the first axis."""

    name: str
    shape: tuple[int, ...]
    """Of the whole."""
    rows: range
    dtype: torch.dtype


@dataclass(frozen=True)
class _Run:
    told: _Told
    tensor: Tensor
    """The rows that are here."""


@dataclass(frozen=True)
class _Wanted:
    """Part of a tensor, by who has it."""

    places: tuple[int, ...]
    """In the order of the rows that each sends."""
    slot: Slot
    dtype: torch.dtype


def _runs(parallel: Parallel) -> dict[str, _Run]:
    """The tensors here that no rank before this one has; after ZeRO-1's `share` they are up to date everywhere."""
    found = {}
    for shard in parallel.model_shards(parallel.model.state_dict()):
        if shard.first and shard.tensor.numel():
            inner = shard.shape[1:].numel()
            first, count = shard.offset // inner, shard.tensor.numel() // inner
            told = _Told(
                shard.name, tuple(shard.shape), range(first, first + count), shard.tensor.dtype
            )
            found[shard.name] = _Run(told, shard.tensor.view(count, *shard.shape[1:]))
    return found


def _part(run: _Run, wanted: _Wanted) -> Tensor:
    """As it is sent and stored."""
    index = wanted.slot.index
    if index and isinstance(index[0], int):
        index = (index[0] - run.told.rows.start, *index[1:])
    return run.tensor[index].to("cpu", wanted.dtype).contiguous()


def _send(wanted: list[_Wanted], here: Mapping[str, _Run], ranks: Together) -> None:
    group = ranks.group
    for one in wanted:
        if group.place in one.places:
            part = _bytes(_part(here[one.slot.name], one))
            with lost_ranks():
                dist.send(part, group.ranks[0], group.handle)


def _bytes(tensor: Tensor) -> Tensor:
    """The same memory as something that every backend sends."""
    return tensor.view(-1).view(torch.uint8)


class _Asking:
    """The first rank's view of the whole model."""

    def __init__(
        self,
        parallel: Parallel,
        here: Mapping[str, _Run],
        told: list[list[_Told]],
        ranks: Together,
    ) -> None:
        self.here, self.ranks = here, ranks
        self.holders: dict[str, list[tuple[int, _Told]]] = {}
        for place, of_rank in enumerate(told):
            for one in of_rank:
                self.holders.setdefault(one.name, []).append((place, one))
        self.tensors = self._whole(parallel)

    def _whole(self, parallel: Parallel) -> dict[str, Tensor]:
        """Shapes and dtypes of all tensors, in the order of one process."""
        with torch.device("meta"):
            names = Transformer(parallel.model.config).state_dict()
        known = {name: found[0][1] for name, found in self.holders.items()}
        return {
            name: torch.empty(known[name].shape, dtype=known[name].dtype, device="meta")
            for name in names
            if name in known
        }

    def fetch(
        self, slots: Mapping[str, Slot], kinds: Mapping[str, torch.dtype]
    ) -> dict[str, Tensor]:
        """The tensors of one file. While others send they hear nothing, so what can fail here comes before or after."""
        wanted = {
            name: _Wanted(self._places(slot), slot, kinds[name]) for name, slot in slots.items()
        }
        found = {
            name: torch.empty(one.slot.of(self.tensors).shape, dtype=one.dtype)
            for name, one in wanted.items()
        }
        self.ranks.lead(lambda: list(wanted.values()))
        group = self.ranks.group
        parts = [part for name, one in wanted.items() for part in self._parts(one, found[name])]
        for _, place, tensor in parts:
            if place != group.place:
                with lost_ranks():
                    dist.recv(_bytes(tensor), group.ranks[place], group.handle)
        for one, place, tensor in parts:
            if place == group.place:
                tensor.copy_(_part(self.here[one.slot.name], one))
        return found

    def _places(self, slot: Slot) -> tuple[int, ...]:
        """One rank that has all of it, or several that have it together."""
        holders = sorted(self.holders[slot.name], key=lambda holder: holder[1].rows.start)
        for place, told in holders:
            whole = len(told.rows) == told.shape[0]
            if whole or (slot.index and slot.index[0] in told.rows):
                return (place,)
        rows = [row for _, told in holders for row in told.rows]
        if slot.index or rows != list(range(self.tensors[slot.name].shape[0])):
            raise CheckpointError(
                f"no rank holds {slot.name} at {slot.index}; the ranks do not hold one model together, start them again"
            )
        return tuple(place for place, _ in holders)

    def _parts(self, wanted: _Wanted, whole: Tensor) -> Iterator[tuple[_Wanted, int, Tensor]]:
        """Who sends what of a tensor."""
        told = dict(self.holders[wanted.slot.name])
        for place in wanted.places:
            rows = told[place].rows
            several = len(wanted.places) > 1
            yield wanted, place, whole[rows.start : rows.stop] if several else whole
