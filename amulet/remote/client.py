"""`connect`: an `Amulet` with the same interface whose model is on a server."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import inf
from typing import Any, Literal, cast
from urllib.parse import urlsplit
from weakref import WeakKeyDictionary

from amulet.errors import AmuletError, MissingPackageError, ModelError, RequestError, shown
from amulet.images import with_data_urls
from amulet.model import Amulet
from amulet.output.async_stream import AsyncReplyStream
from amulet.output.stream import ReplyStream
from amulet.preference import Steering
from amulet.remote.model import RemoteModel, RemoteTokenizer
from amulet.reply import Reply
from amulet.request import Request, listed
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

TOGETHER = 32  # concurrent requests of one `batch`


def connect(
    url: str,
    *,
    api_key: str | None = None,
    model: str | None = None,
    timeout: float | None = 600.0,
    retries: int = 2,
) -> RemoteAmulet:
    """Return an `Amulet` whose model is on a server.

    Args:
        url: address of an `amulet serve`, such as "http://127.0.0.1:8000".
        api_key: the server's key, if it requires one.
        model: the served model's name; None means the only one.
        timeout: seconds to wait for the server's next piece; None is no limit.
        retries: how often to resend a request that the server had no room for (429, 503) or
            that did not reach it; the waits grow, and follow `Retry-After`.

    Raises:
        RequestError: the URL or an option is invalid, or the key is wrong.
        ModelError: there is no such server, or it has no such model.
    """
    if not (isinstance(url, str) and _is_address(url)):
        raise RequestError(f"url={shown(url)}: expected an address such as http://127.0.0.1:8000.")
    if timeout is not None and not (isinstance(timeout, int | float) and 0 < timeout < inf):
        raise RequestError(
            f"timeout={shown(timeout)}: expected seconds, more than 0, or None for no limit."
        )
    if not (isinstance(api_key or "", str) and re.fullmatch("[ -~]*", api_key or "")):
        raise RequestError(
            "api_key: expected printable ASCII characters, because it is sent in a header."
        )
    if isinstance(retries, bool) or not isinstance(retries, int) or retries < 0:
        raise RequestError(f"retries={shown(retries)}: expected a whole number, 0 or more.")
    base = url.rstrip("/").removesuffix("/v1")
    options: dict[str, Any] = {
        "base_url": f"{base}/v1",
        # Never the user's OpenAI key, which the client would read from the environment.
        "api_key": api_key or "none",
        "timeout": timeout,
        "max_retries": retries,
    }
    try:
        client = openai.OpenAI(**options)
    except Exception as error:  # of its HTTP library, about the host's name
        raise RequestError(
            f"url={shown(url)}: {error}; expected an address such as http://127.0.0.1:8000."
        ) from None
    client.organization = client.project = None  # nor these, also from the environment
    try:
        with told():
            name = model or client.models.list().data[0].id
            facts = client.models.retrieve(name).model_dump()
    except RequestError:
        raise
    except AmuletError as error:
        raise ModelError(f"{url}: {error}") from error
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ModelError(f"{url}: this server does not list its models as OpenAI does.") from error
    if not facts.keys() >= {"steering", "end_ids", "system_fingerprint"}:
        raise ModelError(f"{url}: this server is not `amulet serve`: it doesn't steer.")
    return RemoteAmulet(client, options, facts)


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # of the port, or of an IPv6 address
        return False


class RemoteAmulet(Amulet):
    """An `Amulet` whose model is on a server; created by `connect`.

    Options are checked here, as for a local model, and prompts by the server. A request is sent
    when its stream is first read, and the server decodes concurrent requests in one batch.
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
        self._reads_images = bool(facts.get("reads_images"))
        self.max_rows = int(facts.get("max_rows") or 0)
        self.steering = Steering(**facts["steering"])
        self.end_ids = frozenset(facts["end_ids"])
        # What the integrations need from a model: its template and its identity.
        self.tokenizer = cast("Any", RemoteTokenizer(self._tokenize, facts.get("chat_template")))
        self.model = cast("Any", RemoteModel(str(facts["system_fingerprint"])))

    @property
    def name(self) -> str:
        """The server's name for its model."""
        return self._name

    @property
    def window(self) -> int | None:
        """The context window in tokens, for prompt and answer together; None if unknown."""
        return self._window

    @property
    def reads_images(self) -> bool:
        """Whether messages may have images, as the server says."""
        return self._reads_images

    @property
    def rows(self) -> int:
        """Not known to the client.

        Raises:
        RequestError: always; see the server's /metrics.
        """
        raise RequestError("rows: only the server knows them; see its /metrics.")

    @property
    def cache_bytes(self) -> int:
        """Not known to the client; see `rows`."""
        raise RequestError("cache_bytes: only the server knows them; see its /metrics.")

    def prepare(self, request: Request) -> ReplyStream:
        """Return the answer to a `Request`, which is sent at the first read.

        Raises:
            RequestError: it contains something that can't be sent.
        """
        request = Request.of(request)
        body = to_body(request, self._name)
        return RemoteStream(lambda: self._send(self._client, body), request)

    def astart(self, request: Request | ReplyStream) -> AsyncReplyStream:
        """Stream the answer to a `Request` in an event loop; it is sent at the first read."""
        if isinstance(request, RemoteStream):
            request = request.request
        elif isinstance(request, ReplyStream):
            raise RequestError(
                "This stream belongs to another model; give one that this model prepared."
            )
        request = Request.of(request)
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
        """The asynchronous `batch`."""
        places = asyncio.Semaphore(TOGETHER)

        async def read(given: Request | dict[str, Any]) -> Reply | AmuletError:
            try:
                async with places, self.astart(Request.of(given)) as stream:
                    return await stream.read()
            except AmuletError as error:
                if not return_exceptions:
                    raise
                return error

        tasks = [asyncio.ensure_future(read(one)) for one in listed(requests)]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()

    def count_tokens(self, text: str) -> int:
        """Return the number of tokens of a text, by the model's tokenizer."""
        return len(self.encode(text))

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Return the token ids of a text, by the model's tokenizer."""
        return self._tokenize({"prompt": text, "add_special_tokens": special})

    def encode_chat(self, messages: Sequence[dict[str, Any]], **options: Any) -> list[int]:
        """Return the token ids of a chat's prompt without preference; options as for `chat`."""
        request = Request(messages=messages, **options)
        body = {"messages": with_data_urls(request.messages or ()), **chat_options(request)}
        return self._tokenize(body)

    def calls_tools(self, tools_prompt: Literal["template", "fallback"] = "template") -> bool:
        """Tell whether tools can be used, judging by the template's text."""
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
