"""Tools for a chat template without tool support: a system prompt, and calls as text.

The system message gets the instructions below with the tools' schemas. Past calls and results
become text (`amulet.prompting.messages.calls_as_text`). Calls are parsed as in Hermes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from amulet.prompting.messages import Message
from amulet.tool_calls.base import Schema

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


def with_instructions(
    chat: Sequence[Message], schemas: Sequence[Schema], default_system: str
) -> list[Message]:
    """Return a normalised chat with the tools described in its system message.

    Args:
        chat: the messages.
        schemas: the tools that may be called.
        default_system: the template's own system text, used if the chat has none.
    """
    listed = "\n".join(json.dumps(schema) for schema in schemas)
    instructions = TOOLS_PROMPT.format(tools=listed)
    if chat and chat[0]["role"] == "system":
        return [{**chat[0], "content": f"{chat[0]['content']}\n\n{instructions}"}, *chat[1:]]
    system = f"{default_system}\n\n{instructions}" if default_system else instructions
    return [{"role": "system", "content": system}, *chat]
