"""The methods that call a model: all follow the config's preference, and a batch shares passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from functools import partial, wraps
from itertools import islice
from typing import Any, cast

from langchain_core.exceptions import ContextOverflowError
from langchain_core.language_models import BaseChatModel, BaseLanguageModel, LanguageModelInput
from langchain_core.prompt_values import PromptValue
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.runnables.config import get_config_list

from amulet import Amulet, errors
from amulet.output.stream import ReplyStream
from amulet.reply import Reply
from amulet.request import Request
from amulet_integrations.langchain.binding import AmuletBinding, Composable, check_config
from amulet_integrations.langchain.options import AmuletOptions
from amulet_integrations.langchain.runs import in_its_run

CONNECTIONS = 16  # concurrent connections of one batch to a server

# What the input that is being answered will ask for, under way already.
_under_way: ContextVar[list[tuple[Amulet, Request, ReplyStream]] | None] = ContextVar(
    "under_way", default=None
)


class PromptTooLongError(errors.PromptTooLongError, ContextOverflowError):
    """Amulet's error and LangChain's: its middleware then shortens the prompt."""


@contextmanager
def overflow_told() -> Iterator[None]:
    """Raise Amulet's error for a prompt that is too long as one that LangChain knows."""
    try:
        yield
    except errors.PromptTooLongError as error:
        raise PromptTooLongError(str(error)) from None


def _bound(name: str) -> Any:
    """Return a binding method of `Runnable`, applied to an empty binding of the model."""

    @wraps(getattr(Runnable, name), updated=())
    def bind(self: AmuletCalls, *args: Any, **options: Any) -> Any:
        return getattr(self._composed(self), name)(*args, **options)

    bind.__doc__ = f"Return a binding of the model; see LangChain's `Runnable.{name}`."
    return bind


class AmuletCalls(AmuletOptions, Composable, BaseLanguageModel[Any]):
    """The methods by which both models are called and composed.

    A batch stays in the calling thread: all of it is queued for decoding, then LangChain's own
    `invoke` answers one input after the other, with its config, callbacks and cache, and finds
    under way what it asks for. An interrupt ends all of it.
    """

    def _asked_as(
        self, name: str, input: Any, config: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, Any, dict[str, Any]]:
        # The other methods call one of these; events of version "v3" don't.
        if name in ("invoke", "ainvoke", "stream", "astream") or kwargs.get("version") == "v3":
            input = cast("Any", self)._convert_input(input)
            messages = input.to_messages() if isinstance(self, BaseChatModel) else ()
            kwargs = self.settled(config, kwargs, messages)
        elif name == "abatch_as_completed":
            input = _listed(name, input)
        return input, config, kwargs

    def batch(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[Any]:
        """Answer many inputs in shared forward passes; each keeps its config, callbacks, cache."""
        check_config("batch", config)
        answered = self._answered(
            _listed("batch", inputs), config, return_exceptions, False, kwargs
        )
        return [answer for _, answer in sorted(answered, key=lambda one: one[0])]

    def batch_as_completed(
        self,
        inputs: Sequence[LanguageModelInput],
        config: RunnableConfig | Sequence[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> Iterator[Any]:
        """As `batch`, but yields each answer with its position as soon as it is finished."""
        check_config("batch_as_completed", config)
        configs: Any = config if config is None or isinstance(config, dict) else list(config)
        answers = self._answered(
            _listed("batch_as_completed", inputs), configs, return_exceptions, True, kwargs
        )
        return cast("Iterator[Any]", in_its_run(answers))

    async def abatch(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[Any]:
        """See `batch`."""
        check_config("abatch", config)
        listed = _listed("abatch", inputs)
        return await Runnable.abatch(
            self, listed, config, return_exceptions=return_exceptions, **kwargs
        )

    # --- composing

    def _composed(self, runnable: Any) -> Any:
        return AmuletBinding(bound=runnable)

    bind, with_config = _bound("bind"), _bound("with_config")
    with_listeners, with_types = _bound("with_listeners"), _bound("with_types")

    # --- decoding together

    def _asked(self, prompt: PromptValue, stop: Any, kwargs: dict[str, Any]) -> Sequence[Request]:
        """Return the requests of a prompt with settled keywords; none if the answer is cached."""
        raise NotImplementedError

    def _answered(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None,
        return_exceptions: bool,
        as_completed: bool,
        kwargs: dict[str, Any],
    ) -> Iterator[tuple[int, Any]]:
        if not inputs:
            return
        configs = get_config_list(config, len(inputs))
        settled: dict[int, tuple[PromptValue, dict[str, Any]]] = {}

        def answer(position: int) -> Any:
            given, options = settled.get(position, (inputs[position], kwargs))
            try:
                return self.invoke(given, configs[position], **options)
            except Exception as error:
                if not return_exceptions:
                    raise
                return error

        def asked(position: int) -> Sequence[Request]:
            prompt, _, options = self._asked_as(
                "invoke", inputs[position], configs[position], kwargs
            )
            settled[position] = prompt, options
            unstopped = {name: options[name] for name in options if name != "stop"}
            return self._asked(prompt, options.get("stop"), unstopped)

        limit = configs[0].get("max_concurrency") or len(inputs)
        yield from self._together(len(inputs), limit, answer, asked, as_completed)

    def _together(
        self,
        count: int,
        limit: int,
        answer: Callable[[int], Any],
        asked: Callable[[int], Sequence[Request]],
        as_completed: bool = False,
    ) -> Iterator[tuple[int, Any]]:
        """Yield every position's answer, with up to `limit` decoded at once."""
        if not self.engine.decodes_here:
            yield from _by_threads(count, min(limit, CONNECTIONS), answer)
            return
        if getattr(self, "rate_limiter", None):
            limit = 1  # the rate limiter decides when an answer starts
        waiting = list(range(count))
        streams: dict[int, list[tuple[Amulet, Request, ReplyStream]]] = {}
        try:
            while waiting:
                for position in islice(waiting, limit if limit > 1 else 0):
                    if position not in streams:
                        streams[position] = self._begun(partial(asked, position))
                position = waiting[0]
                if as_completed:
                    position = next(
                        filter(lambda one: _is_done(streams.get(one)), waiting), position
                    )
                waiting.remove(position)
                token = _under_way.set(streams.get(position, _under_way.get()))
                try:
                    outcome = answer(position)
                finally:
                    _under_way.reset(token)
                _close(streams.pop(position, []))
                yield position, outcome
        finally:
            for begun in streams.values():
                _close(begun)

    def _begun(
        self, asked: Callable[[], Sequence[Request]]
    ) -> list[tuple[Amulet, Request, ReplyStream]]:
        """Queue what is asked for; nothing where it can't be, which `invoke` will find as well."""
        begun: list[tuple[Amulet, Request, ReplyStream]] = []
        try:
            for request in asked():
                begun.append((self.engine, request, self.engine.start(request)))
        except Exception:
            _close(begun)
            return []
        return begun

    @overflow_told()
    def _replies(self, requests: Sequence[Request]) -> list[Reply]:
        """Decode requests together, except those already running."""
        streams = [self._begun_earlier(request) for request in requests]
        if not any(streams):
            return cast("list[Reply]", self.engine.batch(requests))
        pairs = zip(streams, requests, strict=True)
        started = [stream or self.engine.start(request) for stream, request in pairs]
        try:
            return [stream.read() for stream in started]
        finally:
            for stream in started:
                stream.close()

    async def _areplies(self, requests: Sequence[Request]) -> list[Reply]:
        """Decode requests together."""
        with overflow_told():
            return cast("list[Reply]", await self.engine.abatch(requests))

    def _begun_earlier(self, request: Request) -> ReplyStream | None:
        """Return the stream of a running request; calls made by callbacks have other streams."""
        begun = _under_way.get() or []
        for index, (engine, known, stream) in enumerate(begun):
            if engine is self.engine and known == request:
                del begun[index]
                return stream
        return None


def _listed(name: str, inputs: Any) -> list[Any]:
    if isinstance(inputs, str | bytes | Mapping) or not isinstance(inputs, Iterable):
        raise errors.RequestError(
            f"{name}: inputs is a {type(inputs).__name__}: expected a list of inputs, such as "
            f'{name}(["Hello"]).'
        )
    return list(inputs)


def _is_done(begun: list[tuple[Amulet, Request, ReplyStream]] | None) -> bool:
    return bool(begun) and all(stream.generation.done for _, _, stream in begun or [])


def _close(begun: list[tuple[Amulet, Request, ReplyStream]]) -> None:
    for _, _, stream in begun:
        stream.close()


def _by_threads(count: int, limit: int, answer: Callable[[int], Any]) -> Iterator[tuple[int, Any]]:
    threads = ThreadPoolExecutor(limit)
    try:
        futures = {threads.submit(copy_context().run, answer, i): i for i in range(count)}
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
