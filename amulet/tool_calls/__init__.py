"""Tool calls: finds a template's dialect, checks tools, and builds grammars of forced calls."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from amulet.errors import RequestError, TemplateError, shown
from amulet.grammar import Grammar
from amulet.tool_calls import gemma, glm, harmony, hermes, llama, mistral, pythonic, qwen_coder
from amulet.tool_calls.base import Dialect, Function, Schema

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Specific dialects first, because templates of many kinds mention <tool_call>.
DIALECTS: tuple[Dialect, ...] = (
    harmony,
    mistral,
    gemma,
    pythonic,
    llama,
    qwen_coder,
    glm,
    hermes,
)
FALLBACK: Dialect = hermes


def find_dialect(template: str) -> Dialect | None:
    """Return the dialect in which a chat template tells the model to call tools."""
    return next((dialect for dialect in DIALECTS if dialect.detect(template)), None)


def tool_schemas(tools: Sequence[Any]) -> list[Schema]:
    """Return tools in OpenAI's form: `{"type": "function", "function": {...}}`.

    Raises:
        RequestError: a tool is not such a schema, the function part of one, or a documented
            Python function.
    """
    return [_tool_schema(index, tool) for index, tool in enumerate(tools)]


def _tool_schema(index: int, tool: Any) -> Schema:
    if callable(tool):
        from transformers.utils.chat_template_utils import get_json_schema

        try:
            tool = get_json_schema(tool)
        except Exception as error:
            raise RequestError(
                f"tools[{index}] ({shown(tool)}) has no readable schema: {error}; annotate and "
                "document its arguments, or give its JSON schema."
            ) from None
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RequestError(
            f"tools[{index}]={shown(tool)}: expected {{'type': 'function', "
            "'function': {'name': ..., 'description': ..., 'parameters': <JSON schema>}} or a "
            "documented Python function."
        )
    if not isinstance(function.get("parameters") or {}, Mapping):
        raise RequestError(f"tools[{index}]: parameters is not a JSON schema (a dict).")
    schema = {**tool} if "function" in tool else {"type": "function", "function": {**tool}}
    try:
        json.dumps(schema)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(
            f"tools[{index}] ({function['name']}) can't be written as JSON: {error}. Use only "
            "texts, numbers, lists and dicts."
        ) from None
    return schema


def functions_of(schemas: Sequence[Schema], choice: str) -> list[Function]:
    """Return the functions that a tool choice permits: all, or the one that it names.

    Raises:
        RequestError: two tools share a name, or the choice names an unknown tool.
    """
    found = [
        Function(schema["function"]["name"], dict(schema["function"].get("parameters") or {}))
        for schema in schemas
    ]
    names = [function.name for function in found]
    if len(set(names)) < len(names):
        raise RequestError(f"tools: two share a name ({', '.join(names)}).")
    if choice in ("auto", "any", "none"):
        return found
    if choice not in names:
        raise RequestError(
            f'tool_choice={shown(choice)}: expected "auto", "any", "none" or the name of a tool '
            f"({', '.join(names)})."
        )
    return [function for function in found if function.name == choice]


def forced_grammar(
    tokenizer: PreTrainedTokenizerBase,
    dialect: Dialect,
    functions: Sequence[Function],
    parallel: bool,
    answer: Grammar | None = None,
    template: str = "",
) -> Grammar:
    """Return a grammar of calls; with `answer`, of calls or an answer in that grammar."""

    def mark(marker: str) -> str:
        ids = tokenizer.encode(marker, add_special_tokens=False)
        return f"<[{ids[0]}]>" if len(ids) == 1 else '"' + marker.replace('"', '\\"') + '"'

    source = dialect.grammar(functions, parallel, mark, template)
    if answer is None:
        return Grammar.lark(source)
    head = harmony.answer_head(mark) if dialect is harmony else ""
    return Grammar.either(Grammar.lark(source), answer, head)


def no_tools_error(detail: str) -> TemplateError:
    """Return the error for a template that can't be used with tools."""
    return TemplateError(
        f'{detail} Use tools_prompt="fallback" to describe the tools in the system message, or a '
        "model whose chat template supports tools."
    )
