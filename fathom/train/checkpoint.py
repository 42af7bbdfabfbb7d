"""Checkpoints that survive anything: whole or not there, checked by hash, the last few kept.

`step-N/` holds tensors in safetensors (through `torch.distributed.checkpoint`, so that later they can be
sharded), `state.json`, and `manifest.json` with the sha256 of both. It is written under a temporary
name, every file and the folder are flushed to the disk, and only then renamed. A kill at any instant
leaves the old checkpoints and at most a temporary folder, which the next start removes. When one
is read, every hash is compared; a torn or altered one is named, and the one before it is used.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from fathom.data.progress import Say
from fathom.errors import CheckpointError
from fathom.files import flush, sha256_of

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
    """Write `step-<step>` and drop all but the last `keep` up to it.

    Raises `CheckpointError` when the disk is full or fails; nothing half-written stays behind. Checkpoints of
    later steps were passed over as damaged; they count for nothing and are replaced when their step comes.
    """
    place = directory / f"step-{step}"
    building = directory / f"{UNFINISHED}{step}"
    try:
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
        _write(building, tensors, state)
        _set_aside(place)  # one that is being made again
        building.rename(place)
        flush(directory)
    except OSError as error:
        shutil.rmtree(building, ignore_errors=True)
        raise CheckpointError(_not_written(place, tensors, error)) from error
    for old in [folder for folder in checkpoints(directory) if step_of(folder) <= step][:-keep]:
        _set_aside(old)
    remove_unfinished(directory)
    return place


def _set_aside(folder: Path) -> None:
    """Give a checkpoint a name under which it is none, so that a half-removed one is never met."""
    if folder.exists():
        folder.rename(folder.with_name(f"{UNFINISHED}{folder.name}-removed"))


def _not_written(place: Path, tensors: dict[str, Tensor], error: OSError) -> str:
    size = sum(t.numel() * t.element_size() for t in tensors.values()) / 2**20
    good = [folder for folder in checkpoints(place.parent) if step_of(folder) < step_of(place)]
    kept = f"the last good checkpoint is {good[-1].name}" if good else "there is no earlier one"
    return (
        f"checkpoint {place} ({size:.0f} MiB) could not be written: {error.strerror or error}; "
        f"{kept}. Make room and give the same command again"
    )


def _write(building: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    _write_tensors(building, tensors)
    (building / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
    files = sorted(path for path in building.iterdir() if path.is_file())
    hashes = {path.name: sha256_of(path) for path in files}
    (building / MANIFEST).write_text(json.dumps(hashes, indent=1), encoding="utf-8")
    for path in building.iterdir():
        flush(path)
    flush(building)


def _write_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    from torch.distributed import checkpoint as dcp

    writer = dcp.HuggingFaceStorageWriter(str(folder), _file_numbers(tensors))
    with _library_errors():
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
def _library_errors() -> Iterator[None]:
    """Within: no remarks on running in one process, and errors come out as the system's or as an ordinary one.

    The library wraps whatever happens in a CheckpointException, which is no Exception but a BaseException.
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
        cause = next(iter(error.failures.values()))[0]
        if not isinstance(cause, Exception):  # Ctrl-C, which the library wraps like all else
            raise cause from None
        raise _system_error(cause) or RuntimeError(str(cause)) from error
    finally:
        logger.setLevel(level)


def _system_error(error: BaseException | None) -> OSError | None:
    """The operating system's error behind another one, if there is one."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def problem_with(folder: Path) -> str | None:
    """Why a checkpoint cannot be used, or None when every file is as it was written."""
    try:
        hashes = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        unlisted = {path.name for path in folder.glob("*.safetensors")} - {*hashes}  # all are read
        if unlisted:
            return f"{sorted(unlisted)[0]} does not belong to it"
        for name, expected in hashes.items():
            if not (folder / name).exists():
                return f"{name} is missing"
            if sha256_of(folder / name) != expected:
                return f"{name} was altered or is torn (its sha256 is not the one written)"
    except (OSError, ValueError, AttributeError, TypeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    return None if STATE in hashes else f"{MANIFEST} does not list {STATE}"


def newest_good(directory: Path, say: Say) -> Path | None:
    """The newest checkpoint whose hashes all match; each bad one passed over is said."""
    for folder in reversed(checkpoints(directory)):
        problem = problem_with(folder)
        if problem is None:
            return folder
        say(f"checkpoint {folder} is damaged: {problem}; trying the one before it")
    return None


def read_state(folder: Path) -> dict[str, Any]:
    """What `save_checkpoint` was given as `state`."""
    return json.loads((folder / STATE).read_text(encoding="utf-8"))


def read_tensors(folder: Path, into: dict[str, Tensor]) -> None:
    """Fill the given tensors in place with those of the checkpoint."""
    from torch.distributed import checkpoint as dcp

    try:
        with _library_errors():
            reader = dcp.HuggingFaceStorageReader(path=str(folder))
            dcp.load(into, storage_reader=reader, no_dist=True)
    except Exception as error:
        raise CheckpointError(
            f"checkpoint {folder} does not fit this model ({error}); it was written by another recipe or version; "
            f"choose another run folder with --out"
        ) from error
