"""What the server refuses, with which status and words; limits, keys, states, logs, metrics."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import threading
import time
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from amulet import Amulet, DecodeError, OutOfMemoryError, RequestError
from amulet.serve.app import create_app, served_name
from amulet.serve.limits import Limits, Traffic
from tests.models import ScriptedModel
from tests.serve.conftest import asking, saying, user

CHAT = "/v1/chat/completions"


class SlowModel(ScriptedModel):
    """Takes twenty milliseconds a step."""

    def _next(self, ids: list[int]) -> int:
        time.sleep(0.02)
        return super()._next(ids)


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"top_p": -0.1}, "top_p", "greater than or equal to 0"),
        ({"top_k": -2}, "top_k", "greater than or equal to -1"),
        ({"seed": 1.5}, "seed", "integer"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 5000}, "max_tokens", "this server permits 4096"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": [{"role": "x", "content": "a"}]}, "messages", "has role 'x'"),
        ({"messages": [{"content": "a"}]}, "messages[0]", "field required"),
        ({"messages": user("x" * 600)}, "messages", "context window 512"),
        ({"messages": user("\ud800")}, None, "surrogate"),
        ({"temprature": 1}, "temprature", "unknown option; the closest one is temperature"),
        ({"preferance": "x"}, "preferance", "unknown option; the closest one is preference"),
        ({"num_predict": 1}, "num_predict", "unknown option; it is called max_tokens here"),
        ({"n": 17}, "n", "permits 16 answers"),
        ({"preference": ["a"] * 5}, "preference", "permits 4"),
        ({"preference": {"text": "a", "weight": 11}}, "preference", "less than or equal to 10"),
        ({"preference": {"text": " "}}, "preference", "is empty"),
        ({"strength": 2000}, "strength", "less than or equal to 1000"),
        ({"placement": "here"}, "placement", "'system', 'user' or 'both'"),
        ({"frequency_penalty": 1}, "frequency_penalty", "not supported"),
        ({"logit_bias": {"1": 2}}, "logit_bias", "not supported"),
        ({"modalities": ["text", "audio"]}, "modalities", "returns only text"),
        ({"audio": {"voice": "alloy"}}, "audio", "not supported"),
        ({"functions": [{"name": "f"}]}, "functions", "use tools"),
        ({"function_call": {"name": "f"}}, "function_call", "use tool_choice"),
        ({"web_search_options": {"a": 1}}, "web_search_options", "not supported"),
        ({"verbosity": "huge"}, "verbosity", "'low', 'medium' or 'high'"),
        ({"temperature": None, "messages": None}, "messages", "field required"),
        ({"stream_options": {}}, "stream_options", "requires stream"),
        ({"top_logprobs": 2}, "top_logprobs", "requires logprobs"),
        ({"stop": [""]}, "stop", "non-empty"),
        ({"tool_choice": "required"}, "tool_choice", "requires tools"),
        ({"tools": [{"a": 1}]}, "tools", "expected"),
        ({"response_format": {"type": "yaml"}}, "response_format", "json_schema"),
        ({"response_format": {"type": "json_object", "schema": "x"}}, "response_format", "schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema"),
        ({"grammar": {"kind": "regex", "source": "("}}, "response_format", "regex"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs", "itself"),
    ],
)
async def test_a_bad_body_is_a_400_that_names_the_field(
    tiny: Amulet, body: dict[str, Any], param: str | None, words: str
) -> None:
    content = json.dumps({"messages": user("hi"), **body})
    headers = {"Content-Type": "application/json"}
    async with asking(create_app(tiny, name="m")) as client:
        for streamed in ({}, {"stream": True}) if "stream_options" not in body else ({},):
            sent = json.dumps({**json.loads(content), **streamed})
            response = await client.post(CHAT, content=sent, headers=headers)
            error = response.json()["error"]
            assert response.status_code == 400
            assert error["param"] == param
            assert error["type"] == "invalid_request_error"
            assert words in error["message"]


async def test_codes_that_programs_read(tiny: Amulet) -> None:
    async with asking(create_app(tiny, name="m")) as client:
        long = await client.post(CHAT, json={"messages": user("x" * 600)})
        assert long.json()["error"]["code"] == "context_length_exceeded"
        other = await client.post(CHAT, json={"messages": user("hi"), "model": "gpt"})
        assert other.status_code == 404
        assert other.json()["error"]["code"] == "model_not_found"
        assert (await client.get("/v1/models/gpt")).status_code == 404
        assert (await client.get("/v2")).json()["error"]["code"] == "not_found"
        assert (await client.get(CHAT)).status_code == 405
        broken = await client.post(
            CHAT, content=b'{"a', headers={"Content-Type": "application/json"}
        )
        assert broken.status_code == 400
        deep = await client.post(
            CHAT, content=b"[" * 10**5, headers={"Content-Type": "application/json"}
        )
        assert deep.status_code == 400
        form = await client.post(CHAT, content=b"{}", headers={"Content-Type": "text/plain"})
        assert form.status_code == 400


@pytest.mark.parametrize(
    ("method", "path", "words"),
    [
        ("POST", "/chat/completions", "base URL lacks /v1: set it to http://test/v1."),
        ("GET", "/models", "base URL lacks /v1: set it to http://test/v1."),
        ("POST", "/v1/v1/chat/completions", "base URL has /v1 twice: set it to http://test/v1."),
        ("POST", "/v1/v1/completions/", "base URL has /v1 twice"),
        (
            "POST",
            "/v1/chat/completions/chat/completions",
            "another path: set it to http://test/v1.",
        ),
        ("POST", "//v1/chat/completions", "another path: set it to http://test/v1."),
        ("POST", "/responses", "base URL lacks /v1: set it to http://test/v1."),
        ("GET", "/nothing", "There is no route '/nothing'. /openapi.json lists the routes."),
    ],
)
async def test_a_wrong_base_url_is_told(tiny: Amulet, method: str, path: str, words: str) -> None:
    async with asking(create_app(tiny, name="m")) as client:
        sent = {"json": {"messages": user("hi")}} if method == "POST" else {}
        response = await client.request(method, f"http://test{path}", **sent)
    assert (response.status_code, response.json()["error"]["code"]) == (404, "not_found")
    assert words in response.json()["error"]["message"]


async def test_a_wrong_method_or_content_type_is_told(tiny: Amulet) -> None:
    body = json.dumps({"messages": user("hi"), "max_tokens": 2}).encode()
    async with asking(create_app(tiny, name="m")) as client:
        wrong = await client.get(CHAT)
        assert wrong.status_code == 405
        assert wrong.json()["error"]["message"].endswith("this route accepts POST.")
        for kind, words in (
            (None, "There is no Content-Type"),
            ("text/plain", "The Content-Type is 'text/plain'"),
            ("application/x-www-form-urlencoded", "The Content-Type is 'application/x-www-form"),
        ):
            headers = {} if kind is None else {"Content-Type": kind}
            found = await client.post(CHAT, content=body, headers=headers)
            message = found.json()["error"]["message"]
            assert found.status_code == 400
            assert message.startswith(words)
            assert message.endswith("send JSON with Content-Type: application/json.")
        headers = {"Content-Type": "application/json; charset=utf-8"}
        assert (await client.post(CHAT, content=body, headers=headers)).status_code == 200


async def test_a_body_that_is_no_text_is_told(tiny: Amulet) -> None:
    body = json.dumps({"messages": user("hi")}).encode()
    headers = {"Content-Type": "application/json"}
    async with asking(create_app(tiny, name="m")) as client:
        encoded, size = "send it uncompressed, in UTF-8.", "it is nested too deeply"
        for sent, words in (
            (gzip.compress(body), encoded),
            (body.replace(b"hi", b"\xff\xfe"), encoded),
            (b"1" * 5000, size),
            (b"[" * 100_000, size),
        ):
            found = await client.post(CHAT, content=sent, headers=headers)
            assert found.status_code == 400
            message = found.json()["error"]["message"]
            assert message.startswith(f"The body can't be read as JSON: {words}")


async def test_every_response_has_a_request_id(tiny: Amulet) -> None:
    app = create_app(tiny, name="m", api_keys=["k"], allowed_hosts=["test"])
    asked: list[tuple[str, str, dict[str, Any], int]] = [
        ("GET", "/health", {}, 200),
        ("GET", "/nothing", {}, 404),
        ("PUT", CHAT, {}, 405),
        ("POST", CHAT, {"json": {}}, 400),
        ("POST", CHAT, {"json": {"messages": user("hi"), "max_tokens": 2}}, 200),
        ("POST", CHAT, {"json": {"messages": user("x" * 600), "stream": True}}, 400),
        ("POST", CHAT, {"json": {"messages": user("hi"), "max_tokens": 2, "stream": True}}, 200),
        ("POST", CHAT, {"headers": {"Authorization": "Bearer x"}}, 401),
        ("GET", "/health", {"headers": {"Host": "evil.example"}}, 403),
    ]
    async with asking(app, "k") as client:
        own = []
        for method, path, sent, status in asked:
            response = await client.request(method, path, **sent)
            assert response.status_code == status
            own.append(response.headers["x-request-id"])
            headers = {**sent.get("headers", {}), "X-Request-ID": "mine-1"}
            response = await client.request(method, path, **{**sent, "headers": headers})
            assert response.headers["x-request-id"] == "mine-1"
        assert len(set(own)) == len(asked)
        for bad in ("x" * 201, "two words", ""):
            response = await client.get("/health", headers={"x-request-id": bad})
            assert response.headers["x-request-id"].startswith("req_")


async def test_head_is_get_without_the_body(tiny: Amulet) -> None:
    async with asking(create_app(tiny, name="m", api_keys=["k"])) as client:
        for path, status in (("/health", 200), ("/v1/models", 401), ("/metrics", 401)):
            response = await client.head(path)
            assert (response.status_code, response.content) == (status, b"")
        assert (await client.head(CHAT, headers={"Authorization": "Bearer k"})).status_code == 405


async def test_pages_of_other_origins_may_ask_where_it_is_permitted(tiny: Amulet) -> None:
    origin = "https://app.example.com"
    asked = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang",
    }
    async with asking(create_app(tiny, name="m", api_keys=["k"])) as client:
        assert (await client.options(CHAT, headers=asked)).status_code == 401
        found = await client.get("/health", headers={"Origin": origin})
        assert "access-control-allow-origin" not in found.headers
    app = create_app(tiny, name="m", api_keys=["k"], allowed_origins=[origin])
    async with asking(app) as client:
        found = await client.options(CHAT, headers=asked)
        assert found.status_code == 200
        assert found.headers["access-control-allow-origin"] == origin
        assert "x-stainless-lang" in found.headers["access-control-allow-headers"]
        assert "POST" in found.headers["access-control-allow-methods"]
        assert found.headers["x-request-id"]
        refused = await client.post(CHAT, json={}, headers={"Origin": origin})
        assert refused.status_code == 401  # and the page can read why
        assert refused.headers["access-control-allow-origin"] == origin
        assert "x-request-id" in refused.headers["access-control-expose-headers"]
        other = await client.get("/health", headers={"Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers
    async with asking(create_app(tiny, name="m", allowed_origins=["*"])) as client:
        found = await client.get("/health", headers={"Origin": "https://any.example"})
        assert found.headers["access-control-allow-origin"] == "*"
    for wrong in ("app.example.com", "https://a.example/", "https://a.example/page", ""):
        with pytest.raises(RequestError, match=r"allow_origin='.*': expected a scheme and a host"):
            create_app(tiny, name="m", allowed_origins=[wrong])


@pytest.mark.parametrize("option", ["name", "api_keys", "allowed_hosts", "allowed_origins"])
def test_options_that_are_lists_are_given_as_lists(tiny: Amulet, option: str) -> None:
    """Each letter of a text would be a key of its own."""
    wrong: tuple[Any, ...] = (5, [5], {"a": 1}, *(() if option == "name" else ("secret", b"x")))
    for given in wrong:
        with pytest.raises(RequestError) as raised:
            create_app(tiny, **{option: given})
        kind = type(given).__name__
        assert str(raised.value) == f"{option} is a {kind}: expected a list of texts."


def test_a_model_is_one_or_a_function_that_loads_it() -> None:
    model: Any = "Qwen/Qwen3-0.6B"
    with pytest.raises(RequestError, match=r"a model of type str: expected an Amulet, or a func"):
        create_app(model)
    limits: Any = {"body_bytes": 100}
    with pytest.raises(RequestError, match=r"limits=\{'body_bytes': 100\}: expected Limits"):
        create_app(Amulet.embedded, limits=limits)


async def test_a_model_has_several_names(tiny: Amulet) -> None:
    async with asking(create_app(tiny, name=["one", "two", "one"])) as client:
        listed = (await client.get("/v1/models")).json()["data"]
        assert [model["id"] for model in listed] == ["one", "two"]
        for name in ("one", "two"):
            assert (await client.get(f"/v1/models/{name}")).json()["id"] == name
            body = {"model": name, "messages": user("hi"), "max_tokens": 2}
            assert (await client.post(CHAT, json=body)).json()["model"] == name
        body.pop("model")
        assert (await client.post(CHAT, json=body)).json()["model"] == "one"
        other = await client.post(CHAT, json={**body, "model": "three"})
        assert other.json()["error"]["message"] == "model='three': this server has 'one', 'two'."
    with pytest.raises(RequestError, match="name: expected"):
        create_app(tiny, name=["one", " "])


async def test_limits_are_options(tiny: Amulet) -> None:
    limits = Limits(body_bytes=400, prompt_tokens=40, max_tokens=8, preferences=1, choices=2)
    async with asking(create_app(tiny, name="m", limits=limits)) as client:
        for body, status, param in (
            ({"max_tokens": 513}, 400, "max_tokens"),  # more than the model's window, too
            ({"n": 3}, 400, "n"),
            ({"preference": ["a", "b"]}, 400, "preference"),
            ({"messages": user("x" * 50)}, 400, "messages"),
            ({"messages": user("x" * 500)}, 413, None),
        ):
            response = await client.post(CHAT, json={"messages": user("hi"), **body})
            assert (response.status_code, response.json()["error"]["param"]) == (status, param)

        async def pieces() -> Any:
            for _ in range(5):  # no Content-Length
                yield b" " * 100

        response = await client.post(
            CHAT, content=pieces(), headers={"Content-Type": "application/json"}
        )
        assert (response.status_code, response.json()["error"]["code"]) == (413, "too_large")
        for asked in ({}, {"max_tokens": 9}, {"max_completion_tokens": 512}):
            found = (await client.post(CHAT, json={"messages": user("hi"), **asked})).json()
            assert found["usage"]["completion_tokens"] == 8
            assert found["choices"][0]["finish_reason"] == "length"
    with pytest.raises(RequestError, match=r"seconds=0: expected 0\.001 or more"):
        Limits(seconds=0)


async def test_the_key_opens_everything_but_health(tiny: Amulet) -> None:
    app = create_app(tiny, name="m", api_keys=["one", "two"])
    paths = ("/v1/models", "/metrics", "/openapi.json", "/nowhere")
    async with asking(app) as client:
        assert (await client.get("/health")).json() == {"status": "ready"}
        for path in paths:
            response = await client.get(path)
            assert response.status_code == 401
            assert response.headers["WWW-Authenticate"] == "Bearer"
            assert response.json()["error"]["code"] == "invalid_api_key"
        wrong = await client.get("/v1/models", headers={"Authorization": b"Bearer thr\xe9e"})
        assert wrong.status_code == 401
    async with asking(app, "two") as client:
        assert (await client.get("/v1/models")).status_code == 200


@pytest.mark.parametrize("key", [" k", "k\n", "schl\u00fcssel"])
def test_a_key_that_no_client_can_send_is_told(tiny: Amulet, key: str) -> None:
    with pytest.raises(RequestError, match="api_key: expected printable ASCII characters"):
        create_app(tiny, name="m", api_keys=["good key", key])


async def test_allowed_hosts_are_names_in_any_case(tiny: Amulet) -> None:
    app = create_app(tiny, name="m", allowed_hosts=["Example.COM", "[::1]"])
    async with asking(app) as client:
        for host, status in (("example.com", 200), ("[::1]:80", 200), ("localhost", 403)):
            response = await client.get("/health", headers={"Host": host})
            assert response.status_code == status
    for wrong in ("example.com:8000", "https://example.com", ""):
        with pytest.raises(RequestError, match=r"allowed_host='.*': expected a name"):
            create_app(tiny, name="m", allowed_hosts=[wrong])


async def test_other_hosts_are_refused(tiny: Amulet) -> None:
    async with asking(create_app(tiny, name="m", allowed_hosts=["localhost", "::1"])) as client:
        for host, status in (("localhost:80", 200), ("[::1]:80", 200), ("evil.example", 403)):
            response = await client.get("/health", headers={"Host": host})
            assert response.status_code == status


async def test_loading_and_draining_are_503(tiny: Amulet) -> None:
    go = threading.Event()

    def load() -> Amulet:
        go.wait(10)
        return tiny

    app = create_app(load, name="m")
    async with app.router.lifespan_context(app), asking(app) as client:
        for path in ("/health", "/v1/models"):
            response = await client.get(path)
            assert response.status_code == 503
            assert response.headers["Retry-After"] == "5"
            assert response.json()["error"]["code"] == "loading"
        assert (await client.get("/metrics")).status_code == 200
        go.set()
        while app.state.service.traffic.state == "loading":
            await asyncio.sleep(0.01)
        assert (await client.get("/health")).status_code == 200
        app.state.service.traffic.state = "draining"
        response = await client.post(CHAT, json={"messages": user("hi")})
        assert (response.status_code, response.json()["error"]["code"]) == (503, "draining")
    assert served_name(tiny) == "qwen2"


async def test_a_full_queue_is_a_429(tokenizer: PreTrainedTokenizerFast) -> None:
    amulet = Amulet(SlowModel(tokenizer, "a" * 30), tokenizer, max_rows=2)
    body = {"messages": user("hi"), "preference": "Be brief.", "max_tokens": 10}
    app = create_app(amulet, name="m", limits=Limits(queue=2))
    async with asking(app) as client:
        responses = await asyncio.gather(*(client.post(CHAT, json=body) for _ in range(5)))
    statuses = sorted(response.status_code for response in responses)
    assert statuses == [200, 200, 200, 429, 429]
    refused = next(response for response in responses if response.status_code == 429)
    assert refused.json()["error"]["code"] == "queue_full"
    assert refused.headers["Retry-After"] == "3"
    assert len(app.state.service.traffic) == 0


def test_who_waits() -> None:
    traffic = Traffic(4, Limits(queue=9))
    tickets = [traffic.enter(rows) for rows in (2, 1, 2, 1)]
    assert traffic.waiting == 2  # two and one are in, the next two rows don't fit
    traffic.leave(tickets[0], 1.0)
    assert traffic.waiting == 0
    big = Traffic(4, Limits(queue=0))
    big.enter(9)  # alone it may be larger than the batch
    assert big.waiting == 0


async def test_the_time_limit_cuts_an_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    amulet = Amulet(SlowModel(tokenizer, "a" * 500), tokenizer, max_rows=1)
    app = create_app(amulet, name="m", limits=Limits(seconds=0.3))
    body = {"messages": user("hi"), "return_details": True}
    async with asking(app) as client:
        first = await client.post(CHAT, json=body)
        async with amulet.astream(user("hi")) as busy:
            await anext(busy)
            second = await client.post(CHAT, json=body)
    choice = first.json()["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["details"]["finish_reason"] == "cancelled"
    assert set(choice["message"]["content"]) == {"a"}
    assert 0 < len(choice["details"]["token_ids"]) < 20
    assert second.status_code == 503  # it never got its turn
    assert second.json()["error"]["code"] == "timeout"


async def test_failures_of_the_decode(tokenizer: PreTrainedTokenizerFast) -> None:
    model = ScriptedModel(tokenizer, "hello")
    app = create_app(Amulet(model, tokenizer), name="m")
    body = {"messages": user("secret prompt")}
    async with asking(app) as client:
        for error, status, code in (
            (DecodeError("broke"), 500, "decode_error"),
            (OutOfMemoryError("no room"), 503, "out_of_memory"),
        ):
            model.fail_with = error
            response = await client.post(CHAT, json=body)
            assert response.status_code == status
            assert response.json()["error"] == {
                "message": str(error),
                "type": "server_error",
                "param": None,
                "code": code,
            }
        assert (await client.post(CHAT, json=body)).status_code == 200


async def test_an_error_in_a_stream_is_its_last_event(tokenizer: PreTrainedTokenizerFast) -> None:
    class Failing(ScriptedModel):
        def _next(self, ids: list[int]) -> int:
            if ids[-1] == ord("l"):
                raise DecodeError("broke")
            return super()._next(ids)

    app = create_app(Amulet(Failing(tokenizer, "hello"), tokenizer), name="m")
    async with asking(app) as client:
        response = await client.post(CHAT, json={"messages": user("x"), "stream": True})
    lines = [line for line in response.text.split("\n") if line]
    assert json.loads(lines[-1].removeprefix("data: "))["error"]["message"] == "broke"
    assert len(app.state.service.traffic) == 0


async def test_a_mistake_of_the_server_says_nothing_of_the_prompt(
    tiny: Amulet, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    words = "secret words"

    def wrong(*_: Any) -> Any:
        raise KeyError(words)

    app = create_app(tiny, name="m")
    monkeypatch.setattr(app.state.service, "start", wrong)
    with caplog.at_level(logging.INFO):
        async with asking(app) as client:
            headers = {"x-request-id": "mine-1"}
            response = await client.post(CHAT, json={"messages": user(words)}, headers=headers)
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"
    assert response.headers["x-request-id"] == "mine-1"
    assert "KeyError in request mine-1:" in caplog.text
    assert "secret" not in caplog.text


async def test_logs_hold_content_only_when_asked(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    body = {"messages": user("secret question"), "preference": "secret wish"}
    for log_content in (False, True):
        caplog.clear()
        app = create_app(saying(tokenizer, "secret answer"), name="m", log_content=log_content)
        with caplog.at_level(logging.INFO):
            async with asking(app) as client:
                await client.post(CHAT, json=body)
                await client.post(CHAT, json={**body, "temperature": "secret"})
        said = [words in caplog.text for words in ("question", "wish", "answer'")]
        assert said == [log_content] * 3
        assert "POST /v1/chat/completions 200" in caplog.text
        assert "POST /v1/chat/completions 400" in caplog.text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "asked"),
    [
        (CHAT, {"messages": user("secret")}),
        ("/v1/completions", {"prompt": "secret\n"}),
        ("/v1/responses", {"input": "secret"}),
    ],
)
async def test_the_log_names_the_request(
    path: str,
    asked: dict[str, Any],
    stream: bool,
    tokenizer: PreTrainedTokenizerFast,
    caplog: pytest.LogCaptureFixture,
) -> None:
    app = create_app(saying(tokenizer, "hello"), name="m")
    headers = {"x-request-id": "mine-1"}
    with caplog.at_level(logging.INFO, "amulet.serve"):
        async with asking(app) as client:
            sent = {**asked, "preference": "secret", "stream": stream}
            response = await client.post(path, json=sent, headers=headers)
    assert response.headers["x-request-id"] == "mine-1"
    lines = [one.getMessage() for one in caplog.records if one.name == "amulet.serve"]
    assert [line.split()[0] for line in lines] == ["answer:", "POST"]
    assert [line.split()[-1] for line in lines] == ["mine-1", "mine-1"]
    assert "secret" not in caplog.text


async def test_metrics_count(tokenizer: PreTrainedTokenizerFast) -> None:
    app = create_app(saying(tokenizer, "hello"), name="m")
    async with asking(app) as client:
        await client.post(CHAT, json={"messages": user("hi")})
        await client.post(CHAT, json={"messages": user("hi"), "preference": "x"})
        await client.post(CHAT, json={})
        text = (await client.get("/metrics")).text
    for line in (
        'amulet_requests_total{route="/v1/chat/completions",status="200"} 2.0',
        'amulet_requests_total{route="/v1/chat/completions",status="400"} 1.0',
        'amulet_answers_total{finish_reason="stop",steered="no"} 1.0',
        'amulet_answers_total{finish_reason="stop",steered="yes"} 1.0',
        'amulet_tokens_total{kind="completion"} 12.0',
        'amulet_tokens_total{kind="base_prompt"} 41.0',
        "amulet_requests_in_flight 0.0",
        "amulet_requests_waiting 0.0",
        "amulet_first_token_seconds_count 2.0",
    ):
        assert line in text.split("\n")
