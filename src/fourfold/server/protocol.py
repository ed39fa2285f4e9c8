"""What clients may send: OpenAI's requests, field by field.

A field that is not listed is refused by name, unless it is null. `top_k`, `min_p`, `repetition_penalty` and
`ignore_eos` are fourfold's own. Fields that are listed but do nothing (`user`, `metadata`, `store` = false, ...) say
nothing about the answer in OpenAI's own interface either. Ranges that OpenAI fixes stand here; those that an
administrator sets are in `limits`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)

FUNCTION_NAME = r"^[a-zA-Z0-9_-]{1,64}$"
INT64 = 2**63


MOST_FIELDS, MOST_ENTRIES = 64, 10_000

Item = TypeVar("Item")
Entries = TypeVar("Entries")


class _FirstComplaint(FailFast):
    """pydantic would collect one for each of a million items, at a kilobyte and twenty microseconds."""

    __hash__ = object.__hash__  # as unions want it


List = Annotated[list[Item], _FirstComplaint()]


def _not_too_many(value: object) -> object:
    if isinstance(value, dict) and len(value) > MOST_ENTRIES:
        raise ValueError(f"has {len(value)} entries, more than {MOST_ENTRIES}")
    return value


Few = Annotated[Entries, BeforeValidator(_not_too_many)]  # of a dictionary, for the same reason


class Strict(BaseModel):
    """No field is ignored that says anything, no type converted, no number infinite."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _what_is_said(cls, value: object) -> object:
        """A null asks for nothing, whatever its name: clients send one for each field that they know."""
        if not isinstance(value, dict):
            return value
        if len(value) > MOST_FIELDS:
            raise ValueError(f"has {len(value)} fields, more than there are")
        return {name: field for name, field in value.items() if field is not None or name in cls.model_fields}


class StreamOptions(Strict):
    include_usage: bool | None = Field(None, description="A last chunk with the usage of the whole request.")
    include_obfuscation: Literal[False] | None = None


class SamplingFields(Strict):
    """What chat and completions have in common."""

    model: str = Field(description="As `/v1/models` lists it.")
    n: int | None = Field(None, ge=1, description="Answers to each prompt; 1 where it is missing.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2, description="0: always the likeliest token. Missing: 1.")
    top_p: float | None = Field(None, ge=0, le=1, description="Missing: 1. 0: the likeliest token alone.")
    stop: str | List[str] | None = Field(None, description="Ends what is said, not calls or JSON.")
    seed: int | None = Field(None, ge=-INT64, lt=INT64, description="The same seed, the same answers.")
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: Few[dict[str, Annotated[float, Field(ge=-100, le=100)]]] | None = Field(
        None, description="Token ids, as text, and what is added to their logits."
    )
    user: str | None = Field(None, description="Changes nothing.")
    top_k: int | None = Field(
        None, ge=-1, lt=2**31, description="fourfold's own: among the k likeliest tokens; 0 or -1: among all."
    )
    min_p: float | None = Field(
        None, ge=0, le=1, description="fourfold's own: among tokens at least this fraction as likely as the likeliest."
    )
    repetition_penalty: float | None = Field(
        None, ge=0.01, le=100, description="fourfold's own: above 1, tokens that were there become less likely."
    )
    ignore_eos: bool | None = Field(None, description="fourfold's own: go on to max_tokens, for measurements.")

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> SamplingFields:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for a stream; set stream to true, or leave it out")
        return self


class CompletionRequest(SamplingFields):
    """POST /v1/completions"""

    prompt: str | List[str] | List[int] | List[List[int]] = Field(
        description="A text, several, the token ids of one, or of several."
    )
    max_tokens: int | None = Field(None, ge=0, lt=2**31, description="Missing: 16. 0: with echo, only the prompt.")
    echo: bool | None = Field(None, description="The prompt comes back in front of the answer.")
    logprobs: int | None = Field(
        None, ge=0, le=20, description="Of each token, with so many alternatives; with echo of the prompt's as well."
    )
    best_of: Literal[1] | None = None

    @field_validator("prompt", mode="wrap")
    @classmethod
    def _one_complaint(cls, value: object, check: ValidatorFunctionWrapHandler) -> object:
        """In place of one for each form that a prompt may have."""
        if isinstance(value, list) and len(value) > MOST_ENTRIES and not isinstance(value[0], int):
            raise ValueError(f"has {len(value)} prompts, more than {MOST_ENTRIES}")
        try:
            return check(value)
        except ValidationError:
            raise ValueError("must be a text, a list of texts, a list of token ids, or a list of such lists") from None

    @model_validator(mode="after")
    def _nothing_without_echo(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens 0 is for echo; ask for at least one token, or set echo to true")
        return self


class TextPart(Strict):
    type: Literal["text"]
    text: str


Content = str | List[TextPart]


class FunctionCall(Strict):
    name: str = Field(pattern=FUNCTION_NAME)
    arguments: str = Field(description="A JSON object as text, or nothing.")
    parsed_arguments: Any = Field(None, description="Changes nothing: OpenAI's client reads arguments so.")


class ToolCall(Strict):
    id: str
    type: Literal["function"]
    function: FunctionCall
    index: int | None = Field(None, description="Changes nothing: streams number calls so, and clients keep it.")


class SystemMessage(Strict):
    role: Literal["system", "developer"]
    content: Content


class UserMessage(Strict):
    role: Literal["user"]
    content: Content


class AssistantMessage(Strict):
    """An earlier answer, as this server gave it: what it never says must be null."""

    role: Literal["assistant"]
    content: Content | None = None
    tool_calls: List[ToolCall] | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    parsed: Any = Field(None, description="Changes nothing: OpenAI's client reads JSON in the content so.")
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None


class ToolMessage(Strict):
    role: Literal["tool"]
    content: Content
    tool_call_id: str
    name: str | None = Field(None, description="Changes nothing: the call says which function it was.")


Message = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


class FunctionDefinition(Strict):
    name: str = Field(pattern=FUNCTION_NAME)
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="JSON schema of an object; missing: no arguments.")
    strict: bool | None = Field(None, description="Arguments always fit their schema, so this changes nothing.")


class Tool(Strict):
    type: Literal["function"]
    function: FunctionDefinition


class ChosenFunction(Strict):
    name: str = Field(pattern=FUNCTION_NAME)


class NamedToolChoice(Strict):
    type: Literal["function"]
    function: ChosenFunction


class SchemaFormat(Strict):
    name: str = Field(pattern=FUNCTION_NAME)
    description: str | None = Field(None, description="Changes nothing: say it in a message.")
    schema_: dict[str, Any] | None = Field(None, alias="schema", description="Missing: any JSON object.")
    strict: bool | None = Field(None, description="The answer always fits the schema, so this changes nothing.")


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaFormat | None = None

    @model_validator(mode="after")
    def _schema_where_it_belongs(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema belongs to type json_schema, and to it alone")
        return self


class ChatRequest(SamplingFields):
    """POST /v1/chat/completions"""

    messages: List[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, lt=2**31, description="Missing: what the context has room for.")
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31, description="The newer name of max_tokens.")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: List[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = Field(None, description="Missing: true.")
    metadata: Few[dict[str, str]] | None = Field(None, description="Changes nothing: nothing is stored.")
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    modalities: Annotated[List[Literal["text"]], Field(min_length=1, max_length=1)] | None = None
    prompt_cache_key: str | None = Field(None, description="Changes nothing: prefixes are always reused.")
    safety_identifier: str | None = Field(None, description="Changes nothing.")

    @model_validator(mode="after")
    def _fields_that_belong_together(self) -> ChatRequest:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        names = [tool.function.name for tool in self.tools or []]
        if len(names) != len(set(names)):
            raise ValueError("two tools have the same name; give each its own")
        if isinstance(self.tool_choice, NamedToolChoice) and self.tool_choice.function.name not in names:
            raise ValueError(f"tool_choice names {self.tool_choice.function.name}, which is not among the tools")
        if self.tool_choice == "required" and not names:
            raise ValueError("tool_choice is required, but there are no tools")
        formed = self.response_format is not None and self.response_format.type != "text"
        if formed and names and self.tool_choice != "none":
            raise ValueError("response_format and tools cannot both form an answer; drop one of them")
        return self
