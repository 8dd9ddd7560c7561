"""Converts LangChain's tools, tool choice and response format to Amulet's."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_tool
from pydantic import TypeAdapter

from amulet.errors import RequestError, shown

SAME_CHOICE = {"required": "any", True: "any", False: "none"}


def bound_tools(tools: Any, *, tool_choice: Any = None, **options: Any) -> dict[str, Any]:
    """Return the options of a call with these tools."""
    options["tools"] = tool_schemas(tools)
    if (choice := normal_choice(tool_choice, options["tools"])) is not None:
        options["tool_choice"] = choice
    return options


def tool_schemas(tools: Any) -> list[dict[str, Any]]:
    """Return tools of any form that LangChain accepts in OpenAI's form.

    Raises:
        RequestError: something is not a tool, or is a tool that only a provider's server runs.
    """
    if not isinstance(tools, Iterable) or isinstance(tools, str | bytes | Mapping | type):
        raise RequestError(
            f"tools={shown(tools)}: expected a list of functions, classes or schemas."
        )
    schemas = []
    for tool in tools:
        if isinstance(tool, Mapping) and tool.get("type") == "function" and "function" in tool:
            schemas.append(dict(tool))
            continue
        try:
            schema = convert_to_openai_tool(tool)
        except (ValueError, TypeError) as error:
            raise RequestError(f"tools: {shown(tool)} is not a tool: {error}") from None
        if "function" not in schema:
            raise RequestError(
                f"tools: {shown(tool)} runs on a provider's server; give a function or a schema."
            )
        schemas.append(schema)
    return schemas


def normal_choice(choice: Any, schemas: Sequence[Mapping[str, Any]]) -> str | None:
    """Return "auto", "any", "none" or a tool's name; None if nothing was chosen.

    Args:
        choice: that, or True/"required" for "any", or a dict that names the tool.
        schemas: the tools in OpenAI's form.

    Raises:
        RequestError: the name is not among the tools.
    """
    names = [schema["function"]["name"] for schema in schemas]
    if isinstance(choice, Mapping):
        function = choice.get("function")
        named = function if isinstance(function, Mapping) else choice
        choice = named.get("name") or choice.get("type")
    if isinstance(choice, str | bool):
        choice = SAME_CHOICE.get(choice, choice)
    if choice is None:
        return None
    if isinstance(choice, str) and choice in ("auto", "any", "none", *names):
        if choice == "any" and not names:
            raise RequestError('tool_choice="any" requires tools: there are none.')
        return choice
    raise RequestError(
        f"tool_choice={choice!r}: expected 'auto', 'any', 'none' or one of the tools: "
        f"{', '.join(names) or 'there are none'}."
    )


def named_format(schema: Any) -> dict[str, Any]:
    """Return OpenAI's response format for a schema."""
    form = json_schema(schema)
    named = {"name": str(form.get("title", "answer")), "schema": form, "strict": True}
    return {"type": "json_schema", "json_schema": named}


def response_schema(response_format: Any) -> dict[str, Any] | None:
    """Return the JSON schema of a response format; {} for any object, None for text.

    Args:
        response_format: OpenAI's dict (`json_schema`, `json_object`, `text`), or a Pydantic class,
            TypedDict, dataclass or JSON schema itself.
    """
    if isinstance(response_format, Mapping):
        kind = response_format.get("type")
        if kind == "text":
            return None
        if kind == "json_object":
            return dict(response_format.get("schema") or {})
        if kind == "json_schema" and "json_schema" in response_format:
            inner = response_format["json_schema"]
            return dict(inner.get("schema", inner))
        if "properties" in response_format or "$defs" in response_format or kind == "object":
            return dict(response_format)
    if isinstance(response_format, Mapping | type):
        return json_schema(response_format)
    raise RequestError(
        f"response_format={response_format!r}: expected {{'type': 'json_schema', 'json_schema': "
        "{...}}, {'type': 'json_object'}, {'type': 'text'}, or a schema."
    )


def json_schema(schema: Mapping[str, Any] | type) -> dict[str, Any]:
    """Return the JSON schema of a Pydantic class, TypedDict, dataclass, tool or JSON schema."""
    if isinstance(schema, type) and hasattr(schema, "model_json_schema"):
        return dict(schema.model_json_schema())
    if dataclasses.is_dataclass(schema):
        return dict(TypeAdapter(schema).json_schema())
    given = dict(schema) if isinstance(schema, Mapping) else schema
    try:
        return dict(convert_to_json_schema(given))
    except (ValueError, TypeError) as error:
        raise RequestError(f"schema={schema!r}: {error}") from None
