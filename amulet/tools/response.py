"""Reads an answer by the tokenizer's own response template, where Transformers has one.

`ResponseTemplate` does what `amulet.spans.Spans` does for models whose markers are known here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from amulet.tools.base import Piece, Schema

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ResponseTemplate:
    """Text, reasoning and calls by a tokenizer's `response_template`.

    Args:
        tokenizer: one with a response template.
        prompt: ids of the prompt: it may have opened a section already.
        schemas: the tools; arguments are cast by their schemas.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt: list[int], schemas: Sequence[Schema]
    ) -> None:
        self._parser = tokenizer.get_response_parser(
            prefix=str(tokenizer.decode(prompt)), tools=list(schemas) or None
        )
        self.section: Literal["text", "reasoning", "call"] = "text"
        self.markers = tuple(tokenizer.all_special_tokens) + tuple(
            token.content for token in tokenizer.added_tokens_decoder.values() if token.special
        )
        self._read(self._parser.initial_events)

    def push(self, text: str) -> list[Piece]:
        return self._read(self._parser.feed(text))

    def finish(self) -> list[Piece]:
        try:
            _, events = self._parser.finalize()
        except ValueError as error:  # a field is missing or a call can't be parsed
            return [Piece("end", "", str(error))] if self.section == "call" else []
        return self._read(events)

    def _read(self, events: Sequence[Mapping[str, Any]]) -> list[Piece]:
        out: list[Piece] = []
        for event in events:
            kind = _kind(event["field"])
            if event["type"] == "region_open":
                self.section = kind
            elif event["type"] == "region_chunk" and kind != "call":
                out.append(Piece(kind, event["text"]))
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
