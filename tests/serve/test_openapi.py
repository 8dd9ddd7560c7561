"""The OpenAPI document, fuzzed: whatever is sent, no answer is a 5xx, no request is left over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode

from amulet import Amulet
from amulet.serve.app import create_app
from amulet.serve.limits import Limits
from tests.serve.conftest import asking

EXAMPLES = 6  # per operation and mode


@pytest.mark.parametrize("mode", GenerationMode)
def test_nothing_that_is_sent_is_a_server_error(
    tiny: Amulet, tmp_path: Path, mode: GenerationMode
) -> None:
    app = create_app(
        tiny,
        name="tiny",
        api_keys=["k"],
        limits=Limits(max_tokens=8),
        preferences=tmp_path / "preferences.sqlite",
        thumbs=tmp_path / "preferences.sqlite",
    )
    headers = {"Authorization": "Bearer k"}
    schema = schemathesis.openapi.from_asgi("/openapi.json", app, headers=headers)
    tried = set()
    for found in schema.get_all_operations():
        operation: Any = found.ok()
        strategy = operation.as_strategy(generation_mode=mode)

        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=strategy)
        def send(case: Any) -> None:
            response = case.call(headers=headers)
            assert response.status_code < 500, response.text

        try:
            send()
        except Unsatisfiable:
            continue  # nothing of this operation can be wrong
        tried.add(operation.label)
    stored = {"PUT /v1/preferences/{user}", "PUT /v1/thumbs/{id}", "GET /v1/thumbs/pairs"}
    posted = ("/v1/chat/completions", "/v1/responses", "/v1/embeddings")
    assert {*(f"POST {path}" for path in posted), *stored} <= tried
    assert len(app.state.service.traffic) == 0


async def test_no_page_loads_scripts_from_another_host(tiny: Amulet) -> None:
    async with asking(create_app(tiny, name="m")) as client:
        assert "/v1/models" in (await client.get("/openapi.json")).json()["paths"]
        for page in ("/docs", "/redoc", "/docs/oauth2-redirect"):
            assert (await client.get(page)).status_code == 404
