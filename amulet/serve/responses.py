"""OpenAI's Responses API: converts a request to a `ChatBody`, and its answer to items and events.

Nothing is stored: the client sends the whole conversation, whose prompt is in the prefix cache.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field, ValidationError

from amulet.errors import shown
from amulet.reply import Event, InvalidToolCall, Reply, Usage
from amulet.serve.errors import ApiError, from_validation
from amulet.serve.logprobs import Content, TokenBytes
from amulet.serve.replies import details, likely_tokens, traced
from amulet.serve.schema import ChatBody, MaxTokens, Options, Unused

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LOGPROBS = "message.output_text.logprobs"
# Fields of `ChatBody`, and their names in the Responses API.
NAMES = {
    "max_tokens": "max_output_tokens",
    "messages": "input",
    "reasoning_effort": "reasoning",
    "response_format": "text",
}


class TextOptions(BaseModel):
    """The format of the text."""

    format: dict[str, Any] | None = None
    verbosity: Literal["low", "medium", "high"] | None = Field(
        default=None, description="For chat templates that support it."
    )


class ReasoningOptions(BaseModel):
    """Thinking, for models whose chat template has an option for it."""

    effort: str | None = None
    summary: Unused = None


class Item(BaseModel):
    """A message, a call, its result, or a thinking span; other keys are ignored."""

    type: str | None = None
    role: str | None = None
    content: str | list[dict[str, Any]] | None = None
    summary: list[dict[str, Any]] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[dict[str, Any]] | None = None


class ResponseBody(Options):
    """The body of POST /v1/responses."""

    refused: ClassVar[Mapping[str, str]] = {
        "previous_response_id": "this server stores no conversation; send its messages, and the "
        "items of earlier outputs, in input",
        "conversation": "this server stores no conversation; send its items in input",
        "background": "this server stores no responses; use stream=true",
        "prompt": "this server stores no prompts; send instructions and input",
        "context_management": "leave it out, and send a shorter input",
        "moderation": "leave it out",
    }

    input: str | Annotated[list[Item], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: MaxTokens = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    include: list[str] | None = Field(default=None, description=f"Only {LOGPROBS} has an effect.")
    top_logprobs: Annotated[int, Field(ge=0, le=100)] | None = None
    truncation: Literal["disabled"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools_prompt: Literal["template", "fallback"] = "fallback"

    metadata: dict[str, str] | None = None
    max_tool_calls: Unused = None
    prompt_cache_options: Unused = None
    previous_response_id: Any = None
    conversation: Any = None
    background: Any = None
    prompt: Any = None
    context_management: Any = None
    moderation: Any = None

    @property
    def logprobs(self) -> bool:
        """Whether log-probabilities of the text's tokens are requested."""
        return LOGPROBS in (self.include or ()) or bool(self.top_logprobs)

    def chat(self) -> ChatBody:
        """Return the equivalent chat completion request.

        Raises:
            ApiError: an item, a tool or a format has no equivalent there.
        """
        choice = self.tool_choice
        if isinstance(choice, dict) and choice.get("type") != "function":
            raise ApiError(
                400,
                f'tool_choice of type {shown(choice.get("type"))}: expected "auto", "none", '
                '"required" or {"type": "function", "name": ...}.',
                param="tool_choice",
            )
        fields: dict[str, Any] = {name: getattr(self, name) for name in Options.model_fields}
        fields |= {
            "messages": _messages(self.input, self.instructions),
            "max_tokens": self.max_output_tokens,
            "tools": [_tool(index, tool) for index, tool in enumerate(self.tools or ())],
            "tool_choice": choice,
            "parallel_tool_calls": self.parallel_tool_calls,
            "logprobs": self.logprobs,
            "top_logprobs": self.top_logprobs,
            "chat_template_kwargs": self.chat_template_kwargs,
            "tools_prompt": self.tools_prompt,
        }
        if self.text is not None:
            fields |= {
                "response_format": _format(self.text.format),
                "verbosity": self.text.verbosity,
            }
        if self.reasoning is not None:
            fields["reasoning_effort"] = self.reasoning.effort
        try:
            return ChatBody(**fields)
        except ValidationError as error:
            raise from_validation(error.errors(), ChatBody.model_fields) from None


def as_response_error(error: ApiError) -> ApiError:
    """Return an error of a chat completion with the field names of the Responses API."""
    param = error.param and NAMES.get(error.param.partition("[")[0], error.param)
    message = error.message
    if message.startswith("messages"):  # which are numbered differently from the items
        message = f"input, read as a chat: {message}"
    message = re.sub(r"^max_tokens\b", "max_output_tokens", message)
    message = re.sub(r"\bresponse_format\b", "text.format", message)
    return ApiError(
        error.status, message, param=param, code=error.code, retry_after=error.retry_after
    )


def _messages(given: str | list[Item], instructions: str | None) -> list[dict[str, Any]]:
    """Return the input as messages; the items of one assistant turn become one message."""
    messages: list[dict[str, Any]] = []
    if instructions is not None:
        messages.append({"role": "system", "content": instructions})

    def turn() -> dict[str, Any]:
        if not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": None})
        return messages[-1]

    items = [Item(role="user", content=given)] if isinstance(given, str) else given
    for index, item in enumerate(items):
        kind = item.type or "message"
        if kind == "message" and item.role == "assistant":
            one = turn()
            if one["content"] is not None and "tool_calls" not in one:  # already a message
                messages.append(one := {"role": "assistant", "content": None})
            said = item.content or ""
            parts = [{"type": "text", "text": said}] if isinstance(said, str) else said
            one["content"] = [*(one["content"] or ()), *parts]
        elif kind == "message":
            messages.append({"role": item.role, "content": item.content})
        elif kind == "function_call":
            function = {"name": item.name, "arguments": item.arguments}
            call = {"id": item.call_id, "type": "function", "function": function}
            turn().setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            result = {"role": "tool", "tool_call_id": item.call_id, "content": item.output}
            messages.append(result)
        elif kind == "reasoning":
            thoughts = item.content if isinstance(item.content, list) else item.summary
            if thought := "".join(str(part.get("text") or "") for part in thoughts or ()):
                one = turn()
                one["reasoning_content"] = one.get("reasoning_content", "") + thought
        else:
            stored = kind == "item_reference"
            raise ApiError(
                400,
                f"input[{index}] has type {shown(kind)}: expected message, function_call, "
                "function_call_output or reasoning."
                + " This server stores no items: send the item itself."
                * stored,
                param="input",
            )
    return messages


def _tool(index: int, tool: dict[str, Any]) -> dict[str, Any]:
    if tool.get("type") != "function" or "name" not in tool:
        raise ApiError(
            400,
            f"tools[{index}] has type {shown(tool.get('type'))}: expected "
            '{"type": "function", "name": ..., "parameters": {...}}; this server runs no tools.',
            param="tools",
        )
    names = ("name", "description", "parameters")  # not `strict`: the model would read it
    function = {name: tool[name] for name in names if tool.get(name) is not None}
    return {"type": "function", "function": function}


def _format(given: dict[str, Any] | None) -> dict[str, Any] | None:
    kind = (given or {}).get("type", "text")
    schema = (given or {}).get("schema", {})
    if kind not in ("text", "json_object", "json_schema") or not isinstance(schema, dict):
        kind = None
    if kind is None or (kind == "json_schema" and not schema):
        raise ApiError(
            400,
            'text.format: expected {"type": "text"}, {"type": "json_object"} or '
            '{"type": "json_schema", "name": ..., "schema": {...}}.',
            param="text",
        )
    return given


class ResponseWriter:
    """Writes one answer as a response, whole or as a stream of events; its interface is `Writer`'s.

    Args:
        body: the request, whose settings the response repeats.
        model, fingerprint: those of the served model.
        raw: the bytes of the tokenizer's tokens.
        tokenizer: counts the tokens of the thinking span.
    """

    done = ""

    def __init__(
        self,
        body: ResponseBody,
        model: str,
        fingerprint: str,
        raw: TokenBytes,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        self._body = body
        self._id = secrets.token_hex(12)
        self._raw = raw
        self._tokenizer = tokenizer
        self._head = {
            "id": f"resp_{self._id}",
            "object": "response",
            "created_at": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
            **_repeated(body),
        }
        self._content = Content(raw)
        self._logprobs: list[dict[str, Any]] = []  # for the next delta
        self._output: list[dict[str, Any]] = []
        self._invalid: list[dict[str, Any]] = []
        self._open: tuple[str, int] | None = None  # kind and index of the open item's events
        self._events = 0

    def take(self, index: int, event: Event) -> None:
        """Record an event of an answer that `whole` will return."""
        for _ in self.event(index, event):
            pass

    def whole(self, replies: Sequence[Reply]) -> dict[str, Any]:
        """Return the whole response."""
        *_, last = self.last(0, replies[0])
        response: dict[str, Any] = last["response"]
        return response

    def begin(self) -> Iterator[dict[str, Any]]:
        """Yield the events before the answer."""
        for name in ("created", "in_progress"):
            yield self._event(name, response=self._response("in_progress"))

    def event(self, index: int, event: Event) -> Iterator[dict[str, Any]]:
        """Yield the API's events for a piece of the answer."""
        if self._body.logprobs:
            self._logprobs += likely_tokens(self._content.take(event), self._raw)
        if event.error is not None:
            yield from self._close("completed")
            invalid = InvalidToolCall(event.text, event.error, event.id or "", event.name)
            self._invalid.append(vars(invalid))
            return
        item = (event.kind, event.index)
        if self._open != item and (event.text or event.kind == "tool_call"):
            yield from self._close("completed")
            yield from self._begin(item, event)
        if not event.text:
            return
        if event.kind == "tool_call":
            self._output[-1]["arguments"] += event.text
            yield self._at("function_call_arguments.delta", delta=event.text)
            return
        self._output[-1]["content"][0]["text"] += event.text
        if event.kind == "reasoning":
            yield self._at("reasoning_text.delta", content_index=0, delta=event.text)
        else:
            yield self._at(
                "output_text.delta",
                content_index=0,
                delta=event.text,
                logprobs=self._new_logprobs(),
            )

    def last(self, index: int, reply: Reply) -> Iterator[dict[str, Any]]:
        """Yield the events that end the answer; the last contains the whole response."""
        # The server's time limit cuts an answer off as a token limit does.
        is_cut = reply.finish_reason in ("length", "cancelled")
        status = "incomplete" if is_cut else "completed"
        if not self._output:  # clients expect an item
            yield from self._begin(("text", 0), Event("text", ""))
        if self._body.logprobs:
            self._logprobs += likely_tokens(self._content.end(), self._raw)
        yield from self._close(status)
        yield self._event(status, response=self._response(status, reply))

    def end(self, usages: Sequence[Usage]) -> Iterator[dict[str, Any]]:
        """Yield nothing: the last event has the usage."""
        yield from ()

    def failed(self, error: ApiError) -> dict[str, Any]:
        """Return the event that ends a stream with an error."""
        told = as_response_error(error)
        code = "server_error" if told.status >= 500 else "invalid_prompt"
        response = self._response("failed")
        response["error"] = {"code": code, "message": told.body["error"]["message"]}
        return self._event("failed", response=response)

    def _begin(self, item: tuple[str, int], event: Event) -> Iterator[dict[str, Any]]:
        self._open = item
        place = len(self._output)
        new: dict[str, Any] = {"status": "in_progress"}
        part: dict[str, Any] = {}
        if event.kind == "tool_call":
            new |= {"id": f"fc_{self._id}{place}", "type": "function_call", "call_id": event.id}
            new |= {"name": event.name or "", "arguments": ""}
        elif event.kind == "reasoning":
            new |= {"id": f"rs_{self._id}{place}", "type": "reasoning", "summary": []}
            part = {"type": "reasoning_text", "text": ""}
        else:
            new |= {"id": f"msg_{self._id}{place}", "type": "message", "role": "assistant"}
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        if part:
            new["content"] = []
        yield self._event("output_item.added", output_index=place, item=new)
        self._output.append(new)
        if part:
            yield self._at("content_part.added", content_index=0, part=part)
            new["content"].append(part)

    def _close(self, status: str) -> Iterator[dict[str, Any]]:
        if self._open is None:
            return
        kind, item = self._open[0], self._output[-1]
        self._open = None
        if kind == "tool_call":
            done = {"arguments": item["arguments"], "name": item["name"]}
            yield self._at("function_call_arguments.done", **done)
        else:
            (part,) = item["content"]
            at = {"content_index": 0}
            if kind == "reasoning":
                yield self._at("reasoning_text.done", **at, text=part["text"])
            else:
                self._new_logprobs()
                said = {"text": part["text"], "logprobs": part["logprobs"]}
                yield self._at("output_text.done", **at, **said)
            yield self._at("content_part.done", **at, part=part)
        item["status"] = status
        place = len(self._output) - 1
        yield self._event("output_item.done", output_index=place, item=item)

    def _new_logprobs(self) -> list[dict[str, Any]]:
        new, self._logprobs = self._logprobs, []
        self._output[-1]["content"][0]["logprobs"] += new
        return new

    def _at(self, name: str, /, **fields: Any) -> dict[str, Any]:
        """Return an event of the last item."""
        place = len(self._output) - 1
        return self._event(name, item_id=self._output[-1]["id"], output_index=place, **fields)

    def _event(self, name: str, /, **fields: Any) -> dict[str, Any]:
        self._events += 1
        return {"type": f"response.{name}", "sequence_number": self._events - 1, **fields}

    def _response(self, status: str, reply: Reply | None = None) -> dict[str, Any]:
        response = {
            **self._head,
            "status": status,
            "completed_at": int(time.time()) if status == "completed" else None,
            "error": None,
            "incomplete_details": (
                {"reason": "max_output_tokens"} if status == "incomplete" else None
            ),
            "output": list(self._output),
            "usage": None,
        }
        if reply is None:
            return response
        usage = reply.usage
        thought = self._tokenizer.encode(reply.reasoning, add_special_tokens=False)
        response["usage"] = {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": len(thought)},
            "total_tokens": usage.total_tokens,
            "base_prompt_tokens": usage.base_prompt_tokens,
        }
        # Never among the calls, as in a chat's messages.
        if self._invalid:
            response["invalid_tool_calls"] = self._invalid
        if self._body.trace:
            response["trace"] = [traced(token) for token in reply.trace or ()]
        if self._body.return_details:
            response["details"] = details(reply)
        return response


def _repeated(body: ResponseBody) -> dict[str, Any]:
    """Return the settings of a request that its response repeats."""
    text = body.text or TextOptions()
    return {
        "background": False,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {"effort": body.reasoning and body.reasoning.effort, "summary": None},
        "store": False,
        "temperature": body.temperature or 0.0,
        "text": {"format": text.format or {"type": "text"}}
        | ({"verbosity": text.verbosity} if text.verbosity else {}),
        "tool_choice": body.tool_choice or "auto",
        "tools": body.tools or [],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": "disabled",
        "user": body.user,
    }
