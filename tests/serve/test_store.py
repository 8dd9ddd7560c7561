"""Preferences that the server keeps: who may, whose they are, and what goes first."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from transformers import PreTrainedTokenizerFast

from amulet import RequestError
from amulet.serve.app import create_app
from tests.serve.conftest import asking, saying, user

CHAT = "/v1/chat/completions"


@pytest.mark.parametrize("name", ["ann/1", "https://id.example/auth|5", "a/../b", "ä%?#"])
async def test_a_user_s_name_may_have_any_characters(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, name: str
) -> None:
    amulet = saying(tokenizer, {"Be brief.": "Yo", "": "Hello"})
    app = create_app(amulet, api_keys=["k"], preferences=tmp_path / "preferences.sqlite")
    async with asking(app, "k") as client:
        path = f"/v1/preferences/{quote(name, safe='')}"
        assert (await client.put(path, json={"preference": "Be brief."})).status_code == 200
        assert (await client.get(path)).json() == {"preference": "Be brief."}
        for asked, said in ((name, "Yo"), (name[:-1], "Hello")):
            response = await client.post(CHAT, json={"messages": user("hi"), "user": asked})
            assert response.json()["choices"][0]["message"]["content"] == said
        assert (await client.delete(path)).status_code == 204
        assert (await client.get(path)).status_code == 404
        assert (await client.get("/v1/preferences/")).status_code == 400


async def test_stored_preferences(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    amulet = saying(tokenizer, {"Be brief.": "Yo", "Be rude.": "Go", "": "Hello"})
    file = tmp_path / "preferences.sqlite"
    app = create_app(amulet, name="m", api_keys=["k"], preferences=file)

    async def say(**options: Any) -> str:
        response = await client.post(CHAT, json={"messages": user("hi"), **options})
        return str(response.json()["choices"][0]["message"]["content"])

    async with asking(app) as client:
        assert (await client.get("/v1/preferences/ann")).status_code == 401
    async with asking(app, "k") as client:
        path = "/v1/preferences/ann%2F1"
        assert (await client.get("/v1/preferences/ann")).status_code == 404
        settings = {"preference": [{"text": "Be brief.", "weight": 1.0}], "strength": 3.0}
        for body, status in (
            (settings, 200),
            ({"preference": {"text": ""}}, 400),
            ({"preference": ["a"] * 5}, 400),
            ({"preferences": "x"}, 400),
        ):
            response = await client.put("/v1/preferences/ann", json=body)
            assert response.status_code == status
        assert (await client.get("/v1/preferences/ann")).json() == settings
        assert await say(user="ann") == "Yo"
        assert await say(user="bob") == "Hello"
        assert await say() == "Hello"
        assert await say(user="ann", preference="Be rude.") == "Go"
        assert await say(user="ann", preference="") == "Hello"
        assert (await client.get(path)).status_code == 404
        assert file.stat().st_mode & 0o077 == 0
    again = create_app(amulet, name="m", api_keys=["k"], preferences=file)
    async with asking(again, "k") as client:
        assert await say(user="ann") == "Yo"
        assert (await client.delete("/v1/preferences/ann")).status_code == 204
        assert (await client.delete("/v1/preferences/ann")).status_code == 404
        assert await say(user="ann") == "Hello"
    with pytest.raises(RequestError, match="need an API key"):
        create_app(amulet, preferences=file)
    with pytest.raises(RequestError, match="expected a file"):
        create_app(amulet, api_keys=["k"], preferences=tmp_path)
    with pytest.raises(RequestError, match="expected a file"):
        create_app(amulet, api_keys=["k"], preferences=5)  # type: ignore[arg-type]
