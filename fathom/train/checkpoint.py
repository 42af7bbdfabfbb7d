"""Checkpoints that survive anything: whole or not there, checked by hash, the last few kept.

`step-N/` holds tensors in safetensors (through `torch.distributed.checkpoint`, so that later they can be
sharded), `state.json`, and `manifest.json` with the sha256 of both. It is written under a temporary
name, every file and the folder are flushed to the disk, and only then renamed. A kill at any instant
leaves the old checkpoints and at most a temporary folder, which the next start removes. When one
is read, every hash is compared; a torn or altered one is named, and the one before it is used.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from fathom.errors import CheckpointError

STATE, MANIFEST, UNFINISHED = "state.json", "manifest.json", ".writing-"
Report = Callable[[str], None]


def step_of(folder: Path) -> int:
    """N of a folder called step-N."""
    return int(folder.name.removeprefix("step-"))


def checkpoints(directory: Path) -> list[Path]:
    """Finished checkpoint folders, oldest first."""
    return sorted(directory.glob("step-[0-9]*"), key=step_of)


def remove_unfinished(directory: Path) -> None:
    """Clear what a killed writer left."""
    for folder in directory.glob(f"{UNFINISHED}*"):
        shutil.rmtree(folder, ignore_errors=True)


def save_checkpoint(
    directory: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any], keep: int
) -> Path:
    """Write `step-<step>` and drop all but the last `keep`.

    Raises `CheckpointError` when the disk is full or fails; nothing half-written stays behind.
    """
    place = directory / f"step-{step}"
    building = directory / f"{UNFINISHED}{step}"
    try:
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
        _write(building, tensors, state)
        shutil.rmtree(place, ignore_errors=True)  # an altered one, found bad and done again
        building.rename(place)
        _flush(directory)
    except OSError as error:
        shutil.rmtree(building, ignore_errors=True)
        raise CheckpointError(_not_written(place, tensors, error)) from error
    for old in checkpoints(directory)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return place


def _not_written(place: Path, tensors: dict[str, Tensor], error: OSError) -> str:
    size = sum(t.numel() * t.element_size() for t in tensors.values()) / 2**20
    good = checkpoints(place.parent)
    kept = f"{good[-1]} is whole" if good else "there is no earlier one"
    return (
        f"checkpoint {place} ({size:.0f} MiB) could not be written: {error.strerror or error}; "
        f"{kept}. Make room and give the same command again"
    )


def _write(building: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    _write_tensors(building, tensors)
    (building / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
    files = sorted(path for path in building.iterdir() if path.is_file())
    hashes = {path.name: _sha256(path) for path in files}
    (building / MANIFEST).write_text(json.dumps(hashes, indent=1), encoding="utf-8")
    for path in building.iterdir():
        _flush(path)
    _flush(building)


def _write_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    from torch.distributed import checkpoint as dcp

    with _quiet():
        try:
            writer = dcp.HuggingFaceStorageWriter(path=str(folder))
            dcp.save(dict(tensors), storage_writer=writer, no_dist=True)
        except Exception as error:
            raise _as_os_error(error) from error


def _as_os_error(error: BaseException) -> OSError:
    """The operating system's error inside what the checkpoint library raised."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError):
            return seen
        failures = getattr(seen, "failures", None) or getattr(seen, "_failures", None) or {}
        for failure in failures.values():
            inner = failure[0] if isinstance(failure, tuple) else failure
            if isinstance(inner, OSError):
                return inner
        seen = seen.__cause__ or seen.__context__
    return OSError(f"{type(error).__name__}: {error}")


class _quiet(warnings.catch_warnings):
    """Without the library's remarks on running in one process."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.simplefilter("ignore")
        self.level = logging.getLogger("torch.distributed").level
        logging.getLogger("torch.distributed").setLevel(logging.ERROR)

    def __exit__(self, *error: object) -> None:
        logging.getLogger("torch.distributed").setLevel(self.level)
        super().__exit__(*error)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def problem_with(folder: Path) -> str | None:
    """Why a checkpoint cannot be used, or None when every file is as it was written."""
    try:
        hashes = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, expected in hashes.items():
            if not (folder / name).exists():
                return f"{name} is missing"
            if _sha256(folder / name) != expected:
                return f"{name} was altered or is torn (its sha256 is not the one written)"
    except (OSError, ValueError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    return None if STATE in hashes else f"{MANIFEST} does not list {STATE}"


def newest_good(directory: Path, report: Report) -> Path | None:
    """The newest checkpoint whose hashes all match; each bad one passed over is reported."""
    for folder in reversed(checkpoints(directory)):
        problem = problem_with(folder)
        if problem is None:
            return folder
        report(f"checkpoint {folder} is damaged: {problem}; trying the one before it")
    return None


def read_state(folder: Path) -> dict[str, Any]:
    """What `save_checkpoint` was given as `state`."""
    return json.loads((folder / STATE).read_text(encoding="utf-8"))


def read_tensors(folder: Path, into: dict[str, Tensor]) -> None:
    """Fill the given tensors in place with those of the checkpoint."""
    from torch.distributed import checkpoint as dcp

    with _quiet():
        try:
            reader = dcp.HuggingFaceStorageReader(path=str(folder))
            dcp.load(into, storage_reader=reader, no_dist=True)
        except Exception as error:
            raise CheckpointError(
                f"checkpoint {folder} does not fit this model ({error}); "
                f"it was written by another recipe or version"
            ) from error
