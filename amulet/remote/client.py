"""`connect`: an `Amulet` of the same interface over an `amulet serve` somewhere else."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, cast
from weakref import WeakKeyDictionary

from amulet.errors import AmuletError, MissingPackageError, ModelError, RequestError
from amulet.model import Amulet
from amulet.output.async_stream import AsyncReplyStream
from amulet.output.stream import ReplyStream
from amulet.preference import Steering
from amulet.remote.model import RemoteModel, RemoteTokenizer
from amulet.reply import Reply
from amulet.request import Request
from amulet.tool_calls import find_dialect

try:
    import openai
except ImportError:
    raise MissingPackageError(
        'Amulet.connect needs the package openai: pip install "amulet-integrations[remote]"'
    ) from None

from amulet.remote.bodies import chat_options, sendable, to_body
from amulet.remote.errors import told
from amulet.remote.streams import AsyncChunks, AsyncRemoteStream, RemoteStream

TOGETHER = 32  # requests of one `batch` that are under way at once


def connect(
    url: str,
    *,
    api_key: str | None = None,
    model: str | None = None,
    timeout: float = 600.0,
    retries: int = 2,
) -> RemoteAmulet:
    """Return an `Amulet` whose model is on a server.

    Args:
        url: where `amulet serve` listens, such as "http://127.0.0.1:8000".
        api_key: its key, if it wants one.
        model: the served model's name; None takes the one there is.
        timeout: seconds to wait for the server's next piece.
        retries: how often a request is sent again that the server had no room for (429, 503) or
            that did not reach it; the pauses grow, and follow `Retry-After`.

    Raises:
        RequestError: the URL is none, or the key is wrong.
        ModelError: no such server, or it has no such model.
    """
    if not isinstance(url, str) or not url.startswith(("http://", "https://")):
        raise RequestError(f"url={url!r}: expected an address such as http://127.0.0.1:8000.")
    base = url.rstrip("/").removesuffix("/v1")
    options: dict[str, Any] = {
        "base_url": f"{base}/v1",
        # Never the user's own key for OpenAI, which the client would take from the environment.
        "api_key": api_key or "none",
        "timeout": timeout,
        "max_retries": retries,
    }
    client = openai.OpenAI(**options)
    client.organization = client.project = None  # nor what else the environment says of OpenAI
    try:
        with told():
            name = model or client.models.list().data[0].id
            facts = client.models.retrieve(name).model_dump()
    except RequestError:
        raise
    except (AmuletError, IndexError) as error:
        raise ModelError(f"{url}: {error}") from error
    if "steering" not in facts:
        raise ModelError(f"{url}: this server is not `amulet serve`: it doesn't steer.")
    return RemoteAmulet(client, options, facts)


class RemoteAmulet(Amulet):
    """An `Amulet` whose model is on a server; made by `connect`.

    Options are checked here as for a local model, prompts by the server. Requests go out when
    their stream is first read, and the server decodes what is under way in one batch.
    """

    decodes_here = False

    def __init__(
        self, client: openai.OpenAI, options: dict[str, Any], facts: dict[str, Any]
    ) -> None:
        self._client = client
        self._options = options
        # An HTTP connection belongs to the event loop that opened it.
        self._clients: WeakKeyDictionary[asyncio.AbstractEventLoop, openai.AsyncOpenAI] = (
            WeakKeyDictionary()
        )
        self._name = str(facts["id"])
        self._window: int | None = facts.get("max_model_len")
        self.max_rows = int(facts.get("max_rows") or 0)
        self.steering = Steering(**facts["steering"])
        self.end_ids = frozenset(facts["end_ids"])
        # What the integrations ask of a model in this process: its template and its identity.
        self.tokenizer = cast("Any", RemoteTokenizer(self._tokenize, facts.get("chat_template")))
        self.model = cast("Any", RemoteModel(str(facts["system_fingerprint"])))

    @property
    def name(self) -> str:
        """What the server calls its model."""
        return self._name

    @property
    def window(self) -> int | None:
        """The context window in tokens, prompt and answer together; None where none is known."""
        return self._window

    @property
    def rows(self) -> int:
        """Not known here.

        Raises:
            RequestError: always; the server's /metrics tells.
        """
        raise RequestError("rows: only the server knows them; see its /metrics.")

    @property
    def cache_bytes(self) -> int:
        """Not known here; see `rows`."""
        raise RequestError("cache_bytes: only the server knows them; see its /metrics.")

    def prepare(self, request: Request) -> ReplyStream:
        """Return the answer to a `Request`, which is sent at the first read.

        Raises:
            RequestError: it holds what can't be sent.
        """
        body = to_body(request, self._name)
        return RemoteStream(lambda: self._send(self._client, body), request)

    def astart(self, request: Request | ReplyStream) -> AsyncReplyStream:
        """Answer a `Request` piece by piece in an event loop; it is sent at the first read."""
        if isinstance(request, RemoteStream):
            request = request.request
        elif isinstance(request, ReplyStream):
            raise RequestError(
                "This stream belongs to another model; give one that this model prepared."
            )
        body = to_body(request, self._name)

        async def send() -> AsyncChunks:
            return cast("AsyncChunks", await self._send(self._for_this_loop(), body))

        return AsyncRemoteStream(send, request.trace)

    def batch(
        self, requests: Iterable[Request | dict[str, Any]], *, return_exceptions: bool = False
    ) -> list[Reply | AmuletError]:
        """Answer many requests; the server decodes them together. See `Amulet.batch`."""
        streams = self._prepare_all(requests, return_exceptions)
        if not streams:
            return []

        def read(stream: ReplyStream | AmuletError) -> Reply | AmuletError:
            try:
                return stream if isinstance(stream, AmuletError) else stream.read()
            except AmuletError as error:
                if not return_exceptions:
                    raise
                return error

        try:
            with ThreadPoolExecutor(min(TOGETHER, len(streams))) as threads:
                return list(threads.map(read, streams))
        finally:
            for stream in streams:
                if isinstance(stream, ReplyStream):
                    stream.close()

    async def abatch(
        self, requests: Iterable[Request | dict[str, Any]], *, return_exceptions: bool = False
    ) -> list[Reply | AmuletError]:
        """`batch` for asyncio."""
        places = asyncio.Semaphore(TOGETHER)

        async def read(given: Request | dict[str, Any]) -> Reply | AmuletError:
            try:
                request = given if isinstance(given, Request) else Request(**given)
                async with places, self.astart(request) as stream:
                    return await stream.read()
            except AmuletError as error:
                if not return_exceptions:
                    raise
                return error

        tasks = [asyncio.ensure_future(read(request)) for request in requests]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()

    def count_tokens(self, text: str) -> int:
        """Return how many tokens the model's own tokenizer makes of a text."""
        return len(self.encode(text))

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Return the ids that the model's own tokenizer makes of a text."""
        return self._tokenize({"prompt": text, "add_special_tokens": special})

    def encode_chat(self, messages: Sequence[dict[str, Any]], **options: Any) -> list[int]:
        """Return the ids of a chat's prompt without preference; options as for `chat`."""
        request = Request(messages=messages, **options)
        body = {"messages": list(request.messages or ()), **chat_options(request)}
        return self._tokenize(body)

    def calls_tools(self, tools_prompt: Literal["template", "fallback"] = "template") -> bool:
        """Tell whether tools can be used, as far as the template's text says it."""
        template = self.tokenizer.chat_template or ""
        return tools_prompt == "fallback" or (
            "tools" in template and find_dialect(template) is not None
        )

    @staticmethod
    def _send(client: Any, body: dict[str, Any]) -> Any:
        create = client.chat.completions if "messages" in body else client.completions
        source = "messages" if "messages" in body else "prompt"
        named = {name: body[name] for name in ("model", source, "stream", "stream_options")}
        further = {name: value for name, value in body.items() if name not in named}
        return create.create(**named, extra_body=further)

    def _tokenize(self, body: dict[str, Any]) -> list[int]:
        path, sent = (
            str(self._options["base_url"]).removesuffix("/v1") + "/tokenize",
            sendable(body),
        )
        with told():
            found = cast("Any", self._client.post(path, cast_to=object, body=sent))
        return list(found["tokens"])

    def _for_this_loop(self) -> openai.AsyncOpenAI:
        loop = asyncio.get_running_loop()
        if (client := self._clients.get(loop)) is None:
            client = self._clients[loop] = openai.AsyncOpenAI(**self._options)
            client.organization = client.project = None
        return client
