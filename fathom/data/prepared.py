"""A prepared folder, open: its tokens by side and by source, its tokenizer, its manifest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from fathom.data.manifest import home, read_manifest
from fathom.data.pipeline.encoding import SIDES
from fathom.data.pipeline.packing import ShardRecord
from fathom.data.shards import Tokens, open_shards, verify
from fathom.data.tokenizer import Tokenizer
from fathom.errors import DataError, did_you_mean


@dataclass(frozen=True)
class TokenData:
    """Tokens stay on the disk (memory maps); `parts` has them by (side, source name)."""

    parts: Mapping[tuple[str, str], Tokens]
    tokenizer: Tokenizer
    manifest: dict[str, Any]

    @property
    def names(self) -> tuple[str, ...]:
        """The sources, in the order in which they were given."""
        return tuple(dict.fromkeys(name for _, name in self.parts))

    @property
    def train(self) -> Tokens:
        """All that is trained on."""
        return self.tokens("train")

    @property
    def held_out(self) -> Tokens:
        """All that is never trained on."""
        return self.tokens("held_out")

    def tokens(self, side: str, source: str | None = None) -> Tokens:
        """Tokens of "train" or "held_out", of one source or of all, one after the other. Raises `DataError`."""
        if side not in SIDES:
            raise DataError(f"no tokens of side {side!r}; there are {', '.join(SIDES)}")
        if source not in (None, *self.names):
            raise DataError(
                f"the data has no source {source!r}; {did_you_mean(str(source), self.names, 'there are')}"
            )
        chosen = [self.parts[side, name] for name in self.names if source in (None, name)]
        return chosen[0] if len(chosen) == 1 else Tokens.joined(chosen, chosen[0].dtype)

    def bytes_per_token(self, side: str) -> float:
        """Bytes of text per token of "train" or "held_out": loss / ln 2 / this = bits per byte."""
        return self.manifest["bytes"][side] / self.manifest["tokens"][side]

    @property
    def fingerprint(self) -> str:
        """Equal for the same tokens in the same order, of sources of the same names."""
        shards = self.manifest["shards"]
        marks = [[name, side, [s["sha256"] for s in shards[name][side]]]
                 for name in shards for side in SIDES]  # fmt: skip
        return sha256(json.dumps([self.tokenizer.fingerprint, marks]).encode()).hexdigest()

    @classmethod
    def open(cls, folder: str | Path, tokenizer_fingerprint: str | None = None) -> TokenData:
        """Open what `prepare` made.

        tokenizer_fingerprint: `Tokenizer.fingerprint` of the tokenizer it must have been made with, for example a
        model's. Raises `DataError` when the folder is not there or not whole, or its tokenizer is another.
        """
        folder = home(Path(folder))
        manifest = read_manifest(folder)
        tokenizer = _own_tokenizer(folder, manifest)
        _check_expected(folder, tokenizer, tokenizer_fingerprint)
        dtype = np.dtype(manifest["dtype"])
        records = {
            (side, name): [ShardRecord(**record) for record in shards[side]]
            for name, shards in manifest["shards"].items()
            for side in SIDES
        }
        verify(folder, [record for some in records.values() for record in some], dtype.itemsize)
        parts = {key: open_shards(folder, some, dtype) for key, some in records.items()}
        return cls(parts, tokenizer, manifest)


def _own_tokenizer(folder: Path, manifest: dict[str, Any]) -> Tokenizer:
    tokenizer = Tokenizer.load(folder)
    if tokenizer.fingerprint != manifest["tokenizer_fingerprint"]:
        raise DataError(
            f"{folder}/tokenizer.json is not the one its tokens were made with; put that back or prepare again"
        )
    return tokenizer


def _check_expected(folder: Path, tokenizer: Tokenizer, expected: str | None) -> None:
    if expected not in (None, tokenizer.fingerprint):
        raise DataError(
            f"{folder} was made with the tokenizer {tokenizer.fingerprint[:12]}…, asked for is {str(expected)[:12]}…; "
            f"prepare the text with that one"
        )
