"""An endpoint plug-in by which vLLM's OpenAI server accepts `preference` and steering settings.

Installed as the plug-in `amulet` (entry point `vllm.endpoint_plugins`), which every API server
process loads. It adds no route. It builds the prompts of steered chats and completions by Amulet's
own rules, so that the text of a preference can't leave its place in the prompt.
"""

from __future__ import annotations

import asyncio
import copy
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from amulet.errors import ModelError, RequestError
from amulet.output.channels import TEXTS, Channels
from amulet.output.sections import find_thinking
from amulet.preference import DEFAULT_STEERING, Steering, guard_of, row_weights
from amulet.prepare import described, ends_with, last_message, room_for_answer, steered_rows
from amulet.prompting.chat_template import ChatTemplate
from amulet.prompting.prompts import Prompts, encode_alone, encode_chat, encode_text
from amulet.request import Request
from amulet.tool_calls import find_dialect, harmony
from amulet.vllm_backend.wire import PAIR, Pair

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient

SETTINGS = ("preference", *Steering.model_fields)
MAX_PREFERENCES = 4  # as in `amulet serve`
# Options of `amulet serve` that vLLM would ignore silently.
OWN_ENGINE = ("trace", "grammar", "steer_grammar", "return_details")


class SteeringPlugin:
    """The endpoint plug-in; vLLM calls `init_state` once its own handlers exist."""

    name = "amulet"
    required_tasks = ("generate",)

    def attach_router(self, app: Any) -> None:
        """Add no route."""

    async def init_state(
        self, engine_client: EngineClient | None, state: Any, args: Namespace
    ) -> None:
        """Make vLLM's handlers render through `SteeringRenderer`."""
        from amulet.vllm_backend.scheduler import one_step

        if engine_client is None:
            return
        config = engine_client.vllm_config
        if "amulet.vllm_backend" not in str(config.scheduler_config.scheduler_cls):
            raise ModelError(
                "The plug-in amulet requires Amulet's scheduler and logits processor: start the "
                "server with amulet serve --backend vllm."
            )
        tokenizer = engine_client.renderer.get_tokenizer()
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise ModelError(
                f"The tokenizer is a {type(tokenizer).__name__}: steering requires Transformers'; "
                "use --tokenizer-mode hf."
            )
        encoder = Encoder(
            tokenizer,
            chat_template=getattr(state.online_renderer, "chat_template", None),
            options=state.online_renderer.default_chat_template_kwargs,
            window=config.model_config.max_model_len,
            rows=config.scheduler_config.max_num_seqs,
            step=one_step(config.scheduler_config),
            repetition_penalty=config.model_config.get_diff_sampling_param().get(
                "repetition_penalty", 1.0
            ),
        )
        renderer = SteeringRenderer(state.online_renderer, encoder)
        for handler in map(state.__getitem__, state):
            if getattr(handler, "online_renderer", None) is state.online_renderer:
                handler.online_renderer = renderer


@dataclass(frozen=True)
class Steered:
    """A request's own prompt, and its pair, or None if one row suffices."""

    prompt: list[int]
    pair: Pair | None


class Marks(NamedTuple):
    """What is decoded plainly; see `Pair`."""

    spans: list[list[int]]
    inside: bool = False
    heads: list[list[int]] | None = None
    ends: list[int] | None = None


class Encoder:
    """Converts settings and a chat or text to prompts and weights; not thread-safe.

    Args:
        tokenizer: the model's tokenizer, which is copied.
        chat_template: a template to use instead of the tokenizer's.
        options: variables of the chat template.
        window: the context window in tokens.
        rows: maximum rows of the engine.
        step: tokens of one request that the engine reads in one step.
        repetition_penalty: the default of requests that set none.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        chat_template: str | None,
        options: Mapping[str, Any] | None,
        window: int,
        rows: int,
        step: int,
        repetition_penalty: float = 1.0,
    ) -> None:
        self._tokenizer = copy.deepcopy(tokenizer)
        if chat_template is not None:
            self._tokenizer.chat_template = chat_template
        self._options = dict(options or {})
        self._window = window
        self._rows = rows
        self._step = step
        self._repetition_penalty = repetition_penalty

    def chat(
        self,
        messages: Sequence[dict[str, Any]],
        settings: Mapping[str, Any],
        tools: Sequence[dict[str, Any]] | None = None,
        options: Mapping[str, Any] | None = None,
        repetition_penalty: float | None = None,
    ) -> Steered | None:
        """Return what to decode for a chat, or None to decode it plainly.

        With a repetition penalty there is always a base row, because the penalty counts its prompt.

        Raises:
            RequestError: a setting or message is invalid, or the prompts are too long.
        """
        merged = {**self._options, **(options or {})}
        source = ChatTemplate(self._tokenizer, list(tools or ()) or None, merged).source
        tools = described(tools or (), source) or None
        request = Request(messages=list(messages), template_options=merged, **settings)

        def encode(placement: Any) -> Prompts:
            return encode_chat(
                self._tokenizer,
                request.messages or (),
                request.preference,
                placement,
                tools=tools,
                template_options=merged,
            )

        def alone() -> list[int]:
            return encode_alone(
                self._tokenizer,
                request.messages or (),
                request.preference,
                tools=tools,
                template_options=merged,
            )

        return self._steered(
            request,
            encode,
            alone,
            partial(self._marks, source, bool(tools)),
            repetition_penalty,
        )

    def text(
        self,
        prompt: str,
        settings: Mapping[str, Any],
        repetition_penalty: float | None = None,
    ) -> Steered | None:
        """Return what to decode for a raw prompt; see `chat`."""
        request = Request(prompt=prompt, **settings)
        return self._steered(
            request,
            lambda placement: encode_text(self._tokenizer, prompt, request.preference),
            None,
            lambda prompt: Marks([]),
            repetition_penalty,
        )

    def _steered(
        self,
        request: Request,
        encode: Any,
        alone: Callable[[], list[int]] | None,
        marks: Callable[[list[int]], Marks],
        repetition_penalty: float | None,
    ) -> Steered | None:
        preferences = request.preference
        steering = request.steering(DEFAULT_STEERING)
        if not any(row_weights(preferences, steering.strength)):
            return None
        most = min(MAX_PREFERENCES, self._rows - 1)
        if len(preferences) > most:
            raise RequestError(f"preference: {len(preferences)} given; this server permits {most}.")
        prompts = encode(steering.placement)
        has_room = len(preferences) + 2 <= self._rows  # for the focus row
        rows, weights = steered_rows(prompts, preferences, steering, alone if has_room else None)
        lengths = [len(prompt) for prompt in rows]
        longest = max(lengths)
        if min(lengths) == 1 and sum(lengths) > self._step:
            raise RequestError(
                f"preference: a prompt of one token with others of {sum(lengths) - 1} "
                f"exceeds what this server reads in one step ({self._step}); shorten it."
            )
        room_for_answer(longest, self._window)
        marked = marks(prompts.base)
        if repetition_penalty is None:
            repetition_penalty = self._repetition_penalty
        # Only the preference in the prompt.
        is_marked = marked.spans or marked.heads
        if weights == [1.0] and not is_marked and repetition_penalty == 1.0:
            return Steered(prompts.preferred[0], None)
        pair = Pair(
            rows[1:],
            weights,
            steering.floor,
            guard_of(steering),
            *marked,
        )
        return Steered(prompts.preferred[0], pair)

    def _marks(self, source: str, has_tools: bool, prompt: list[int]) -> Marks:
        """Return what is decoded plainly after a prompt, by the source of its template."""
        if harmony.detect(source):
            return self._headers(prompt)
        texts = []
        thinking = find_thinking(source)
        if thinking is not None:
            texts.append(thinking)
        dialect = find_dialect(source) if has_tools else None
        if dialect is not None and dialect.SPANS:
            texts += dialect.SPANS
        elif has_tools:
            raise RequestError(
                "tools: the chat template does not show by which tokens a call begins and ends, so "
                "a preference would change the calls; leave out one of the two."
            )
        spans = []
        for opening, closing in texts:
            first = self._token(opening)
            last = self._token(closing) if closing else -1
            if first is None or last is None:
                raise RequestError(
                    f"preference: the model marks machine-read parts by {opening!r}, which is more "
                    "than one token, so this backend can't exempt them from steering. Leave out "
                    "the tools, or use amulet serve without --backend vllm."
                )
            spans.append([first, last])
        inside = thinking is not None and ends_with(self._tokenizer, prompt, thinking[0])
        return Marks(spans, inside)

    def _headers(self, prompt: list[int]) -> Marks:
        """Return how messages for the reader begin in Harmony; all others are decoded plainly."""
        begun = last_message(self._tokenizer, prompt)
        heads = [
            f"{role}{harmony.CHANNEL}{channel}{harmony.MESSAGE}"
            for role in ("", "assistant")  # the prompt may have the first message's role
            for channel in TEXTS
        ]
        return Marks(
            [],
            Channels(begun).section != "text",
            [self._tokenizer.encode(head, add_special_tokens=False) for head in heads],
            [self._tokenizer.encode(end, add_special_tokens=False)[0] for end in harmony.ENDS],
        )

    def _token(self, text: str) -> int | None:
        """Return a marker's token: its only one, or an added one that begins it (Gemma 4)."""
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        is_told = len(ids) == 1 or ids[0] in self._tokenizer.added_tokens_decoder
        return ids[0] if is_told else None


class SteeringRenderer:
    """Wraps vLLM's renderer; for a steered request it returns Amulet's prompts.

    Args:
        inner: vLLM's `OnlineRenderer`, which renders plain requests.
        encoder: builds the prompts.
    """

    def __init__(self, inner: Any, encoder: Encoder) -> None:
        self._inner = inner
        self._encoder = encoder
        self._thread = ThreadPoolExecutor(1, "amulet-encode")  # a tokenizer is not thread-safe

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def render_chat(self, request: Any, **options: Any) -> Any:
        """Return the conversation and its prompt, or vLLM's error response."""
        if refused := self._refuse_own_engine(request):
            return refused
        as_meant(request)
        rendered = await self._inner.render_chat(request, **options)
        settings = _settings(request)
        if not settings or not isinstance(rendered, tuple) or _is_machine_read(request):
            return rendered
        conversation, inputs = rendered
        asked = request.model_dump(mode="json", exclude_unset=True)
        tools = None if request.tool_choice == "none" else asked.get("tools")

        def encode() -> Steered | None:
            _refuse(request, inputs)
            if request.chat_template is not None:
                raise RequestError("chat_template: can't be combined with a preference.")
            return self._encoder.chat(
                asked["messages"],
                settings,
                tools,
                _template_options(request),
                request.repetition_penalty,
            )

        return await self._steer(request, inputs, encode, lambda steered: (conversation, steered))

    async def render_completion(self, request: Any, **options: Any) -> Any:
        """Return the prompts, or vLLM's error response."""
        if refused := self._refuse_own_engine(request):
            return refused
        as_meant(request)
        rendered = await self._inner.render_completion(request, **options)
        settings = _settings(request)
        if not settings or not isinstance(rendered, list) or _is_machine_read(request):
            return rendered

        def encode() -> Steered | None:
            _refuse(request, rendered)
            if request.echo or request.suffix:
                raise RequestError("echo, suffix: can't be combined with a preference.")
            given = request.prompt
            if isinstance(given, list) and len(given) == 1:
                given = given[0]
            if not isinstance(given, str):
                raise RequestError(
                    "prompt: expected one text, not a list or token ids, with a "
                    "preference; send one request per text."
                )
            return self._encoder.text(given, settings, request.repetition_penalty)

        return await self._steer(request, rendered, encode, lambda steered: steered)

    async def render_responses(self, request: Any, **options: Any) -> Any:
        """Refuse a preference, which this route does not support."""
        if _settings(request):
            return self._inner.create_error_response(
                "preference: use /v1/chat/completions.", param="preference"
            )
        return await self._inner.render_responses(request, **options)

    def _refuse_own_engine(self, request: Any) -> Any:
        """Return an error response for an option of Amulet's own engine, else None."""
        extra = request.model_extra or {}
        for name in OWN_ENGINE:
            if extra.get(name):
                return self._inner.create_error_response(
                    f"{name}: only Amulet's own engine supports it; leave it out, or use amulet "
                    "serve without --backend vllm.",
                    param=name,
                )
        return None

    async def _steer(self, request: Any, inputs: list[Any], encode: Any, result: Any) -> Any:
        try:
            loop = asyncio.get_running_loop()
            steered = await loop.run_in_executor(self._thread, encode)
        except RequestError as error:
            fields = {*SETTINGS, "messages", "prompt", "tools", "chat_template", "echo"}
            named = str(error).split(":")[0].split("=")[0].split("[")[0]
            return self._inner.create_error_response(
                str(error), param=named if named in fields else None
            )
        if steered is None:
            return result(inputs)
        if steered.pair is not None:
            request.vllm_xargs = {**(request.vllm_xargs or {}), **steered.pair.args()}
        given = {key: value for key, value in inputs[0].items() if key != "prompt"}
        return result([{**given, "prompt_token_ids": steered.prompt}])


def as_meant(request: Any) -> None:
    """Convert options of OpenAI's clients that vLLM would refuse or ignore to vLLM's form."""
    if request.top_p == 0:  # only the likeliest token
        request.top_p, request.temperature = 1.0, 0.0
    form = getattr(request, "response_format", None)
    if form is not None and form.type == "json_object":
        schema = (form.model_extra or {}).get("schema")
        if schema:
            wrapped = {"name": "answer", "schema": schema}
            request.response_format = type(form)(type="json_schema", json_schema=wrapped)


def _settings(request: Any) -> dict[str, Any]:
    """Return the request's steering settings; {} for a plain request."""
    extra = request.model_extra or {}
    settings = {name: extra[name] for name in SETTINGS if extra.get(name) is not None}
    return settings if settings.get("preference") else {}


def _template_options(request: Any) -> dict[str, Any]:
    """Return a chat's variables of the template; its effort of reasoning is one, as in vLLM."""
    options = dict(request.chat_template_kwargs or {})
    if request.reasoning_effort is not None:
        options = {"enable_thinking": request.reasoning_effort != "none", **options}
        options["reasoning_effort"] = request.reasoning_effort
    return options


def _is_machine_read(request: Any) -> bool:
    """Tell whether a machine reads the answer, which is then decoded plainly."""
    form = getattr(request, "response_format", None)
    return (
        getattr(request, "structured_outputs", None) is not None
        or (form is not None and form.type != "text")
        or getattr(request, "tool_choice", None) not in (None, "none", "auto")
    )


def _refuse(request: Any, inputs: list[Any]) -> None:
    """Refuse options that can't be combined with steering.

    Raises:
        RequestError: names the option.
    """
    if PAIR in (request.vllm_xargs or {}):
        raise RequestError(f"vllm_xargs: {PAIR} is reserved for the server.")
    if request.use_beam_search:
        raise RequestError("use_beam_search: can't be combined with a preference.")
    if request.prompt_logprobs is not None:
        raise RequestError("prompt_logprobs: can't be combined with a preference.")
    if len(inputs) != 1 or inputs[0].get("type") != "token":
        raise RequestError("messages: only text can be steered; leave out images and audio.")
