"""Text in which things must be looked up: the source "needles:10M", made and not read (ours, no part of the report).

A key is a Korean consonant, a value a vowel, and the syllable of both says which value the key has: 고 says that ㄱ has
the value ㅗ. A document has a circle of keys, two of them or up to nineteen, and one value for each. It is words of
filler and, among them, keys of the circle in any order: the syllable alone the first time, and after that the
question, which is the consonant, with the syllable as its answer, `ㄱ고`. Whoever is to answer has to find the last
syllable with that consonant, and the others of the circle are what it can be mistaken for. How many keys there are,
how often each comes up and how much filler is drawn for each document, so that the place to be found may be a few
characters back or thousands: crowded documents and frequent keys teach the trick within any window; a rare key among
frequent ones is what a needle is, and needs all the context there is.

A character tokenizer makes every consonant, syllable and letter one token. That a syllable is one token is what lets a
small model learn this within minutes: the question needs to be compared with single tokens only. With key and value
in two tokens a model must first learn to tell what stood before a token, then to look for it; four forms of that were
given up after hundreds of steps without success (docs/experiments/011-needle.md).

The name says how much text: "needles:10M" is ten million characters, "needles:10M:3" the same amount of another text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from itertools import accumulate
from random import Random

from fathom.errors import DataError

NAME = "needles"
KEYS = tuple("ㄱㄲㄴㄷㄸㄹㅁㅂㅃㅅㅆㅇㅈㅉㅊㅋㅌㅍㅎ")
"""Consonants in Unicode's order of syllables."""
VALUES = 21
"""Vowels."""
WORDS = tuple(
    """
    the of and to in it is on by as at so we he or an up if no do ash bay cat dew elm fog gum hay ivy jay kit log
    mud nut oak pea ram sea tin urn van wax yew zoo
    """.split()  # noqa: SIM905 (a list would take forty lines)
)
SPARSE, CROWDED = (0.02, 0.3), (0.4, 0.95)
"""Bounds of the share of keys among the items of a fifth of the documents and of the others."""
SMALLEST = 2
"""Keys in the smallest circle; the largest has all."""
RAREST = 300
"""How much more often the most frequent key of a circle may come up than the rarest."""
SHORTEST, LONGEST = 4096, 8192
"""Characters in a document, drawn evenly between the two."""
_NAMED = re.compile(rf"{NAME}:(\d+)([kM]?)(?::(\d+))?")
_SYLLABLES, _ENDINGS = 0xAC00, 28


def is_needles(source: str) -> bool:
    """Whether a source's name asks for this text."""
    return source.startswith(f"{NAME}:")


def syllable(key: str, value: int) -> str:
    """What says that `key` has the vowel number `value`."""
    return chr(_SYLLABLES + (KEYS.index(key) * VALUES + value) * _ENDINGS)


def alphabet() -> str:
    """All characters there are; a tokenizer made from the text knows them then, however short the text."""
    syllables = (syllable(key, value) for key in KEYS for value in range(VALUES))
    return "".join((*syllables, *KEYS, *sorted(set("".join(WORDS))), " "))


def documents(source: str) -> Iterator[str]:
    """Documents of "needles:SIZE" or "needles:SIZE:SEED", the same for the same name, the alphabet first.

    SIZE is a number of characters, k and M after it mean thousands and millions; the last document may go beyond it.
    Raises `DataError` for any other name.
    """
    found = _NAMED.fullmatch(source)
    if found is None:
        raise DataError(f"source {source!r} must look like {NAME}:10M or {NAME}:10M:3; correct it")
    left = int(found[1]) * {"": 1, "k": 1_000, "M": 1_000_000}[found[2]]
    return _documents(left, Random(f"{NAME}/{found[3] or 0}"))


def _documents(left: int, draw: Random) -> Iterator[str]:
    yield alphabet()
    while left > 0:
        text = document(draw, draw.randint(SHORTEST, LONGEST))
        left -= len(text)
        yield text


def document(draw: Random, length: int) -> str:
    """A document of `length` characters or a few more."""
    parts, size = [], 0
    for item in items(draw):
        parts.append(item)
        size += len(item)
        if size >= length:
            break
    return "".join(parts)


def items(draw: Random, without: str = "") -> Iterator[str]:
    """Words and keys of one document that never ends, and in which the key `without` does not occur."""
    keys = [key for key in KEYS if key != without]
    circle = draw.sample(keys, round(_between(draw, SMALLEST, len(keys))))
    sooner = list(accumulate(_between(draw, 1, RAREST) for _ in circle))
    share = draw.uniform(*CROWDED) if draw.random() < 0.8 else _between(draw, *SPARSE)
    said: dict[str, str] = {}
    while True:
        if draw.random() >= share:
            yield f"{draw.choice(WORDS)} "
            continue
        (key,) = draw.choices(circle, cum_weights=sooner)
        if key in said:
            yield key + said[key]
        else:
            said[key] = syllable(key, draw.randrange(VALUES))
            yield said[key]


def _between(draw: Random, low: float, high: float) -> float:
    """Evenly on a logarithmic scale."""
    return math.exp(draw.uniform(math.log(low), math.log(high)))
