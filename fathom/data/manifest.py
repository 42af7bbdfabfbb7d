"""manifest.json: what a prepared folder was made of and what came out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fathom.errors import DataError
from fathom.files import write_whole

MANIFEST = "manifest.json"
FORMAT = 2
OPENED = "opened_from"
"""Key of a manifest whose tokens lie in another folder."""
_NEEDED = ("weights", "tokenizer_fingerprint", "dtype", "bytes", "tokens", "sources", "shards")
"""What nothing can be opened without."""


def is_prepared(folder: Path) -> bool:
    """Whether there is a manifest at all."""
    return (folder / MANIFEST).is_file()


def read_manifest(folder: Path) -> dict[str, Any]:
    """Raises `DataError` for one that is missing, broken or of another version."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["settings"]["format"] != FORMAT:
            raise DataError(
                f"{folder} was prepared by another version of fathom; remove it and prepare again"
            )
        for key in _NEEDED:
            manifest[key]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder} is not prepared data (no sound {MANIFEST}); make it with `fathom data prepare`"
        ) from error
    return manifest


def home(folder: Path) -> Path:
    """Where prepared data lies: in `folder`, or in the one that was opened there. `DataError` where that is gone."""
    opened = read_manifest(folder).get(OPENED)
    if opened is None:
        return folder
    if not is_prepared(Path(opened)):
        raise DataError(
            f"{folder} uses the prepared data in {opened}, where there is none now; put it back (a link will do)"
        )
    return home(Path(opened))


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Whole or not at all."""
    text = json.dumps(manifest, indent=2, ensure_ascii=False)
    write_whole(folder / MANIFEST, (text + "\n").encode())


def note_opened(place: Path, folder: Path, manifest: dict[str, Any]) -> None:
    """Leave in `place` that the prepared `folder` is used there. `DataError` if it holds other prepared data."""
    if is_prepared(place) and read_manifest(place)["shards"] != manifest["shards"]:
        raise DataError(
            f"{place} holds other prepared data than {folder}; choose another folder or remove it"
        )
    place.mkdir(parents=True, exist_ok=True)
    write_manifest(place, manifest | {OPENED: str(folder.resolve())})


def check_same(folder: Path, settings: dict[str, Any]) -> None:
    """Raise `DataError` with the differences when the folder was made with other settings."""
    manifest = read_manifest(folder)
    if OPENED in manifest:
        raise DataError(
            f"{folder} uses the prepared data in {home(folder)}; give that as the only source, or choose another folder"
        )
    made = manifest["settings"]
    different = [
        f"{key} {made.get(key)!r} there, {value!r} now"
        for key, value in settings.items()
        if made.get(key) != value
    ]
    if different:
        raise DataError(
            f"{folder} was prepared with other settings ({'; '.join(different)}); "
            f"go back to those, choose another folder or remove this one"
        )
