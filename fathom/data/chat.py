"""The released chat form (report §5.1): bos, system text, then User message Assistant reply eos.

Two spellings of the same form: a Jinja template for other tools, and `chat_ids` for us. Only `chat_ids` is safe
against text that spells a control token: it sets the control tokens by id and encodes all content as plain text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fathom.errors import DataError

if TYPE_CHECKING:
    from fathom.data.tokenizer import Tokenizer

USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{{ messages | selectattr('role', 'equalto', 'system') | map(attribute='content') | join('\\n\\n') }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}"
    "{{ '" + USER + "' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '" + ASSISTANT + "' + message['content'].split('</think>')[-1] + eos_token }}"
    "{% elif message['role'] != 'system' %}"
    "{{ raise_exception('only the roles system, user and assistant are known') }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '" + ASSISTANT + "' }}{% endif %}"
)


def chat_ids(
    tokenizer: Tokenizer, messages: Sequence[dict[str, str]], add_generation_prompt: bool = True
) -> list[int]:
    """Token ids of a conversation of {"role": system | user | assistant, "content": text}.

    System texts go first, joined by an empty line; of an assistant's text what stands before `</think>` is dropped.
    `add_generation_prompt` ends with the token that asks for a reply. Raises `DataError` for other roles and for a
    tokenizer without the role tokens.
    """
    system = [m["content"] for m in messages if m["role"] == "system"]
    ids = [tokenizer.bos_id, *tokenizer.encode("\n\n".join(system))]
    for message in messages:
        ids += _turn_ids(tokenizer, message["role"], message["content"])
    return [*ids, tokenizer.control_id(ASSISTANT)] if add_generation_prompt else ids


def message_ids(tokenizer: Tokenizer, message: str) -> list[int]:
    """A user's message and the request for a reply: what a running conversation grows by at each turn."""
    return [*_turn_ids(tokenizer, "user", message), tokenizer.control_id(ASSISTANT)]


def _turn_ids(tokenizer: Tokenizer, role: str, content: str) -> list[int]:
    if role == "system":
        return []
    if role == "user":
        return [tokenizer.control_id(USER), *tokenizer.encode(content)]
    if role == "assistant":
        reply = content.split("</think>")[-1]
        return [tokenizer.control_id(ASSISTANT), *tokenizer.encode(reply), tokenizer.eos_id]
    raise DataError(f"role {role!r} is not known; use system, user or assistant")
