"""What the API takes and gives, as its OpenAPI document shows it: OpenAI's objects, and what of them is ours.

    ChatRequest, CompletionRequest, GroundingRequest    what is asked
    ChatCompletion, Completion, Grounding, ErrorBody     what is answered

A field that is not here is refused, rather than passed over: who sends it expects something of it. Those that OpenAI's
clients send and that ask for nothing (`user`, `metadata`, `logit_bias` without a bias) are taken.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

Text = Annotated[str, Field(max_length=1_000_000)]
Stop = Annotated[list[Annotated[str, Field(min_length=1, max_length=200)]], Field(max_length=16)]


class _Asked(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class ImageUrl(_Asked):
    """A picture: a data URL, or an http(s) URL of a domain that the server allows."""

    url: Annotated[str, Field(min_length=1, examples=["data:image/png;base64,iVBORw0KGgo..."])]
    detail: Literal["auto", "low", "high"] | None = Field(
        None, description="Of no effect: every picture is seen at the model's own size."
    )


class TextPart(_Asked):
    """A text, taken as it is: no tag in it has a meaning."""

    type: Literal["text"]
    text: Text


class ImagePart(_Asked):
    """A picture at its place in the message."""

    type: Literal["image_url"]
    image_url: ImageUrl | Annotated[str, Field(min_length=1)]


class FunctionCall(_Asked):
    """A function's name, and its arguments as the model wrote them: JSON, if all is well."""

    name: Annotated[str, Field(min_length=1, max_length=200)]
    arguments: Text


class ToolCall(_Asked):
    """A function that the model wants called."""

    id: Annotated[str, Field(min_length=1, max_length=200)]
    type: Literal["function"] = "function"
    function: FunctionCall


class PastCall(ToolCall):
    """The same as a client sends it back: put together from a stream, it has its place."""

    index: int | None = None


TextParts = Annotated[list[TextPart], Field(min_length=1, max_length=256)]


class SystemMessage(_Asked):
    """How the model is to behave; before all others."""

    role: Literal["system", "developer"]
    content: Text | TextParts
    name: str | None = None


class UserMessage(_Asked):
    """What is asked: a text, or texts and pictures in their order."""

    role: Literal["user"]
    content: Text | Annotated[list[Annotated[TextPart | ImagePart, Field(discriminator="type")]], Field(max_length=256)]
    name: str | None = None


class AssistantMessage(_Asked):
    """What the model has answered before."""

    role: Literal["assistant"]
    content: Text | TextParts | None = None
    tool_calls: Annotated[list[PastCall], Field(max_length=64)] | None = None
    name: str | None = None
    reasoning_content: None = None
    refusal: None = None
    annotations: list[JsonValue] | None = None
    audio: None = None
    function_call: None = None


class ToolMessage(_Asked):
    """What a called function has returned."""

    role: Literal["tool"]
    tool_call_id: str
    content: Text | TextParts
    name: str | None = None


Message = Annotated[
    SystemMessage | UserMessage | AssistantMessage | ToolMessage,
    Field(discriminator="role"),
]


class Function(_Asked):
    """A function that the model may call."""

    name: Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^\r\n,\[\]]+$")]
    description: Text | None = None
    parameters: dict[str, JsonValue] | None = None
    strict: bool | None = Field(None, description="Only false: arguments are what the model writes.")


class Tool(_Asked):
    """One of the tools."""

    type: Literal["function"]
    function: Function


class NamedFunction(_Asked):
    """A function's name."""

    name: str


class NamedTool(_Asked):
    """The function that is to be called."""

    type: Literal["function"]
    function: NamedFunction


class StreamOptions(_Asked):
    """Of a stream."""

    include_usage: bool = False
    include_obfuscation: bool | None = None


class TextFormat(_Asked):
    """The one form of answers."""

    type: Literal["text"]


class _Sampling(_Asked):
    """What chat and completion requests share. What is not given is as the checkpoint's generation_config.json says."""

    model: Annotated[str, Field(max_length=500)]
    max_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(None, description="0 is greedy.")
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=1_000_000)] | None = Field(
        None, description="0 and -1 are off. Not OpenAI's."
    )
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stop: Annotated[str, Field(min_length=1, max_length=200)] | Stop | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = Field(None, description="Not OpenAI's.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    user: str | None = None


class ChatRequest(_Sampling):
    """A conversation, whose next message is wanted."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1000)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = Field(None, description="Of no effect: calls come one at a time.")
    response_format: TextFormat | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = Field(None, description="Of no effect: nothing is stored.")
    service_tier: Literal["auto", "default"] | None = None
    modalities: list[Literal["text"]] | None = None
    functions: Annotated[list[JsonValue], Field(max_length=0)] | None = None
    function_call: Literal["none", "auto"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    reasoning_effort: None = None
    verbosity: None = None
    prediction: None = None
    audio: None = None
    web_search_options: None = None


class CompletionRequest(_Sampling):
    """A text, with pictures before it if they are given, that the model is to go on with."""

    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=128)]
    images: Annotated[list[str | ImageUrl], Field(max_length=64)] | None = Field(
        None,
        description="Pictures before each prompt, without `Picture k:`, as base checkpoints are asked. Not OpenAI's.",
    )
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None


class GroundingRequest(_Asked):
    """A picture, and a phrase to find in it."""

    model: Annotated[str, Field(max_length=500)] | None = None
    image: Annotated[str, Field(min_length=1)] | ImageUrl
    phrase: Annotated[str, Field(min_length=1, max_length=1000)]


# ---- answers


class PromptDetails(BaseModel):
    """Of a prompt's tokens."""

    cached_tokens: int


class Usage(BaseModel):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class TopToken(BaseModel):
    """A token that might have been, or was."""

    token: str
    logprob: float
    bytes: list[int]


class TokenInfo(TopToken):
    """A token of the answer, and the most likely ones in its place."""

    top_logprobs: list[TopToken]


class ChatLogprobs(BaseModel):
    """How likely the model found what it wrote."""

    content: list[TokenInfo]
    refusal: None = None


class ReplyMessage(BaseModel):
    """What the model answered."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(BaseModel):
    """One of the answers."""

    index: int
    message: ReplyMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(BaseModel):
    """The answers to a conversation."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class CompletionLogprobs(BaseModel):
    """How likely the model found what it wrote, a list for each fact."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One of the texts."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Literal["stop", "length"]


class Completion(BaseModel):
    """The texts with which the model goes on."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class FoundBox(BaseModel):
    """A rectangle in pixels of the picture that was sent, from its top left corner to its bottom right."""

    x1: float
    y1: float
    x2: float
    y2: float
    label: str | None


class Grounding(BaseModel):
    """Where the phrase is in the picture, of `width` x `height` pixels; no boxes if it was not found."""

    object: Literal["grounding"] = "grounding"
    model: str
    boxes: list[FoundBox]
    width: int
    height: int
    usage: Usage


class Model(BaseModel):
    """The model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "qwenvl"


class Models(BaseModel):
    """All models that are served: one."""

    object: Literal["list"] = "list"
    data: list[Model]


class Error(BaseModel):
    """What is wrong, in a line."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """An error, as OpenAI's clients expect it."""

    error: Error
