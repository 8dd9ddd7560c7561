"""Tools for a chat template that knows none: a prompt in the system message, and calls as text.

The system message gets the instructions below with the tools' schemas; past calls become the text
that the model would have written, results become user turns. Calls are read as in Hermes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from amulet.tools.base import Schema

TOOLS_PROMPT = """\
You can use these tools, one JSON schema per line:
<tools>
{tools}
</tools>
To use a tool, answer with nothing but its name and arguments as JSON between tags:
<tool_call>
{{"name": "the tool's name", "arguments": {{"an argument": "its value"}}}}
</tool_call>
The result comes back between <tool_response> tags. Answer in plain words when no tool is needed \
or once you have the results."""


def as_text(
    messages: Sequence[Mapping[str, Any]], schemas: Sequence[Schema], default_system: str
) -> list[dict[str, Any]]:
    """Return a chat without tool calls and tool messages, and with the tools in its system message.

    Args:
        messages: the chat; what is not a tool call or a result is passed on as it is.
        schemas: the tools that may be called; none adds no instructions.
        default_system: the template's own system text, kept where the chat has none.
    """
    chat: list[dict[str, Any]] = []
    for message in messages:
        if message.get("role") == "tool":
            result = f"<tool_response>\n{_text(message.get('content'))}\n</tool_response>"
            if chat and chat[-1].get("results"):
                chat[-1]["content"] += "\n" + result
            else:
                chat.append({"role": "user", "content": result, "results": True})
        elif message.get("tool_calls"):
            chat.append({"role": "assistant", "content": _with_calls(message)})
        else:
            chat.append(dict(message))
    for message in chat:
        message.pop("results", None)
    return _with_instructions(chat, schemas, default_system) if schemas else chat


def _with_calls(message: Mapping[str, Any]) -> str:
    blocks = [_text(message.get("content"))]
    for call in message["tool_calls"]:
        function = call.get("function", call) if isinstance(call, Mapping) else {}
        arguments = function.get("arguments")
        written = arguments if isinstance(arguments, str) else json.dumps(arguments or {})
        body = f'{{"name": {json.dumps(function.get("name"))}, "arguments": {written}}}'
        blocks.append(f"<tool_call>\n{body}\n</tool_call>")
    return "\n".join(block for block in blocks if block)


def _with_instructions(
    chat: list[dict[str, Any]], schemas: Sequence[Schema], default_system: str
) -> list[dict[str, Any]]:
    listed = "\n".join(json.dumps(schema) for schema in schemas)
    instructions = TOOLS_PROMPT.format(tools=listed)
    first = chat[0] if chat else {}
    if first.get("role") in ("system", "developer"):
        system = _text(first.get("content"))
        return [{**first, "content": f"{system}\n\n{instructions}"}, *chat[1:]]
    system = f"{default_system}\n\n{instructions}" if default_system else instructions
    return [{"role": "system", "content": system}, *chat]


def _text(content: Any) -> str:
    if isinstance(content, list | tuple):
        parts = (part.get("text", "") if isinstance(part, Mapping) else part for part in content)
        return "".join(map(str, parts))
    return "" if content is None else str(content)
