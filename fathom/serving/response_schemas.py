"""What clients may send to POST /v1/responses."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from fathom.serving.schemas import (
    Body,
    Effort,
    Harmless,
    Name,
    TemplateSettings,
    at_fault,
)


class Part(Body):
    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class MessageItem(Body):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    id: str | None = None
    status: str | None = None


class CallItem(Body):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: str | None = None


class OutputItem(Body):
    type: Literal["function_call_output"]
    call_id: str
    output: str | list[Part]
    id: str | None = None
    status: str | None = None


class ReasoningItem(Body):
    """What the model thought before; dropped, as in conversations."""

    type: Literal["reasoning"]
    id: str | None = None
    summary: list[Any] | None = None
    content: list[Any] | None = None
    encrypted_content: str | None = None
    status: str | None = None


def _kind(item: Any) -> str | None:
    """The tag of an item's type; a message may leave it out."""
    kind = item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", None)
    return str(kind).title() if kind is not None else None


Item = Annotated[
    Annotated[MessageItem, Tag("Message")]
    | Annotated[CallItem, Tag("Function_Call")]
    | Annotated[OutputItem, Tag("Function_Call_Output")]
    | Annotated[ReasoningItem, Tag("Reasoning")],
    Discriminator(_kind),
]
"""One part of a conversation. The tags have capitals so that they are not taken for fields."""


class FlatTool(Body):
    type: Literal["function"]
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FlatNamedTool(Body):
    type: Literal["function"]
    name: str


class TextFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> TextFormat:
        if (self.type == "json_schema") != (self.schema_ is not None):
            raise at_fault("schema", "schema belongs to the type json_schema")
        return self


class TextSettings(Body):
    format: TextFormat | None = None
    verbosity: str | None = Field(None, description="Taken and not used.")


class Reasoning(Body):
    effort: Effort | None = Field(None, description="'none' switches thinking off, others on.")
    summary: str | None = Field(None, description="Taken and not used: reasoning is given whole.")
    generate_summary: str | None = Field(None, description="The same.")


class ResponseStreamOptions(Body):
    include_obfuscation: bool | None = Field(None, description="Taken and not used.")


class ResponsesBody(Harmless):
    """POST /v1/responses. Nothing is kept, so every request brings its whole conversation."""

    model: str = Field(description="As /v1/models names it.")
    input: str | Annotated[list[Item], Field(min_length=1)]
    instructions: str | None = Field(None, description="A system text before the conversation.")
    max_output_tokens: int | None = Field(None, ge=1, lt=2**31)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="Not OpenAI's.")
    top_logprobs: int | None = Field(None, ge=0, le=20)
    include: list[Literal["message.output_text.logprobs"]] | None = None
    tools: list[FlatTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | FlatNamedTool | None = None
    parallel_tool_calls: bool | None = None
    text: TextSettings | None = None
    reasoning: Reasoning | None = None
    chat_template_kwargs: TemplateSettings | None = Field(None, description="vLLM's.")
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    background: Literal[False] | None = None
    truncation: Literal["disabled"] | None = None
    previous_response_id: None = None
    conversation: None = None
    prompt: None = None
    max_tool_calls: None = None
