"""Converts a `Request` to the server's JSON, and the server's chunks to events and a `Reply`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from amulet.errors import DecodeError, RequestError
from amulet.images import with_data_urls
from amulet.preference import Steering
from amulet.prompting.chat_template import check_unicode
from amulet.reply import Event, InvalidToolCall, Reply, TokenTrace, ToolCall, Usage
from amulet.request import Request
from amulet.tool_calls import tool_schemas

_SAME = (
    *Steering.model_fields,
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "seed",
    "trace",
)


def to_body(request: Request, model: str) -> dict[str, Any]:
    """Return the body of a streaming request.

    Raises:
        RequestError: the request has logits processors or values that JSON can't represent.
    """
    if request.logits_processor:
        raise RequestError(
            "logits_processor: Python functions can't be sent to a server; leave it out, or load "
            "the model in this process."
        )
    body: dict[str, Any] = {name: getattr(request, name) for name in _SAME}
    body.update(model=model, max_tokens=request.max_new_tokens, return_details=True, stream=True)
    body["stream_options"] = {"include_usage": True}
    body["stop"] = list(request.stop) or None
    body["preference"] = [wish.model_dump() for wish in request.preference] or None
    body["top_logprobs"] = request.top_logprobs or None
    if request.grammar is not None:
        body["grammar"] = vars(request.grammar)
        body["steer_grammar"] = request.steer_grammar
    if request.prompt is not None:
        body["prompt"] = request.prompt
    else:
        body["messages"] = with_data_urls(request.messages or ())
        body.update(chat_options(request))
        if request.tools:
            choice = request.tool_choice
            named = {"type": "function", "function": {"name": choice}}
            known = {"auto": "auto", "none": "none", "any": "required"}
            body["tool_choice"] = known.get(choice, named)
            body["parallel_tool_calls"] = request.parallel_tool_calls
    return sendable(body)


def sendable(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return a body without its None values.

    Raises:
        RequestError: it can't be written as JSON, or a text contains a lone surrogate.
    """
    try:
        json.dumps(dict(body), allow_nan=False, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        check_unicode(str(error.object))
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(
            f"The request can't be sent as JSON ({error}): give texts, finite numbers, lists and "
            "dicts of them."
        ) from None
    return {name: value for name, value in body.items() if value is not None}


def chat_options(request: Request) -> dict[str, Any]:
    """Return the options that affect a chat's prompt, in addition to its messages."""
    return {
        "tools": tool_schemas(request.tools) if request.tools else None,
        "tools_prompt": request.tools_prompt,
        "chat_template_kwargs": request.template_options or None,
    }


class Collector:
    """Converts a server's chunks to events, and all of them to the reply."""

    def __init__(self, traced: bool) -> None:
        self.usage = Usage(0, 0)
        self.trace: list[TokenTrace] = []
        self._traced = traced
        self._details: dict[str, Any] | None = None
        self._texts = {"text": "", "reasoning": ""}
        self._calls: dict[int, tuple[str, str, list[str]]] = {}  # id, name, arguments

    @property
    def text(self) -> str:
        """The text so far."""
        return self._texts["text"]

    def take(self, chunk: Mapping[str, Any]) -> list[Event]:
        """Return the events of a chunk.

        Raises:
            DecodeError: it is not a chunk of `amulet serve`.
        """
        try:
            return list(self._events(chunk))
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise DecodeError(
                "The server sent something that can't be read as part of an answer "
                f"({type(error).__name__}); is it an `amulet serve` of the same version?"
            ) from error

    def _events(self, chunk: Mapping[str, Any]) -> Iterator[Event]:
        if usage := chunk.get("usage"):
            self.usage = Usage(
                usage["prompt_tokens"],
                usage["completion_tokens"],
                usage.get("base_prompt_tokens", 0),
                (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
            )
        for choice in chunk.get("choices") or ():
            tokens = tuple(_token(token) for token in choice.get("trace") or ())
            self.trace += tokens
            self._details = choice.get("details") or self._details
            delta = choice.get("delta") or {"content": choice.get("text")}
            event = self._event(delta)
            if event is not None:
                yield event.with_tokens(tokens)
            elif tokens:
                yield Event("text", "", tokens)

    def _event(self, delta: Mapping[str, Any]) -> Event | None:
        for call in delta.get("tool_calls") or ():
            function, index = call["function"], call["index"]
            id_, name = call.get("id"), function.get("name") or None
            if id_ is not None:
                self._calls[index] = (id_, name or "", [])
            self._calls[index][2].append(function.get("arguments") or "")
            return Event("tool_call", function.get("arguments") or "", (), index, id_, name)
        for call in delta.get("invalid_tool_calls") or ():
            return Event(
                "tool_call", call["raw"], (), call["index"], call["id"], call["name"], call["error"]
            )
        if reasoning := delta.get("reasoning_content"):
            self._texts["reasoning"] += reasoning
            return Event("reasoning", reasoning)
        if content := delta.get("content"):
            self._texts["text"] += content
            return Event("text", content)
        return None

    def reply(self, cancelled: bool) -> Reply:
        """Return the answer; `cancelled` tells that the client ended it.

        Raises:
            RequestError: the answer is not finished.
            DecodeError: the server stopped without finishing it.
        """
        details = self._details
        if details is None:
            if not cancelled:
                raise DecodeError(
                    "The server ended the answer without a finish reason; is it an `amulet serve` "
                    "of the same version?"
                )
            details = {"token_ids": [], "finish_reason": "cancelled"}
        invalid = tuple(InvalidToolCall(**call) for call in details.get("invalid_tool_calls", ()))
        steering = details.get("steering")
        return Reply(
            text=self.text,
            token_ids=tuple(details["token_ids"]),
            finish_reason=details["finish_reason"],
            usage=self.usage,
            steering=None if steering is None else Steering(**steering),
            stop_string=details.get("stop_string"),
            trace=tuple(self.trace) if self._traced else None,
            reasoning=self._texts["reasoning"],
            tool_calls=tuple(
                ToolCall(name, json.loads(written := "".join(arguments)), id_, written)
                for id_, name, arguments in self._calls.values()
            )
            if not cancelled
            else (),
            invalid_tool_calls=invalid,
        )


def _token(given: Mapping[str, Any]) -> TokenTrace:
    figures = {
        name: float("-inf") if given[name] is None else given[name]
        for name in ("preferred", "base", "steered")
    }
    top: Sequence[Any] = given["top"]
    likely = tuple((id_, text, float("-inf") if p is None else p) for id_, text, p in top)
    return TokenTrace(**{**given, **figures, "top": likely})
