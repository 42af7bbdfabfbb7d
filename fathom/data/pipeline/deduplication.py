"""Second pass: which documents of a corpus are left out because they repeat one that stands before them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fathom.data.pipeline.duplicates import (
    Pairs,
    Told,
    exact_duplicates,
    near_duplicates,
    similar,
)
from fathom.data.pipeline.reading import Corpus, read_texts
from fathom.data.pipeline.signatures import comparable
from fathom.data.pipeline.work import finishing
from fathom.data.pipeline.workers import Workers
from fathom.data.progress import Say, silent
from fathom.errors import DataError

NONE, EXACT, NEAR = "none", "exact", "near"
_VERIFIED_AT_ONCE = 256


def check_dedup(kind: str) -> None:
    """Raises `DataError` for a kind that there is not."""
    if kind not in (NONE, EXACT, NEAR):
        raise DataError(f"dedup={kind!r} is not known; use {NONE!r}, {EXACT!r} or {NEAR!r}")


@dataclass(frozen=True)
class Duplicates:
    """For each document, in reading order, the one it repeats, or itself."""

    exact: np.ndarray
    """int64: the first document of the same content."""
    near: np.ndarray
    """int64: the first document of the same cluster, of those that are no exact duplicates."""

    @property
    def kept(self) -> np.ndarray:
        """int64, the documents that repeat none, in reading order."""
        here = np.arange(len(self.exact))
        return np.flatnonzero((self.exact == here) & (self.near == here))

    def dropped(self) -> list[tuple[int, str, int]]:
        """(document, "exact" or "near", the document it repeats), in reading order."""
        here = np.arange(len(self.exact))
        exact = [(int(i), EXACT, int(self.exact[i])) for i in np.flatnonzero(self.exact != here)]
        near = [(int(i), NEAR, int(self.near[i])) for i in np.flatnonzero(self.near != here)]
        return sorted(exact + near)


def find_duplicates(
    corpus: Corpus, kind: str, piece: Path, workers: Workers, say: Say, show: Say = silent
) -> Duplicates:
    """The duplicates of a corpus, found now or, in the folder `piece`, by an earlier process."""
    if not piece.exists():
        with finishing(piece) as folder:
            exact, near = _find(corpus, kind, folder, workers, say, show)
            np.save(folder / "exact.npy", exact)
            np.save(folder / "near.npy", near)
            (folder / "signatures.bin").unlink(missing_ok=True)
    return Duplicates(np.load(piece / "exact.npy"), np.load(piece / "near.npy"))


def _find(
    corpus: Corpus, kind: str, folder: Path, workers: Workers, say: Say, show: Say
) -> tuple[np.ndarray, np.ndarray]:
    exact = near = np.arange(len(corpus.index))
    if kind == NONE or not len(exact):
        return exact, near
    exact = exact_duplicates(np.stack([corpus.index["side"], corpus.index["order"]], axis=1))
    if kind == EXACT:
        return exact, near
    distinct = np.flatnonzero(exact == near)
    say(f"looking for near-duplicates among {len(distinct):,} documents")
    signatures = corpus.signatures(folder / "signatures.bin")
    if len(distinct) < len(exact):
        signatures = signatures[distinct]
    roots, asked = near_duplicates(
        signatures, lambda pairs, told: _verify(corpus, distinct[pairs], workers, told), show
    )
    say(f"near-duplicates: {asked:,} pairs compared")
    near = near.copy()
    near[distinct] = distinct[roots]
    return exact, near


def _verify(corpus: Corpus, pairs: Pairs, workers: Workers, told: Told) -> np.ndarray:
    """bool [pairs]: whether the two texts are similar; `told` hears of some at a time."""
    pieces = [str(piece) for piece in corpus.pieces]
    units = np.searchsorted(corpus.first, pairs, side="right") - 1
    tasks = [
        (pieces, units[i : i + _VERIFIED_AT_ONCE], corpus.index[pairs[i : i + _VERIFIED_AT_ONCE]])
        for i in range(0, len(pairs), _VERIFIED_AT_ONCE)
    ]
    answers: dict[int, np.ndarray] = {}
    for number, answer in workers.map(are_similar, tasks):
        answers[number] = answer
        told(len(answer))
    return np.concatenate([answers[i] for i in range(len(tasks))])


def are_similar(pieces: list[str], units: np.ndarray, entries: np.ndarray) -> np.ndarray:
    """bool [pairs] for the texts at `entries` [pairs, 2] of `units` [pairs, 2]."""
    found = np.empty(len(units), bool)
    for i, (unit, entry) in enumerate(zip(units, entries, strict=True)):
        one, other = (
            comparable(next(read_texts(Path(pieces[unit[k]]), entry[k : k + 1]))) for k in (0, 1)
        )
        found[i] = similar(one, other)
    return found
