"""The routes for thumbs, users' ratings of answers, which `amulet tune --thumbs` reads."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Query
from fastapi import Path as InPath
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from starlette.responses import Response

from amulet.evaluation.thumbs import differing, pairs
from amulet.serve.errors import RESPONSES, ApiError
from amulet.serve.schema import ChatMessage, chat, readable, too_many_preferences
from amulet.serve.service import Service
from amulet.serve.store import Store

Id = Annotated[str, InPath(min_length=1, max_length=256)]
User = Annotated[str, Query(min_length=1, max_length=256)]
UNGUESSED = 32  # minimum length of a user's name if there is no API key


class ThumbBody(BaseModel):
    """The body of PUT /v1/thumbs/{id}: an answer, its question, and the user's rating.

    Answers to the same `messages` under the same `preferences` form pairs of one thumb up and one
    thumb down. So a plain answer that is shown next to a steered one gets the preferences of both.
    """

    model_config = ConfigDict(extra="forbid")

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    preferences: Annotated[list[str], Field(min_length=1)]
    answer: str
    thumb: Literal["up", "down"]
    settings: dict[str, Any] = Field(
        default={},
        description="The settings of the answer; stored unchanged. Pairs get `focus` and "
        "`loop_guard` from them.",
    )

    @model_validator(mode="before")
    @classmethod
    def _is_readable(cls, given: Any) -> Any:
        return readable(given)

    @field_validator("preferences")
    @classmethod
    def _preferences_differ(cls, given: list[str]) -> list[str]:
        return list(differing(given))


def add_thumbs(app: FastAPI, service: Service, store: Store, has_key: bool) -> None:
    """Add the routes to an application.

    Args:
        app: the application.
        service: provides the limits and the model's name.
        store: stores the thumbs.
        has_key: whether clients send an API key. Without one, only the user's name protects the
            thumbs, so it must be long.
    """

    def check(user: str) -> None:
        if not has_key and len(user) < UNGUESSED:
            raise ApiError(
                400,
                f"user: expected {UNGUESSED} or more random characters: without an API "
                "key, anyone who guesses the name can read these thumbs.",
                param="user",
            )

    @app.get("/v1/thumbs", responses=RESPONSES)
    async def get_thumbs(user: User) -> dict[str, Any]:
        """Return a user's thumbs, oldest first."""
        check(user)
        return {"object": "list", "data": await asyncio.to_thread(store.thumbs, user)}

    @app.get("/v1/thumbs/pairs", responses=RESPONSES)
    async def get_pairs(user: User) -> Response:
        """Return a user's pairs of answers as JSON lines, as `amulet tune --thumbs` reads them."""
        check(user)

        def lines() -> str:
            found = pairs(store.thumbs(user))
            return "".join(pair.model_dump_json(exclude_defaults=True) + "\n" for pair in found)

        headers = {"Content-Disposition": 'attachment; filename="thumbs.jsonl"'}
        text = await asyncio.to_thread(lines)
        return Response(text, headers=headers, media_type="application/x-ndjson")

    @app.put("/v1/thumbs/{id}", responses=RESPONSES)
    async def put_thumb(id: Id, user: User, body: ThumbBody) -> dict[str, Any]:
        """Store a thumb, replacing an earlier one with this id; return what is stored."""
        check(user)
        limits = service.limits
        if len(body.preferences) > limits.preferences:
            raise too_many_preferences(len(body.preferences), limits, "preferences")
        kept = {
            **body.model_dump(mode="json", exclude={"messages"}),
            "messages": chat(body.messages),
            "model": service.names[0],
            "fingerprint": service.fingerprint,
            "time": int(time.time()),
        }
        if not await asyncio.to_thread(store.put_thumb, user, id, kept, limits.thumbs):
            raise ApiError(
                400,
                f"This user has {limits.thumbs} thumbs, the limit of this server: delete some.",
                param="user",
                code="too_many_thumbs",
            )
        return {"id": id, **kept}

    @app.delete("/v1/thumbs/{id}", responses=RESPONSES, status_code=204)
    async def delete_thumb(id: Id, user: User) -> Response:
        """Delete one of a user's thumbs."""
        check(user)
        return _deleted(await asyncio.to_thread(store.delete_thumbs, user, id))

    @app.delete("/v1/thumbs", responses=RESPONSES, status_code=204)
    async def delete_thumbs(user: User) -> Response:
        """Delete all of a user's thumbs."""
        check(user)
        return _deleted(await asyncio.to_thread(store.delete_thumbs, user))


def _deleted(count: int) -> Response:
    if not count:
        raise ApiError(404, "This user has no such thumb.", code="not_found")
    return Response(status_code=204)
