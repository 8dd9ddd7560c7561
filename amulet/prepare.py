"""Converts a `Request` to the `Generation` to decode and the `Answer` that collects it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

from amulet.decoding.generation import Generation
from amulet.decoding.sampling import Sampling
from amulet.errors import PromptTooLongError, RequestError, TemplateError
from amulet.grammar import LENIENT, Grammar, Matcher, fault_in
from amulet.images import ImageReader, PromptImage, take_images, with_columns
from amulet.output.answer import Answer
from amulet.output.channels import Channels
from amulet.output.sections import Calls, Scanner, Spans, find_thinking
from amulet.output.steered_tokens import is_answer_steered
from amulet.preference import Preference, Steering, guard_of, row_weights
from amulet.prompting.chat_template import ChatTemplate
from amulet.prompting.messages import Message, calls_as_text, normal_messages
from amulet.prompting.prompts import Prompts, encode_alone, encode_chat, encode_text
from amulet.request import Request
from amulet.tool_calls import (
    FALLBACK,
    find_dialect,
    forced_grammar,
    functions_of,
    harmony,
    no_tools_error,
    tool_schemas,
)
from amulet.tool_calls.base import Dialect, Function, Piece, Schema, arguments_schema
from amulet.tool_calls.fallback import with_instructions
from amulet.tool_calls.response import ResponseTemplate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTEXT = 8
"""The prompt's last ids, which decide whether an answer that continues it starts with a space."""


@dataclass(frozen=True)
class _Tools:
    """A request's tools: the template's schemas, the functions that may be called, the dialect."""

    messages: list[Message]  # in normal form
    schemas: list[Schema]  # for the template
    functions: list[Function]
    dialect: Dialect | None = None
    template: str = ""  # the template source in which the dialect was found
    is_fallback: bool = False


@dataclass(frozen=True)
class Preparer:
    """Prepares requests; holds what all requests to one model share.

    Attributes:
        tokenizer: the model's.
        steering: for requests that don't give their own.
        window: the context window in tokens; None if unknown.
        end_ids: ids that end an answer.
        reader: of images; None where the model takes none.
        no_images: which model takes none, and why.
    """

    tokenizer: PreTrainedTokenizerBase
    steering: Steering
    window: int | None
    end_ids: frozenset[int]
    reader: ImageReader | None = None
    no_images: str = ""

    def prepare(self, request: Request) -> tuple[Generation, Answer, Steering | None]:
        """Return the generation, the answer that collects its tokens, and the steering in force.

        Raises:
            RequestError: the request is not valid.
        """
        messages, images = self._read(request)
        tools = self._tools(request, messages)
        grammar = self._grammar(request, tools)
        preferences = request.preference if is_answer_steered(request, grammar) else ()
        steering = request.steering(self.steering) if preferences else None
        prompts = self._encode(request, tools, images, preferences, steering)
        forced = grammar is not None and grammar is not request.grammar
        scanner = self._scanner(request, tools, prompts, forced)
        seen = self._seen(prompts, images)
        rows: list[list[int]] = [seen.base]
        weights: list[float] = []
        if steering is not None:
            rows, weights = steered_rows(
                seen,
                preferences,
                steering,
                None if request.prompt is not None else partial(self._alone, request, tools),
            )
            # Strength 0 needs no base row unless a part may be decoded plainly.
            if weights == [1.0] and not request.trace and not scanner.markers and not grammar:
                rows, weights = [seen.preferred[0]], []
        matcher = self._matcher(grammar, tools) if grammar is not None else None
        answer = Answer(
            self.tokenizer,
            request.stop,
            scanner,
            matcher,
            request.parallel_tool_calls,
            prompts.base[-CONTEXT:] if _goes_on(tools) else (),
        )
        generation = Generation(
            prompts=rows,
            plain=prompts.base,
            images=images,
            weights=weights,
            floor=steering.floor if steering is not None else 0.0,
            loop_guard=guard_of(steering) if steering is not None else 0,
            max_new_tokens=self._limit(request, max(map(len, rows))),
            sampling=Sampling(
                request.temperature,
                request.top_k,
                request.top_p,
                request.min_p,
                request.repetition_penalty,
            ),
            seed=request.seed,
            end_ids=self.end_ids,
            processors=request.logits_processor,
            trace=request.trace,
            top_logprobs=request.top_logprobs,
        )
        answer.lead(generation)
        return generation, answer, steering

    def encode(self, request: Request) -> list[int]:
        """Return the base prompt of a request, as token ids."""
        messages, images = self._read(request)
        return self._encode(request, self._tools(request, messages), images, (), None).base

    def calls_tools(self, tools_prompt: Literal["template", "fallback"]) -> bool:
        """Tell whether the model sees the tools and the calls in its answers can be parsed."""
        probe = Request(
            messages=({"role": "user", "content": "x"},),
            tools=({"name": "probe"},),
            tools_prompt=tools_prompt,
        )
        try:
            tools = self._tools(probe, normal_messages(probe.messages or ()))
            return tools.dialect is not None or self._has_response_template
        except TemplateError:
            return False

    def _read(self, request: Request) -> tuple[list[Message], tuple[PromptImage, ...]]:
        """Return a chat's messages in normal form, with a mark for each image, and the images."""
        messages, parts = take_images(request.messages or ())
        if not parts:
            return normal_messages(messages), ()
        if self.reader is None:
            raise RequestError(
                f"The messages have an image, and {self.no_images}. Leave the image out, describe "
                "it in words, or load a model that reads images."
            )
        is_only = len(parts) == 1
        images = tuple(self.reader.read(part, is_only) for part in parts)
        return normal_messages(messages), images

    def _seen(self, prompts: Prompts, images: Sequence[PromptImage]) -> Prompts:
        """Return the prompts of rows: with the images' own ids where the placeholders are."""
        if self.reader is None or not images:
            return prompts
        own = partial(with_columns, token_id=self.reader.token_id, images=images)
        return Prompts(tuple(map(own, prompts.preferred)), own(prompts.base))

    def _tools(self, request: Request, messages: list[Message]) -> _Tools:
        """Find how the template shows tools; if it can't, write tools and past calls as text.

        Args:
            request: the request.
            messages: its messages in normal form.
        """
        if request.messages is None:
            return _Tools([], [], [])
        schemas = tool_schemas(request.tools or ())
        functions = functions_of(schemas, request.tool_choice)
        if not schemas or request.tool_choice == "none":
            return _Tools(messages, [], [])
        template = ChatTemplate(self.tokenizer, schemas, dict(request.template_options))
        schemas = described(schemas, template.source)
        knows = _knows_tools(template)
        dialect = find_dialect(template.source) if knows else None
        if dialect is FALLBACK and not _is_read(template, dialect):
            dialect = None
        if dialect is not None or (knows and self._has_response_template):
            return _Tools(messages, schemas, functions, dialect, template.source)
        if request.tools_prompt != "fallback":
            if knows and "<tool_call>" in template.source:  # an unknown syntax: calls stay text
                return _Tools(messages, schemas, functions, None, template.source)
            raise no_tools_error(
                "The chat template does not show how the model writes tool calls."
                if knows
                else "The chat template ignores tools: the model would never see them."
            )
        default = template.traits().default_system
        chat = with_instructions(calls_as_text(messages), schemas, default)
        return _Tools(chat, [], functions, FALLBACK, is_fallback=True)

    @property
    def _has_response_template(self) -> bool:
        return getattr(self.tokenizer, "response_template", None) is not None

    def _grammar(self, request: Request, tools: _Tools) -> Grammar | None:
        """Return the answer's grammar: the request's own, that of forced calls, or a choice."""
        if not tools.functions or (request.tool_choice == "auto" and request.grammar is None):
            return request.grammar
        if tools.dialect is None:
            raise no_tools_error(
                "Calls can't be forced: the chat template does not show how the model "
                "writes tool calls."
            )
        forced = request.tool_choice != "auto"
        if forced and request.grammar is not None:
            raise RequestError(
                f"tool_choice={request.tool_choice!r} and a grammar: the answer can't be both; "
                'give one of them, or tool_choice="auto".'
            )
        # A named tool is called once, as in OpenAI's API. A model that was not trained on tools
        # doesn't know when to stop either.
        parallel = request.parallel_tool_calls and request.tool_choice in ("auto", "any")
        parallel = parallel and not tools.is_fallback
        return forced_grammar(
            self.tokenizer,
            tools.dialect,
            tools.functions,
            parallel,
            request.grammar,
            tools.template,
        )

    def _matcher(self, grammar: Grammar, tools: _Tools) -> Matcher:
        try:
            return grammar.matcher(self.tokenizer, self.end_ids)
        except RequestError:
            for function in tools.functions:
                if fault := fault_in({**arguments_schema(function), **LENIENT}):
                    raise RequestError(f"tools: {function.name}: {fault}") from None
            raise

    def _scanner(self, request: Request, tools: _Tools, prompts: Prompts, forced: bool) -> Scanner:
        if request.prompt is not None:
            return Spans(None)
        if self._has_response_template and request.grammar is None and not tools.is_fallback:
            return ResponseTemplate(self.tokenizer, prompts.base, tools.schemas)
        calls = None
        if tools.dialect is not None and tools.functions:
            names = tuple(function.name for function in tools.functions)
            calls = Calls(tools.dialect, names, tuple(tools.functions))
        options = dict(request.template_options)
        source = ChatTemplate(self.tokenizer, tools.schemas or None, options).source
        if harmony.detect(source) and not tools.is_fallback:
            return Channels(last_message(self.tokenizer, prompts.base), forced)
        thinking = find_thinking(source)
        opened = thinking is not None and self._is_open(thinking, tools.messages, prompts.base)
        return Spans(thinking, opened, calls)

    def _is_open(
        self, thinking: tuple[str, str], messages: list[Message], prompt: list[int]
    ) -> bool:
        """Tell whether the prompt ends inside a thinking span, which the model continues."""
        opening, closing = thinking
        last = messages[-1]
        if last["role"] == "assistant":  # it is continued
            written = last.get("content") or ""
            return written.rfind(opening) > written.rfind(closing)
        return ends_with(self.tokenizer, prompt, opening)

    def _encode(
        self,
        request: Request,
        tools: _Tools,
        images: Sequence[PromptImage],
        preferences: Sequence[Preference],
        steering: Steering | None,
    ) -> Prompts:
        if request.prompt is not None:
            return encode_text(self.tokenizer, request.prompt, preferences)
        return encode_chat(
            self.tokenizer,
            tools.messages,
            preferences,
            (steering or self.steering).placement,
            tools=tools.schemas or None,
            template_options=request.template_options,
            reader=self.reader,
            images=images,
        )

    def _alone(self, request: Request, tools: _Tools) -> list[int]:
        return encode_alone(
            self.tokenizer,
            tools.messages,
            request.preference,
            tools=tools.schemas or None,
            template_options=request.template_options,
            reader=self.reader,
        )

    def _limit(self, request: Request, prompt_tokens: int) -> int:
        """Return the answer's token limit: the window may cut an answer, but not a prompt."""
        if self.window is None:
            return request.max_new_tokens
        return min(request.max_new_tokens, room_for_answer(prompt_tokens, self.window))


def steered_rows(
    prompts: Prompts,
    preferences: Sequence[Preference],
    steering: Steering,
    alone: Callable[[], list[int]] | None,
) -> tuple[list[list[int]], list[float]]:
    """Return the prompts of a steered answer's rows, and the weights of all but the base row.

    Args:
        prompts: the prompts of the chat, or of raw text.
        preferences: normal form, at least one.
        steering: the settings in force.
        alone: returns the prompt for focus, the preferences alone; None where focus doesn't apply.
    """
    rows = [*prompts.preferred, prompts.base]
    weights = row_weights(preferences, steering.strength, steering.focus if alone else 0.0)
    if alone is not None and len(weights) == len(rows):
        try:
            rows.insert(-1, alone())
        except TemplateError:  # it accepts the chat, but not system message and preference alone
            weights = row_weights(preferences, steering.strength)
    return rows, weights


def room_for_answer(prompt_tokens: int, window: int) -> int:
    """Return how many tokens of a context window a prompt leaves.

    Raises:
        PromptTooLongError: it leaves none.
    """
    if prompt_tokens >= window:
        raise PromptTooLongError(
            f"The prompt has {prompt_tokens} tokens (the preference included) and the model's "
            f"context window {window}, so no answer fits; shorten the prompt."
        )
    return window - prompt_tokens


def ends_with(tokenizer: PreTrainedTokenizerBase, prompt: list[int], text: str) -> bool:
    """Tell whether a prompt ends with a text, such as a thinking marker, ignoring white space."""
    tail = str(tokenizer.decode(prompt[-32:], skip_special_tokens=False))
    return tail.rstrip().endswith(text)


def last_message(tokenizer: PreTrainedTokenizerBase, prompt: list[int]) -> str:
    """Return a prompt's last message, which the model continues, in Harmony's form."""
    # By its id: a content may spell the marker, but never has its token.
    start = tokenizer.convert_tokens_to_ids(harmony.START)
    if start not in prompt:
        return ""
    begun = prompt[len(prompt) - prompt[::-1].index(start) :]
    return str(tokenizer.decode(begun, skip_special_tokens=False))


def described(schemas: Sequence[Schema], template: str) -> list[Schema]:
    """Return tools as a template's source needs them: gpt-oss's fails without a description."""
    if ".description" not in template:
        return list(schemas)
    return [{**schema, "function": {"description": "", **schema["function"]}} for schema in schemas]


def _is_read(template: ChatTemplate, dialect: Dialect) -> bool:
    """Tell whether a dialect can parse calls as a chat template writes them."""
    function = {"name": "probe_tool", "arguments": {"key": "probe value"}}
    call = {"type": "function", "function": function}
    messages: list[Message] = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "probe_tool", "content": "x"},
    ]
    try:
        chat = template.render(messages)
    except TemplateError:
        return True  # how it writes calls is unknown
    begun = chat[: chat.find("probe value")].rfind(dialect.SPANS[0][0])
    if "probe value" not in chat or begun < 0:
        return True
    spans = Spans(None, calls=Calls(dialect, ()))
    pieces = [*spans.push(chat[begun:]), *spans.finish()]
    return Piece("name", "probe_tool") in pieces


def _goes_on(tools: _Tools) -> bool:
    """Tell whether the answer continues text of the prompt: raw text, or an assistant's turn."""
    last = tools.messages[-1] if tools.messages else None
    return last is None or (last["role"] == "assistant" and bool(last["content"].strip()))


def _knows_tools(template: ChatTemplate) -> bool:
    """Tell whether a chat template renders tools, so that the model sees them."""
    chat = [{"role": "user", "content": "x"}]
    plain = ChatTemplate(template.tokenizer, None, template.options)
    try:
        return template.render(chat) != plain.render(chat)
    except TemplateError:
        return True  # it needs other messages; the request's own will show
