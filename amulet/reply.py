"""`Reply`, the finished answer, and its parts: usage, trace, tool calls, events."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from amulet.preference import (
    Steering,
)
from amulet.rendering.html import reply_html

if TYPE_CHECKING:
    from rich.console import RenderableType


FinishReason = Literal["stop", "length", "tool_calls", "cancelled"]


EventKind = Literal["text", "reasoning", "tool_call"]


@dataclass(frozen=True)
class Usage:
    """Token counts. The prompt tokens that steering added are counted separately.

    Attributes:
        prompt_tokens: tokens of the preferred prompt (the prompt that the answer responds to).
        completion_tokens: tokens decoded, including the end-of-turn token.
        base_prompt_tokens: prompt tokens of the other rows; 0 for a plain request.
        cached_tokens: how many of `prompt_tokens` were reused from an earlier or running request
            with the same prefix. It depends on other requests, so `==` ignores it.
    """

    prompt_tokens: int
    completion_tokens: int
    base_prompt_tokens: int = 0
    cached_tokens: int = field(default=0, compare=False)

    @property
    def total_tokens(self) -> int:
        """Prompt and completion, without the other rows."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class TokenTrace:
    """Why one token was chosen. Log-probabilities are natural, before temperature and top-k/p.

    Attributes:
        token_id, text: the token that was emitted.
        preferred: its log-probability with the preference in the prompt (with several: the mean
            of their rows by weight).
        base: its log-probability without the preference.
        steered: its log-probability under the steered distribution, after the floor.
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
    """Return the share of tokens where the plain model would have chosen another; 0 for none."""
    return sum(token.unsteered_id != token.token_id for token in trace) / max(1, len(trace))


@dataclass(frozen=True)
class ToolCall:
    """A tool call in an answer.

    Attributes:
        name: the tool's name, as the model wrote it.
        arguments: its arguments, not checked against the tool's schema.
        id: the call's unique id, for the tool message that answers it.
        written: the JSON of the arguments as it was streamed; "" for a call constructed in code.
    """

    name: str
    arguments: dict[str, Any]
    id: str
    written: str = field(default="", compare=False, repr=False)


@dataclass(frozen=True)
class InvalidToolCall:
    """A call that can't be parsed or was cut off: what the model wrote, and the error."""

    raw: str
    error: str
    id: str
    name: str | None = None


@dataclass(frozen=True)
class Event:
    """A piece of a streamed answer; events come in the order of the answer.

    Attributes:
        kind: "text" for the reader, "reasoning" (a thinking span), or "tool_call".
        text: the piece. The pieces of one kind concatenate to the reply's `text` or `reasoning`;
            those of one call to the JSON of its arguments. With a trace the last may be empty. A
            call's events are sent when the call is complete, so a cut call never looks complete.
        tokens: with `trace=True`, the tokens whose text begins here; together they are the trace.
        index: for a call, its index in the answer, from 0.
        id, name: for a call's first event, its id and the tool's name (None: could not be parsed).
        error: for the only event of an invalid call, the error; `text` is what the model wrote.
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
        text: what the user reads: no special tokens, no prompt, no stop sequence.
        token_ids: every decoded id, including the end-of-turn id.
        finish_reason: "stop" (end of turn or stop sequence), "tool_calls" (the model calls tools),
            "length" or "cancelled".
        usage: token counts.
        steering: the settings in force, see `Steering`; None if the answer was decoded plainly.
        stop_string: the stop sequence that ended the answer, if any.
        trace: a `TokenTrace` per token, if requested.
        reasoning: the thinking spans, without their markers.
        tool_calls, invalid_tool_calls: the calls in the answer, and those that can't be parsed.
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
