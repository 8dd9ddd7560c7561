"""Stream answers from FastAPI, each with its own preference, without blocking the event loop.

Requires `pip install fastapi httpx`. Serve it with `uvicorn langchain_fastapi:app` in this folder.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import httpx
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from amulet_integrations.langchain import ChatAmulet

app = FastAPI()
model = ChatAmulet.embedded(max_tokens=48)


class Question(BaseModel):
    """The body of a request."""

    text: str
    preference: str | None = None


@app.post("/chat")
async def chat(question: Question) -> StreamingResponse:
    """Stream an answer; the decode stops when the client disconnects."""

    async def pieces() -> AsyncIterator[str]:
        async for piece in model.astream(question.text, preference=question.preference):
            yield piece.text

    return StreamingResponse(pieces(), media_type="text/plain")


async def main() -> None:
    """Send three requests at once; their answers share forward passes."""
    wishes = [None, "Answer in one short sentence.", "Answer as a numbered list."]
    transport = httpx.ASGITransport(app=app)  # in this process, without a socket
    async with httpx.AsyncClient(transport=transport, base_url="http://amulet") as client:
        bodies = [{"text": "How do I keep a houseplant alive?", "preference": w} for w in wishes]
        answers = await asyncio.gather(*(client.post("/chat", json=body) for body in bodies))
    for wish, answer in zip(wishes, answers, strict=True):
        print(f"{wish}: {answer.text}")


if __name__ == "__main__":
    asyncio.run(main())
