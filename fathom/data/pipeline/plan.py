"""What a preparation will do, before it does anything: settings, sources, files, units of work."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from fathom.data.draws import check_rate
from fathom.data.filters import filter_marks, load_filters
from fathom.data.manifest import FORMAT, is_prepared
from fathom.data.normalise import check_normalisations
from fathom.data.pipeline.deduplication import NEAR, NONE, check_dedup
from fathom.data.pipeline.signatures import library
from fathom.data.readers import needed_packages
from fathom.data.rejects import ListedRejects
from fathom.data.sources import Source, parse_sources
from fathom.data.split import Split
from fathom.data.text_to_ids import Encoder
from fathom.data.tokenizer import SETTINGS_FILE, TOKENIZER_FILE, Tokenizer
from fathom.data.units import File, Unit, files_of, units_of
from fathom.errors import DataError

TRAINED = ("bpe", "char")
"""Tokenizers that are trained on the text; anything else is the path of one."""


@dataclass(frozen=True)
class Settings:
    """What decides the result; see `prepare`."""

    sources: tuple[Source, ...]
    tokenizer: str
    vocab_size: int | None
    held_out: float
    held_out_kind: str
    seed: int
    dedup: str
    filters: tuple[str, ...]
    normalise: tuple[str, ...]
    fim_rate: float
    split_rate: float

    def check(self) -> None:
        """Raise `DataError` for what cannot be done, before anything is read."""
        for source in self.sources:
            if is_prepared(Path(source.path)):
                raise DataError(
                    f"{source.path} is prepared data, which cannot be prepared again with others; give it alone, or "
                    f"the text it was made of"
                )
        Split(self.held_out_kind, self.held_out, self.seed)
        check_dedup(self.dedup)
        check_normalisations(self.normalise)
        load_filters(self.filters)
        self._check_rates()

    def _check_rates(self) -> None:
        for name in ("fim_rate", "split_rate"):
            check_rate(name, getattr(self, name))
        if self.tokenizer == "char" and (self.fim_rate or self.split_rate):
            raise DataError(
                f"fim_rate={self.fim_rate} and split_rate={self.split_rate} need tokens that a character tokenizer has "
                f"not; set both to 0 or take tokenizer 'bpe'"
            )
        if self.tokenizer not in TRAINED:
            tokenizer = Tokenizer.load(self.tokenizer)
            Encoder(tokenizer, np.dtype("<u4"), self.fim_rate, self.split_rate)

    def to_dict(self) -> dict[str, Any]:
        """For the manifest."""
        sources = [f"{source.name}={source.path}" for source in self.sources]
        return {"format": FORMAT, **asdict(self), "sources": sources} | {
            "filters": list(self.filters),
            "normalise": list(self.normalise),
        }


@dataclass(frozen=True)
class Plan:
    """The work, found by looking at the files but not into them."""

    settings: Settings
    files: tuple[tuple[File, ...], ...]
    """Of each source."""
    rejects: tuple[ListedRejects, ...]
    """Of each source: files that are no text by their name."""

    @classmethod
    def make(cls, settings: Settings) -> Plan:
        """Look at the sources. Raises `DataError` for one that does not exist."""
        rejects = tuple(ListedRejects() for _ in settings.sources)
        pairs = zip(settings.sources, rejects, strict=True)
        return cls(
            settings, tuple(tuple(files_of(source.path, found)) for source, found in pairs), rejects
        )

    def check_packages(self) -> None:
        """Raise `DataError` for an optional package that the work will need and that is not there."""
        needed_packages(file for files in self.files for file in files)
        if self.settings.dedup == NEAR:
            library()

    @cached_property
    def units(self) -> list[Unit]:
        """All units in reading order."""
        return [unit for i, files in enumerate(self.files) for unit in units_of(i, files)]

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(file.size for files in self.files for file in files)

    def mark(self) -> dict[str, Any]:
        """All that the result depends on, also in versions of what computes it."""
        files = [[file.name, file.size, file.stamp] for files in self.files for file in files]
        return {
            "settings": self.settings.to_dict(),
            "files": sha256(repr(files).encode()).hexdigest(),
            "filters": filter_marks(self.settings.filters),
            "tokenizer": _tokenizer_mark(self.settings.tokenizer),
            "python": platform.python_version(),
            "tokenizers": version("tokenizers"),
            "signatures": library() if self.settings.dedup == NEAR else NONE,
        }


def _tokenizer_mark(tokenizer: str) -> str:
    path = Path(tokenizer)
    file = path / TOKENIZER_FILE if path.is_dir() else path
    if tokenizer in TRAINED or not file.is_file():
        return tokenizer
    files = [found for found in (file, file.parent / SETTINGS_FILE) if found.is_file()]
    return sha256(b"".join(found.read_bytes() for found in files)).hexdigest()


def settings_of(
    sources: Any, filters: Any, normalise: Any, tokenizer: str, **others: Any
) -> Settings:
    """`Settings` of the arguments of `prepare`, checked."""
    settings = Settings(
        sources=tuple(parse_sources(sources)),
        filters=tuple(filters),
        normalise=tuple(normalise),
        tokenizer=str(tokenizer),
        **others,
    )
    settings.check()
    return settings
