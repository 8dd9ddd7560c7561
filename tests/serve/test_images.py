"""Images in requests to the server, and from a client of `Amulet.connect`."""

from __future__ import annotations

import base64
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from amulet import Amulet, RequestError, images
from amulet.images import open_image
from amulet.remote import connect
from amulet.serve.app import create_app
from amulet_integrations.langchain import ChatAmulet
from tests.models.images import asks, data_url, image_model, picture, png, processor
from tests.serve.conftest import asking, listening

WISH = {"preference": "Be brief."}
SAID = "Which tea?"


@pytest.fixture(scope="module")
def reading() -> Amulet:
    return Amulet(image_model("llava", torch.float32), processor("llava"))


@pytest.fixture(scope="module")
def expected(reading: Amulet) -> str:
    return reading.chat(asks(SAID, picture()), max_new_tokens=8, **WISH).text


def parts(image: Any) -> list[Any]:
    return [{"type": "text", "text": SAID}, image]


async def test_chat_completions(reading: Amulet, expected: str) -> None:
    image = {"type": "image_url", "image_url": {"url": data_url(), "detail": "auto"}}
    body = {"messages": [{"role": "user", "content": parts(image)}], "max_tokens": 8, **WISH}
    async with asking(create_app(reading)) as client:
        answer = (await client.post("/v1/chat/completions", json=body)).json()
        assert answer["choices"][0]["message"]["content"] == expected
        counted = await client.post("/tokenize", json={"messages": body["messages"]})
        assert counted.json()["count"] == reading.count_chat(asks(SAID, picture()))
        assert (await client.get(f"/v1/models/{answer['model']}")).json()["reads_images"]


async def test_few_images_are_read_at_once(
    reading: Amulet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading one takes memory; a client has no more threads for it by asking for token counts."""
    threads: list[str] = []

    def opened(part: object) -> Any:
        threads.append(threading.current_thread().name)
        return open_image(part)

    monkeypatch.setattr(images, "open_image", opened)
    async with asking(create_app(reading)) as client:
        for place, route in enumerate(("/tokenize", "/v1/chat/completions")):
            image = {"type": "image_url", "image_url": {"url": data_url(50 + place)}}
            body = {"messages": [{"role": "user", "content": parts(image)}]}
            assert (await client.post(route, json=body)).status_code == 200
    assert [name.rpartition("_")[0] for name in threads] == ["amulet-prepare"] * 2


async def test_responses(reading: Amulet, expected: str) -> None:
    said = [{"type": "input_text", "text": SAID}, {"type": "input_image", "image_url": data_url()}]
    body = {"input": [{"role": "user", "content": said}], "max_output_tokens": 8, **WISH}
    async with asking(create_app(reading)) as client:
        answer = (await client.post("/v1/responses", json=body)).json()
    assert answer["output"][0]["content"][0]["text"] == expected


SECRET = Path(__file__).resolve()


@pytest.mark.parametrize(
    ("image", "said"),
    [
        ({"type": "image_url", "image_url": {"url": "http://127.0.0.1/"}}, "doesn't fetch"),
        ({"type": "image_url", "image_url": {"url": SECRET.as_uri()}}, "expected data:image"),
        ({"type": "image", "path": str(SECRET)}, "expected data:image"),
        ({"type": "image", "image": str(SECRET)}, "expected data:image"),
        ({"type": "image", "base64": base64.b64encode(b"x" * 99).decode()}, "in no format"),
        ({"type": "image_url", "image_url": {"url": 5}}, "is a int: expected"),
    ],
    ids=str,
)
async def test_what_is_refused(reading: Amulet, image: Any, said: str) -> None:
    async with asking(create_app(reading)) as client:
        body = {"messages": [{"role": "user", "content": parts(image)}]}
        answer = await client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert said in error["message"]
    assert error["param"] is None  # and not "n", a part of the word "An"


async def test_a_text_model_takes_none(tiny: Amulet) -> None:
    image = {"type": "image_url", "image_url": {"url": data_url()}}
    body = {"messages": [{"role": "user", "content": parts(image)}]}
    async with asking(create_app(tiny)) as client:
        answer = await client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400
    assert "qwen2 takes none: qwen2 reads text alone" in answer.json()["error"]["message"]


async def test_no_image_reaches_the_log(reading: Amulet, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "amulet")
    image = {"type": "image_url", "image_url": {"url": data_url()}}
    body = {"messages": [{"role": "user", "content": parts(image)}], "max_tokens": 2}
    async with asking(create_app(reading, log_content=True)) as client:
        await client.post("/v1/chat/completions", json=body)
    assert SAID in caplog.text
    assert "base64" not in caplog.text


@pytest.mark.allow_hosts(["127.0.0.1"])
def test_a_client_sends_images(reading: Amulet, tmp_path: Path) -> None:
    (tmp_path / "tea.png").write_bytes(png())
    with listening(create_app(reading)) as (url, _):
        remote = connect(url)
        assert remote.reads_images
        local = reading.chat(asks(SAID, picture()), max_new_tokens=8, **WISH)
        for image in (picture(), png(), tmp_path / "tea.png", {"type": "image", "url": data_url()}):
            assert remote.chat(asks(SAID, image), max_new_tokens=8, **WISH) == local
        assert remote.count_chat(asks(SAID, png())) == reading.count_chat(asks(SAID, png()))
        with pytest.raises(RequestError, match="doesn't fetch"):
            remote.chat(asks({"type": "image", "url": "http://127.0.0.1/"}))
        profile = ChatAmulet(amulet=remote).profile
        assert profile is not None
        assert profile["image_inputs"]
