"""Checkpoints that survive anything: whole or not there, checked by hash, the last few kept.

`step-N/` holds tensors in safetensors (through `torch.distributed.checkpoint`), `state.json`, and
`manifest.json` with the sha256 of both. It is written under a temporary
name, every file and the folder are flushed to the disk, and only then renamed. A kill at any instant
leaves the old checkpoints and at most a temporary folder, which the next start removes. When one
is read, every hash is compared; a torn or altered one is named, and the one before it is used.

Several ranks write one together, into a folder that all of them see: each its own files
(`fathom.train.sharded`), the first one state and manifest, and it renames. What fails on one
fails on all. They read together too: each compares a share of the hashes, and all take the same folder.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from fathom.data.progress import Say
from fathom.errors import CheckpointError
from fathom.files import flush, sha256_of
from fathom.parallel.together import Together, of_rank

STATE, MANIFEST, UNFINISHED = "state.json", "manifest.json", ".writing-"
FILE_BYTES = 1 << 30
"""About how much goes into one file of tensors."""


def step_of(folder: Path) -> int:
    """N of a folder called step-N."""
    return int(folder.name.removeprefix("step-"))


def checkpoints(directory: Path) -> list[Path]:
    """Finished checkpoint folders, oldest first."""
    found = directory.glob("step-*")
    return sorted((p for p in found if re.fullmatch(r"step-\d+", p.name)), key=step_of)


def remove_unfinished(directory: Path) -> None:
    """Clear what a killed writer left, and what was set aside."""
    for folder in directory.glob(f"{UNFINISHED}*"):
        shutil.rmtree(folder, ignore_errors=True)


def save_checkpoint(
    directory: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any], keep: int
) -> Path:
    """Write `step-<step>` and drop all but the last `keep` up to it; one process.

    Raises `CheckpointError` when the disk is full or fails; nothing half-written stays behind. Checkpoints of
    later steps were passed over as damaged; they count for nothing and are replaced when their step comes.
    """

    def write(folder: Path) -> Iterable[Path]:
        _write_tensors(folder, tensors)
        return [path for path in folder.iterdir() if path.is_file()]

    return put_in_place(directory, step, write, size_of(tensors.values()), state, keep)


def put_in_place(
    directory: Path,
    step: int,
    write: Callable[[Path], Iterable[Path]],
    size: int,
    state: dict[str, Any],
    keep: int,
    ranks: Together | None = None,
) -> Path:
    """The same with tensors that `write` puts into a folder; it gives back this rank's files. All ranks together.

    `size`: bytes of this rank's tensors. Raises `CheckpointError` on all ranks when one of them cannot write, and
    `ParallelError` when one is lost.
    """
    ranks = ranks or Together()
    place, building = directory / f"step-{step}", directory / f"{UNFINISHED}{step}"
    size = sum(ranks.each(lambda: size))
    try:
        ranks.lead(lambda: _begin(building))
        files = write(building)
        hashes = ranks.each(lambda: _seal(files))
        ranks.lead(lambda: _finish(building, place, state, hashes))
    except OSError as error:
        if ranks.leads:
            shutil.rmtree(building, ignore_errors=True)
        raise CheckpointError(_not_written(place, size, error)) from error
    ranks.lead(lambda: _drop(directory, step, keep))
    return place


def _begin(building: Path) -> None:
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)


def _seal(files: Iterable[Path]) -> dict[str, str]:
    """Have files on the disk; their hashes by name."""
    hashes = {path.name: sha256_of(path) for path in sorted(files)}
    for path in files:
        flush(path)
    return hashes


def _finish(
    building: Path, place: Path, state: dict[str, Any], hashes: list[dict[str, str]]
) -> None:
    """State and manifest beside the tensors, and the folder under its own name."""
    (building / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
    known = {name: found for of_rank in hashes for name, found in of_rank.items()}
    known |= _seal([building / STATE])
    known = dict(sorted(known.items()))
    (building / MANIFEST).write_text(json.dumps(known, indent=1), encoding="utf-8")
    flush(building / MANIFEST)
    flush(building)
    _set_aside(place)  # one that is being made again
    building.rename(place)
    flush(place.parent)


def _drop(directory: Path, step: int, keep: int) -> None:
    for old in [folder for folder in checkpoints(directory) if step_of(folder) <= step][:-keep]:
        _set_aside(old)
    remove_unfinished(directory)


def _set_aside(folder: Path) -> None:
    """Give a checkpoint a name under which it is none, so that a half-removed one is never met."""
    if folder.exists():
        folder.rename(folder.with_name(f"{UNFINISHED}{folder.name}-removed"))


def size_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of their numbers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _not_written(place: Path, size: int, error: OSError) -> str:
    good = [folder for folder in checkpoints(place.parent) if step_of(folder) < step_of(place)]
    kept = f"the last good checkpoint is {good[-1].name}" if good else "there is no earlier one"
    return (
        f"checkpoint {place} ({size / 2**20:.0f} MiB) could not be written: {error.strerror or error}; "
        f"{kept}. Make room and give the same command again"
    )


def _write_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    from torch.distributed import checkpoint as dcp

    writer = dcp.HuggingFaceStorageWriter(str(folder), _file_numbers(tensors))
    with library_errors():
        dcp.save(dict(tensors), storage_writer=writer, no_dist=True)


def _file_numbers(tensors: dict[str, Tensor]) -> dict[str, int]:
    """Which file each tensor goes to, counted from 1. The writer holds one file's bytes in memory at a time."""
    numbers, size = {}, 0
    for name, tensor in tensors.items():
        size += tensor.nbytes
        numbers[name] = 1 + (size - tensor.nbytes) // FILE_BYTES
    present = sorted(set(numbers.values()))
    return {name: 1 + present.index(number) for name, number in numbers.items()}


@contextmanager
def library_errors(name_rank: bool = False) -> Iterator[None]:
    """Within: no remarks on running in one process, and errors come out as the system's or as an ordinary one.

    With `name_rank` they say who met them. The library wraps whatever happens in a CheckpointException, which is no
    Exception but a BaseException.
    """
    from torch.distributed.checkpoint.api import CheckpointException

    logger = logging.getLogger("torch.distributed")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        if not isinstance(cause, Exception):  # Ctrl-C, which the library wraps like all else
            raise cause from None
        found = _system_error(cause) or RuntimeError(str(cause))
        raise (of_rank(found, rank) if name_rank else found) from error
    finally:
        logger.setLevel(level)


def _system_error(error: BaseException | None) -> OSError | None:
    """The operating system's error behind another one, if there is one."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def problem_with(folder: Path, share: int = 0, shares: int = 1) -> str | None:
    """Why a checkpoint cannot be used, or None when every file is as it was written.

    Of several ranks each may compare the hashes of its share of the files.
    """
    try:
        hashes = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        unlisted = {path.name for path in folder.glob("*.safetensors")} - {*hashes}  # all are read
        if unlisted:
            return f"{sorted(unlisted)[0]} does not belong to it"
        for number, (name, expected) in enumerate(hashes.items()):
            if not (folder / name).exists():
                return f"{name} is missing"
            if number % shares == share and sha256_of(folder / name) != expected:
                return f"{name} was altered or is torn (its sha256 is not the one written)"
    except (OSError, ValueError, AttributeError, TypeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    return None if STATE in hashes else f"{MANIFEST} does not list {STATE}"


def newest_good(directory: Path, say: Say, ranks: Together | None = None) -> Path | None:
    """The newest checkpoint whose hashes all match; each bad one passed over is said.

    All ranks together; all find the same, and the first one says.
    """
    ranks = ranks or Together()
    for folder in reversed(ranks.lead(lambda: checkpoints(directory))):
        problem = _problem_found(folder, ranks)
        if problem is None:
            return folder
        if ranks.leads:
            say(f"checkpoint {folder} is damaged: {problem}; trying the one before it")
    return None


def _problem_found(folder: Path, ranks: Together) -> str | None:
    """What the first of the ranks that found one has found."""
    group = ranks.group
    found = ranks.each(lambda: problem_with(folder, group.place, group.size))
    return next(filter(None, found), None)


def read_state(folder: Path) -> dict[str, Any]:
    """What `save_checkpoint` was given as `state`."""
    return json.loads((folder / STATE).read_text(encoding="utf-8"))


def read_tensors(folder: Path, into: dict[str, Tensor]) -> None:
    """Fill the given tensors in place with those of the checkpoint."""
    from torch.distributed import checkpoint as dcp

    with fits(folder):
        reader = dcp.HuggingFaceStorageReader(path=str(folder))
        dcp.load(into, storage_reader=reader, no_dist=True)


@contextmanager
def fits(folder: Path) -> Iterator[None]:
    """Within, a checkpoint is read; what does not go into this model is an error of ours."""
    try:
        with library_errors():
            yield
    except Exception as error:
        raise CheckpointError(
            f"checkpoint {folder} does not fit this model ({error}); it was written by another recipe or version; "
            f"choose another run folder with --out"
        ) from error
