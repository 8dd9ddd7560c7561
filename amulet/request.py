"""`Request`: one answer to decode, with all its options.

Every range is checked here, once; the modules below rely on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from amulet.aliases import refuse_unnamed
from amulet.errors import RequestError, shown
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

if TYPE_CHECKING:
    pass


def _message(given: Any) -> Any:
    if not isinstance(given, Mapping):
        raise ValueError('expected a dict, such as {"role": "user", "content": "Hello"}')
    return given


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
        repetition_penalty: 0.01 to 100; above 1 lowers the scores of tokens that already occur in
            the prompt (without preferences) or in the answer; 1 is off.
        stop: stop sequences: strings that end the answer and are removed from it.
        seed: for sampling; the same seed gives the same answer, alone or batched. None draws one.
        trace: return a `TokenTrace` for every token.
        top_logprobs: with `trace`, how many likely alternatives to list for each token.
        logits_processor: Transformers logits processors, applied after steering and before the
            floor; they get the ids of the prompt without preferences and of the answer.
        grammar: the form that the answer must have; see `Grammar`. It starts after the thinking
            span, if there is one.
        steer_grammar: steer under a grammar too, where the grammar permits free text.
        tools: tools that may be called: OpenAI schemas or documented Python functions.
        tool_choice: "auto" (the model decides), "any" (it must call a tool), "none", or the name of
            the tool that it must call. A forced call follows a grammar of the tools' schemas.
        parallel_tool_calls: permit more than one call in the answer.
        tools_prompt: for a chat template without support for tools: "template" raises an error and
            "fallback" describes the tools in the system message. With both, past calls and results
            that the template refuses or drops are written as text.
        template_options: additional variables of the chat template, such as `enable_thinking`.

    Raises:
        RequestError: a field is not valid; the message names each one with its value.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    messages: tuple[Annotated[dict[str, Any], BeforeValidator(_message)], ...] | None = None
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
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100.0)] = 1.0
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

    def __init__(self, *unnamed: Any, **options: Any) -> None:
        refuse_unnamed(unnamed, "Request", 'messages=[{"role": "user", "content": "Hello"}]')
        try:
            super().__init__(**options)
        except ValidationError as error:
            raise RequestError(describe(error, type(self).model_fields)) from None

    @classmethod
    def of(cls, given: Request | Mapping[str, Any]) -> Request:
        """Return a request that may be given as a dict of its fields.

        Raises:
            RequestError: it is neither, or a field is not valid.
        """
        if isinstance(given, Request):
            return given
        if not isinstance(given, Mapping) or "role" in given:  # a message, or a list of them
            raise RequestError(
                f"a request of type {type(given).__name__}: expected a Request, or a dict of its "
                'fields, such as {"messages": [...], "preference": "Be brief."}.'
            )
        return cls(**given)

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

    @field_validator("grammar", mode="before")
    @classmethod
    def _grammar_says_its_kind(cls, given: Any) -> Any:
        is_json = isinstance(given, Mapping) and "kind" in given
        if given is not None and not isinstance(given, Grammar) and not is_json:
            raise ValueError(
                'expected a Grammar, such as Grammar.json_schema({...}) or Grammar.regex("[0-9]+")'
            )
        return given

    @field_validator("messages", mode="before")
    @classmethod
    def _messages_are_dicts(cls, given: Any) -> Any:
        if given is None:
            return given
        listed = isinstance(given, Iterable) and not isinstance(given, str | Mapping)
        messages = tuple(given) if listed else ()
        if not messages:
            raw = "; for raw text use complete()" if isinstance(given, str) else ""
            raise ValueError(
                'expected a list of messages, such as [{"role": "user", "content": "Hello"}]' + raw
            )
        return messages

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
            raise ValueError("tools require messages (a chat); a raw prompt has no place for them")
        if not self.tools and self.tool_choice not in ("auto", "none"):
            raise ValueError(f"tool_choice={shown(self.tool_choice)} requires tools")
        return self

    def steering(self, default: Steering) -> Steering:
        """Return the settings in force: those not given come from `default`."""
        given = {name: getattr(self, name) for name in Steering.model_fields}
        given = {name: value for name, value in given.items() if value is not None}
        return Steering(**{**default.model_dump(), **given}) if given else default


def listed(requests: Iterable[Request | dict[str, Any]]) -> list[Request | dict[str, Any]]:
    """Return the requests of a batch as a list; `Request.of` checks each.

    Raises:
        RequestError: they are not iterable, or are a single request.
    """
    alone = isinstance(requests, str | bytes | Mapping | Request)  # each can be iterated, too
    if alone or not isinstance(requests, Iterable):
        raise RequestError(
            f"requests of type {type(requests).__name__}: expected a list of Request objects, or "
            'of dicts of their fields, such as [{"messages": [...], "preference": "Be brief."}].'
        )
    return list(requests)
