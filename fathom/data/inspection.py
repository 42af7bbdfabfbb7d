"""What a prepared folder holds, as numbers and samples; `fathom data inspect` shows them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fathom.data.manifest import home
from fathom.data.pipeline.result import FILES, REJECTS
from fathom.data.prepared import TokenData
from fathom.data.shards import Tokens
from fathom.errors import DataError

_AT_ONCE = 4_000_000


@dataclass(frozen=True)
class Sample:
    """One document, with where it was found."""

    place: str
    tokens: int
    ids: list[int]
    """At most as many as were asked for."""
    text: str


def length_histogram(tokens: Tokens) -> list[tuple[int, int, int, int]]:
    """(least, most, documents, tokens) of documents whose length in tokens, their end included, is a power of two up
    to twice that."""
    lengths = np.diff(tokens.documents)
    lengths = lengths[lengths > 0]
    powers = np.frexp(lengths)[1] - 1
    return [
        (
            2 ** int(power),
            2 ** (int(power) + 1) - 1,
            int((powers == power).sum()),
            int(lengths[powers == power].sum()),
        )
        for power in np.unique(powers)
    ]


def token_counts(tokens: Tokens, vocab_size: int) -> np.ndarray:
    """int64 [vocab_size]: how often each id stands there."""
    counts = np.zeros(vocab_size, np.int64)
    for start in range(0, len(tokens), _AT_ONCE):
        some = tokens.read(start, min(start + _AT_ONCE, len(tokens)))
        counts += np.bincount(some, minlength=vocab_size)
    return counts


def samples(
    folder: Path, data: TokenData, side: str, source: str, count: int, most: int
) -> Iterator[Sample]:
    """`count` documents of one source at even distances; of each at most `most` tokens."""
    with _said(home(folder) / FILES) as path:
        names = json.loads(path.read_text(encoding="utf-8"))[source]
    tokens = data.tokens(side, source)
    number = len(tokens.documents) - 1
    for i in sorted({number * k // count for k in range(count)} if number else set()):
        start, stop = (int(place) for place in tokens.documents[i : i + 2])
        ids = tokens.read(start, min(stop, start + most)).tolist()
        entry = tokens.entry(i)
        place = names[entry["file"]] + (f":{entry['row']}" if entry["row"] else "")
        yield Sample(f"{source}/{place}", stop - start, ids, data.tokenizer.decode(ids))


def reject_summary(folder: Path) -> tuple[Counter[tuple[str, str, str]], dict[tuple, dict]]:
    """(how many by source, kind and reason, the first line of each); reasons with numbers in them count as one kind."""
    counts: Counter[tuple[str, str, str]] = Counter()
    first: dict[tuple, dict] = {}
    with _said(home(folder) / REJECTS) as path, open(path, encoding="utf-8") as file:
        for line in map(json.loads, file):
            reason = line["reason"] if line["kind"] == "unreadable" else ""
            key = (line["source"], line["kind"], reason)
            counts[key] += 1
            first.setdefault(key, line)
    return counts, first


@contextmanager
def _said(path: Path) -> Iterator[Path]:
    """Within, a file that is missing or no sound JSON is a `DataError`."""
    try:
        yield path
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{path} is missing or damaged ({type(error).__name__}: {error}); {path.parent} can be trained on all the "
            f"same, prepare it again to look into it"
        ) from error
