"""Grammars that an answer must follow: JSON schema, regex, Lark or a choice, as token masks.

The optional package llguidance does the work; it is imported when a grammar is first used. A
grammar is compiled before the prefill. During decoding its matcher returns the mask of permitted
ids, consumes each token, and ends the answer when nothing can follow.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast, get_args
from weakref import WeakKeyDictionary

from amulet.errors import DecodeError, MissingPackageError, ModelError, RequestError, shown

if TYPE_CHECKING:
    import torch
    from llguidance import LLMatcher, LLTokenizer
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

Kind: TypeAlias = Literal["json_schema", "regex", "lark", "either"]

# JSON is spaced only as by `json.dumps`, on which models are trained: a small model that may put
# spaces anywhere writes nothing but spaces.
SPACING: Mapping[str, Any] = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}
# llguidance's option in a schema that leaves out what a grammar can't express (`not`, `if`,
# `uniqueItems`, unknown formats); the reader of the answer has to check that.
LENIENT: Mapping[str, Any] = {"x-guidance": {**SPACING, "lenient": True, "coerce_one_of": True}}
# Keywords that contain schemas by name, and those that contain data, not schemas.
NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
DATA = ("const", "enum", "default", "examples", "example")
DRAFT = re.compile(r"https?://json-schema\.org/draft[-/]")
BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")


@dataclass(frozen=True)
class Grammar:
    """A constraint on an answer; create one with a class method.

    Attributes:
        kind: the format of `source`.
        source: the schema as JSON text, the regex, the Lark grammar, or llguidance's own JSON.
    """

    kind: Kind
    source: str

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind) or not isinstance(self.source, str):
            raise RequestError(
                f"Grammar({shown(self.kind)}, {shown(self.source)}): expected a kind of grammar "
                "and its text. Use a class method, such as Grammar.json_schema({...}) or "
                'Grammar.regex("[0-9]+").'
            )

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any]) -> Grammar:
        """JSON that is valid against a schema, spaced as by `json.dumps`, with keys in its order.

        Decoding raises `RequestError` for what a grammar can't express; see `json_like`.

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
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(f"The JSON schema can't be written as JSON: {error}.") from None

    @classmethod
    def json_like(cls, schema: Mapping[str, Any]) -> Grammar:
        """JSON as close to a schema as a grammar permits, for answers that are validated later.

        Objects have only the listed keys, unless they say otherwise. It ignores what a grammar
        can't express: `not`, `if`, `uniqueItems`, unknown formats, patterns with look-around, ...

        Raises:
            RequestError: the schema is not a dict that can be written as JSON.
        """
        if not isinstance(schema, Mapping):
            return cls.json_schema(schema)
        return cls.json_schema({**closed(schema), **LENIENT})

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
        """One of several texts.

        Raises:
            RequestError: there is no text, or one is empty or not a string.
        """
        listed = [options] if isinstance(options, str) else options
        listed = list(listed) if isinstance(listed, Iterable) else []
        if not listed or any(not isinstance(option, str) or not option for option in listed):
            raise RequestError(
                f"choice({shown(options)}): expected one or more non-empty texts, as in "
                'Grammar.choice(["yes", "no"]).'
            )
        return cls.lark("start: " + " | ".join(json.dumps(option) for option in listed))

    @classmethod
    def either(cls, first: Grammar, second: Grammar, head: str = "") -> Grammar:
        """Either of two grammars.

        Args:
            first, second: the grammars.
            head: a Lark term that precedes an answer by the second grammar.

        Raises:
            RequestError: they are not grammars, or alternatives themselves.
            MissingPackageError: llguidance is not installed.
        """
        for given in (first, second):
            if not isinstance(given, Grammar) or given.kind == "either":
                raise RequestError(
                    f"either({shown(given)}): expected two grammars that are not alternatives "
                    'themselves, such as Grammar.regex("[0-9]+").'
                )
        named = [
            {**grammar._part(), "name": name}
            for name, grammar in (("first", first), ("second", second))
        ]
        start = {"lark_grammar": f"start: @first | {head} @second"}
        return cls("either", json.dumps({"grammars": [start, *named]}))

    def _part(self) -> dict[str, Any]:
        compiled = self.compiled()
        if self.kind == "lark":
            return {"lark_grammar": compiled}
        return dict(json.loads(compiled)["grammars"][0])

    def compiled(self) -> str:
        """Return the grammar in llguidance's own format.

        Raises:
            RequestError: the source is malformed, with llguidance's message.
            MissingPackageError: llguidance is not installed.
        """
        if self.kind == "either":
            return self.source
        matcher = _llguidance().LLMatcher
        try:
            if self.kind == "json_schema":
                source = self.source
                if '"x-guidance"' in source:
                    source = json.dumps(sayable(json.loads(source)))
                return str(matcher.grammar_from_json_schema(source, defaults=dict(SPACING)))
            if self.kind == "regex":
                return str(matcher.grammar_from_regex(self.source))
            return str(matcher.grammar_from_lark(self.source))
        except (ValueError, RecursionError) as error:  # a schema's JSON, or text not Unicode
            raise RequestError(f"grammar ({self.kind}): {error}") from None

    def matcher(
        self, tokenizer: PreTrainedTokenizerBase, end_ids: frozenset[int] = frozenset()
    ) -> Matcher:
        """Return a matcher that follows one answer through this grammar.

        Args:
            tokenizer: the model's tokenizer; its conversion takes about a second, once.
            end_ids: ids that end an answer; permitted only where the grammar is complete.

        Raises:
            RequestError: the grammar is invalid or not supported, with llguidance's message.
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
        """Whether only the end can follow."""
        return bool(self._matcher.is_stopped())

    def allowed(self) -> torch.Tensor:
        """Return which ids may come next, bool `[vocab]` on the CPU.

        Raises:
            DecodeError: the matcher failed; an answer never continues unconstrained.
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
        """Consume the chosen token, except for the ids that end an answer.

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
    """Return a tokenizer in llguidance's format, converted once; see `Grammar.matcher`."""
    _llguidance()
    from llguidance.hf import from_tokenizer

    key = (len(tokenizer), end_ids)
    with _lock:
        known = _converted.setdefault(tokenizer, {})
        if key not in known:
            try:
                if convert := getattr(tokenizer, "to_llguidance", None):  # of a GGUF file
                    known[key] = convert(sorted(end_ids))
                    return known[key]
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
        fault = fault_in(json.loads(grammar.source)) if grammar.kind == "json_schema" else None
        raise RequestError(f"grammar ({grammar.kind}): {fault or matcher.get_error().strip()}")
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


def sayable(schema: Any) -> Any:
    """Return a JSON schema without what llguidance refuses even in its lenient mode.

    These are patterns that only other engines support (look-around, back-references), bounds beyond
    64 bits, and the name of an unknown dialect.
    """
    if isinstance(schema, list):
        return [sayable(entry) for entry in schema]
    if not isinstance(schema, Mapping):
        return schema
    kept: dict[str, Any] = {}
    for name, value in schema.items():
        if name in NAMED and isinstance(value, Mapping):
            kept[name] = {key: sayable(entry) for key, entry in value.items()}
        elif name in DATA:
            kept[name] = value
        elif not _is_unsayable(name, value):
            kept[name] = sayable(value)
    names = kept.get("patternProperties")
    if isinstance(names, Mapping) and any(_is_unsayable("pattern", name) for name in names):
        del kept["patternProperties"]  # permits any key with any value
        kept.pop("additionalProperties", None)
    return kept


def _is_unsayable(name: str, value: Any) -> bool:
    if name == "pattern" and isinstance(value, str):
        return _is_foreign(value)
    if name == "$schema":
        return not (isinstance(value, str) and DRAFT.match(value))
    return name in BOUNDS and isinstance(value, int | float) and abs(value) >= 2**63


@lru_cache(maxsize=1024)
def _is_foreign(pattern: str) -> bool:
    """Tell whether Python supports a pattern and llguidance does not."""
    try:
        re.compile(pattern)
    except re.error:
        return False  # it is invalid, and llguidance's error will say so
    return _refusal({"type": "string", "pattern": pattern}) is not None


def _refusal(schema: Any) -> str | None:
    """Return llguidance's error about a schema, or None."""
    matcher = _llguidance().LLMatcher
    try:
        made = matcher.grammar_from_json_schema(json.dumps(schema), defaults=dict(SPACING))
    except ValueError as error:  # NaN and infinity, which JSON does not have
        return str(error)
    return str(matcher.validate_grammar(made)).strip() or None


def fault_in(schema: Mapping[str, Any]) -> str | None:
    """Return which field of a schema has no grammar, and why; None if all have one."""
    lenient = sayable(schema) if "x-guidance" in schema else schema
    return _fault(lenient, lenient, (), frozenset())


def _fault(
    part: Any, root: Mapping[str, Any], path: tuple[str, ...], seen: frozenset[str]
) -> str | None:
    shared = {name: root[name] for name in ("$defs", "definitions", "x-guidance") if name in root}
    if not isinstance(part, Mapping) or not (refusal := _refusal({**shared, **part})):
        return None
    inner: list[tuple[tuple[str, ...], Any, frozenset[str]]] = []
    properties = part.get("properties")
    if isinstance(properties, Mapping):
        inner += [((*path, str(name)), entry, seen) for name, entry in properties.items()]
    for name in ("items", "additionalProperties"):
        inner.append(((*path, "[]"), part.get(name), seen))
    for name in ("anyOf", "oneOf", "allOf", "prefixItems"):
        entries = part.get(name)
        inner += [(path, entry, seen) for entry in entries] if isinstance(entries, list) else []
    reference = part.get("$ref")
    if isinstance(reference, str) and reference not in seen:
        inner.append((path, resolved(reference, root), seen | {reference}))
    found = (_fault(entry, root, where, known) for where, entry, known in inner)
    here = f"field {'.'.join(path)!r}: {refusal}" if path else refusal
    return next(filter(None, found), here)


def resolved(reference: str, root: Any) -> Any:
    """Return the target of a reference in a schema, such as "#/$defs/City", or None."""
    for part in reference.removeprefix("#").strip("/").split("/") if reference != "#" else ():
        root = root.get(part) if isinstance(root, Mapping) else None
    return root


def closed(schema: Any) -> Any:
    """Return a JSON schema whose objects have only the listed keys.

    A class's schema permits further keys, and a small model keeps inventing some. An object that
    states what else it permits is unchanged, and so is a schema in which `allOf` combines objects,
    because each part would refuse the others' keys.
    """
    try:
        return schema if '"allOf"' in json.dumps(schema, default=str) else _closed(schema)
    except (ValueError, RecursionError):  # it contains itself; writing it as JSON raises the error
        return schema


def _closed(schema: Any) -> Any:
    if isinstance(schema, Mapping):
        inner = {name: value if name in DATA else _closed(value) for name, value in schema.items()}
        says = ("additionalProperties", "patternProperties", "$ref")
        is_listed = isinstance(inner.get("properties"), dict) and inner.get("type") == "object"
        if is_listed and not any(name in inner for name in says):
            inner["additionalProperties"] = False
        return inner
    return [_closed(entry) for entry in schema] if isinstance(schema, list) else schema
