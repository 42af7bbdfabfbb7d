"""Answers kept in a form (see `Guide`), and how far each has got.

Before a token is chosen, those that would leave the form get probability 0, the others keep their
proportions. Which ones they are, the library llguidance says (an Earley parser over bytes, run down
the vocabulary as a tree): some tens of microseconds a token, nothing for requests without a guide.
Where the form leaves one continuation, it allows the tokens that the tokenizer would give for it.

    Grammars   one tokenizer as llguidance wants it; one for an engine
    Guided     how far one answer has got

A form may begin behind a text, `after`: a reasoning model thinks freely up to its "</think>". The
text is looked for in what the prompt ends with and the answer goes on with. If the answer never
says it, nothing is masked. Tokens that would say its end and something behind it at once are
masked, so that all of what comes behind it is in the form; each can be said in two tokens.

Drafts are proposed under the same masks: the state behind j drafts is found by reading them and
rolling back. An answer ends when its form is complete and nothing could follow; while it could end
or go on, the tokens that end an answer are allowed too.

Shapes: V vocabulary of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fathom.data import Tokenizer
from fathom.errors import GenerationError
from fathom.inference.guide import Guide

_BLANKS = r"[ \n\r\t]{1,40}"
"""Blanks between the parts of a JSON text: enough for an indented one, too few to go on for ever."""


class Grammars:
    """One tokenizer in llguidance's form, for all guides of an engine."""

    def __init__(self, tokenizer: Tokenizer | None, vocabulary: int) -> None:
        """`vocabulary`: rows of the model's logits. Raises `GenerationError` where guides cannot be had."""
        if tokenizer is None:
            raise GenerationError("a guide needs a tokenizer; give the engine the model's")
        self._library = _llguidance()
        reader = _Reader(self._library, tokenizer)
        self.tokens = self._library.LLTokenizer(self._library.TokenizerWrapper(reader))
        self.spelled, self.end = reader.tokens, tokenizer.eos_id
        self.vocabulary, self.rows = vocabulary, min(vocabulary, len(self.spelled))
        self.crossing = lru_cache(maxsize=8)(self._crossing)

    def begin(
        self, guide: Guide, prompt_ids: Sequence[int], ends: frozenset[int], count: int = 1
    ) -> list[Guided]:
        """The states of so many answers that are to begin; `GenerationError` names what is wrong with the form."""
        matcher = self._library.LLMatcher(self.tokens, self._grammar(guide), log_level=0)
        if matcher.is_error():
            raise GenerationError(
                f"the guide's {guide.kind} cannot be used, correct it: {_short(matcher)}"
            )
        seen = None if guide.after is None else self._end_of_prompt(guide.after, prompt_ids)
        others = [matcher.deep_copy() for _ in range(count - 1)]
        return [Guided(self, guide, each, ends, seen) for each in (matcher, *others)]

    def _grammar(self, guide: Guide) -> str:
        make = self._library.LLMatcher
        if guide.kind == "regex":
            return make.grammar_from_regex(guide.value)
        if guide.kind == "lark":
            return make.grammar_from_lark(guide.value)
        schema: Any = guide.value if guide.kind == "json_schema" else {"type": "object"}
        settings = schema.get("x-guidance") or {}
        blanks = {} if "whitespace_flexible" in settings else {"whitespace_pattern": _BLANKS}
        try:
            return make.grammar_from_json_schema(dict(schema), defaults=blanks)
        except (TypeError, ValueError) as problem:
            raise GenerationError(
                f"the guide's {guide.kind} cannot be used, correct it: {problem}"
            ) from problem

    def _end_of_prompt(self, after: str, prompt_ids: Sequence[int]) -> bytes | None:
        """What of `after` the prompt ends with, None if all of it."""
        mark, text = after.encode(), self.bytes_of(prompt_ids)
        if text.endswith(mark) or text.rstrip().endswith(mark):
            return None
        return _begun(text, mark)

    def bytes_of(self, ids: Sequence[int]) -> bytes:
        """What tokens spell, control tokens too; nothing for rows that the tokenizer does not have."""
        return b"".join(self.spelled[token] for token in ids if token < len(self.spelled))

    def _crossing(self, after: str) -> list[Tensor | None]:
        """bool [V] for each number of bytes of `after` that were said: what may follow without crossing its end."""
        mark = after.encode()
        spelled = enumerate(self.spelled[: self.rows])
        longer = [(token, text) for token, text in spelled if mark[-1:] in text[:-1]]
        return [
            self._all_but([token for token, text in longer if _crosses(mark[:n] + text, mark)])
            for n in range(len(mark))
        ]

    def _all_but(self, tokens: list[int]) -> Tensor | None:
        if not tokens:
            return None
        allowed_V = torch.ones(self.vocabulary, dtype=torch.bool)
        allowed_V[tokens] = False
        return allowed_V


class Guided:
    """How far one answer has got in its form."""

    def __init__(
        self,
        grammars: Grammars,
        guide: Guide,
        matcher: Any,
        ends: frozenset[int],
        seen: bytes | None,
    ) -> None:
        """`seen`: how much of `guide.after` stands at the text's end; None: the form has begun."""
        self.grammars, self.guide, self.matcher, self.seen = grammars, guide, matcher, seen
        self.ends = [token for token in sorted(ends) if 0 <= token < grammars.rows]
        self.complete = False
        """Whether the answer is in the form and nothing could follow."""
        self.failure: str | None = None
        """Why the form cannot be kept."""
        self._known: dict[tuple[int, ...], Tensor | None] = {}
        self._look()
        if self.failure or self.complete:
            raise GenerationError(
                f"the guide's {guide.kind} permits no answer: {self.failure or 'only the empty text'}"
            )

    def allowed(self, drafts: Sequence[int] = ()) -> Tensor | None:
        """bool [V] of the tokens that may follow the answer and these drafts; None where any may.

        Any may behind drafts that end the answer or leave the form: what is chosen there is never said.
        """
        path = tuple(drafts)
        if path not in self._known:
            self._known[path] = self._behind(path)
        return self._known[path]

    def advance(self, token: int) -> None:
        """The answer has said this token, which did not end it; sets `complete` or `failure`."""
        self._known = {
            path[1:]: mask for path, mask in self._known.items() if path and path[0] == token
        }
        if self.seen is not None:
            self.seen = self._watch(self.seen, token)
        elif not self.matcher.consume_token(token):
            self.failure = f"token {token} does not continue it ({_short(self.matcher)})"
        if self.failure is None:
            self._look()

    def _look(self) -> None:
        """Whether the answer can go on from here."""
        mask = self.allowed()
        if self.matcher.is_error():
            self.failure = _short(self.matcher)
        elif self.seen is None and self.matcher.is_stopped():
            self.complete = True
        elif mask is not None and not bool(mask.any()):
            self.complete = bool(self.matcher.is_accepting())
            self.failure = None if self.complete else "no token of the tokenizer continues it"

    def _behind(self, path: tuple[int, ...]) -> Tensor | None:
        if not set(path).isdisjoint(self.ends):
            return None
        seen = self.seen
        while seen is not None:
            if not path:
                return self.grammars.crossing(str(self.guide.after))[len(seen)]
            seen, path = self._watch(seen, path[0]), path[1:]
        read = self.matcher.try_consume_tokens(list(path))
        mask = self._mask() if read == len(path) and not self.matcher.is_stopped() else None
        if read:
            self.matcher.rollback(read)
        return mask

    def _mask(self) -> Tensor:
        """bool [V] of what the form lets follow where the matcher stands."""
        grammars = self.grammars
        bits = np.frombuffer(self.matcher.compute_bitmask(), np.uint8)
        allowed_V = torch.zeros(grammars.vocabulary, dtype=torch.bool)
        unpacked = np.unpackbits(bits, bitorder="little")[: grammars.rows]
        allowed_V[: grammars.rows] = torch.from_numpy(unpacked.view(np.bool_))
        if self.matcher.is_accepting():  # then the library allows the end, which ignore_eos forbids
            allowed_V[grammars.end : grammars.end + 1] = False
            allowed_V[self.ends] = True
        return allowed_V

    def _watch(self, seen: bytes, token: int) -> bytes | None:
        """What of `after` the text ends with behind one more token; None when all of it was said."""
        mark = str(self.guide.after).encode()
        text = seen + self.grammars.bytes_of([token])
        return None if mark in text else _begun(text, mark)


class _Reader:
    """A tokenizer as llguidance asks for it: what each token spells, and text into ids.

    The library can read tokenizer.json by itself, but takes text that spells a control token for that token.
    """

    def __init__(self, library: Any, tokenizer: Tokenizer) -> None:
        try:
            read = library.LLTokenizer(tokenizer.definition.strip())
        except ValueError as problem:
            raise GenerationError(
                f"guides need a byte-level tokenizer, and this one is none that llguidance reads ({problem})"
            ) from problem
        tokens = range(read.vocab_size)
        self.tokens = [bytes(read.decode_bytes([token])) for token in tokens]
        self.special_token_ids = [token for token in tokens if read.is_special_token(token)]
        self.eos_token_id, self.bos_token_id = tokenizer.eos_id, None
        self._encode = tokenizer.encode

    def __call__(self, text: str) -> list[int]:
        return self._encode(text)


def _begun(text: bytes, mark: bytes) -> bytes:
    """The longest end of `text` that `mark` begins with and goes on behind."""
    longest = min(len(text), len(mark) - 1)
    lengths = (n for n in range(longest, 0, -1) if text.endswith(mark[:n]))
    return mark[: next(lengths, 0)]


def _crosses(text: bytes, mark: bytes) -> bool:
    """Whether `mark` is in `text` with something behind it."""
    return 0 <= text.find(mark) < len(text) - len(mark)


def _short(matcher: Any) -> str:
    """What the library complains of, without its dump of the grammar."""
    return str(matcher.get_error()).split("\n<state>")[0].strip()


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError as missing:
        raise GenerationError(
            "a guide needs llguidance, which is not installed; run: pip install 'fathom[guide]'"
        ) from missing
    return llguidance
