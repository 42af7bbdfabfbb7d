"""What clients may send: OpenAI's fields, a few of vLLM's, and nothing else.

An unknown field is refused with its name: a setting that is silently dropped is worse than an error. The fields of
`Harmless` change no answer; OpenAI's clients send some of them by themselves, so they are taken and not used.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

MOST_STOPS = 16
Stop = Annotated[str, Field(min_length=1, max_length=1024)]
Token = Annotated[int, Field(ge=0, lt=2**31)]
Tokens = Annotated[list[Token], Field(min_length=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:-]{1,64}$")]


def at_fault(param: str, message: str) -> PydanticCustomError:
    """A refusal of one field, found when several are looked at together."""
    return PydanticCustomError("at_fault", "{message}", {"param": param, "message": message})


class Body(BaseModel):
    """Strict types, no unknown fields, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Harmless(Body):
    user: str | None = Field(None, description="Taken and not used, like the next fields.")
    metadata: dict[str, Any] | None = None
    store: bool | None = Field(None, description="Nothing is stored.")
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = Field(None, description="The prefix cache needs no key.")
    prompt_cache_retention: str | None = None


class StreamOptions(Body):
    include_usage: bool | None = Field(None, description="A last chunk with the usage.")
    continuous_usage_stats: bool | None = Field(None, description="Usage in every chunk; vLLM's.")
    include_obfuscation: bool | None = Field(None, description="Taken and not used.")


class Wishes(Harmless):
    """How tokens are chosen and where answers end."""

    model: str = Field(description="As /v1/models names it.")
    temperature: float | None = Field(None, ge=0, le=100, description="0 is greedy; 1 by default.")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, lt=2**31, description="0 is all. Not OpenAI's.")
    min_p: float | None = Field(None, ge=0, le=1, description="Not OpenAI's.")
    repetition_penalty: float | None = Field(None, gt=0, le=100, description="Not OpenAI's.")
    presence_penalty: float | None = Field(None, ge=-100, le=100)
    frequency_penalty: float | None = Field(None, ge=-100, le=100)
    logit_bias: dict[str, float] | None = Field(None, description="From token ids to numbers.")
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    stop_token_ids: Annotated[list[Token], Field(max_length=MOST_STOPS)] | None = None
    ignore_eos: bool | None = None
    n: int | None = Field(None, ge=1, le=128)
    stream: bool | None = None
    stream_options: StreamOptions | None = None


# --- conversations -----------------------------------------------------------------------------------


class TextPart(Body):
    type: Literal["text"]
    text: str


class CalledFunction(Body):
    name: str
    arguments: str


class Call(Body):
    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class ChatMessage(Body):
    """One message. What a server answers can be sent back as it came."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = Field(None, description="Taken and not used: the chat form has no names.")
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = Field(None, description="Dropped: the model does not see it.")
    refusal: None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None

    @model_validator(mode="after")
    def _says_something(self) -> ChatMessage:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise at_fault("content", f"a message of the role {self.role} needs content")
        if self.tool_calls and self.role != "assistant":
            raise at_fault("tool_calls", "tool_calls are for the role assistant")
        return self

    @property
    def text(self) -> str:
        """All text of the message."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class Function(Body):
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"]
    function: NamedFunction


class Schema(Body):
    name: str
    description: str | None = None
    # `schema` is a method of pydantic's models
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: Schema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise at_fault("json_schema", "json_schema belongs to the type json_schema")
        return self


class TemplateSettings(Body):
    thinking: bool | None = Field(None, description="Open the reply with <think>.")
    enable_thinking: bool | None = Field(None, description="The same under another name.")


Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]


class ChatBody(Wishes):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    max_tokens: int | None = Field(None, ge=1, lt=2**31, description="The old name of the same.")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: Effort | None = Field(
        None, description="'none' switches thinking off, every other value on."
    )
    chat_template_kwargs: TemplateSettings | None = Field(None, description="vLLM's.")
    modalities: list[Literal["text"]] | None = None

    @model_validator(mode="after")
    def _agrees(self) -> ChatBody:
        both = {self.max_completion_tokens, self.max_tokens} - {None}
        if len(both) > 1:
            raise at_fault(
                "max_tokens", "max_completion_tokens and max_tokens differ; give one of them"
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise at_fault("top_logprobs", "top_logprobs needs logprobs: true")
        return self


# --- texts -------------------------------------------------------------------------------------------


class CompletionBody(Wishes):
    """POST /v1/completions."""

    prompt: (
        str
        | Tokens
        | Annotated[list[str], Field(min_length=1)]
        | Annotated[list[Tokens], Field(min_length=1)]
    )
    max_tokens: int | None = Field(None, ge=0, lt=2**31, description="16 by default.")
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool | None = Field(None, description="Begin the answer with the prompt.")
    best_of: int | None = Field(None, description="Only what n is.")
    suffix: None = None

    @model_validator(mode="after")
    def _agrees(self) -> CompletionBody:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise at_fault("best_of", "best_of other than n is not supported; leave it out")
        if self.max_tokens == 0 and not self.echo:
            raise at_fault(
                "max_tokens", "max_tokens: 0 asks for nothing; that is only of use with echo: true"
            )
        return self


class TokenizeBody(Body):
    """POST /tokenize; a prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = Field(None, min_length=1)
    tools: list[Tool] | None = None
    add_special_tokens: bool = Field(True, description="As a prompt of /v1/completions.")
    add_generation_prompt: bool = True
    return_token_strs: bool | None = None
    chat_template_kwargs: TemplateSettings | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise at_fault("prompt", "give either prompt or messages")
        return self


class DetokenizeBody(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[Token]
