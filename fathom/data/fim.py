"""Fill in the middle (report §4.1), in the form prefix, suffix, middle (PSM), at the level of documents before packing:

    fim_begin prefix fim_hole suffix fim_end middle

and end of sentence, which packing puts behind every document anyway. A model trained on it continues what stands before
and after a gap, at no cost to left-to-right prediction (the report took it over from DeepSeekCoder-V2).

Where to cut is ours: two different places out of all those between characters and at both ends, uniformly. The middle
is thus never empty, prefix or suffix may be. The three texts are encoded one by one: no token crosses a cut, as in use,
where the gap's ends are wherever the cursor happens to be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fathom.data.draws import check_rate, uniform
from fathom.data.tokenizer import Tokenizer
from fathom.data.vocabulary import FIM_BEGIN, FIM_END, FIM_HOLE
from fathom.errors import DataError

RATE = 0.1
"""Share of the documents that the report permutes."""
SHORTEST = 10
"""Characters below which a document is never permuted (our choice): there is nothing to fill in from."""


class Parts(NamedTuple):
    """A document cut in three; joined in this order they are the document."""

    prefix: str
    middle: str
    suffix: str


def cut(text: str, rate: float, key: int) -> Parts | None:
    """The document cut in three, or None when it stays as it is.

    It is cut with probability `rate`, decided like the places by `key` (64 bits, see `draws.key_of`) alone; shorter
    texts than `SHORTEST` never. Raises `DataError` for a rate outside [0, 1].
    """
    check_rate("fim_rate", rate)
    if len(text) < SHORTEST or rate == 0:
        return None
    chosen, first, second = uniform(key, "fim", 3)
    if chosen >= rate:
        return None
    a, b = int(first * (len(text) + 1)), int(second * len(text))
    b += b >= a  # the second place is any but the first
    start, end = min(a, b), max(a, b)
    return Parts(text[:start], text[start:end], text[end:])


@dataclass(frozen=True)
class FimTokens:
    """Ids of the three control tokens."""

    begin: int
    hole: int
    end: int

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> FimTokens:
        """Those of `tokenizer`. Raises `DataError` when it lacks one."""
        try:
            return cls(*map(tokenizer.control_id, (FIM_BEGIN, FIM_HOLE, FIM_END)))
        except DataError as error:
            raise DataError(
                f"{error}, or set fim_rate=0: filling in the middle needs {FIM_BEGIN}, {FIM_HOLE} and {FIM_END}"
            ) from error

    def arranged(
        self, prefix: Sequence[int], middle: Sequence[int], suffix: Sequence[int]
    ) -> list[int]:
        """The ids of the three texts as the model sees them, without end of sentence."""
        return [self.begin, *prefix, self.hole, *suffix, self.end, *middle]


def fim_ids(tokenizer: Tokenizer, text: str, rate: float, key: int) -> list[int]:
    """Ids of a document, permuted or not, without end of sentence: what `text_to_ids.Encoder` does, one at a time.

    Raises `DataError`.
    """
    parts = cut(text, rate, key)
    if parts is None:
        return tokenizer.encode(text)
    return FimTokens.of(tokenizer).arranged(*tokenizer.encode_batch(parts))
