"""From what a client says to what the model reads: prompts, sampling, limits, and how the answer is to be read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fathom.data import Tokenizer
from fathom.data.chat import CALL_END, call_ids, chat_ids
from fathom.errors import DataError
from fathom.inference import Sampling
from fathom.serving.errors import ApiError
from fathom.serving.guides import Format, guide_of, guide_of_call
from fathom.serving.reader import Reader, can_call
from fathom.serving.schemas import Wishes

AUTO, NONE, REQUIRED = "auto", "none", "required"


@dataclass(frozen=True)
class Conversation:
    """What both interfaces for conversations come to."""

    messages: Sequence[Mapping[str, Any]]
    """As `fathom.data.chat` takes them."""
    tools: Sequence[Mapping[str, Any]] = ()
    """Functions: name, description, parameters, strict."""
    choice: str = AUTO
    """auto, none or required; ignored where `function` is named."""
    function: str | None = None
    """The function that must be called."""
    parallel: bool = True
    """Whether one answer may call several."""
    thinking: bool = False
    format: Format = field(default_factory=Format)


@dataclass(frozen=True)
class Prompt:
    """What the model reads, and what follows from it."""

    ids: list[int]
    new_reader: Callable[[], Reader]
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `Sampling` that the conversation sets."""


def prompt_of(conversation: Conversation, tokenizer: Tokenizer) -> Prompt:
    """The prompt of a conversation. Raises `ApiError` for what the model cannot do."""
    talk = conversation
    _check_tools(talk, tokenizer)
    calling = bool(talk.tools) and talk.choice != NONE
    forced = talk.function is not None or talk.choice == REQUIRED
    thinking = talk.thinking and talk.messages[-1]["role"] != "tool"
    try:
        tools = talk.tools if calling else ()
        ids = chat_ids(tokenizer, talk.messages, tools=tools, thinking=thinking)
        begun = (talk.function or "") if forced else None
        if forced:
            ids += call_ids(tokenizer, talk.function)
    except DataError as error:
        raise ApiError(f"messages: {error}", param="messages") from error
    sampling: dict[str, Any] = {}
    if calling and not talk.parallel:
        sampling["stop_token_ids"] = (tokenizer.control_id(CALL_END),)
    guide = guide_of_call(talk.tools, talk.function) if forced else guide_of(talk.format, thinking)
    if guide is not None:
        sampling["guide"] = guide
    return Prompt(ids, lambda: Reader(tokenizer, thinking, calling, begun), sampling)


def _check_tools(talk: Conversation, tokenizer: Tokenizer) -> None:
    forced = talk.function is not None or talk.choice == REQUIRED
    names = [tool["name"] for tool in talk.tools]
    if len(set(names)) < len(names):
        raise ApiError("tools: two functions have the same name", param="tools")
    if talk.tools and not can_call(tokenizer):
        raise ApiError(
            "tools: this model's vocabulary has no tokens for calls; leave tools out", param="tools"
        )
    if forced and not talk.tools:
        raise ApiError("tool_choice needs tools to choose from", param="tool_choice")
    if talk.function is not None and talk.function not in names:
        raise ApiError(f"tool_choice: {talk.function!r} is not among tools", param="tool_choice")
    if forced and talk.thinking:
        raise ApiError(
            "tool_choice: a call cannot be forced while the model thinks; use 'auto' or switch thinking off",
            param="tool_choice",
        )
    if talk.tools and talk.choice != NONE and talk.format.type != "text":
        raise ApiError(
            "response_format: an answer in this form could not call tools; leave tools out, or tool_choice: 'none'",
            param="response_format",
        )


_SHARED = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "ignore_eos",
    "n",
)


def sampling_of(body: Wishes, vocabulary: int, **more: Any) -> Sampling:
    """A body's wishes as the engine's; `more` are further fields of `Sampling`."""
    given = {name: getattr(body, name) for name in _SHARED}
    fields = {name: value for name, value in given.items() if value is not None}
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    ends = (*(body.stop_token_ids or ()), *more.pop("stop_token_ids", ()))
    bias = _bias(body.logit_bias or {}, vocabulary)
    return Sampling(**fields, stop=stop, stop_token_ids=ends, logit_bias=bias, **more)


def _bias(given: Mapping[str, float], vocabulary: int) -> dict[int, float]:
    bias = {}
    for key, value in given.items():
        if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < vocabulary):
            raise ApiError(
                f"logit_bias: {key[:20]!r} is not a token id below {vocabulary}", param="logit_bias"
            )
        bias[int(key)] = value
    return bias


@dataclass(frozen=True)
class Limits:
    """How long prompts and answers may be."""

    context: int
    """Tokens of the model's context, or of the cache if that is smaller."""
    prompt: int | None = None
    """What the server allows of a prompt."""

    def check(self, prompt: Sequence[int], new: int | None, of: str, of_new: str) -> None:
        """Raises `ApiError` when a prompt, or it with `new` tokens, is too long; `of` and `of_new` are their fields."""
        have = len(prompt)
        most = self.context - 1 if self.prompt is None else min(self.prompt, self.context - 1)
        if have > most:
            raise ApiError(
                f"{of}: {have} tokens, of which this server takes {most} at most; shorten it",
                param=of,
                code="context_length_exceeded",
            )
        if new is not None and have + new > self.context:
            raise ApiError(
                f"{of_new}: {new} tokens behind a prompt of {have} exceed the context of {self.context}; "
                f"ask for at most {self.context - have}",
                param=of_new,
                code="context_length_exceeded",
            )
