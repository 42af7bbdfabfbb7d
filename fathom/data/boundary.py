"""Random splitting of tokens that join punctuation and line ends (report §4.1).

The released pre-tokenisation lets a token run from punctuation into the line ends behind it: ".\\n\\n", "):\\n". Where
text always meets these as one token, "." alone comes to mean that the line goes on, and a prompt that ends with "."
and no line end, as few-shot prompts do, is continued wrongly. The report therefore splits a proportion of such tokens
in training, which it does not state. Here a token is split into the tokens of its punctuation and the tokens of its
line ends; the text stays the same.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fathom.data.draws import check_rate, uniform
from fathom.data.tokenizer import Tokenizer
from fathom.errors import DataError

RATE = 0.1
"""Share of these tokens to split where splitting is on: our choice, as the report states none."""


@dataclass(frozen=True)
class MergedTokens:
    """The tokens that can be split, as a table over the vocabulary.

    Token i becomes parts[start[i] : start[i] + length[i]]; length 1 means that it is not one of them (and stays i).
    """

    start: np.ndarray
    length: np.ndarray
    parts: np.ndarray

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> MergedTokens:
        """Those of `tokenizer`: one decoding per id, so once for a corpus, not once for a document."""
        size = tokenizer.vocab_size
        start, length = np.zeros(size, np.int64), np.ones(size, np.int64)
        parts: list[int] = []
        for token, split in _splits(tokenizer):
            start[token], length[token] = len(parts), len(split)
            parts += split
        return cls(start, length, np.array(parts, np.int64))

    @property
    def ids(self) -> np.ndarray:
        """The tokens that can be split, in ascending order."""
        return np.flatnonzero(self.length > 1)

    def split(self, ids: np.ndarray, rate: float, key: int) -> np.ndarray:
        """A document's `ids` with each splittable token split with probability `rate`; same dtype, same text.

        `key` (64 bits, see `draws.key_of`) decides alone: the n-th splittable token takes the n-th draw. Give whole
        documents, since parts with one key would repeat each other's draws. Raises `DataError` for a rate outside
        [0, 1], and for a tokenizer that has nothing to split.
        """
        self.check(rate)
        places = np.flatnonzero(self.length[ids] > 1) if rate else ids[:0]
        chosen = places[uniform(key, "boundary", len(places)) < rate]
        return self._expanded(ids, chosen) if len(chosen) else ids

    def check(self, rate: float) -> None:
        """Raise `DataError` for a rate that cannot be."""
        check_rate("split_rate", rate)
        if rate and not len(self.parts):
            raise DataError(
                f"split_rate={rate}, but the tokenizer has no token that joins punctuation and line ends; "
                f"set split_rate=0"
            )

    def _expanded(self, ids: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        """`ids` with the tokens at the places `chosen` replaced by their parts."""
        lengths = np.ones(len(ids), np.int64)
        lengths[chosen] = self.length[ids[chosen]]
        expanded = np.repeat(ids, lengths)
        counts = lengths[chosen]
        begins = (np.cumsum(lengths) - lengths)[chosen]
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        sources = np.repeat(self.start[ids[chosen]], counts) + within
        expanded[np.repeat(begins, counts) + within] = self.parts[sources]
        return expanded


def _splits(tokenizer: Tokenizer) -> Iterator[tuple[int, list[int]]]:
    """Each splittable token with its parts.

    Parts that do not give the same text behind other text are left out: some tokenizers write a word's beginning into
    its token, and there the parts would add a blank.
    """
    for token in range(tokenizer.vocab_size):
        text = tokenizer.decode([token])
        head = text.rstrip("\r\n")
        if head == text or not _is_punctuation(head):
            continue
        before = tokenizer.encode("0")
        parts = tokenizer.encode(head) + tokenizer.encode(text[len(head) :])
        if tokenizer.decode([*before, *parts]) == tokenizer.decode([*before, token]):
            yield token, parts


def _is_punctuation(text: str) -> bool:
    """Punctuation and symbols (Unicode categories P and S), perhaps with a space before them.

    U+FFFD is a symbol too, but here it means bytes of a character that began in the token before.
    """
    symbols = text.removeprefix(" ")
    return bool(symbols) and all(
        unicodedata.category(c)[0] in "PS" and c != "\ufffd" for c in symbols
    )
