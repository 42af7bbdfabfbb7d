"""Tokens as clients see them: text and bytes of a single id, for log-probabilities."""

from __future__ import annotations

from functools import lru_cache

from fathom.data import Tokenizer
from fathom.inference.choice import Logprob


def _printable() -> dict[str, int]:
    """The byte behind each character of a byte-level vocabulary: printable ones stand for themselves, the others are
    numbered from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(plain)]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_OF = _printable()


class Spelling:
    """Text and bytes of ids, remembered."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.of = lru_cache(maxsize=65_536)(self._spell)

    def _spell(self, token: int) -> tuple[str, list[int]]:
        """Text of an id, U+FFFD for a part of a character, and its bytes."""
        text = self._tokenizer.decode([token])
        spelled = self._tokenizer.spelling(token) or ""
        if "\ufffd" in text and all(character in _BYTE_OF for character in spelled):
            return text, [_BYTE_OF[character] for character in spelled]
        return text, list(text.encode())

    def text(self, token: int) -> str:
        """Text of an id."""
        return self.of(token)[0]

    def chat_logprob(self, logprob: Logprob) -> dict[str, object]:
        """One token's entry in `choices[].logprobs.content`."""
        top = [self._entry(token, value) for token, value in logprob.top]
        return {**self._entry(logprob.token, logprob.logprob), "top_logprobs": top}

    def _entry(self, token: int, value: float) -> dict[str, object]:
        text, data = self.of(token)
        return {"token": text, "logprob": max(value, LEAST), "bytes": data}


LEAST = -9999.0
"""What stands for the logarithm of nothing, which JSON cannot write."""
