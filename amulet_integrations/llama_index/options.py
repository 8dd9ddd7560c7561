"""Converts a call's keywords and settings to a `Request`; refuses those without effect."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from amulet.errors import RequestError
from amulet.request import Request
from amulet_integrations import _options
from amulet_integrations._preference import SETTINGS

SAMPLING = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
TOOLS = ("tools", "tool_choice", "parallel_tool_calls", "tools_prompt")
# Names of `Request` that a call may give; `max_tokens` is `max_new_tokens` there.
PASSED_ON = (
    *SAMPLING[1:],
    *TOOLS,
    "stop",
    "trace",
    "top_logprobs",
    "logits_processor",
    "template_options",
    "grammar",
    "steer_grammar",
)
# `DocumentContextExtractor` gives every LLM the headers of one service; here no request has any.
UNUSED = ("extra_headers",)
CALL = (*SETTINGS, "max_tokens", "max_new_tokens", "enable_thinking", *PASSED_ON, *UNUSED)

HINTS = {
    "model_name": "use model",
    "model_id": "use model",
    "tokenizer_name": "use amulet=Amulet(model, tokenizer)",
    "tokenizer": "use amulet=Amulet(model, tokenizer)",
    "context_window": "leave it out: it is read from the model",
    "generate_kwargs": "give temperature, top_p, ... by name",
    "do_sample": "use temperature: 0 is greedy, above 0 samples",
    "is_chat_model": "leave it out: it is read from the tokenizer's chat template",
    "is_function_calling_model": 'use tools_prompt="fallback" if the template has no tools',
    "stopping_ids": "use stop, with strings",
    "device_map": "give it to the constructor",
    "base_url": "leave it out, or use amulet=Amulet.connect(url) for the model of a server",
    "api_key": "leave it out: the model runs in this process",
    "request_timeout": "leave it out: the model runs in this process",
    "json_mode": "use structured_predict() or as_structured_llm()",
    "format": "use structured_predict() or as_structured_llm()",
    "response_format": "use structured_predict() or as_structured_llm()",
    "thinking": "use enable_thinking",
    "additional_kwargs": "give the options by name",
}


@dataclass(frozen=True)
class PreparedCall:
    """The engine's input for one call.

    Attributes:
        request: the request.
        raw: reported in the response: model, stage, source of the preference.
        marker: the text that separates a plain part of the answer from a steered one, if any.
    """

    request: Request
    raw: dict[str, Any] = field(default_factory=dict)
    marker: str | None = None


def refuse_unknown(options: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    """Refuse options with the hints for users of this framework; see the shared function."""
    _options.refuse_unknown(options, known, where, HINTS)


def request_fields(call: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a `Request` except its source and preference.

    Args:
        call: the call's keywords; None is "not given".
        defaults: the model object's own, by the same names.

    Raises:
        RequestError: an option is unknown, or given under two names.
    """
    refuse_unknown(call, CALL, "AmuletLLM")
    call = _options.one_name(call, "max_new_tokens", "max_tokens")
    given = {name: value for name, value in call.items() if value is not None}
    merged = {**{name: value for name, value in defaults.items() if value is not None}, **given}
    fields = {name: merged[name] for name in PASSED_ON if name in merged}
    if "max_tokens" in merged:
        fields["max_new_tokens"] = merged["max_tokens"]
    if "enable_thinking" in merged:
        fields["template_options"] = _options.template_options(
            merged.get("template_options", {}), merged["enable_thinking"]
        )
    return fields


def tool_choice(given: Any, required: bool) -> str:
    """Return a tool choice of any usual spelling as "auto", "any", "none" or a name.

    Raises:
        RequestError: it is none of them.
    """
    if given is None:
        return "any" if required else "auto"
    if isinstance(given, Mapping):
        function = given.get("function")
        named = function if isinstance(function, Mapping) else given
        given = named.get("name") or given.get("type")
    if isinstance(given, bool):
        given = "any" if given else "none"
    if not isinstance(given, str) or not given:
        raise RequestError(
            f'tool_choice={given!r}: expected "auto", "any", "none" or the name of a tool.'
        )
    return "any" if given == "required" or (given == "auto" and required) else given
