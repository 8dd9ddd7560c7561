"""The routes: completions, responses, models, tokens, stored preferences, health, metrics."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import Annotated, Any, get_type_hints

import anyio
from fastapi import FastAPI
from fastapi import Path as InPath
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from amulet import __version__
from amulet.errors import AmuletError, RequestError, shown
from amulet.model import Amulet
from amulet.request import Request
from amulet.serve.embeddings import add_embeddings
from amulet.serve.errors import RESPONSES, ApiError, from_amulet, from_validation
from amulet.serve.guard import Guard, answer, check_origins, named_host, not_ready
from amulet.serve.limits import Limits
from amulet.serve.metrics import CONTENT_TYPE
from amulet.serve.replies import Writer
from amulet.serve.responses import ResponseBody, ResponseWriter, as_response_error
from amulet.serve.schema import (
    ChatBody,
    CompletionBody,
    Settings,
    TokenizeBody,
    chat,
    check_settings,
)
from amulet.serve.service import GRACE, ClientGone, ServedRequest, Service
from amulet.serve.store import Store
from amulet.serve.thumbs import add_thumbs

_JSON = re.compile(r"application/([\w.-]+\+)?json", re.IGNORECASE)
User = Annotated[str, InPath(min_length=1, max_length=256)]
SLOW_READER = 60.0  # seconds that a client has to read the rest, beyond the request's time limit
PING = 10.0  # seconds of silence after which a stream sends a comment
PATHS = ("/chat/completions", "/completions", "/models", "/responses", "/embeddings")  # below /v1


def create_app(
    amulet: Amulet | Callable[[], Amulet],
    *,
    name: str | Sequence[str] | None = None,
    api_keys: Sequence[str] = (),
    limits: Limits | None = None,
    preferences: Path | None = None,
    thumbs: str | Path | None = None,
    allowed_hosts: Sequence[str] | None = None,
    allowed_origins: Sequence[str] = (),
    log_content: bool = False,
    on_failure: Callable[[Exception], None] | None = None,
) -> FastAPI:
    """Return the ASGI application; `app.state.service` is its `Service`.

    While it runs, `app.state.loading` is the thread that loads the model, if it is loaded then.

    Args:
        amulet: the model, or a function that loads it while the server runs and answers 503.
        name: the model's name or names for clients; None uses the last part of its own name.
        api_keys: keys, one of which a client must send; if empty, no key is required.
        limits: the limits of requests.
        preferences: an SQLite file for stored preferences; requires an API key.
        thumbs: an SQLite file for stored thumbs, which may be the same file; ":memory:" keeps them
            until the server stops. Without an API key, user names need 32 characters or more.
        allowed_hosts: accepted names in the `Host` header; None accepts all.
        allowed_origins: origins whose pages may call the server (CORS), such as
            "https://app.example.com"; "*" permits all.
        log_content: write prompts, preferences and answers to the log.
        on_failure: called if the model can't be loaded.

    Raises:
        RequestError: preferences without an API key, an empty name, a key that no client can send,
            an invalid host or origin, or an option of another type.
    """
    if not isinstance(amulet, Amulet) and not callable(amulet):
        raise RequestError(
            f"create_app has a model of type {type(amulet).__name__}: expected an Amulet, or a "
            "function that loads one, such as Amulet.embedded."
        )
    if not isinstance(limits, Limits | None):
        raise RequestError(f"limits={shown(limits)}: expected Limits(...).")
    lists = {
        "name": [name] if isinstance(name, str) else name or (),
        "api_keys": api_keys,
        "allowed_hosts": () if allowed_hosts is None else allowed_hosts,
        "allowed_origins": allowed_origins,
    }
    for option, given in lists.items():  # of a text, each letter would be a key
        is_list = isinstance(given, Collection) and not isinstance(given, str | Mapping)
        if not is_list or not all(isinstance(one, str) for one in given):
            raise RequestError(f"{option} is a {type(given).__name__}: expected a list of texts.")
    names = list(lists["name"])
    if any(not one.strip() for one in names):
        raise RequestError("name: expected the model's name for clients, got an empty text.")
    if any(not key.strip() for key in api_keys):
        raise RequestError("api_key: expected a key, got an empty text.")
    if any(not re.fullmatch("[!-~]([ -~]*[!-~])?", key) for key in api_keys):
        raise RequestError(
            "api_key: expected printable ASCII characters without spaces at the ends, because "
            "clients send it in a header."
        )
    hosts = None if allowed_hosts is None else [named_host(host) for host in allowed_hosts]
    check_origins(allowed_origins)
    if preferences is not None and not api_keys:
        raise RequestError(
            "Stored preferences need an API key: otherwise anyone could read and change them."
        )
    service = Service(limits or Limits(), log_content)
    store = None if preferences is None else Store(preferences)
    thumb_store = None if thumbs is None else Store(thumbs)

    def serve(loaded: Amulet) -> None:
        service.ready(loaded, names or [served_name(loaded)])

    def load(loader: Callable[[], Amulet]) -> None:
        try:
            serve(loader())
        except Exception as error:
            if on_failure is None:
                raise
            on_failure(error)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if not isinstance(amulet, Amulet):
            # A daemon, because the end of an executor's thread is waited for at exit.
            loading = Thread(target=load, args=(amulet,), name="amulet-load", daemon=True)
            app.state.loading = loading
            loading.start()
        yield
        service.preparing.shutdown(wait=False)
        for kept in (store, thumb_store):
            if kept is not None:
                kept.close()

    if isinstance(amulet, Amulet):
        serve(amulet)
    app = FastAPI(
        title="Amulet",
        version=__version__,
        description="An OpenAI-compatible server that steers each answer towards a preference.",
        docs_url=None,  # the pages would load scripts from another host
        redoc_url=None,
        lifespan=lifespan,
        redirect_slashes=False,  # a path without its id must not match another route
    )
    app.state.service = service
    _add_routes(app, service, store, keeps_thumbs=thumb_store is not None)
    add_embeddings(app, service)
    if store is not None:
        _add_store(app, service.limits, store)
    if thumb_store is not None:
        add_thumbs(app, service, thumb_store, has_key=bool(api_keys))
    _add_errors(app)
    app.add_middleware(
        Guard,
        service=service,
        api_keys=api_keys,
        hosts=hosts,
        origins=allowed_origins,
    )
    return app


def served_name(amulet: Amulet) -> str:
    """Return a model's name for clients: the last part of its hub id or folder."""
    folder = Path(amulet.name)
    return folder.name if folder.is_dir() or folder.is_absolute() else amulet.name


def _add_routes(app: FastAPI, service: Service, store: Store | None, keeps_thumbs: bool) -> None:
    async def run(
        body: ChatBody | CompletionBody, http: HttpRequest, asked: ResponseBody | None = None
    ) -> Response:
        _check_model(service, body.model)
        fields = list(type(body).model_fields)
        stored = await _stored(store, body.user)
        try:
            requests = body.requests(service.limits, service.amulet.window, stored)
            job = await service.start(requests, http, GRACE if body.stream else None)
            writer = _writer(service, body, requests, asked)
            if body.stream:
                return EventStream(_chunks(job, writer, fields), job, service.limits.seconds)
            try:
                return JSONResponse(writer.whole(await job.read(http, writer.take)))
            finally:
                job.close()
        except AmuletError as error:
            raise from_amulet(error, fields) from None
        except ClientGone:
            return Response(status_code=499)  # only for the log and the metrics

    @app.post("/v1/chat/completions", responses=RESPONSES)
    async def chat_completions(body: ChatBody, http: HttpRequest) -> Response:
        """Answer a chat."""
        return await run(body, http)

    @app.post("/v1/completions", responses=RESPONSES)
    async def completions(body: CompletionBody, http: HttpRequest) -> Response:
        """Continue a text, without a chat template."""
        return await run(body, http)

    @app.post("/v1/responses", responses=RESPONSES)
    async def responses(body: ResponseBody, http: HttpRequest) -> Response:
        """Answer a chat, by OpenAI's Responses API; nothing is stored."""
        try:
            return await run(body.chat(), http, body)
        except ApiError as error:
            raise as_response_error(error) from None

    @app.get("/v1/models", responses=RESPONSES)
    async def models() -> dict[str, Any]:
        """List the model under each of its names."""
        service.amulet  # noqa: B018  (503 while it is loaded)
        return {"object": "list", "data": [_model(service, name) for name in service.names]}

    @app.get("/v1/models/{model:path}", responses=RESPONSES)
    async def model(model: str) -> dict[str, Any]:
        """Return what a client needs to know about the model."""
        _check_model(service, model)
        amulet = service.amulet
        template = getattr(amulet.tokenizer, "chat_template", None)
        return {
            **_model(service, model),
            "version": __version__,
            "system_fingerprint": service.fingerprint,
            "steering": amulet.steering.model_dump(),
            "chat_template": template,
            "end_ids": sorted(amulet.end_ids),
            "max_rows": amulet.max_rows,
            "reads_images": amulet.reads_images,
            "limits": vars(service.limits),
            "thumbs": keeps_thumbs,
        }

    @app.post("/tokenize", responses=RESPONSES)
    async def tokenize(body: TokenizeBody) -> dict[str, Any]:
        """Return the token ids of a text, or of a chat rendered by the model's template."""
        _check_model(service, body.model)
        try:
            # Not in any thread: reading an image of 50 megapixels takes some 700 MB meanwhile.
            loop = asyncio.get_running_loop()
            ids = await loop.run_in_executor(service.preparing, _tokens, service.amulet, body)
        except AmuletError as error:
            raise from_amulet(error, list(TokenizeBody.model_fields)) from None
        return {"count": len(ids), "max_model_len": service.amulet.window, "tokens": ids}

    @app.get("/health", responses=RESPONSES)
    async def health() -> dict[str, str]:
        """Return 200 if requests are answered, 503 while loading or draining."""
        if service.traffic.state != "ready":
            raise not_ready(service.traffic.state)
        return {"status": "ready"}

    @app.get("/metrics", responses=RESPONSES)
    async def metrics() -> Response:
        """Return the metrics in Prometheus's text format."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)


def _add_store(app: FastAPI, limits: Limits, store: Store) -> None:
    @app.get("/v1/preferences/{user:path}", responses=RESPONSES)
    async def get_preference(user: User) -> dict[str, Any]:
        """Return a user's stored settings."""
        settings = await asyncio.to_thread(store.get, user)
        if settings is None:
            raise _no_preference()
        return settings

    @app.put("/v1/preferences/{user:path}", responses=RESPONSES)
    async def put_preference(user: User, body: Settings) -> dict[str, Any]:
        """Store settings for requests with this `user`."""
        try:
            check_settings(body, limits)
        except AmuletError as error:
            raise from_amulet(error, list(Settings.model_fields)) from None
        await asyncio.to_thread(store.put, user, body.settings())
        return body.settings()

    @app.delete("/v1/preferences/{user:path}", responses=RESPONSES, status_code=204)
    async def delete_preference(user: User) -> Response:
        """Delete a user's settings."""
        if not await asyncio.to_thread(store.delete, user):
            raise _no_preference()
        return Response(status_code=204)


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(_: HttpRequest, error: ApiError) -> Response:
        return answer(error)

    @app.exception_handler(RequestValidationError)
    async def validation_error(http: HttpRequest, error: RequestValidationError) -> Response:
        kind = http.headers.get("content-type", "").partition(";")[0].strip()
        if http.method != "GET" and not _JSON.fullmatch(kind):
            found = f"The Content-Type is {kind!r}" if kind else "There is no Content-Type"
            wrong = ApiError(400, f"{found}: send JSON with Content-Type: application/json.")
            return answer(wrong)
        body = get_type_hints(http.scope["endpoint"]).get("body")
        return answer(from_validation(error.errors(), getattr(body, "model_fields", ())))

    @app.exception_handler(HTTPException)
    async def http_error(http: HttpRequest, error: HTTPException) -> Response:
        codes = {404: "not_found", 405: "method_not_allowed", 413: "too_large"}
        message = str(error.detail)
        if error.status_code == 400:  # FastAPI's, which does not say why
            reason = "it is nested too deeply, or a number has too many digits"
            if isinstance(error.__cause__, UnicodeDecodeError):
                reason = "send it uncompressed, in UTF-8"
            message = f"The body can't be read as JSON: {reason}."
        elif error.status_code == 404:
            message = _no_route(http)
        elif error.status_code == 405:
            allowed = (error.headers or {}).get("Allow", "another method")
            message = f"{http.method} {http.url.path!r:.200}: this route accepts {allowed}."
        told = ApiError(error.status_code, message, code=codes.get(error.status_code))
        return JSONResponse(told.body, told.status, error.headers)


def _no_route(http: HttpRequest) -> str:
    """Say what is wrong with a path; usually it is the client's base URL."""
    path = http.url.path
    found = next((known for known in PATHS if path.rstrip("/").endswith(known)), None)
    hint = "/openapi.json lists the routes."
    if found is not None:
        wrong = {0: "lacks /v1", 1: "has another path"}.get(path.count("/v1"), "has /v1 twice")
        hint = f"The client's base URL {wrong}: set it to {http.base_url}v1."
    elif path.startswith("/v1/responses/"):
        hint = "This server stores no responses: POST /v1/responses with the whole conversation."
    return f"There is no route {path!r:.200}. {hint}"


class EventStream(StreamingResponse):
    """Server-sent events of a job. The job is closed in any case when the response ends."""

    def __init__(self, chunks: AsyncIterator[str], job: ServedRequest, seconds: float) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(chunks, headers=headers, media_type="text/event-stream")
        self._job = job
        self._seconds = seconds + SLOW_READER

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with anyio.move_on_after(self._seconds), suppress(ClientDisconnect):
                await super().__call__(scope, receive, send)
        finally:
            self._job.close()


async def _chunks(
    job: ServedRequest, writer: Writer | ResponseWriter, fields: list[str]
) -> AsyncIterator[str]:
    try:
        for chunk in writer.begin():
            yield _sse(chunk)
        async for item in job.events(PING):
            if item is None:
                yield ": the answer is not finished\n\n"  # a comment, which clients skip
                continue
            index, event = item
            if event is None:
                chunks = writer.last(index, job.reply(index))
            else:
                chunks = writer.event(index, event)
            for chunk in chunks:
                yield _sse(chunk)
        for chunk in writer.end(job.usages):
            yield _sse(chunk)
        yield writer.done
    except AmuletError as error:
        yield _sse(writer.failed(from_amulet(error, fields)))
    except ApiError as error:
        yield _sse(writer.failed(error))


def _sse(content: dict[str, Any]) -> str:
    # In ASCII, because some clients take U+2028 and other Unicode line ends for the end of a line.
    name = f"event: {content['type']}\n" if "type" in content else ""
    return f"{name}data: {json.dumps(content)}\n\n"


def _writer(
    service: Service,
    body: ChatBody | CompletionBody,
    requests: Sequence[Request],
    asked: ResponseBody | None,
) -> Writer | ResponseWriter:
    model = body.model or service.names[0]
    if asked is not None:
        tokenizer = service.amulet.tokenizer
        return ResponseWriter(asked, model, service.fingerprint, service.raw, tokenizer)
    is_chat = isinstance(body, ChatBody)
    return Writer(
        kind="chat" if is_chat else "completion",
        model=model,
        prompts=len(requests) // (body.n or 1),
        logprobs=bool(body.logprobs) if is_chat else body.logprobs is not None,
        trace=body.trace,
        details=body.return_details,
        usage_last=bool(body.stream_options and body.stream_options.include_usage),
        raw=service.raw,
        fingerprint=service.fingerprint,
    )


async def _stored(store: Store | None, user: str | None) -> dict[str, Any]:
    if store is None or user is None:
        return {}
    return await asyncio.to_thread(store.get, user) or {}


def _check_model(service: Service, model: str | None) -> None:
    if model is not None and model not in service.names:
        known = ", ".join(map(repr, service.names))
        raise ApiError(
            404,
            f"model={shown(model)}: this server has {known}.",
            param="model",
            code="model_not_found",
        )


def _model(service: Service, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "amulet",
        "max_model_len": service.amulet.window,
    }


def _tokens(amulet: Amulet, body: TokenizeBody) -> list[int]:
    if body.prompt is not None:
        return amulet.encode(body.prompt, special=body.add_special_tokens)
    return amulet.encode_chat(
        chat(body.messages or []),
        tools=body.tools or None,
        tools_prompt=body.tools_prompt,
        template_options=body.chat_template_kwargs or {},
    )


def _no_preference() -> ApiError:
    return ApiError(404, "This user has no stored preference.", param="user", code="not_found")
