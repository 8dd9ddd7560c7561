"""Request bodies in OpenAI's format, and their conversion to `Request`s.

An unsupported option that would change the answer is refused unless it has its neutral value. An
option without effect here (`store`, `metadata`, ...) is accepted. So is null, for any option,
because clients send it for options that are not set.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, model_validator

from amulet.errors import RequestError
from amulet.grammar import Grammar, Kind
from amulet.preference import Floor, Focus, LoopGuard, Placement, Steering, Strength
from amulet.request import Request
from amulet.serve.errors import ApiError
from amulet.serve.limits import Limits

SETTINGS = ("preference", *Steering.model_fields)
DEPTH = 100
VALUES = 100_000  # in a body; other requests wait while they are checked, some 10 µs each
COMPLETION_TOKENS = 16  # OpenAI's default for completions
SEEDS = 2**63  # any integer is accepted as a seed, modulo the generators' range

_SURROGATE = re.compile("[\ud800-\udfff]")

MaxTokens: TypeAlias = Annotated[int, Field(ge=1)] | None
Unused = Annotated[Any, Field(description="Accepted without effect.")]


# OpenAI's options that would change the answer, with advice. 0, false and "" change nothing.
REFUSED = {
    **dict.fromkeys(("frequency_penalty", "presence_penalty", "logit_bias"), "leave it out"),
    **dict.fromkeys(("audio", "web_search_options"), "leave it out"),
    "functions": "use tools",
    "function_call": "use tool_choice",
}


class Wish(BaseModel):
    """A preference and its weight; a negative weight steers away."""

    model_config = ConfigDict(extra="forbid")

    text: str
    weight: Annotated[float, Field(ge=-10.0, le=10.0, allow_inf_nan=False)] = 1.0


class Settings(BaseModel):
    """How an answer is steered; the body of PUT /v1/preferences/{user}."""

    model_config = ConfigDict(extra="forbid")

    preference: str | Wish | list[str | Wish] | None = Field(
        default=None, description='What the user wants from the answer; "" decodes plainly.'
    )
    strength: Strength | None = None
    floor: Floor | None = None
    placement: Placement | None = None
    focus: Focus | None = None
    loop_guard: LoopGuard | None = None

    @model_validator(mode="before")
    @classmethod
    def _is_readable(cls, given: Any) -> Any:
        return readable(given)

    def settings(self) -> dict[str, Any]:
        """Return the given settings as JSON."""
        return self.model_dump(mode="json", include=set(SETTINGS), exclude_none=True)


class StreamOptions(BaseModel):
    """What a stream reports in addition to the answer."""

    include_usage: bool | None = None


class GrammarBody(BaseModel):
    """A grammar in the form of `amulet.Grammar`."""

    model_config = ConfigDict(extra="forbid")

    kind: Kind
    source: str


class Options(Settings):
    """The fields that chats, text completions and responses share."""

    refused: ClassVar[Mapping[str, str]] = REFUSED

    model: str | None = Field(default=None, description="The served model; optional.")
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0.0, le=100.0, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(ge=0.0, le=1.0, description="0 is greedy.")] | None = None
    stop: str | Annotated[list[str], Field(max_length=64)] | None = None
    seed: Annotated[int, Field(description="Any integer.")] | None = None
    user: str | None = None
    trace: bool = Field(default=False, description="Return, for each token, why it was chosen.")
    top_k: Annotated[int, Field(ge=-1, lt=2**31, description="0 and -1 are off.")] | None = None
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100.0)] | None = None
    grammar: GrammarBody | None = None
    steer_grammar: bool = False
    return_details: bool = Field(default=False, description="Return token ids, steering and more.")

    metadata: Unused = None
    store: Unused = None
    service_tier: Unused = None
    safety_identifier: Unused = None
    prompt_cache_key: Unused = None
    prompt_cache_retention: Unused = None

    @model_validator(mode="after")
    def _only_what_is_done(self) -> Options:
        for name, instead in self.refused.items():
            if getattr(self, name, None):
                raise ValueError(f"{name}: not supported; {instead}")
        if set(getattr(self, "modalities", None) or ()) - {"text"}:
            raise ValueError('modalities: this server returns only text; expected ["text"]')
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: requires stream=true")
        return self


class Body(Options):
    """The fields that chat and text completions share."""

    max_tokens: MaxTokens = None
    n: Annotated[int, Field(ge=1)] | None = None

    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None

    def _sampling(
        self, limits: Limits, max_tokens: int, window: int | None, stored: dict[str, Any]
    ) -> dict[str, Any]:
        if max_tokens > max(limits.max_tokens, window or max_tokens):
            raise ApiError(
                400,
                f"max_tokens={max_tokens}: this server permits {limits.max_tokens}, and the "
                f"model's context window is {window}.",
                param="max_tokens",
            )
        fields: dict[str, Any] = {
            "max_new_tokens": min(max_tokens, limits.max_tokens),
            **stored,
            **self.settings(),
        }
        wishes = fields.get("preference")
        if isinstance(wishes, list) and len(wishes) > limits.preferences:
            raise too_many_preferences(len(wishes), limits)
        for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "stop"):
            if (value := getattr(self, name)) is not None:
                fields[name] = value
        if self.top_k == -1:  # off, in vLLM
            fields["top_k"] = 0
        if self.top_p == 0:  # only the likeliest token
            fields |= {"top_p": 1.0, "temperature": 0.0}
        if self.grammar is not None:
            check_size("grammar", self.grammar.source, limits)
            fields["grammar"] = Grammar(self.grammar.kind, self.grammar.source)
            fields["steer_grammar"] = self.steer_grammar
        return fields

    def _choices(self, sources: list[dict[str, Any]], limits: Limits) -> list[Request]:
        n = self.n or 1
        if n * len(sources) > limits.choices:
            raise ApiError(
                400,
                f"n={n} for {len(sources)} prompt(s): this server permits {limits.choices} "
                "answers per request.",
                param="n",
            )
        # Choices differ by their seeds; the first is the same as without further choices.
        seeds = [None if self.seed is None else (self.seed + choice) % SEEDS for choice in range(n)]
        return [Request(**source, seed=seed) for source in sources for seed in seeds]


class ChatMessage(BaseModel):
    """One message of a chat; further keys are passed to the chat template."""

    model_config = ConfigDict(extra="allow")

    role: str
    content: str | list[str | dict[str, Any]] | None = None
    tool_calls: list[dict[str, Any]] | None = None


class ChatBody(Body):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: MaxTokens = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=100)] | None = None
    reasoning_effort: str | None = None
    verbosity: Literal["low", "medium", "high"] | None = Field(
        default=None, description="For chat templates that support it."
    )
    modalities: list[str] | None = None
    prediction: Unused = None
    audio: Any = None
    functions: Any = None
    function_call: Any = None
    web_search_options: Any = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools_prompt: Literal["template", "fallback"] = "fallback"

    def requests(self, limits: Limits, window: int | None, stored: dict[str, Any]) -> list[Request]:
        """Return a request per choice.

        Args:
            limits: what the server permits.
            window: the model's context window in tokens; None if unknown.
            stored: the user's stored settings; those of the body take precedence.

        Raises:
            ApiError, RequestError: an option is not possible.
        """
        asked = self.max_completion_tokens or self.max_tokens
        fields = self._sampling(limits, asked or limits.max_tokens, window, stored)
        fields["messages"] = chat(self.messages)
        fields["tools_prompt"] = self.tools_prompt
        fields["template_options"] = self._template_options()
        if self.logprobs or self.trace:
            fields.update(trace=True, top_logprobs=self.top_logprobs or 0)
        elif self.top_logprobs:
            raise ApiError(400, "top_logprobs requires logprobs=true.", param="top_logprobs")
        if self.tools:
            fields["tools"] = self.tools
            fields["tool_choice"] = tool_choice(self.tool_choice)
            fields["parallel_tool_calls"] = self.parallel_tool_calls is not False
            if fields["tool_choice"] not in ("auto", "none") or self.response_format:
                check_size("tools", json.dumps(self.tools), limits)
        elif self.tool_choice not in (None, "auto", "none"):
            raise ApiError(400, "tool_choice requires tools.", param="tool_choice")
        if (grammar := response_grammar(self.response_format)) is not None:
            if self.grammar is not None:
                raise ApiError(400, "Give either grammar or response_format.", param="grammar")
            check_size("response_format", grammar.source, limits)
            # Agent frameworks send both, but a forced call leaves no text to constrain.
            if fields.get("tool_choice", "none") in ("auto", "none"):
                fields["grammar"] = grammar
        return self._choices([fields], limits)

    def _template_options(self) -> dict[str, Any]:
        options = dict(self.chat_template_kwargs or {})
        if self.reasoning_effort is not None:
            options.setdefault("enable_thinking", self.reasoning_effort not in ("none", "minimal"))
            options.setdefault("reasoning_effort", self.reasoning_effort)
        if self.verbosity is not None:
            options.setdefault("verbosity", self.verbosity)
        return options


class CompletionBody(Body):
    """The body of POST /v1/completions."""

    prompt: str | Annotated[list[str], Field(min_length=1)]
    logprobs: Annotated[int, Field(ge=0, le=100)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=100)] | None = None
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None

    def requests(self, limits: Limits, window: int | None, stored: dict[str, Any]) -> list[Request]:
        """Return a request per prompt and choice; see `ChatBody.requests`."""
        fields = self._sampling(limits, self.max_tokens or COMPLETION_TOKENS, window, stored)
        if self.logprobs is not None or self.trace:
            fields.update(trace=True, top_logprobs=self.logprobs or self.top_logprobs or 0)
        prompts = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        return self._choices([{**fields, "prompt": prompt} for prompt in prompts], limits)


class TokenizeBody(BaseModel):
    """The body of POST /tokenize: a text, or a chat to render by the template."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    add_special_tokens: bool = True
    tools: list[dict[str, Any]] | None = None
    tools_prompt: Literal["template", "fallback"] = "fallback"
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _is_readable(cls, given: Any) -> Any:
        return readable(given)

    @model_validator(mode="after")
    def _one_source(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("expected either prompt or messages")
        return self


def readable(given: Any) -> Any:
    """Return a body without its nulls, after checking that later code can process it.

    Raises:
        ValueError: a text contains a lone surrogate, which JSON permits but tokenizers don't; a
            number is NaN or infinite, which only Python reads in JSON; there are more than `VALUES`
            keys and values; or lists and objects are nested more than `DEPTH` levels deep, which
            later code may not survive.
    """
    waiting = [(given, 0)]
    count = 0
    while waiting:
        value, depth = waiting.pop()
        count += 1
        if count > VALUES:
            raise ValueError(f"it has more than {VALUES:,} keys and values")
        if depth > DEPTH:
            raise ValueError(f"it is nested more than {DEPTH} levels deep")
        if isinstance(value, dict):
            waiting += [(inner, depth + 1) for pair in value.items() for inner in pair]
            # The arguments of a past call, JSON in a text, are values of the prompt, too.
            if isinstance(written := value.get("arguments"), str):
                count += sum(map(written.count, ",:[{"))
        elif isinstance(value, list):
            waiting += [(inner, depth + 1) for inner in value]
        elif isinstance(value, str) and _SURROGATE.search(value):
            raise ValueError("a text contains a lone surrogate; send valid Unicode")
        elif isinstance(value, float) and not math.isfinite(value):
            raise ValueError("a number is NaN or infinite; send finite numbers")
    if not isinstance(given, dict):
        return given
    return {name: value for name, value in given.items() if value is not None}


def check_size(what: str, written: str, limits: Limits) -> None:
    """Refuse a grammar that is too large.

    Raises:
        ApiError: the grammar is too large.
    """
    if len(written) > limits.grammar_bytes:
        raise ApiError(
            400,
            f"{what}: {len(written)} characters; this server permits {limits.grammar_bytes}.",
            param=what,
        )


def chat(messages: list[ChatMessage]) -> list[dict[str, Any]]:
    """Return messages as the dicts that were sent, without nulls other than the content."""
    given = [message.model_dump(exclude_unset=True) for message in messages]
    return [
        {name: value for name, value in message.items() if value is not None or name == "content"}
        for message in given
    ]


def check_settings(settings: Settings, limits: Limits) -> None:
    """Raise for settings that no request could use.

    Raises:
        ApiError, RequestError: too many preferences, or an empty one.
    """
    given = settings.settings()
    wishes = given.get("preference")
    if isinstance(wishes, list) and len(wishes) > limits.preferences:
        raise too_many_preferences(len(wishes), limits)
    Request(prompt="-", **given)


def too_many_preferences(count: int, limits: Limits, field: str = "preference") -> ApiError:
    """Return the error for more preferences than a request may have."""
    return ApiError(
        400,
        f"{field}: {count} given; this server permits {limits.preferences} per request.",
        param=field,
    )


def tool_choice(given: str | dict[str, Any] | None) -> str:
    """Convert OpenAI's tool choice to that of `Request`.

    Raises:
        ApiError: it is invalid.
    """
    if isinstance(given, dict):
        function = given.get("function")
        name = function.get("name") if isinstance(function, dict) else given.get("name")
        if not isinstance(name, str) or not name:
            raise ApiError(
                400,
                'tool_choice: expected "auto", "none", "required" or '
                '{"type": "function", "function": {"name": ...}}.',
                param="tool_choice",
            )
        return name
    return {None: "auto", "required": "any"}.get(given, given or "auto")


def response_grammar(given: dict[str, Any] | None) -> Grammar | None:
    """Return the grammar of OpenAI's `response_format`.

    Raises:
        ApiError: it has none of OpenAI's forms.
    """
    given = given or {"type": "text"}
    kind = given.get("type")
    if kind == "text":
        return None
    # Other servers put the schema next to the type, even for `json_object`.
    wrapped = given.get("json_schema") or given
    schema = wrapped.get("schema") if isinstance(wrapped, dict) else wrapped
    if kind == "json_object" and not schema:
        return Grammar.json_object()
    if kind not in ("json_object", "json_schema") or not isinstance(schema, dict):
        raise ApiError(
            400,
            'response_format: expected {"type": "text"}, {"type": "json_object"} or '
            '{"type": "json_schema", "json_schema": {"name": ..., "schema": {...}}}.',
            param="response_format",
        )
    if kind == "json_object":
        schema = {"type": "object", **schema}
    try:
        return Grammar.json_like(schema)
    except (RequestError, RecursionError) as error:
        raise ApiError(400, f"response_format: {error}", param="response_format") from None
