"""Structured prediction: a pydantic class as the grammar of the answer, always valid JSON."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterable, Generator, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from llama_index.core.base.llms.types import ChatMessage, ChatResponse, MessageRole, TextBlock
from llama_index.core.program.utils import FlexibleModel, create_flexible_model
from pydantic import BaseModel
from pydantic_core import from_json

from amulet.errors import DecodeError, RequestError
from amulet.grammar import Grammar

Model = TypeVar("Model", bound=BaseModel)

# Options that LlamaIndex's own program drops, too; the grammar replaces them.
_NOT_NEEDED = ("tool_required", "tool_choice", "allow_parallel_tool_calls")


def call_options(
    output_cls: type[BaseModel], llm_kwargs: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return the keywords of a `chat` that answers in a class's JSON.

    Raises:
        RequestError: the class can't be written as a JSON schema.
    """
    given = {name: value for name, value in (llm_kwargs or {}).items() if name not in _NOT_NEEDED}
    return {"grammar": Grammar.json_like(_schema(output_cls)), **given}


def with_schema(messages: Sequence[ChatMessage], output_cls: type[BaseModel]) -> list[ChatMessage]:
    """Return the messages with the schema after the last user turn, as an explanation."""
    said = list(messages)
    block = TextBlock(text=f"\nAnswer in JSON of this schema:\n{json.dumps(_schema(output_cls))}")
    for index in range(len(said) - 1, -1, -1):
        if said[index].role == MessageRole.USER:
            said[index] = said[index].model_copy(update={"blocks": [*said[index].blocks, block]})
            return said
    return [*said, ChatMessage(role=MessageRole.USER, blocks=[block])]


def parsed(output_cls: type[Model], response: ChatResponse) -> Model:
    """Return the object in an answer.

    Raises:
        DecodeError: the answer was cut off by `max_tokens` or a stop sequence.
        ValidationError: a validator of the class refuses what the schema allows.
    """
    text = response.message.content or ""
    raw = response.raw or {}
    try:
        json.loads(text)
    except ValueError:
        used = raw.get("usage", {}).get("completion_tokens")
        raise DecodeError(
            f"The JSON of {output_cls.__name__} was cut off after {used} tokens "
            f"(finish reason {raw.get('finish_reason')!r}): give a larger max_tokens, and no stop."
        ) from None
    return output_cls.model_validate_json(text)


def partial_objects(
    output_cls: type[Model], responses: Iterable[ChatResponse]
) -> Generator[Model | FlexibleModel, None, None]:
    """Yield the object so far each time it grows, and finally the whole object."""
    growing = _Growing(output_cls)
    last = None
    for last in responses:
        if (known := growing.push(last)) is not None:
            yield known
    if last is not None:
        yield parsed(output_cls, last)


async def apartial_objects(
    output_cls: type[Model], responses: AsyncIterable[ChatResponse]
) -> AsyncGenerator[Model | FlexibleModel, None]:
    """The asynchronous `partial_objects`."""
    growing = _Growing(output_cls)
    last = None
    async for last in responses:
        if (known := growing.push(last)) is not None:
            yield known
    if last is not None:
        yield parsed(output_cls, last)


class _Growing:
    def __init__(self, output_cls: type[BaseModel]) -> None:
        self._cls = create_flexible_model(output_cls)
        self._known: Any = None

    def push(self, response: ChatResponse) -> FlexibleModel | None:
        try:
            found = from_json(response.message.content or "", allow_partial="trailing-strings")
        except ValueError:
            return None
        if not isinstance(found, dict) or found == self._known:
            return None
        self._known = found
        return self._cls.model_validate(found)


def _schema(output_cls: type[BaseModel]) -> dict[str, Any]:
    try:
        return output_cls.model_json_schema()
    except Exception as error:
        raise RequestError(
            f"{output_cls!r} has no JSON schema: {error}; expected a pydantic class."
        ) from None
