"""The tensors of a checkpoint, written and read by many ranks, each its own part (report §3.2: PP16 EP64 ZeRO-1).

A rank keeps *runs* of tensors (`fathom.parallel.pieces.Shard`). Here each run is cut into boxes of the
whole tensor (`fathom.parallel.boxes`), and the boxes go to `torch.distributed.checkpoint` under the names and in
the shapes of one process. So nothing in a checkpoint tells in which layout it was written, and one that one process
wrote is of the same kind: its boxes are whole tensors. The library plans (and checks that the boxes of
all ranks fill every tensor exactly once), and when it reads finds out which parts of which files a rank needs.

Storage is safetensors: torch's own format has its index in a pickle, which can run code when it is
read. A safetensors file has a name only once, so the boxes of a tensor that is cut within its rows go
to different files of the rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
    LoadPlan,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from fathom.parallel.boxes import boxes
from fathom.parallel.pieces import Shard
from fathom.parallel.together import Together, lost_ranks
from fathom.train import checkpoint
from fathom.train.checkpoint import fits, library_errors


@dataclass(frozen=True, eq=False)
class Part:
    """A box of a tensor, live."""

    name: str
    tensor: Tensor
    """In the shape of the box."""
    shape: torch.Size
    """Of the whole tensor."""
    offsets: torch.Size

    @property
    def index(self) -> MetadataIndex:
        """What the library calls it."""
        return MetadataIndex(self.name, self.offsets)

    @property
    def chunk(self) -> ChunkStorageMetadata:
        """Its place in the whole, in the library's words."""
        return ChunkStorageMetadata(self.offsets, self.tensor.size())


def parts_of(shards: Iterable[Shard]) -> list[Part]:
    """The boxes of all shards, in their order."""
    found = []
    for shard in shards:
        begin, done = shard.offset, 0
        for box in boxes(tuple(shard.shape), begin, begin + shard.tensor.numel()):
            run = shard.tensor[done : done + box.numel].view(box.sizes)
            found.append(Part(shard.name, run, shard.shape, torch.Size(box.offsets)))
            done += box.numel
    return found


def _by_index(parts: Iterable[Part]) -> dict[MetadataIndex, Part]:
    found: dict[MetadataIndex, Part] = {}
    for part in parts:
        if found.setdefault(part.index, part) is not part:
            raise ValueError(f"{part.name} comes twice on this rank")
    return found


# --- writing -------------------------------------------------------------------------------------


def write_shards(folder: Path, shards: Iterable[Shard], ranks: Together) -> list[Path]:
    """Write the shards that are this rank's to write into a folder that is there; its files. All ranks together.

    Raises on all ranks alike: `OSError` where one cannot write, `ParallelError` when one is lost, `ValueError` when the
    shards of all do not fill every tensor exactly once.
    """
    parts = parts_of(shard for shard in shards if shard.first)
    writer = _Writer(folder, ranks.group.size)
    with library_errors(name_rank=True), lost_ranks():
        dcp.save(
            {},
            storage_writer=writer,
            planner=_Saving(parts),
            process_group=ranks.group.handle,
        )
    return writer.files


class _Saving(DefaultSavePlanner):
    """Says what this rank writes; the library's own compares that with what the others do."""

    def __init__(self, parts: Iterable[Part]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.parts = _by_index(parts)

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([_write_item(part) for part in self.parts.values()])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.parts[index].tensor


def _write_item(part: Part) -> WriteItem:
    properties = TensorProperties(dtype=part.tensor.dtype)
    data = TensorWriteData(chunk=part.chunk, properties=properties, size=part.shape)
    return WriteItem(part.index, WriteItemType.SHARD, tensor_data=data)


class _Writer(HuggingFaceStorageWriter):
    """Safetensors of about `FILE_BYTES`; the library alone would make one of all that a rank writes."""

    def __init__(self, folder: Path, ranks: int) -> None:
        super().__init__(str(folder), save_distributed=True)
        self.folder, self.ranks = folder, ranks
        self.files: list[Path] = []
        """What was written."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results: list[WriteResult] = []
        lists = list(_files(plan.items))
        for number, items in enumerate(lists):
            # A file's name has the rank's number, from 1, and nothing else of its own. Ours take more numbers: of four
            # ranks the first has 1, 5, 9 and so on.
            index = plan.storage_data["shard_index"] + number * self.ranks
            part = replace(plan, items=items, storage_data={"shard_index": index})
            results += super().write_data(part, planner).wait()
        names = {result.storage_data.relative_path for result in results}
        if len(names) != len(lists):
            raise RuntimeError(f"{len(lists)} files were to be written and {len(names)} were")
        self.files = [self.folder / name for name in sorted(names)]
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done


def _files(items: Iterable[WriteItem]) -> Iterator[list[WriteItem]]:
    """Items by file: as many as fit, no name twice."""
    open_files: list[list[WriteItem]] = []
    names: list[set[str]] = []
    sizes: list[int] = []
    for item in items:
        size = item.tensor_storage_size() or 0
        for number, known in enumerate(names):
            if item.index.fqn not in known and sizes[number] + size <= checkpoint.FILE_BYTES:
                break
        else:
            number = len(names)
            open_files.append([])
            names.append(set())
            sizes.append(0)
        open_files[number].append(item)
        names[number].add(item.index.fqn)
        sizes[number] += size
    yield from open_files


# --- reading -------------------------------------------------------------------------------------


def read_shards(folder: Path, shards: Iterable[Shard]) -> None:
    """Fill shards in place from a checkpoint of any layout; of its files only what this rank needs is read.

    Raises `CheckpointError` where it does not hold that.
    """
    with fits(folder):
        reader = HuggingFaceStorageReader(path=str(folder))
        planner = _Loading(parts_of(shards))
        dcp.load({}, storage_reader=reader, planner=planner, no_dist=True)


class _Loading(DefaultLoadPlanner):
    """Says what this rank reads."""

    def __init__(self, parts: Iterable[Part]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.parts = _by_index(parts)

    def set_up_planner(
        self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        super().set_up_planner(state_dict, metadata, is_coordinator)
        self.stored = metadata.state_dict_metadata if metadata else {}

    def create_local_plan(self) -> LoadPlan:
        return LoadPlan([item for part in self.parts.values() for item in self._reads(part)])

    def _reads(self, part: Part) -> list[ReadItem]:
        stored = self.stored.get(part.name)
        if not isinstance(stored, TensorStorageMetadata):
            raise ValueError(f"{part.name} is not in it")
        if stored.size != part.shape:
            raise ValueError(
                f"{part.name} is {list(stored.size)} there and {list(part.shape)} here"
            )
        items = create_read_items_for_chunk_list(part.name, stored, [part.chunk])
        if sum(torch.Size(item.lengths).numel() for item in items) != part.tensor.numel():
            raise ValueError(f"{part.name} is there in part only")
        return items

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        target = self.parts[read_item.dest_index].tensor
        for axis, (start, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            target = target.narrow(axis, start, length)
        return target
