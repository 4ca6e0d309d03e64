"""The requests of the OpenAI API, as far as they are understood, and its error object.

Bodies are validated strictly (no "5" for 5). Fields that are not listed here are ignored, except
those in `REFUSED`: to ignore them would give an answer to another question.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema

from secateur.serve.constraint import ANY_OBJECT
from secateur.serve.sampling import SamplingParameters

Body = TypeVar("Body", bound=BaseModel)
Finite = Field(allow_inf_nan=False)
Alternatives = Annotated[int, Field(ge=0, le=20)]

MAX_STOPS = 16
MAX_SEQUENCES = 1024  # prompts × n of one request
MAX_MESSAGES = 4096
MAX_BIASES = 4096
MAX_SCHEMA = 64 * 2**10  # characters

# Body fields that are sampling parameters of the same name.
PLAIN_FIELDS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)

# Field → values that mean the same as leaving it out.
REFUSED: dict[str, tuple[Any, ...]] = {
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "audio": (),
    "modalities": (["text"],),
    "prediction": (),
    "web_search_options": (),
    "use_beam_search": (False,),
    "min_tokens": (0,),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "include_stop_str_in_output": (False,),
    "prompt_logprobs": (),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
}


class ApiError(Exception):
    """An answer that is an error object.

    Args:
        status: HTTP status.
        message: one sentence for the sender.
        param: the field at fault.
        code: a machine-readable reason.
        headers: to send with it.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = headers

    def body(self) -> dict[str, Any]:
        """The error object of the OpenAI API."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, kind)
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    model: str | None = None


class StreamOptions(BaseModel):
    """What a stream tells besides the text."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    include_usage: bool | None = None


class SchemaFormat(BaseModel):
    """A JSON schema with a name."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    schema_: Annotated[dict[str, Any] | bool, Field(alias="schema")]


class ResponseFormat(BaseModel):
    """What the text of the answer must look like."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaFormat | None = None


_STRING_OR_SOME = WithJsonSchema(
    {
        "anyOf": [
            {"type": "null"},
            {"type": "string", "minLength": 1},
            {
                "type": "array",
                "items": {"type": "string", "minLength": 1},
                "maxItems": MAX_STOPS,
            },
        ]
    }
)


class GenerateBody(_Body):
    """Fields that both kinds of generation share; None stands for the default."""

    temperature: Annotated[float, Finite, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Finite, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Finite, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Finite, Field(ge=0.01, le=10)] | None = None
    presence_penalty: Annotated[float, Finite, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Finite, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=MAX_BIASES)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stop: Annotated[Any, _STRING_OR_SOME] = None
    stop_token_ids: Annotated[list[int], Field(fail_fast=True)] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    user: Annotated[str, Field(max_length=512)] | None = None

    def choices(self) -> int:
        """Answers wanted per prompt."""
        return self.n or 1

    def wants_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def schema_text(self) -> str | None:
        """The JSON schema that the answer must fit, as JSON; None if any text will do.

        Raises:
            ApiError: a schema is announced and missing, or it is too large.
        """
        wanted = self.response_format
        if wanted is None or wanted.type == "text":
            return None
        if wanted.type == "json_object":
            return ANY_OBJECT
        if wanted.json_schema is None:
            raise ApiError(400, "json_schema needs a schema", "response_format")
        text = json.dumps(wanted.json_schema.schema_)
        if len(text) > MAX_SCHEMA:
            raise ApiError(
                400, f"the schema is larger than {MAX_SCHEMA} characters", "response_format"
            )
        return text

    def stops(self) -> tuple[str, ...]:
        """The stop strings.

        Raises:
            ApiError: not a string or a short list of non-empty strings.
        """
        if self.stop is None:
            return ()
        stops = [self.stop] if isinstance(self.stop, str) else self.stop
        if not (
            isinstance(stops, list)
            and len(stops) <= MAX_STOPS
            and all(isinstance(stop, str) and stop for stop in stops)
        ):
            raise ApiError(
                400, f"stop must be a non-empty string, or up to {MAX_STOPS} of them", "stop"
            )
        return tuple(stops)

    def sampling(self, choice: int) -> SamplingParameters:
        """How the tokens of the n-th choice are drawn; each has a seed of its own.

        Raises:
            ApiError: logit_bias is wrong.
        """
        given = {name: value for name in PLAIN_FIELDS if (value := getattr(self, name)) is not None}
        return SamplingParameters(
            **given,
            top_k=max(self.top_k or 0, 0),
            logit_bias=self._biases(),
            seed=None if self.seed is None else (self.seed + choice) % 2**64,
        )

    def _biases(self) -> tuple[tuple[int, float], ...]:
        biases = []
        for token, bias in (self.logit_bias or {}).items():
            if not (token.isascii() and token.isdecimal() and len(token) <= 9):
                raise ApiError(400, "the keys of logit_bias must be token ids", "logit_bias")
            if type(bias) not in (int, float) or not -100 <= bias <= 100:
                raise ApiError(
                    400, "the values of logit_bias must be numbers from -100 to 100", "logit_bias"
                )
            biases.append((int(token), float(bias)))
        return tuple(biases)


_TOKENS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_PROMPTS = WithJsonSchema(
    {
        "anyOf": [
            {"type": "string"},
            {"type": "array", "items": {"type": "string"}, "minItems": 1},
            _TOKENS,
            {"type": "array", "items": _TOKENS, "minItems": 1},
        ]
    }
)


class CompletionBody(GenerateBody):
    """``POST /v1/completions``."""

    prompt: Annotated[Any, _PROMPTS]
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: Alternatives | None = None
    echo: bool | None = None
    best_of: int | None = None

    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, one or more, all texts or all token ids.

        Raises:
            ApiError: neither of the four allowed forms.
        """
        given: Any = self.prompt
        if isinstance(given, str) or (_all(given, int) and given):
            given = [given]
        if given and (
            _all(given, str) or (_all(given, list) and all(_all(prompt, int) for prompt in given))
        ):
            if len(given) * self.choices() > MAX_SEQUENCES:
                raise ApiError(
                    400, f"at most {MAX_SEQUENCES} sequences (prompts × n) per request", "prompt"
                )
            prompts: list[str] | list[list[int]] = given
            return prompts
        raise ApiError(
            400,
            "prompt must be a string, a list of strings, a list of token ids or a list of lists "
            "of token ids, and not empty",
            "prompt",
        )


def _all(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)


class TextPart(BaseModel):
    """A piece of a message; only text is understood."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)]

    def plain(self) -> dict[str, str]:
        """As chat templates expect it; they call the developer "system"."""
        content = self.content
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]


class ChatBody(GenerateBody):
    """``POST /v1/chat/completions``."""

    messages: Messages
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Alternatives | None = None

    def alternatives(self) -> int | None:
        """Alternatives to report per token; None: no log-probabilities.

        Raises:
            ApiError: top_logprobs without logprobs.
        """
        if self.logprobs:
            return self.top_logprobs or 0
        if self.top_logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", "top_logprobs")
        return None


class TokenizeBody(_Body):
    """``POST /tokenize``: of a text, or of a conversation."""

    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None


class DetokenizeBody(_Body):
    """``POST /detokenize``."""

    tokens: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(fail_fast=True)]


def parse(kind: type[Body], body: bytes) -> Body:
    """Validate a request body.

    Raises:
        ApiError: 400, naming the field.
    """
    try:
        parsed = kind.model_validate_json(body)
    except ValidationError as fault:
        first = fault.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        message = f"{place}: {first['msg']}" if place else first["msg"]
        param = str(first["loc"][0]) if first["loc"] else None
        code = "invalid_json" if first["type"] == "json_invalid" else None
        raise ApiError(400, message, param, code) from fault
    for name, harmless in REFUSED.items():
        value = (parsed.model_extra or {}).get(name)
        if value is not None and value not in harmless:
            raise ApiError(400, f"{name} is not supported by this server", name, "unsupported")
    if isinstance(parsed, CompletionBody) and parsed.best_of not in (None, parsed.choices()):
        raise ApiError(400, "best_of other than n is not supported", "best_of", "unsupported")
    return parsed
