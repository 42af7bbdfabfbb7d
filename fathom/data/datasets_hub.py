"""Hugging Face data sets as a source: "hf:NAME[:CONFIG][:SPLIT]", or a folder that `save_to_disk` wrote."""

from __future__ import annotations

from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from fathom.data.units import HUB, SAVED_DATASET, File
from fathom.errors import DataError

_USUAL_SPLIT = "train"


def dataset_file(source: str) -> File:
    """The data set as one file; its fingerprint stands for the time of change."""
    rows = open_dataset(source)
    name = source.removeprefix(HUB).split(":")[0]
    stamp = int.from_bytes(sha256(rows._fingerprint.encode()).digest()[:7])
    return File(source, Path(name).name, "dataset", max(1, rows.data.nbytes), stamp)


@lru_cache(maxsize=4)
def open_dataset(source: str) -> Any:
    """The rows of a data set, memory-mapped. Raises `DataError` where there are none, naming the splits there are."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{source} is a Hugging Face data set, which needs datasets; pip install 'fathom[datasets]'"
        ) from error
    name, configuration, split = _divide(source)
    try:
        if Path(name).is_dir() and any((Path(name) / f).is_file() for f in SAVED_DATASET):
            found = datasets.load_from_disk(name)
        else:
            found = datasets.load_dataset(name, configuration or None)
    except Exception as error:  # the library raises many kinds, none of them its own
        raise DataError(f"the data set {name} cannot be opened ({error})") from error
    return _split(found, split, source)


def _divide(source: str) -> tuple[str, str, str]:
    """(NAME, CONFIG, SPLIT); an empty one is the usual one: hf:NAME::validation."""
    name, configuration, split = [*source.removeprefix(HUB).split(":"), "", ""][:3]
    return name, configuration, split


def _split(found: Any, split: str, source: str) -> Any:
    if not isinstance(found, dict):
        return found
    if not split and len(found) == 1:
        return next(iter(found.values()))
    if (split or _USUAL_SPLIT) not in found:
        raise DataError(
            f"{source} has no split {split or _USUAL_SPLIT!r}; take one of {', '.join(found)}: {HUB}NAME:CONFIG:SPLIT"
        )
    return found[split or _USUAL_SPLIT]
