"""Text in which things must be looked up: the source "needles:10M", made and not read (ours, no part of the report).

A document has a circle of keys, two of them or hundreds. It is words of filler and, among them, keys of the circle:
where one comes up for the first time a statement `=名Q` gives it a value, and everywhere after that a question `?名Q`
asks for it. To know Q, a reader of `?名` has to find a place where 名 was named before. Circles are drawn evenly on a
logarithmic scale, and so is about how far back that place lies: small ones teach the trick within any window, large
ones need all the context there is. Values stand in filler too, in front of words; keys do not, but there are others of
the circle to mistake one for.

A character tokenizer makes every key, value and letter one token. The name says how much text: "needles:10M" is ten
million characters, "needles:10M:3" the same amount of another text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from random import Random

from fathom.errors import DataError

NAME = "needles"
STATE, ASK = "=", "?"
KEYS = tuple(chr(0x4E00 + number) for number in range(256))
"""Han characters, the first of them in Unicode."""
VALUES = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
WORDS = tuple(
    """
    the of and to in it is on by as at so we he or an up if no do ash bay cat dew elm fog gum hay ivy jay kit log
    mud nut oak pea ram sea tin urn van wax yew zoo
    """.split()  # noqa: SIM905 (a list would take forty lines)
)
ABOUT_KEYS, INITIAL = 0.75, 0.10
"""Of all items, the share of statements and questions; of the words, the share with a value in front."""
SMALLEST = 2
"""Keys in the smallest circle; the largest has all."""
SHORTEST, LONGEST = 4096, 8192
"""Characters in a document, drawn evenly between the two."""
_NAMED = re.compile(rf"{NAME}:(\d+)([kM]?)(?::(\d+))?")


def is_needles(source: str) -> bool:
    """Whether a source's name asks for this text."""
    return source.split(":")[0] == NAME and ":" in source


def documents(source: str) -> Iterator[str]:
    """Documents of "needles:SIZE" or "needles:SIZE:SEED", the same for the same name.

    SIZE is a number of characters, k and M after it mean thousands and millions; the last document may go beyond it.
    Raises `DataError` for any other name.
    """
    found = _NAMED.fullmatch(source)
    if found is None:
        raise DataError(f"source {source!r} must look like {NAME}:10M or {NAME}:10M:3; correct it")
    left = int(found[1]) * {"": 1, "k": 1_000, "M": 1_000_000}[found[2]]
    return _documents(left, Random(f"{NAME}/{found[3] or 0}"))


def _documents(left: int, draw: Random) -> Iterator[str]:
    while left > 0:
        text = document(draw, draw.randint(SHORTEST, LONGEST))
        left -= len(text)
        yield text


def document(draw: Random, length: int, without: str = "") -> str:
    """A document of `length` characters or a few more, in which the key `without` does not occur."""
    parts, size = [], 0
    for item in items(draw, without):
        parts.append(item)
        size += len(item)
        if size >= length:
            break
    return "".join(parts)


def items(draw: Random, without: str = "") -> Iterator[str]:
    """The words, statements and questions of one document that never ends."""
    circle = _circle(draw, [key for key in KEYS if key != without])
    values: dict[str, str] = {}
    while True:
        if draw.random() >= ABOUT_KEYS:
            yield _word(draw)
            continue
        key = draw.choice(circle)
        sign = ASK if key in values else STATE
        yield f"{sign}{key}{values.setdefault(key, draw.choice(VALUES))} "


def _circle(draw: Random, keys: list[str]) -> list[str]:
    size = round(math.exp(draw.uniform(math.log(SMALLEST), math.log(len(keys)))))
    return draw.sample(keys, size)


def _word(draw: Random) -> str:
    initial = draw.choice(VALUES) if draw.random() < INITIAL else ""
    return f"{initial}{draw.choice(WORDS)} "
