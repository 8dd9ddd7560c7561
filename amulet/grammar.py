"""Grammars that an answer must follow: JSON schema, regex, Lark or a choice, as token masks.

The optional package llguidance does the work; it is imported when a grammar is first used. A
grammar is compiled before the prefill; during decoding its matcher gives the mask of permitted
ids, takes each token, and ends the answer where nothing can follow.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast
from weakref import WeakKeyDictionary

from amulet.errors import DecodeError, MissingPackageError, ModelError, RequestError

if TYPE_CHECKING:
    import torch
    from llguidance import LLMatcher, LLTokenizer
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

# One way to space JSON, `json.dumps`'s: it is what models are trained on, and a small model that
# may put spaces anywhere writes nothing but spaces.
SPACING: Mapping[str, Any] = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}


@dataclass(frozen=True)
class Grammar:
    """What an answer must look like; made by one of the class methods.

    Attributes:
        kind: how `source` is written.
        source: the schema as JSON text, the regex, the Lark grammar, or llguidance's own JSON.
    """

    kind: Literal["json_schema", "regex", "lark", "either"]
    source: str

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any]) -> Grammar:
        """JSON that is valid against a schema, spaced as `json.dumps` does, keys in its order.

        Raises:
            RequestError: the schema is not a dict that can be written as JSON.
        """
        if not isinstance(schema, Mapping):
            raise RequestError(
                f"a JSON schema of type {type(schema).__name__}: expected a dict, such as "
                "{'type': 'object', 'properties': {...}}."
            )
        try:
            return cls("json_schema", json.dumps(schema))
        except (TypeError, ValueError) as error:
            raise RequestError(f"The JSON schema can't be written as JSON: {error}.") from None

    @classmethod
    def json_object(cls) -> Grammar:
        """Any JSON object."""
        return cls.json_schema({"type": "object"})

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        """Text that a regular expression matches as a whole (Rust syntax, no look-around)."""
        return cls("regex", _text("regex", pattern))

    @classmethod
    def lark(cls, source: str) -> Grammar:
        """Text of a context-free grammar in llguidance's Lark dialect, from its rule `start`."""
        return cls("lark", _text("Lark grammar", source))

    @classmethod
    def choice(cls, options: Sequence[str]) -> Grammar:
        """One of some texts.

        Raises:
            RequestError: there is none, or one is not a non-empty text.
        """
        listed = [options] if isinstance(options, str) else list(options)
        if not listed or any(not isinstance(option, str) or not option for option in listed):
            raise RequestError(f"choice({options!r}): expected one or more non-empty texts.")
        return cls.lark("start: " + " | ".join(json.dumps(option) for option in listed))

    @classmethod
    def either(cls, first: Grammar, second: Grammar) -> Grammar:
        """What one of two grammars permits.

        Raises:
            MissingPackageError: llguidance is not installed.
        """
        if "either" in (first.kind, second.kind):
            raise RequestError(
                "either: expected two grammars that are not alternatives themselves."
            )
        named = [
            {**grammar._part(), "name": name}
            for name, grammar in (("first", first), ("second", second))
        ]
        start = {"lark_grammar": "start: @first | @second"}
        return cls("either", json.dumps({"grammars": [start, *named]}))

    def _part(self) -> dict[str, Any]:
        compiled = self.compiled()
        if self.kind == "lark":
            return {"lark_grammar": compiled}
        return dict(json.loads(compiled)["grammars"][0])

    def compiled(self) -> str:
        """Return the grammar in llguidance's own form.

        Raises:
            RequestError: the source is not even written as its kind is, in llguidance's own words.
            MissingPackageError: llguidance is not installed.
        """
        if self.kind == "either":
            return self.source
        matcher = _llguidance().LLMatcher
        try:
            if self.kind == "json_schema":
                return str(matcher.grammar_from_json_schema(self.source, defaults=dict(SPACING)))
            if self.kind == "regex":
                return str(matcher.grammar_from_regex(self.source))
            return str(matcher.grammar_from_lark(self.source))
        except ValueError as error:  # the JSON of a schema, or text that is not Unicode
            raise RequestError(f"grammar ({self.kind}): {error}") from None

    def matcher(
        self, tokenizer: PreTrainedTokenizerBase, end_ids: frozenset[int] = frozenset()
    ) -> Matcher:
        """Return what follows one answer through this grammar.

        Args:
            tokenizer: the model's; its conversion takes about a second, once.
            end_ids: ids that end an answer; permitted only where the grammar is complete.

        Raises:
            RequestError: the grammar is not valid or not supported, in llguidance's own words.
            MissingPackageError: llguidance is not installed.
            ModelError: the tokenizer is not a fast one.
        """
        converted = converted_tokenizer(tokenizer, end_ids)
        return Matcher(_checked_matcher(self, converted))


class Matcher:
    """Follows one answer through a grammar."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    @property
    def complete(self) -> bool:
        """Whether nothing but the end can follow."""
        return bool(self._matcher.is_stopped())

    def allowed(self) -> torch.Tensor:
        """Return which ids may come next, bool `[vocab]` on the CPU.

        Raises:
            DecodeError: the matcher failed; an answer never goes on unconstrained.
        """
        import numpy as np
        import torch

        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        mask = torch.from_numpy(np.unpackbits(bits, bitorder="little")).bool()
        if not mask.any():
            raise DecodeError("The grammar permits no further token and is not complete either.")
        return mask

    def consume(self, token_id: int) -> None:
        """Take the token that was chosen; not for the ids that end an answer.

        Raises:
            DecodeError: it was not permitted, or the matcher failed.
        """
        self._matcher.consume_token(token_id)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = self._matcher.get_error().partition("\n")[0]
            raise DecodeError(f"The grammar could not be followed: {reason}.")


_converted: WeakKeyDictionary[PreTrainedTokenizerBase, dict[Any, LLTokenizer]] = WeakKeyDictionary()
_lock = threading.Lock()


def converted_tokenizer(
    tokenizer: PreTrainedTokenizerBase, end_ids: frozenset[int] = frozenset()
) -> LLTokenizer:
    """Return llguidance's form of a tokenizer, converted once; see `Grammar.matcher`."""
    _llguidance()
    from llguidance.hf import from_tokenizer

    key = (len(tokenizer), end_ids)
    with _lock:
        known = _converted.setdefault(tokenizer, {})
        if key not in known:
            try:
                known[key] = from_tokenizer(
                    cast("PreTrainedTokenizerFast", tokenizer), eos_token=sorted(end_ids) or None
                )
            except ValueError as error:
                raise ModelError(
                    f"A grammar needs a fast tokenizer and this is a {type(tokenizer).__name__} "
                    f"({error}); load it with use_fast=True or leave the grammar out."
                ) from None
        return known[key]


def _checked_matcher(grammar: Grammar, converted: LLTokenizer) -> LLMatcher:
    matcher: LLMatcher = _llguidance().LLMatcher(converted, grammar.compiled(), log_level=0)
    if matcher.is_error():
        raise RequestError(f"grammar ({grammar.kind}): {matcher.get_error().strip()}")
    return matcher


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError:
        raise MissingPackageError(
            "A grammar (structured output, a forced tool call) needs the package llguidance: "
            'pip install "amulet-integrations[grammar]"'
        ) from None
    return llguidance


def _text(name: str, given: object) -> str:
    if not isinstance(given, str) or not given:
        raise RequestError(f"a {name} of type {type(given).__name__}: expected non-empty text.")
    return given


def closed(schema: Any) -> Any:
    """Return a JSON schema whose objects have the listed keys and no others.

    A class's schema permits further keys, and a small model goes on inventing some. An object that
    says itself what else it permits is left as it is.
    """
    if isinstance(schema, Mapping):
        inner = {name: closed(value) for name, value in schema.items()}
        says = ("additionalProperties", "patternProperties", "allOf")
        is_listed = isinstance(inner.get("properties"), dict) and inner.get("type") == "object"
        if is_listed and not any(name in inner for name in says):
            inner["additionalProperties"] = False
        return inner
    return [closed(entry) for entry in schema] if isinstance(schema, list) else schema
