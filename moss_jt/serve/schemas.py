"""What clients send, as OpenAI's interface has it: checked strictly where we know a member, and ignored where we do not."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Body = ConfigDict(strict=True)


def _integral(value: Any) -> Any:
    """JSON knows no whole numbers: 512.0 is one, and Go's clients write 5.12e2."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


# It comes last: bounds after it would stand in the schema by names that JSON Schema does not have.
Integral = BeforeValidator(_integral)
Integer = Annotated[int, Integral]
Natural = Annotated[int, Field(ge=0, le=1 << 31), Integral]
Positive = Annotated[int, Field(ge=1, le=1 << 31), Integral]
Stop = Annotated[str, Field(min_length=1, max_length=1000)]
Stops = Stop | Annotated[list[Stop], Field(max_length=4)] | None
Penalty = Annotated[float, Field(ge=-2, le=2)]
Bias = Annotated[float, Field(ge=-100, le=100)]


class TextPart(BaseModel):
    model_config = Body
    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """content  text, or parts that are text; nothing else is read"""

    model_config = Body
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class StreamOptions(BaseModel):
    model_config = Body
    include_usage: bool | None = None


class TextFormat(BaseModel):
    model_config = Body
    type: Literal["text"]


class Sampling(BaseModel):
    """What both kinds of request have. top_k, repetition_penalty and min_p are not OpenAI's: extra_body sends them."""

    model_config = Body
    model: str | None = Field(None, max_length=300)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Natural | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, Bias] | None = Field(
        None, max_length=1024, json_schema_extra={"propertyNames": {"pattern": "^(0|[1-9][0-9]{0,2})$"}}
    )
    seed: Integer | None = None
    stop: Stops = None
    n: Annotated[int, Field(ge=1, le=128), Integral] | None = None
    user: str | None = None
    return_progress: bool | None = Field(
        None, description="Tell how far the prompt is read, as llama.cpp does."
    )


class ChatRequest(Sampling):
    """The members that would change the answer and that are not done here may only say so much: None, or what is done anyway."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=10_000)
    max_tokens: Positive | None = None
    max_completion_tokens: Positive | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20), Integral] | None = None
    plugins: list[str] | None = Field(
        None, max_length=50, description="MOSS's plugins that may be called; by default those of the server."
    )
    response_format: TextFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    functions: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    function_call: Literal["none", "auto"] | None = None
    modalities: list[Literal["text"]] | None = None
    audio: None = None
    prediction: None = None
    web_search_options: None = None
    moderation: None = None
    reasoning_effort: Literal["medium"] | None = None
    verbosity: Literal["medium"] | None = None


class CompletionRequest(Sampling):
    prompt: (
        Annotated[str, Field(min_length=1)]
        | Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=128)]
        | Annotated[list[Natural], Field(min_length=1)]
        | Annotated[list[Annotated[list[Natural], Field(min_length=1)]], Field(min_length=1, max_length=128)]
    )
    max_tokens: Natural | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=5), Integral] | None = None
    suffix: Literal[""] | None = None
    best_of: Annotated[int, Field(ge=1, le=1), Integral] | None = None


class TokenizeRequest(BaseModel):
    """``parse_special``: special tokens written in the text count as such, as in a prompt of /v1/completions."""

    model_config = Body
    content: str
    parse_special: bool = True
    with_pieces: bool = False


class DetokenizeRequest(BaseModel):
    model_config = Body
    tokens: list[Natural]
