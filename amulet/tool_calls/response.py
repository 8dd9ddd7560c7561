"""Parses an answer by the tokenizer's response template, where Transformers has one.

`ResponseTemplate` replaces `amulet.output.sections.Spans`, which knows the markers of common
models.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from amulet.tool_calls.base import CUT, Piece, Schema

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ResponseTemplate:
    """Splits an answer into text, reasoning and calls by a tokenizer's `response_template`.

    Args:
        tokenizer: a tokenizer with a response template.
        prompt: ids of the prompt, which may open a section.
        schemas: the tools; their schemas give the types of arguments.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt: list[int], schemas: Sequence[Schema]
    ) -> None:
        def new_parser(prefix: str) -> Any:
            return tokenizer.get_response_parser(prefix=prefix, tools=list(schemas) or None)

        self._new_parser = new_parser
        self._parser = new_parser(str(tokenizer.decode(prompt)))
        self._raw = ""  # text of the call being parsed
        self.section: Literal["text", "reasoning", "call"] = "text"
        self.markers = tuple(tokenizer.all_special_tokens) + tuple(
            token.content for token in tokenizer.added_tokens_decoder.values() if token.special
        )
        self._read(self._parser.initial_events)

    def push(self, text: str) -> list[Piece]:
        out: list[Piece] = []
        for character in text:  # one by one, to keep the text after a call that can't be parsed
            try:
                out += self._read(self._parser.feed(character))
            except ValueError as error:
                out += self._unreadable(str(error))
                self._parser = self._new_parser("")
        return out

    def finish(self, cut: bool = False) -> list[Piece]:
        if cut:  # the parser would take a truncated call for a complete one
            return self._unreadable(CUT)
        try:
            _, events = self._parser.finalize()
        except ValueError as error:  # a field is missing or a call can't be parsed
            return self._unreadable(str(error))
        return self._read(events)

    def _unreadable(self, error: str) -> list[Piece]:
        if self.section != "call":
            return []
        self.section = "text"
        return [Piece("end", self._raw, error)]

    def _read(self, events: Sequence[Mapping[str, Any]]) -> list[Piece]:
        out: list[Piece] = []
        for event in events:
            kind = _kind(event["field"])
            if event["type"] == "region_open":
                self.section, self._raw = kind, ""
            elif event["type"] == "region_chunk" and kind != "call":
                out.append(Piece(kind, event["text"]))
            elif event["type"] == "region_chunk":
                self._raw += event["text"]
            elif event["type"] == "region_close":
                self.section = "text"
                if kind == "call":
                    values = event["value"]
                    for value in values if isinstance(values, list) else [values]:
                        out += _call(value)
        return out


def _kind(field: str) -> Literal["text", "reasoning", "call"]:
    if "tool" in field:
        return "call"
    return "reasoning" if "think" in field or "reason" in field else "text"


def _call(value: Any) -> list[Piece]:
    raw = json.dumps(value, default=str)
    function = value.get("function", value) if isinstance(value, Mapping) else {}
    name, arguments = function.get("name"), function.get("arguments")
    if not isinstance(name, str):
        return [Piece("end", raw, "expected a name")]
    written = arguments if isinstance(arguments, str) else json.dumps(arguments or {})
    return [Piece("name", name), Piece("arguments", written), Piece("end", raw)]
