"""Reads an answer as it comes: what is reasoning, what is content, what calls a tool.

    START --<think>--> REASONING --</think>--> CONTENT --calls_begin--> BETWEEN <--call_end-- ARGUMENTS
      '----anything else----------------------->'                         |                      ^
                                                                     call_begin            name and fence
                                                                          '--> TYPE --sep--> NAME -'

The tags of reasoning are text, and may come in several tokens. The marks of a call count only as the control tokens
they are: text that spells them, because somebody asked the model to repeat it, stays text. For that the reader follows
the tokens too, and knows at which character of the text each control token stands.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Literal

from fathom.data import Tokenizer
from fathom.data.chat import (
    ARGUMENTS_OPEN,
    CALL_BEGIN,
    CALL_END,
    CALLS_BEGIN,
    CALLS_END,
    END_THINK,
    THINK,
    TOOL_SEP,
)
from fathom.errors import DataError

Kind = Literal["reasoning", "content", "call", "arguments"]


@dataclass(frozen=True)
class Piece:
    """A part of an answer; "call" begins a call, its text is the function's name."""

    kind: Kind
    text: str


class State(Enum):
    """What is being read."""

    START = auto()
    REASONING = auto()
    AFTER_REASONING = auto()
    CONTENT = auto()
    BETWEEN = auto()
    TYPE = auto()
    NAME = auto()
    FENCE = auto()
    ARGUMENTS = auto()


class Marks:
    """Where control tokens stand in a text, and where each token ends."""

    def __init__(self, tokenizer: Tokenizer, marks: Sequence[str]) -> None:
        self._text = tokenizer.stream()
        self._spelled = {tokenizer.control_id(mark): mark for mark in marks}
        self._length = 0
        self.places: deque[tuple[int, str]] = deque()
        self.ends: list[int] = []
        """For each token, the length of the text with it."""

    def push(self, token: int) -> None:
        """The next token."""
        self._length += len(self._text.push(token))
        self.ends.append(self._length)
        if mark := self._spelled.get(token):
            self.places.append((self._length - len(mark), mark))


class Reader:
    """One answer. `push` what comes, `end` when it is over; pieces together are all that was said."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        thinking: bool = False,
        tools: bool = False,
        begun: str | None = None,
    ) -> None:
        """`thinking`: the prompt ends with an open <think>. `tools`: whether calls are looked for. `begun`: the prompt
        ends with a begun call, with the function of this name, or of one that comes next if it is empty."""
        marks = (CALLS_BEGIN, CALLS_END, CALL_BEGIN, CALL_END, TOOL_SEP) if tools else ()
        self._marks = Marks(tokenizer, marks)
        self._buffer, self._at = "", 0
        self._pieces: list[Piece] = []
        self._reasoning_end: int | None = None
        self.state = State.REASONING if thinking else State.START
        if begun is not None:
            self.state = State.ARGUMENTS if begun else State.NAME
        if begun:
            self._pieces.append(Piece("call", begun))

    @property
    def reasoning_tokens(self) -> int:
        """Tokens up to the one that ended the reasoning; all if none has."""
        if self._reasoning_end is not None:
            return sum(end <= self._reasoning_end for end in self._marks.ends)
        return len(self._marks.ends) if self.state is State.REASONING else 0

    def push(self, token_ids: Sequence[int], text: str) -> list[Piece]:
        """What the tokens, and the text that they made certain, come to."""
        for token in token_ids:
            self._marks.push(token)
        self._buffer += text
        return self._read(last=False)

    def end(self) -> list[Piece]:
        """What was held back, because it could have become a tag."""
        return self._read(last=True)

    def _read(self, last: bool) -> list[Piece]:
        while self._step(last):
            pass
        pieces, self._pieces = self._pieces, []
        return pieces

    def _step(self, last: bool) -> bool:
        """Read what is certain up to the next change of state; whether there was one."""
        place, mark = self._next_mark()
        stretch = self._buffer[: place - self._at]
        state = _STEPS[self.state](self, stretch, last or len(stretch) < len(self._buffer))
        if state is not None:
            self.state = state
            return True
        if not mark or not self._buffer.startswith(mark):
            return False
        self._take(len(mark))
        self._marks.places.popleft()
        self._pass(mark)
        return True

    def _next_mark(self) -> tuple[int, str]:
        """The next control token and its place; the buffer's end and nothing if there is none in it."""
        end = self._at + len(self._buffer)
        if self._marks.places and self._marks.places[0][0] < end:
            return self._marks.places[0]
        return end, ""

    def _pass(self, mark: str) -> None:
        """What a control token changes; where it makes no sense, nothing."""
        if mark == CALLS_BEGIN and self.state is State.REASONING:
            self._reasoning_end = self._at
        if mark == CALLS_BEGIN:
            self.state = State.BETWEEN
        elif mark == CALL_BEGIN:
            self.state = State.TYPE
        elif mark == TOOL_SEP and self.state is State.TYPE:
            self.state = State.NAME
        elif mark == CALL_END:
            self.state = State.BETWEEN
        elif mark == CALLS_END:
            self.state = State.CONTENT

    def _take(self, count: int) -> str:
        taken, self._buffer = self._buffer[:count], self._buffer[count:]
        self._at += count
        return taken

    def _give(self, kind: Kind, count: int) -> None:
        if text := self._take(count):
            self._pieces.append(Piece(kind, text))

    # --- one for each state: the next state, or None to wait for more; `closed`: nothing more belongs to it ---

    def _start(self, stretch: str, closed: bool) -> State | None:
        begun = stretch.lstrip()
        if begun.startswith(THINK):
            self._take(len(stretch) - len(begun) + len(THINK))
            return State.REASONING
        return None if THINK.startswith(begun) and not closed else State.CONTENT

    def _reasoning(self, stretch: str, closed: bool) -> State | None:
        place = stretch.find(END_THINK)
        if place < 0:
            self._give("reasoning", len(stretch) - (0 if closed else overlap(stretch, END_THINK)))
            return None
        self._give("reasoning", place)
        self._take(len(END_THINK))
        self._reasoning_end = self._at
        return State.AFTER_REASONING

    def _after_reasoning(self, stretch: str, closed: bool) -> State | None:
        """Line ends between reasoning and content belong to neither."""
        self._take(len(stretch) - len(stretch.lstrip("\n")))
        return State.CONTENT if stretch.strip("\n") else None

    def _content(self, stretch: str, closed: bool) -> State | None:
        self._give("content", len(stretch))
        return None

    def _skip(self, stretch: str, closed: bool) -> State | None:
        self._take(len(stretch))
        return None

    def _name(self, stretch: str, closed: bool) -> State | None:
        line_end = stretch.find("\n")
        if line_end < 0 and not closed:
            return None
        name = self._take(line_end if line_end >= 0 else len(stretch)).strip()
        self._pieces.append(Piece("call", name))
        return State.FENCE

    def _fence(self, stretch: str, closed: bool) -> State | None:
        if stretch.startswith(ARGUMENTS_OPEN):
            self._take(len(ARGUMENTS_OPEN))
        elif ARGUMENTS_OPEN.startswith(stretch) and not closed:
            return None
        return State.ARGUMENTS

    def _arguments(self, stretch: str, closed: bool) -> State | None:
        """All but the closing fence, which is known as such only when nothing comes behind it."""
        held = _FENCE_CLOSES.search(stretch) if closed else _FENCE_MAY_CLOSE.search(stretch)
        self._give("arguments", held.start() if held else len(stretch))
        if closed:
            self._take(len(held[0]) if held else 0)
        return None


_FENCE_CLOSES = re.compile(r"\s*```\s*\Z|\s+\Z")
_FENCE_MAY_CLOSE = re.compile(r"\s*`{1,3}\s*\Z|\s+\Z")
_STEPS = {
    State.START: Reader._start,
    State.REASONING: Reader._reasoning,
    State.AFTER_REASONING: Reader._after_reasoning,
    State.CONTENT: Reader._content,
    State.BETWEEN: Reader._skip,
    State.TYPE: Reader._skip,
    State.NAME: Reader._name,
    State.FENCE: Reader._fence,
    State.ARGUMENTS: Reader._arguments,
}


def overlap(text: str, tag: str) -> int:
    """Length of the longest end of `text` that begins `tag`."""
    longest = min(len(text), len(tag) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(tag[:n])), 0)


def can_call(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer has the control tokens of calls."""
    try:
        return tokenizer.control_id(CALLS_BEGIN) >= 0
    except DataError:
        return False
