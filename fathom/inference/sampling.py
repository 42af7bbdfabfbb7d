"""What a request may ask of the choice of its tokens, and of where it ends; checked when it is made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fathom.errors import GenerationError
from fathom.inference.guide import Guide

MOST_LOGPROBS = 20
"""As many alternatives as OpenAI's interface knows."""


@dataclass(frozen=True)
class Sampling:
    """The wishes of one request. Raises `GenerationError` for values outside their range."""

    temperature: float = 1.0
    """What logits are divided by; 0 takes the most likely token always."""
    top_p: float = 1.0
    """Only the most likely tokens that together have this probability can be drawn; 1 means all."""
    top_k: int = 0
    """Only so many of the most likely tokens can be drawn; 0 means all."""
    min_p: float = 0.0
    """Only tokens at least this likely, relative to the most likely one, can be drawn."""
    repetition_penalty: float = 1.0
    """Logits of tokens in prompt or answer are divided by this if positive, multiplied if negative."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens that are in the answer."""
    frequency_penalty: float = 0.0
    """Subtracted from the logits of tokens for each time they are in the answer."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of token ids."""
    seed: int | None = None
    """The same seed gives the same answer, whatever else is computed beside it; None draws one."""
    max_new_tokens: int | None = 256
    """Longest answer; None goes on to the end of the model's context."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer; they are not part of its text."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the answer besides the model's own end; they are not part of its text."""
    ignore_eos: bool = False
    """Go on behind the model's own end-of-sentence."""
    n: int = 1
    """Answers to the same prompt; the k-th (from 0) uses seed + k."""
    logprobs: int | None = None
    """Log-probability of each new token, with so many of the most likely alternatives."""
    prompt_logprobs: int | None = None
    """The same of each prompt token but the first."""
    guide: Guide | None = None
    """The form that the answer must have."""

    def __post_init__(self) -> None:
        self._check_range("temperature", 0, math.inf, "0 is greedy")
        self._check_range("top_p", 0, 1, "1 draws from all tokens", low_open=True)
        self._check_range("min_p", 0, 1, "0 draws from all tokens")
        self._check_range("repetition_penalty", 0, math.inf, "1 is none", low_open=True)
        self._check_range("presence_penalty", -math.inf, math.inf, "0 is none")
        self._check_range("frequency_penalty", -math.inf, math.inf, "0 is none")
        self._check_whole("top_k", 0, "0 draws from all tokens")
        self._check_whole("n", 1, "1 gives a single answer")
        for name in ("max_new_tokens", "seed", "logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                least = {"max_new_tokens": 1, "seed": None}.get(name, 0)
                self._check_whole(name, least, "None leaves it open")
        for name in ("logprobs", "prompt_logprobs"):
            if (getattr(self, name) or 0) > MOST_LOGPROBS:
                raise _refused(name, getattr(self, name), f"be at most {MOST_LOGPROBS}")
        if self.guide is not None and not isinstance(self.guide, Guide):
            raise _refused("guide", self.guide, "be a Guide, for example Guide('json_object')")
        self._check_lists()

    def _check_range(
        self, name: str, low: float, high: float, hint: str, low_open: bool = False
    ) -> None:
        value = getattr(self, name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or not low <= value <= high:
            raise _refused(name, value, f"be a number in [{low}, {high}]; {hint}")
        if low_open and value == low:
            raise _refused(name, value, f"be greater than {low}; {hint}")

    def _check_whole(self, name: str, least: int | None, hint: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool):
            raise _refused(name, value, f"be a whole number; {hint}")
        if least is not None and value < least:
            raise _refused(name, value, f"be at least {least}; {hint}")

    def _check_lists(self) -> None:
        object.__setattr__(self, "stop", _tuple_of(self.stop, str, "stop"))
        object.__setattr__(
            self, "stop_token_ids", _tuple_of(self.stop_token_ids, int, "stop_token_ids")
        )
        if "" in self.stop:
            raise _refused("stop", self.stop, "not hold an empty text, which would end at once")
        for token, bias in self.logit_bias.items():
            known = isinstance(token, int) and not isinstance(token, bool) and token >= 0
            if not known or not isinstance(bias, int | float) or math.isnan(bias):
                raise _refused("logit_bias", {token: bias}, "map token ids to numbers")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def penalised(self) -> bool:
        """Whether logits depend on the tokens so far, or are shifted."""
        plain = self.repetition_penalty == 1 and not self.presence_penalty
        return not (plain and not self.frequency_penalty and not self.logit_bias)


def _tuple_of(values: Any, kind: type, name: str) -> tuple[Any, ...]:
    """A single value or a list of them as a tuple."""
    found = (values,) if isinstance(values, kind) else tuple(values or ())
    if not all(isinstance(value, kind) and not isinstance(value, bool) for value in found):
        raise _refused(name, values, f"hold {'texts' if kind is str else 'token ids'} only")
    return found


def _refused(name: str, value: object, constraint: str) -> GenerationError:
    return GenerationError(f"{name}={value!r} must {constraint}")
