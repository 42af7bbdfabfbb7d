"""Needles and the haystacks they lie in (the test of report §4.3, Figure 8; what it is made of is our choice).

    filler … filler NEEDLE filler … filler QUESTION | answer
    <------ depth ------->
    <--------------- length, answer included --------------->

A `Form` says what filler, needle and question are; where they go is the same for all of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from random import Random
from typing import Any, Protocol

from fathom.data import needles
from fathom.data.tokenizer import Tokenizer
from fathom.errors import DataError, FathomError

_AT_ONCE = 4096
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Puzzle:
    """What is hidden and asked, in ids of one tokenizer."""

    filler: Iterator[Sequence[int]]
    """Pieces without end, between which a needle may be put."""
    needle: Sequence[int]
    question: Sequence[int]
    answer: str
    answer_tokens: int
    """Tokens to be generated, enough to tell whether the answer is right."""


class Form(Protocol):
    """One kind of puzzle; `draw` is all the chance there is in it."""

    tokenizer: Tokenizer

    def puzzle(self, draw: Random) -> Puzzle: ...


@dataclass(frozen=True)
class Haystack:
    """A prompt with a needle in it."""

    ids: list[int]
    needle_at: int
    """Where the needle begins; at most one piece of filler before the place that was asked for."""
    answer: str
    answer_tokens: int

    def is_answer(self, text: str) -> bool:
        """Whether generated text says the answer: its first word is the answer, no more and no less."""
        word = _WORD.search(text)
        return word is not None and word[0] == self.answer


def build(puzzle: Puzzle, length: int, depth: float) -> Haystack:
    """`length` tokens, those of the answer included, with the needle behind the share `depth` of the filler.

    Depth 0 is the very beginning, 1 right before the question. Raises `FathomError` where there is no room for filler.
    """
    room = length - len(puzzle.needle) - len(puzzle.question) - puzzle.answer_tokens
    if room < 1:
        raise FathomError(
            f"a length of {length} has no room for filler beside {length - room} tokens of needle, question and "
            f"answer; ask for at least {length - room + 1}"
        )
    filler, borders = _filler(puzzle.filler, room)
    at = max(border for border in borders if border <= round(depth * room))
    ids = [*filler[:at], *puzzle.needle, *filler[at:], *puzzle.question]
    return Haystack(ids, at, puzzle.answer, puzzle.answer_tokens)


def _filler(pieces: Iterator[Sequence[int]], room: int) -> tuple[list[int], list[int]]:
    """The last `room` tokens of enough pieces, as a window cut from a text has them, and where its pieces meet."""
    taken: list[Sequence[int]] = []
    size = 0
    while size < room:
        taken.append(next(pieces))
        size += len(taken[-1])
    ids = [token for piece in taken for token in piece]
    ends = [end - (size - room) for end in accumulate(map(len, taken))]
    return ids[size - room :], [0, *(end for end in ends if end > 0)]


class Text(Protocol):
    """Token ids one after the other: a list, an array, the tokens of prepared data."""

    def __len__(self) -> int: ...

    def __getitem__(self, key: slice, /) -> Any: ...


class Pairs:
    """Keys and values as the source "needles" has them: the haystack is one of its documents, with other keys in it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raises `DataError` when the tokenizer lacks one of the characters."""
        self.tokenizer = tokenizer
        tokenizer.encode(needles.alphabet())

    def puzzle(self, draw: Random) -> Puzzle:
        key = draw.choice(needles.KEYS)
        answer = needles.syllable(key, draw.randrange(needles.VALUES))
        encode = self.tokenizer.encode
        filler = (encode(item) for item in needles.items(draw, without=key))
        return Puzzle(filler, encode(answer), encode(key), answer, len(encode(answer)))


class PassKey:
    """A number to remember, in a text that has nothing to do with it."""

    STATEMENT = "\nThe pass key is {}. Remember it: {} is the pass key.\n"
    QUESTION = "\nWhat is the pass key? The pass key is"

    def __init__(self, tokenizer: Tokenizer, text: Text) -> None:
        """`text`: ids of the filler, a ring that is read from a place drawn anew each time.

        Raises `DataError` when there is none.
        """
        if not len(text):
            raise DataError("the filler text is empty; give one with at least a few words")
        self.tokenizer, self.text = tokenizer, text
        self._begins: dict[int, bool] = {}

    def puzzle(self, draw: Random) -> Puzzle:
        number = str(draw.randrange(10_000, 100_000))
        encode = self.tokenizer.encode
        return Puzzle(
            self._words(draw.randrange(len(self.text))),
            encode(self.STATEMENT.format(number, number)),
            encode(self.QUESTION),
            number,
            len(encode(f" {number}.")),
        )

    def _words(self, place: int) -> Iterator[list[int]]:
        """The filler from a place on, cut before every token that begins with white space."""
        word: list[int] = []
        for token in self._ring(place):
            if word and self._begins_word(token):
                yield word
                word = []
            word.append(token)

    def _ring(self, place: int) -> Iterator[int]:
        while True:
            yield from map(int, self.text[place : place + _AT_ONCE])
            place += _AT_ONCE
            if place >= len(self.text):
                place = 0

    def _begins_word(self, token: int) -> bool:
        if token not in self._begins:
            self._begins[token] = self.tokenizer.decode([token])[:1].isspace()
        return self._begins[token]
