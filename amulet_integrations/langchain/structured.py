"""Answers with a schema: `with_structured_output` for all of LangChain's kinds and methods."""

from __future__ import annotations

import dataclasses
import json
from operator import itemgetter
from typing import Any, Literal, cast, get_args

from langchain_core.exceptions import OutputParserException
from langchain_core.language_models import LanguageModelInput
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.output_parsers import BaseCumulativeTransformOutputParser
from langchain_core.outputs import ChatGeneration, Generation
from langchain_core.runnables import Runnable, RunnableMap, RunnablePassthrough
from langchain_core.utils.json import parse_partial_json
from langchain_core.utils.pydantic import is_basemodel_subclass
from pydantic import TypeAdapter

from amulet.errors import RequestError
from amulet_integrations.langchain.options import CHAT_OPTIONS, refuse_unknown
from amulet_integrations.langchain.tools import json_schema, named_format

Method = Literal["json_schema", "function_calling", "json_mode"]
METHODS: tuple[Method, ...] = get_args(Method)


def structured_output(
    model: Any,
    schema: Any = None,
    *,
    method: Method = "json_schema",
    include_raw: bool = False,
    strict: bool | None = None,
    **kwargs: Any,
) -> Runnable[LanguageModelInput, Any]:
    """Return a runnable whose answers have the schema.

    Args:
        model: a `ChatAmulet`, or one with options bound to it, which stay.
        schema: a Pydantic class or dataclass (answers are its instances), a TypedDict, an OpenAI
            tool or a JSON schema (answers are dicts). None only with "json_mode".
        method: "json_schema" constrains the answer to the schema by a grammar; "function_calling"
            makes it the arguments of a forced tool call; "json_mode" is "json_schema" if a schema
            is given, and any JSON object otherwise.
        include_raw: return a dict with `raw`, `parsed` and `parsing_error` instead.
        strict: accepted for compatibility; a grammar always constrains the answer.
        kwargs: further options of every call, such as `preference` or `steer_grammar`.

    Raises:
        RequestError: the schema, method or an option is unknown.
        OutputParserException: (when run) the answer does not fit, or `max_tokens` cut it.
    """
    if method not in METHODS:
        raise RequestError(f"method={method!r}: expected one of {', '.join(METHODS)}.")
    if schema is None and method != "json_mode":
        raise RequestError(f"schema=None with method={method!r}: expected a schema.")
    refuse_unknown(kwargs, (*CHAT_OPTIONS, "stop"), "with_structured_output")
    traced = {"kwargs": {"method": method}, "schema": schema if schema is not None else {}}
    if method == "function_calling":
        tool = _as_tool(schema)
        bound = model.bind_tools(
            [tool],
            tool_choice=tool["function"]["name"],
            parallel_tool_calls=False,
            ls_structured_output_format=traced,
            **kwargs,
        )
    else:
        wanted: dict[str, Any] = {"type": "json_object"}
        if schema is not None:
            wanted = named_format(schema)
        bound = model.bind(response_format=wanted, ls_structured_output_format=traced, **kwargs)
    parser = SchemaParser(form=schema, from_tool_call=method == "function_calling")
    if not include_raw:
        answer: Runnable[LanguageModelInput, Any] = bound | parser
        return answer
    parsed = RunnablePassthrough.assign(
        parsed=itemgetter("raw") | parser, parsing_error=lambda _: None
    )
    failed = RunnablePassthrough.assign(parsed=lambda _: None)
    # The model comes first, because otherwise a call's keywords would not reach it.
    kept = RunnableMap(raw=RunnablePassthrough())
    told: Runnable[LanguageModelInput, Any] = (
        bound | kept | parsed.with_fallbacks([failed], exception_key="parsing_error")
    )
    return told


class SchemaParser(BaseCumulativeTransformOutputParser[Any]):
    """Parses an answer (or the arguments of its tool call) to the schema's instance or dict.

    In a stream it yields each new state of the object; a Pydantic class or dataclass only once the
    part so far is valid.
    """

    form: Any = None
    from_tool_call: bool = False

    @property
    def _type(self) -> str:
        return "amulet-schema"

    def parse_result(self, result: list[Generation], *, partial: bool = False) -> Any:
        """Return the object; with `partial`, None if there is none yet.

        Raises:
            OutputParserException: the finished answer does not fit, or `max_tokens` cut it.
        """
        answer = result[0]
        message = answer.message if isinstance(answer, ChatGeneration) else None
        finish = message.response_metadata.get("finish_reason") if message else None
        if partial and finish is None:
            return self._parse_partial(self._text(answer))
        text = self._text(answer)
        try:
            return self._instance(json.loads(text))
        except (ValueError, TypeError) as error:  # ValidationError is a ValueError
            if finish == "length":
                reason = "max_tokens cut the answer before its end; give more tokens"
            else:
                reason = f"the answer does not fit the schema: {error}"
            raise OutputParserException(f"{reason}. Answer: {text!r}", llm_output=text) from None

    def parse(self, text: str) -> Any:
        """Return the object in a text."""
        return self.parse_result([Generation(text=text)])

    def _parse_partial(self, text: str) -> Any:
        try:
            value = parse_partial_json(text)
            return self._instance(value) if isinstance(value, dict) else None
        except (ValueError, TypeError):
            return None

    def _text(self, answer: Generation) -> str:
        if not self.from_tool_call or not isinstance(answer, ChatGeneration):
            return answer.text
        message = answer.message
        if isinstance(message, AIMessageChunk) and message.tool_call_chunks:
            return message.tool_call_chunks[0]["args"] or ""
        if isinstance(message, AIMessage):
            if message.tool_calls:
                return json.dumps(message.tool_calls[0]["args"], ensure_ascii=False)
            if message.invalid_tool_calls:
                return message.invalid_tool_calls[0]["args"] or ""
        return answer.text

    def _instance(self, value: Any) -> Any:
        if isinstance(self.form, type):
            if dataclasses.is_dataclass(self.form) or hasattr(self.form, "model_validate"):
                return TypeAdapter(self.form).validate_python(value)
            if is_basemodel_subclass(self.form):  # Pydantic 1
                return cast(Any, self.form).parse_obj(value)
        return value


def _as_tool(schema: Any) -> dict[str, Any]:
    """Return the schema as a tool whose arguments are the answer."""
    if isinstance(schema, dict) and schema.get("type") == "function" and "function" in schema:
        return schema
    form = json_schema(schema)
    name = form.get("title") or getattr(schema, "__name__", None) or "answer"
    function = {"name": str(name).replace(" ", "_"), "parameters": form}
    if description := form.get("description"):
        function["description"] = description
    return {"type": "function", "function": function}
