"""Thumbs that the server keeps: whose they are, what is refused, and how `amulet tune` reads."""

from __future__ import annotations

import json
import logging
import sqlite3
from pathlib import Path
from typing import Any

import httpx
import pytest

from amulet import Amulet, RequestError
from amulet.errors import EvaluationError
from amulet.evaluation.thumbs import Thumb, read_thumbs
from amulet.serve.app import create_app
from amulet.serve.limits import Limits
from amulet.serve.store import MEMORY, Store
from tests.serve.conftest import asking, user

ANN, BOB = {"user": "ann"}, {"user": "bob"}
THUMBS, PAIRS = "/v1/thumbs", "/v1/thumbs/pairs"
SETTINGS = {"preference": "Be brief.", "strength": 0.5, "focus": {"new": [1, None]}}


def body(answer: str, thumb: str, question: str = "What is tea?", **more: Any) -> dict[str, Any]:
    given = {"messages": user(question), "preferences": ["Be brief."], "settings": SETTINGS}
    return {**given, "answer": answer, "thumb": thumb, **more}


async def put(client: httpx.AsyncClient, id_: str, who: dict[str, str], given: Any) -> int:
    return (await client.put(f"{THUMBS}/{id_}", params=who, json=given)).status_code


async def ids(client: httpx.AsyncClient, who: dict[str, str]) -> list[str]:
    return [one["id"] for one in (await client.get(THUMBS, params=who)).json()["data"]]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "thumbs.sqlite"


async def test_a_round_trip_of_two_users(tiny: Amulet, file: Path) -> None:
    app = create_app(tiny, name="m", api_keys=["k"], thumbs=file)
    async with asking(app) as client:
        for path in (THUMBS, PAIRS):
            assert (await client.get(path, params=ANN)).status_code == 401
    async with asking(app, "k") as client:
        assert (await client.get("/v1/models/m")).json()["thumbs"] is True
        assert await put(client, "1-plain", ANN, body("Tea is ...", "up")) == 200
        assert await put(client, "1-plain", ANN, body("Tea is ...", "down")) == 200  # changed
        assert await put(client, "1-steered", ANN, body("A drink.\u2028", "up")) == 200
        assert await put(client, "1-steered", BOB, body("Bob's words", "up")) == 200
        first, second = (await client.get(THUMBS, params=ANN)).json()["data"]
        assert first.pop("time") > 1_700_000_000
        assert first.pop("fingerprint") == app.state.service.fingerprint
        assert first == {"id": "1-plain", "model": "m", **body("Tea is ...", "down")}
        assert second["settings"] == SETTINGS  # as given, also what this server doesn't know
        assert await ids(client, BOB) == ["1-steered"]
        for mixed in ("ann/pairs", "ann?", "ann&user=bob", "Ann", "ann%"):
            assert await ids(client, {"user": mixed}) == []
            assert (await client.get(PAIRS, params={"user": mixed})).text == ""

        exported = await client.get(PAIRS, params=ANN)
        assert exported.headers["content-type"].startswith("application/x-ndjson")
        assert "thumbs.jsonl" in exported.headers["content-disposition"]
        assert [json.loads(line) for line in exported.text.strip("\n").split("\n")] == [
            {
                "messages": user("What is tea?"),
                "preferences": ["Be brief."],
                "a": "A drink.\u2028",
                "b": "Tea is ...",
                "chosen": "a",
            }
        ]
        assert (await client.get(PAIRS, params=BOB)).text == ""

        for who, status in ((BOB, 404), (ANN, 204), (ANN, 404)):
            answer = await client.delete(f"{THUMBS}/1-plain", params=who)
            assert answer.status_code == status
        assert (await ids(client, ANN), await ids(client, BOB)) == (["1-steered"], ["1-steered"])
        assert (await client.delete(THUMBS, params=ANN)).status_code == 204
        assert (await client.delete(THUMBS, params=ANN)).status_code == 404
        assert (await ids(client, ANN), await ids(client, BOB)) == ([], ["1-steered"])
        assert (await client.delete(THUMBS)).status_code == 400  # nobody's: not everybody's
    assert file.stat().st_mode & 0o077 == 0
    written = b"".join(path.read_bytes() for path in file.parent.iterdir())
    assert b"Bob's words" in written
    assert b"A drink" not in written  # what is deleted is overwritten


async def test_a_path_without_an_id_deletes_nothing(tiny: Amulet) -> None:
    app = create_app(tiny, name="m", api_keys=["k"], thumbs=MEMORY)
    async with asking(app, "k") as client:
        assert await put(client, "1", ANN, body("Tea is ...", "up")) == 200
        for path in (f"{THUMBS}/", f"{THUMBS}//"):
            response = await client.delete(path, params=ANN, follow_redirects=True)
            assert response.status_code == 404
        assert await ids(client, ANN) == ["1"]


async def test_pairs_are_of_one_chat_and_the_same_preferences(tiny: Amulet) -> None:
    async with asking(create_app(tiny, api_keys=["k"], thumbs=MEMORY), "k") as client:
        longer = [*user("What is tea?"), {"role": "assistant", "content": "A"}, *user("Why?")]
        both = ["Be brief.", "Be kind."]
        for number, given in enumerate(
            [
                body("up 1", "up"),
                body("down 1", "down"),
                body("down 2", "down"),
                body("down 1", "up"),  # the same words, liked once and disliked once
                body("other question", "down", "What is coffee?"),
                body("other chat", "down", messages=longer),
                body("two", "up", preferences=both),
                body("two, worse", "down", preferences=both[::-1], settings={}),
            ]
        ):
            assert await put(client, str(number), ANN, given) == 200
        lines = (await client.get(PAIRS, params=ANN)).text.splitlines()
        found = [Thumb.model_validate_json(line) for line in lines]
    assert [(pair.a, pair.b, len(pair.preferences)) for pair in found] == [
        ("up 1", "down 1", 1),
        ("up 1", "down 2", 1),
        ("down 1", "down 2", 1),
        ("two", "two, worse", 2),
    ]


async def test_tune_reads_the_export_and_the_file_itself(
    tiny: Amulet, file: Path, tmp_path: Path
) -> None:
    async with asking(create_app(tiny, api_keys=["k"], thumbs=file), "k") as client:
        for who, words in ((ANN, "Ann's"), (BOB, "Bob's")):
            await put(client, "1", who, body(f"{words} good one", "up"))
            await put(client, "2", who, body(f"{words} bad one", "down"))
        export = tmp_path / "thumbs.jsonl"
        export.write_bytes((await client.get(PAIRS, params=ANN)).content)
        ann = read_thumbs(export)
        assert [(pair.a, pair.b) for pair in ann] == [("Ann's good one", "Ann's bad one")]
        assert read_thumbs(file, "ann") == ann  # also while the server runs
        assert [pair.a for pair in read_thumbs(file)] == ["Ann's good one", "Bob's good one"]
    with pytest.raises(EvaluationError, match="no pairs of the user 'eve'"):
        read_thumbs(file, "eve")
    with pytest.raises(EvaluationError, match="only a server's SQLite file distinguishes users"):
        read_thumbs(export, "ann")
    other = tmp_path / "other.sqlite"
    with sqlite3.connect(other) as database:
        database.execute("CREATE TABLE x (y)")
    with pytest.raises(EvaluationError, match="expected a file of `amulet serve --thumbs`"):
        read_thumbs(other)


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"preferences": []}, "preferences"),
        ({"preferences": ["secret "] * 2}, "preferences"),
        ({"preferences": [" "]}, "preferences"),
        ({"preferences": ["secret 1", "secret 2", "secret 3"]}, "preferences"),
        ({"thumb": "secret"}, "thumb"),
        ({"answer": None}, "answer"),
        ({"answer": "\ud800"}, None),
        ({"settings": "secret"}, "settings"),
        ({"settings": {"deep": json.loads("[" * 200 + "]" * 200)}}, None),
        ({"settings": {"strength": float("nan")}}, None),
        ({"secret": 1}, "secret"),
    ],
)
async def test_a_bad_body_is_a_400_without_content(
    tiny: Amulet, caplog: pytest.LogCaptureFixture, given: dict[str, Any], field: str | None
) -> None:
    limits = Limits(preferences=2)
    app = create_app(tiny, api_keys=["k"], thumbs=MEMORY, limits=limits)
    written = json.dumps({**body("secret answer", "up"), **given})
    with caplog.at_level(logging.DEBUG):
        async with asking(app, "k") as client:
            headers = {"Content-Type": "application/json"}
            answer = await client.put(f"{THUMBS}/1", params=ANN, content=written, headers=headers)
            assert answer.status_code == 400, answer.text
            assert answer.json()["error"]["param"] == field
            assert await ids(client, ANN) == []
    if "secret" not in given:
        assert "secret" not in answer.text
    ours = [record.getMessage() for record in caplog.records if record.name == "amulet.serve"]
    assert any(f"PUT {THUMBS}/{{id}} 400" in line for line in ours)
    assert not any("secret" in line or "ann" in line for line in ours)


async def test_nothing_of_a_thumb_is_logged(tiny: Amulet, caplog: pytest.LogCaptureFixture) -> None:
    app = create_app(tiny, api_keys=["k"], thumbs=MEMORY, log_content=True)
    with caplog.at_level(logging.INFO, "amulet.serve"):
        async with asking(app, "k") as client:
            assert await put(client, "secret-id", {"user": "secret"}, body("secret", "up")) == 200
            assert await ids(client, {"user": "secret"}) == ["secret-id"]
            assert (await client.delete(THUMBS, params={"user": "secret"})).status_code == 204
    lines = [record.getMessage() for record in caplog.records if record.name == "amulet.serve"]
    assert len(lines) == 3
    assert not any("secret" in line for line in lines)


async def test_limits(tiny: Amulet, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = Limits(thumbs=2, body_bytes=1000)
    app = create_app(tiny, api_keys=["k"], thumbs=MEMORY, limits=limits)
    async with asking(app, "k") as client:
        assert await put(client, "big", ANN, body("x" * 1000, "up")) == 413
        assert await put(client, "1", ANN, body("one", "up")) == 200
        assert await put(client, "2", ANN, body("two", "down")) == 200
        refused = await client.put(f"{THUMBS}/3", params=ANN, json=body("three", "up"))
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "too_many_thumbs")
        assert await put(client, "2", ANN, body("two", "up")) == 200  # one can still be changed
        assert await put(client, "1", BOB, body("three", "up")) == 200
        assert (await client.get(THUMBS, params={"user": "a" * 257})).status_code == 400
        assert await put(client, "i" * 257, ANN, body("one", "up")) == 400
    monkeypatch.setattr("amulet.serve.store._PAGES", 10)
    app = create_app(tiny, api_keys=["k"], thumbs=MEMORY)
    async with asking(app, "k") as client:
        full = await client.put(f"{THUMBS}/1", params=ANN, json=body("x" * 50_000, "up"))
        assert full.status_code == 507
        assert full.json()["error"]["message"].startswith("The server's store is full")
        assert await put(client, "1", ANN, body("small", "up")) == 200


async def test_without_a_key_a_name_must_be_long(tiny: Amulet) -> None:
    async with asking(create_app(tiny, name="m", thumbs=MEMORY)) as client:
        short = await client.get(THUMBS, params={"user": "a" * 31})
        assert (short.status_code, short.json()["error"]["param"]) == (400, "user")
        for method, path in (("PUT", "/1"), ("DELETE", "/1"), ("DELETE", ""), ("GET", "/pairs")):
            given = body("one", "up") if method == "PUT" else None
            answer = await client.request(method, THUMBS + path, params=ANN, json=given)
            assert answer.status_code == 400, (method, path)
        long = {"user": "a" * 32}
        assert await put(client, "1", long, body("one", "up")) == 200
        assert await ids(client, long) == ["1"]
        plain = await client.put(  # what a page of another origin may send without asking
            f"{THUMBS}/1", params=long, content=json.dumps(body("two", "up"))
        )
        assert plain.status_code == 400


async def test_they_are_kept_in_the_file_beside_preferences(tiny: Amulet, file: Path) -> None:
    for _ in range(2):
        app = create_app(tiny, api_keys=["k"], thumbs=file, preferences=file)
        async with app.router.lifespan_context(app), asking(app, "k") as client:
            await client.put("/v1/preferences/ann", json={"preference": "Be brief."})
            await put(client, "1", ANN, body("one", "up"))
    store = Store(file)
    assert store.get("ann") == {"preference": "Be brief."}
    assert [one["answer"] for one in store.thumbs("ann")] == ["one"]
    store.close()


async def test_a_server_that_keeps_none(tiny: Amulet, tmp_path: Path) -> None:
    async with asking(create_app(tiny, name="m")) as client:
        assert (await client.get("/v1/models/m")).json()["thumbs"] is False
        assert (await client.get(THUMBS, params={"user": "a" * 32})).status_code == 404
    with pytest.raises(RequestError, match="expected a file"):
        create_app(tiny, thumbs=tmp_path)
