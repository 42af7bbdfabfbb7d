"""From sources to token files (report §4.1): survey, split, tokenizer, tokens; once, atomically, for any corpus size.

A prepared folder holds train.bin and held_out.bin (raw little-endian uint16 or uint32), the tokenizer's two files
and manifest.json. Documents are packed in a shuffled order with end-of-sentence after each, without any mask
between them. Memory holds one batch of text and a few numbers per document, never the corpus.

A corpus of few documents cannot be divided by documents: then the tail of each document is held out instead, and
the manifest's `held_out_kind` says so.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from fathom.data.packing import SIDES, Packed, pack
from fathom.data.sources import STDLIB, Document, Rejects, read_documents
from fathom.data.split import DOCUMENTS, TAIL, Split, Survey, lopsided, survey
from fathom.data.tokenizer import Tokenizer
from fathom.errors import DataError

MANIFEST = "manifest.json"
FORMAT = 1
Say = Callable[[str], None]


@dataclass(frozen=True)
class TokenData:
    """A prepared folder, open: token arrays stay on the disk (memory maps)."""

    train: np.ndarray
    held_out: np.ndarray
    tokenizer: Tokenizer
    manifest: dict[str, Any]

    names: tuple[str, ...] = ()

    def tokens(self, side: str, source: str | None = None) -> np.ndarray:
        """Tokens of a side."""
        return self.train if side == "train" else self.held_out

    def bytes_per_token(self, side: str) -> float:
        """Bytes of text per token of "train" or "held_out": loss / ln 2 / this = bits per byte."""
        return self.manifest["bytes"][side] / self.manifest["tokens"][side]

    @classmethod
    def open(cls, folder: str | Path) -> TokenData:
        """Open what `prepare` made. Raises `DataError` when it is not there or not whole."""
        folder = Path(folder)
        manifest = _read_manifest(folder)
        arrays = [_map(folder / f"{side}.bin", manifest, side) for side in SIDES]
        return cls(arrays[0], arrays[1], Tokenizer.load(folder), manifest)


def prepare(
    out_dir: str | Path,
    sources: Sequence[str],
    tokenizer: str = "bpe",
    vocab_size: int | None = None,
    held_out: float = 0.05,
    held_out_kind: str = DOCUMENTS,
    seed: int = 0,
    say: Say | None = None,
) -> TokenData:
    """Tokens of `sources` (see `read_documents`) in `out_dir`, made now or found there from before.

    tokenizer: "bpe" or "char" trains one on the training text, anything else is the path of one; `vocab_size` is what
    a trained one has and a loaded one may not exceed. held_out: share of the text never trained on; held_out_kind
    "documents" or "tail" (see `Split`). say: called with a line of text at each step.
    The folder appears whole or not at all, and one made with other settings is refused with the difference.
    Raises `DataError`, also for sources without any usable text.
    """
    place = Path(out_dir)
    settings = {
        "format": FORMAT,
        "sources": [s if s == STDLIB else str(Path(s)) for s in map(str, sources)],
        "tokenizer": str(tokenizer),
        "vocab_size": vocab_size,
        "held_out": held_out,
        "held_out_kind": held_out_kind,
        "seed": seed,
    }
    if (place / MANIFEST).exists():
        _check_same(place, settings)
    else:
        split = Split(held_out_kind, held_out, seed)
        _make(place, settings, split, say or (lambda line: None))
    return TokenData.open(place)


def _check_same(place: Path, settings: dict[str, Any]) -> None:
    made = _read_manifest(place)["settings"]
    different = [
        f"{key} {made.get(key)!r} there, {value!r} now"
        for key, value in settings.items()
        if made.get(key) != value
    ]
    if different:
        raise DataError(
            f"{place} was prepared with other settings ({'; '.join(different)}); "
            f"go back to those, choose another folder or remove this one"
        )


def _make(place: Path, settings: dict[str, Any], split: Split, say: Say) -> None:
    """Build everything beside `place` and rename it there."""
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise DataError(
            f"{place} exists and is not prepared data; choose another folder or remove it"
        )
    building = place.with_name(f".{place.name}.building")
    try:
        shutil.rmtree(building, ignore_errors=True)  # left by a run that was killed
        building.mkdir(parents=True)
        _build(building, settings, split, say)
        if place.exists():
            place.rmdir()
        building.rename(place)
    except OSError as error:
        raise DataError(
            f"{place} could not be prepared ({error}); make room or choose another folder"
        ) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _build(folder: Path, settings: dict[str, Any], split: Split, say: Say) -> None:
    sources, rejects = settings["sources"], Rejects()
    say(f"reading {', '.join(sources)}")
    found = survey(_read(sources, rejects), split)
    if not found.documents:
        reason = rejects.summary() if rejects.total else "there is no text in it"
        raise DataError(
            f"nothing to train on in {', '.join(sources)}: {reason}; give .txt, .md, code, .jsonl or .parquet"
        )
    if split.kind == DOCUMENTS and lopsided(found, split):
        split = replace(split, kind=TAIL)
        say("too few documents to hold some out; the tail of each document is held out instead")
    say(f"{found.documents:,} documents, {found.bytes / 1e6:.1f} MB; {rejects.summary()}")
    tokenizer = _tokenizer(settings, split, say)
    say(f"encoding with {tokenizer.vocab_size:,} tokens")
    texts = (piece for document in _read(sources, Rejects()) for piece in split.pieces(document))
    packed = pack(folder, texts, tokenizer, end_last=split.kind == DOCUMENTS)
    tokenizer.save(folder)
    _write_manifest(folder, _manifest(settings, split, found, rejects, tokenizer, packed))


def _read(sources: Sequence[str], rejects: Rejects) -> Iterator[Document]:
    return chain.from_iterable(read_documents(source, rejects) for source in sources)


def _tokenizer(settings: dict[str, Any], split: Split, say: Say) -> Tokenizer:
    """Train on the training side only, but for characters: an alphabet is not learned, and it must be complete."""
    kind, size, sources = settings["tokenizer"], settings["vocab_size"], settings["sources"]
    if kind not in ("bpe", "char"):
        return _loaded(kind, size)
    say(f"training a {kind} tokenizer")
    pieces = (p for document in _read(sources, Rejects()) for p in split.pieces(document))
    texts = (p.text for p in pieces if kind == "char" or not p.held_out)
    tokenizer = Tokenizer.train(texts, size, kind)
    if tokenizer.placeholders:
        say(
            f"the corpus gives {tokenizer.vocab_size - tokenizer.placeholders:,} of the {size:,} tokens asked for; "
            f"the rest stays unused (more text or a smaller vocab_size avoids that)"
        )
    return tokenizer


def _loaded(path: str, size: int | None) -> Tokenizer:
    tokenizer = Tokenizer.load(path)
    if size is not None and tokenizer.vocab_size > size:
        raise DataError(
            f"the tokenizer {path} has {tokenizer.vocab_size} ids, the model's vocab_size is {size}; "
            f"set vocab_size={tokenizer.vocab_size} or more"
        )
    return tokenizer


def _manifest(
    settings: dict[str, Any],
    split: Split,
    found: Survey,
    rejects: Rejects,
    tokenizer: Tokenizer,
    packed: Packed,
) -> dict[str, Any]:
    return {
        "settings": settings,
        "held_out_kind": split.kind,
        "python": platform.python_version(),
        "content_sha256": found.sha256,
        "content_bytes": found.bytes,
        "content_documents": found.documents,
        "vocab_size": tokenizer.vocab_size,
        "unused_tokens": tokenizer.placeholders,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "rejects": {"counts": dict(rejects.counts), "examples": rejects.examples},
        **asdict(packed),
    }


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    text = json.dumps(manifest, indent=2, ensure_ascii=False)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
    for path in folder.iterdir():  # on the disk before the rename that makes them count
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["settings"]["format"] != FORMAT:
            raise DataError(
                f"{folder} was prepared by another version of fathom; remove it and prepare again"
            )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder} is not prepared data (no sound {MANIFEST}); prepare it again"
        ) from error
    return manifest


def _map(path: Path, manifest: dict[str, Any], side: str) -> np.ndarray:
    dtype, count = np.dtype(manifest["dtype"]), manifest["tokens"][side]
    size = path.stat().st_size if path.exists() else 0
    if size != count * dtype.itemsize:
        raise DataError(
            f"{path} has {size} bytes instead of {count * dtype.itemsize}; remove {path.parent} and prepare it again"
        )
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != manifest["sha256"][side]:
            raise DataError(
                f"{path} was altered since it was prepared (its sha256 is not the one in "
                f"{MANIFEST}); remove {path.parent} and prepare it again"
            )
    return np.memmap(path, dtype=dtype, mode="r")
