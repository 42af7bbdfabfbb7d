"""The released chat form (report §5.1): bos, system text, then User message Assistant reply eos.

Two spellings of the same form: a Jinja template for other tools, and `chat_ids` for us. Only `chat_ids` is safe
against text that spells a control token: it sets the control tokens by id and encodes all content as plain text.
Tools are in `chat_ids` alone, in the released form:

    Assistant text calls_begin call_begin function sep NAME newline ```json newline ARGUMENTS newline ``` call_end
        newline call_begin … call_end calls_end eos outputs_begin output_begin RESULT output_end … outputs_end reply eos

The released V3 template loses the markers of a second round of calls in one conversation; here every round has its own,
as in the template that came with V3-0324.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fathom.errors import DataError

if TYPE_CHECKING:
    from fathom.data.tokenizer import Tokenizer

USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
CALLS_BEGIN, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL_BEGIN, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
OUTPUTS_BEGIN, OUTPUTS_END = "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>"
OUTPUT_BEGIN, OUTPUT_END = "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"
TOOL_SEP = "<｜tool▁sep｜>"
THINK, END_THINK = "<think>", "</think>"
ARGUMENTS_OPEN, ARGUMENTS_CLOSE = "\n```json\n", "\n```"
"""What stands around a call's arguments, behind its name."""

Message = Mapping[str, Any]
"""{"role": system | user | assistant | tool, "content": text}; an assistant's may have "tool_calls" as OpenAI's."""

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
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] = (),
    thinking: bool = False,
) -> list[int]:
    """Token ids of a conversation.

    System texts go first, joined by an empty line; of an assistant's text what stands before `</think>` is dropped.
    `add_generation_prompt` ends with the token that asks for a reply, and with `thinking` with an open `<think>` behind
    it; behind the results of tools the model goes on without either. `tools`: functions that may be called, each with
    name, description and parameters. Raises `DataError` for other roles and for a tokenizer without the tokens.
    """
    system = [m["content"] for m in messages if m["role"] == "system"]
    if tools:
        tokenizer.control_id(CALLS_BEGIN)  # a model without the token cannot call
        system.append(tools_text(tools))
    ids = [tokenizer.bos_id, *tokenizer.encode("\n\n".join(system))]
    before = ""
    for message in messages:
        if message["role"] != "system":
            ids += _turn_ids(tokenizer, message, before)
            before = message["role"]
    if before == "tool":
        return [*ids, tokenizer.control_id(OUTPUTS_END)]
    if not add_generation_prompt:
        return ids
    return [*ids, tokenizer.control_id(ASSISTANT), *(think_ids(tokenizer) if thinking else ())]


def message_ids(tokenizer: Tokenizer, message: str) -> list[int]:
    """A user's message and the request for a reply: what a running conversation grows by at each turn."""
    turn = _turn_ids(tokenizer, {"role": "user", "content": message}, "")
    return [*turn, tokenizer.control_id(ASSISTANT)]


def think_ids(tokenizer: Tokenizer) -> list[int]:
    """What opens reasoning, `<think>` and a line end; the tag is a token of its own where there is one."""
    try:
        return [tokenizer.control_id(THINK), *tokenizer.encode("\n")]
    except DataError:
        return tokenizer.encode(THINK + "\n")


def call_ids(tokenizer: Tokenizer, name: str | None = None) -> list[int]:
    """The beginning of a reply that calls a tool, up to where its name comes, or its arguments if it has a `name`."""
    controls = [tokenizer.control_id(c) for c in (CALLS_BEGIN, CALL_BEGIN, TOOL_SEP)]
    begin = [*controls[:2], *tokenizer.encode("function"), controls[2]]
    return begin if name is None else begin + tokenizer.encode(name + ARGUMENTS_OPEN)


def tools_text(tools: Sequence[Mapping[str, Any]]) -> str:
    """The part of the system text that names the functions. Its words are our choice: the released form has none."""
    parts = ["## Tools\nThese functions can be called:"]
    for tool in tools:
        schema = json.dumps(tool.get("parameters") or {}, ensure_ascii=False)
        lines = [f"### {tool['name']}", tool.get("description") or "", f"Parameters: {schema}"]
        parts.append("\n".join(line for line in lines if line))
    return "\n\n".join(parts)


def _turn_ids(tokenizer: Tokenizer, message: Message, before: str) -> list[int]:
    """One message's ids; `before` is the role of the message in front of it, system texts not counted."""
    role, content = message["role"], message.get("content") or ""
    control = tokenizer.control_id
    if role == "tool":
        begin = [] if before == "tool" else [control(OUTPUTS_BEGIN)]
        text = tokenizer.encode(content)
        return [*begin, control(OUTPUT_BEGIN), *text, control(OUTPUT_END)]
    close = [control(OUTPUTS_END)] if before == "tool" else []
    if role == "user":
        return [*close, control(USER), *tokenizer.encode(content)]
    if role == "assistant":
        reply = tokenizer.encode(content.split(END_THINK)[-1])
        calls = _calls_ids(tokenizer, message.get("tool_calls") or ())
        return [*(close or [control(ASSISTANT)]), *reply, *calls, tokenizer.eos_id]
    raise DataError(f"role {role!r} is not known; use system, user, assistant or tool")


def _calls_ids(tokenizer: Tokenizer, calls: Sequence[Mapping[str, Any]]) -> list[int]:
    if not calls:
        return []
    control = tokenizer.control_id
    ids = [control(CALLS_BEGIN)]
    for number, call in enumerate(calls):
        function = call["function"]
        text = function["name"] + ARGUMENTS_OPEN + function["arguments"] + ARGUMENTS_CLOSE
        ids += tokenizer.encode("\n") if number else []
        ids += [control(CALL_BEGIN), *tokenizer.encode("function"), control(TOOL_SEP)]
        ids += [*tokenizer.encode(text), control(CALL_END)]
    return [*ids, control(CALLS_END)]
