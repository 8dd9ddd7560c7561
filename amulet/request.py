"""What is asked for and what comes back: `Request`, `Reply`, `Usage`, `TokenTrace`.

Every range is checked here, once; the modules below trust it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from amulet.errors import RequestError
from amulet.grammar import Grammar
from amulet.preference import (
    Floor,
    Focus,
    LoopGuard,
    Placement,
    Preference,
    Steering,
    Strength,
    describe,
    normal_preferences,
)
from amulet.rendering.html import reply_html

if TYPE_CHECKING:
    from rich.console import RenderableType

FinishReason = Literal["stop", "length", "tool_calls", "cancelled"]
EventKind = Literal["text", "reasoning", "tool_call"]


class Request(BaseModel):
    """One answer to decode; frozen. `Amulet.batch` takes a list of them.

    Args:
        messages: the chat, dicts in the Transformers form (`role`, `content`, ...); or
        prompt: raw text for a completion, without a chat template. Exactly one of the two.
        preference: text, `Preference`, a list of them, or None/"" for plain decoding.
        strength, floor, placement, focus, loop_guard: see `Steering`; None takes the model's
            default.
        max_new_tokens: the answer's limit in tokens, at least 1.
        temperature: 0 is greedy; above 0 samples.
        top_k: keep the k likeliest tokens; 0 is off.
        top_p: keep the smallest set with this probability, in (0, 1]; 1 is off.
        min_p: keep tokens with at least this share of the likeliest one's probability; 0 is off.
        repetition_penalty: above 1 lowers tokens that the prompt (without preferences) or answer
            already has; 1 is off.
        stop: strings that end the answer; they are cut off.
        seed: for sampling; the same one gives the same answer, alone or in a batch. None draws one.
        trace: give a `TokenTrace` for every token.
        top_logprobs: with `trace`, how many likely alternatives each token lists.
        logits_processor: Transformers logits processors, applied after steering and before the
            floor; they get the ids of the prompt without preferences and of the answer.
        grammar: what the answer must look like; see `Grammar`. After the thinking span, if any.
        steer_grammar: steer under a grammar too, where it leaves the text free.
        tools: tools that may be called: OpenAI's schemas or documented Python functions.
        tool_choice: "auto" (the model decides), "any" (it must call), "none", or a tool's name (it
            must call that one). A forced call follows a grammar made of the tools' schemas.
        parallel_tool_calls: permit more than one call in the answer.
        tools_prompt: where the chat template knows no tools, "template" is an error and "fallback"
            describes them in the system message. Past calls and results that the template refuses
            or drops are text in both.
        template_options: further variables of the chat template, such as `enable_thinking`.

    Raises:
        RequestError: naming each field that is wrong, with its value.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    messages: tuple[dict[str, Any], ...] | None = None
    prompt: str | None = None
    preference: tuple[Preference, ...] = ()
    strength: Strength | None = None
    floor: Floor | None = None
    placement: Placement | None = None
    focus: Focus | None = None
    loop_guard: LoopGuard | None = None
    max_new_tokens: Annotated[int, Field(ge=1, strict=True)] = 256
    temperature: Annotated[float, Field(ge=0.0, le=100.0, allow_inf_nan=False)] = 0.0
    top_k: Annotated[int, Field(ge=0)] = 0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 1.0
    stop: tuple[str, ...] = ()
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    trace: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=100)] = 0
    logits_processor: tuple[Any, ...] = ()
    grammar: Grammar | None = None
    steer_grammar: bool = False
    tools: tuple[Any, ...] | None = None
    tool_choice: str = "auto"
    parallel_tool_calls: bool = True
    tools_prompt: Literal["template", "fallback"] = "template"
    template_options: dict[str, Any] = Field(default_factory=dict)

    def __init__(self, **options: Any) -> None:
        try:
            super().__init__(**options)
        except ValidationError as error:
            raise RequestError(describe(error, type(self).model_fields)) from None

    @field_validator("preference", mode="before")
    @classmethod
    def _normal_preference(cls, given: Any) -> tuple[Preference, ...]:
        return normal_preferences(given)

    @field_validator("stop", mode="before")
    @classmethod
    def _stop_is_text(cls, given: Any) -> tuple[str, ...]:
        strings = (given,) if isinstance(given, str) else given
        if strings is None:
            return ()
        if not isinstance(strings, list | tuple) or any(
            not isinstance(string, str) or not string for string in strings
        ):
            raise ValueError("expected a non-empty string or a list of them")
        return tuple(strings)

    @field_validator("logits_processor", mode="before")
    @classmethod
    def _processors_can_be_called(cls, given: Any) -> tuple[Any, ...]:
        if given is None:
            return ()
        processors = (given,) if callable(given) else given
        if not isinstance(processors, Iterable) or not all(map(callable, processors)):
            raise ValueError("expected callables (input_ids, scores) -> scores")
        return tuple(processors)

    @field_validator("messages", mode="before")
    @classmethod
    def _messages_are_dicts(cls, given: Any) -> Any:
        if isinstance(given, str):
            raise ValueError("expected a list of messages; for raw text use complete()")
        if given is not None and not given:
            raise ValueError("expected at least one message, such as {'role': 'user', ...}")
        return given

    @field_validator("tools", mode="before")
    @classmethod
    def _tools_are_listed(cls, given: Any) -> Any:
        if given is not None and not isinstance(given, list | tuple):
            raise ValueError("expected a list of tools")
        return given

    @model_validator(mode="after")
    def _one_source(self) -> Request:
        if (self.messages is None) == (self.prompt is None):
            raise ValueError("expected either messages (a chat) or prompt (raw text), not both")
        if self.top_logprobs and not self.trace:
            raise ValueError("top_logprobs needs trace=True")
        if self.tools and self.prompt is not None:
            raise ValueError("tools need messages (a chat); a raw prompt has no place for them")
        if not self.tools and self.tool_choice not in ("auto", "none"):
            raise ValueError(f"tool_choice={self.tool_choice!r} needs tools")
        return self

    def steering(self, default: Steering) -> Steering:
        """Return how to steer: what was not given is taken from `default`."""
        given = {name: getattr(self, name) for name in Steering.model_fields}
        given = {name: value for name, value in given.items() if value is not None}
        return Steering(**{**default.model_dump(), **given}) if given else default


@dataclass(frozen=True)
class Usage:
    """Token counts. The base row's share is told apart: it is what steering cost.

    Attributes:
        prompt_tokens: tokens of the preferred prompt (the prompt that the user sees answered).
        completion_tokens: tokens decoded, the end-of-turn token included.
        base_prompt_tokens: prompt tokens of the further rows; 0 for a plain request.
        cached_tokens: how many of `prompt_tokens` were not computed, because an earlier or running
            request began alike. It depends on what else was asked, so it doesn't count in `==`.
    """

    prompt_tokens: int
    completion_tokens: int
    base_prompt_tokens: int = 0
    cached_tokens: int = field(default=0, compare=False)

    @property
    def total_tokens(self) -> int:
        """Prompt and completion, without the further rows."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class TokenTrace:
    """Why one token was chosen. Log-probabilities are natural, before temperature and top-k/p.

    Attributes:
        token_id, text: the token that was emitted.
        preferred: its log-probability with the preference in the prompt (with several: the mean
            of their rows by weight).
        base: its log-probability without.
        steered: its log-probability under the steered distribution, floor applied.
        unsteered_id, unsteered_text: what the plain model would have chosen here.
        top: likely alternatives under the steered distribution, `(token_id, text, logprob)`.
    """

    token_id: int
    text: str
    preferred: float
    base: float
    steered: float
    unsteered_id: int
    unsteered_text: str
    top: tuple[tuple[int, str, float], ...] = ()


def mean_base(trace: Sequence[TokenTrace]) -> float:
    """Return the mean log-probability of the tokens under the plain model, nats; 0 for none."""
    return sum(token.base for token in trace) / max(1, len(trace))


def changed_share(trace: Sequence[TokenTrace]) -> float:
    """Return the share of tokens for which the plain model would have said another; 0 for none."""
    return sum(token.unsteered_id != token.token_id for token in trace) / max(1, len(trace))


@dataclass(frozen=True)
class ToolCall:
    """A call that the model makes.

    Attributes:
        name: the tool's name, as the model wrote it.
        arguments: its arguments; they are not checked against the tool's schema.
        id: an id of this call, unique, for the tool message that answers it.
        written: the JSON of the arguments as it was streamed; "" for a call made by hand.
    """

    name: str
    arguments: dict[str, Any]
    id: str
    written: str = field(default="", compare=False, repr=False)


@dataclass(frozen=True)
class InvalidToolCall:
    """A call that can't be read or was cut off: what the model wrote, and what is wrong with it."""

    raw: str
    error: str
    id: str
    name: str | None = None


@dataclass(frozen=True)
class Event:
    """A piece of an answer, in the order it was written.

    Attributes:
        kind: "text" for the reader, "reasoning" (a thinking span), or "tool_call".
        text: the piece. Those of one kind concatenate to the reply's `text` or `reasoning`; those
            of one call to the JSON of its arguments. With a trace the last event may be empty. A
            call's events come once it has ended, so that no cut call looks like a whole one.
        tokens: with `trace=True`, the tokens whose text begins here; all events' make the trace.
        index: for a call, the how manyth of the answer it is, from 0.
        id, name: for a call's first event, its id and the tool's name (None: not readable).
        error: for an invalid call's only event, what is wrong; `text` is what the model wrote.
    """

    kind: EventKind
    text: str
    tokens: tuple[TokenTrace, ...] = ()
    index: int = 0
    id: str | None = None
    name: str | None = None
    error: str | None = None

    def with_tokens(self, tokens: tuple[TokenTrace, ...]) -> Event:
        """Return this event with its tokens."""
        return replace(self, tokens=tokens)


@dataclass(frozen=True)
class Reply:
    """A finished answer.

    Attributes:
        text: what the user reads: no special tokens, no prompt, no stop string.
        token_ids: every decoded id, the end-of-turn id included.
        finish_reason: "stop" (end of turn or stop string), "tool_calls" (the model calls tools),
            "length" or "cancelled".
        usage: token counts.
        steering: the settings in force, see `Steering`; None when decoded plainly.
        stop_string: the stop string that ended the answer, if one did.
        trace: a `TokenTrace` per token, if asked for.
        reasoning: the thinking spans, without their markers.
        tool_calls, invalid_tool_calls: the calls that the model makes, and what it failed to say.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    steering: Steering | None = None
    stop_string: str | None = None
    trace: tuple[TokenTrace, ...] | None = field(default=None, repr=False)
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    invalid_tool_calls: tuple[InvalidToolCall, ...] = ()

    def __str__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:  # what a notebook shows
        return reply_html(self)

    def __rich__(self) -> RenderableType:  # what rich prints
        from amulet.rendering.terminal import reply_terminal  # rich is slow to import

        return reply_terminal(self)
