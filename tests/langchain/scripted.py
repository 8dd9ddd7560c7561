"""A `ChatAmulet` that says what the test lists, by what stands in its prompt."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from amulet import Amulet, Steering
from amulet_integrations.langchain import ChatAmulet
from tests.models import ScriptedModel
from tests.templates import family_tokenizer


def scripted_chat(answers: str | Mapping[str, str], **options: Any) -> ChatAmulet:
    """Return a chat model whose answer is that of the first key that its prompt contains.

    The template is Qwen's: it knows tools, and a preference in the system message is found as
    "system\\n<text>".
    """
    tokenizer = family_tokenizer("qwen")
    model: Any = ScriptedModel(tokenizer, answers)
    amulet = Amulet(model, tokenizer, steering=Steering(strength=2.0, placement="system"))
    return ChatAmulet(amulet=amulet, **options)


def preferring(*preferences: str, **options: Any) -> ChatAmulet:
    """Return a chat model that answers "<preference>!" where one of them is in force, else "plain".

    The first that stands at the front of the system message decides.
    """
    answers = {f"system\n{text}": f"{text}!" for text in preferences}
    return scripted_chat({**answers, "": "plain"}, **options)


def tool_call_text(name: str, **arguments: Any) -> str:
    """Return a tool call as Qwen writes it."""
    call = json.dumps({"name": name, "arguments": arguments})
    return f"<tool_call>\n{call}\n</tool_call>"
