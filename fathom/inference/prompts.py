"""What may be asked: a text, token ids, or a conversation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fathom.data import Tokenizer
from fathom.data.chat import chat_ids
from fathom.errors import GenerationError

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]


def ids_of(prompt: Prompt, tokenizer: Tokenizer | None, vocabulary: int) -> list[int]:
    """Token ids of a prompt. Raises `GenerationError` when there are none or the model does not know them."""
    ids = _ids(prompt, tokenizer)
    if not ids:
        raise GenerationError("the prompt is empty; give at least one token to continue")
    wrong = next((token for token in ids if not 0 <= token < vocabulary), None)
    if wrong is not None:
        raise GenerationError(
            f"token id {wrong} is outside the model's vocabulary of {vocabulary}; "
            f"use the tokenizer that the model was trained with"
        )
    return ids


def check_length(prompt: int, new: int | None, context: int) -> None:
    """Whether `prompt` tokens and `new` ones (None: at least one) fit the context; `GenerationError` if not."""
    if new is not None and new < 1:
        raise GenerationError(f"max_new_tokens={new} must be at least 1")
    if prompt >= context:
        raise GenerationError(
            f"a prompt of {prompt} tokens fills the model's context of {context}; shorten it"
        )
    if new is not None and prompt + new > context:
        raise GenerationError(
            f"{prompt} tokens and max_new_tokens={new} exceed the model's context of {context}; "
            f"ask for at most {context - prompt} new tokens or shorten the prompt"
        )


def _ids(prompt: Prompt, tokenizer: Tokenizer | None) -> list[int]:
    listed = getattr(prompt, "tolist", None)  # of torch and numpy
    if listed is not None:
        prompt = listed()
    if not isinstance(prompt, str | list | tuple):
        raise _no_prompt(prompt)
    if not isinstance(prompt, str) and all(_is_id(part) for part in prompt):
        return list(prompt)  # type: ignore[arg-type]
    messages = [dict(part) for part in prompt if isinstance(part, Mapping)]
    if not isinstance(prompt, str) and len(messages) < len(prompt):
        raise _no_prompt(prompt)
    if tokenizer is None:
        raise GenerationError("there is no tokenizer; give prompts as lists of token ids")
    return (
        tokenizer.prompt_ids(prompt) if isinstance(prompt, str) else chat_ids(tokenizer, messages)
    )


def _no_prompt(prompt: object) -> GenerationError:
    inner = f" with {type(prompt[0]).__name__}" if isinstance(prompt, list | tuple) else ""
    return GenerationError(
        f"a prompt of {type(prompt).__name__}{inner} is none; give a text, a list of token ids, or a list of messages"
    )


def _is_id(part: object) -> bool:
    return isinstance(part, int) and not isinstance(part, bool)
