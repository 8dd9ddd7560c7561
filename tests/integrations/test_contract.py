"""One table for both integrations: what is given, what reaches the engine, what comes out.

Each case is run through LangChain's and LlamaIndex's class over the same model, whole and streamed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from langchain_core.messages import convert_to_messages
from llama_index.core.llms import ChatMessage

from amulet import Amulet, Preference, RequestError, Steering
from amulet.request import Request
from amulet_integrations.langchain import ChatAmulet
from amulet_integrations.llama_index import AmuletLLM
from tests.models import ScriptedModel, byte_tokenizer

WISH = "Be brief."
PLAIN, STEERED = "A long and winding answer.", "Short."
USER = {"role": "user", "content": "Hi"}

Ask = Callable[[Amulet, dict[str, Any], list[dict[str, Any]], dict[str, Any]], str]


class RecordingAmulet(Amulet):
    """Keeps the requests that reach it."""

    def __init__(self) -> None:
        tokenizer = byte_tokenizer()
        model: Any = ScriptedModel(tokenizer, {WISH: STEERED, "": PLAIN})
        super().__init__(model, tokenizer)
        self.requests: list[Request] = []

    def start(self, request: Request) -> Any:
        self.requests.append(request)
        return super().start(request)

    def batch(self, requests: Any, **options: Any) -> Any:
        given = list(requests)
        self.requests += given
        return super().batch(given, **options)


def langchain(amulet: Amulet, model: Any, messages: Any, options: Any) -> str:
    chat = ChatAmulet(amulet=amulet, **model)
    return str(chat.invoke(convert_to_messages(messages), **options).text)


def langchain_streamed(amulet: Amulet, model: Any, messages: Any, options: Any) -> str:
    chat = ChatAmulet(amulet=amulet, **model)
    return "".join(c.text for c in chat.stream(convert_to_messages(messages), **options))


def llama_index(amulet: Amulet, model: Any, messages: Any, options: Any) -> str:
    llm = AmuletLLM(amulet=amulet, **model)
    return str(llm.chat([ChatMessage(**m) for m in messages], **options).message.content)


def llama_index_streamed(amulet: Amulet, model: Any, messages: Any, options: Any) -> str:
    llm = AmuletLLM(amulet=amulet, **model)
    chunks = llm.stream_chat([ChatMessage(**m) for m in messages], **options)
    return "".join(chunk.delta or "" for chunk in chunks)


@dataclass
class Case:
    """What the model and the call are given, what must reach the engine, and what must be said."""

    name: str
    messages: list[dict[str, Any]] = field(default_factory=lambda: [USER])
    model: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    reaches: dict[str, Any] = field(default_factory=dict)
    says: str = PLAIN


SAMPLING = {"temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 7}
STEERING = {"strength": 1.5, "floor": 0.2, "placement": "user", "focus": 0.5, "loop_guard": 3}
CHAT = [
    {"role": "system", "content": "You are kind."},
    USER,
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "And now?"},
]
WISHED = (Preference(WISH),)

CASES = [
    Case("plain", reaches={"messages": (USER,), "preference": ()}),
    Case("a conversation", messages=CHAT, reaches={"messages": tuple(CHAT)}),
    Case("of the call", options={"preference": WISH}, reaches={"preference": WISHED}, says=STEERED),
    Case("of the model", model={"preference": WISH}, reaches={"preference": WISHED}, says=STEERED),
    Case("off for a call", model={"preference": WISH}, options={"preference": ""}),
    Case("None inherits", model={"preference": WISH}, options={"preference": None}, says=STEERED),
    Case("a call beats the model", model={"preference": "x"}, options={"preference": WISH},
         reaches={"preference": WISHED}, says=STEERED),
    Case("steering of the call", options={"preference": WISH, **STEERING}, reaches=STEERING,
         says=STEERED),
    Case("steering of the model", model={"preference": WISH, **STEERING}, reaches=STEERING,
         says=STEERED),
    Case("strength 0 is an answer", model={"preference": WISH, "strength": 3.0},
         options={"strength": 0.0}, reaches={"strength": 0.0}, says=STEERED),
    Case("sampling of the call", options=SAMPLING, reaches=SAMPLING),
    Case("sampling of the model", model=SAMPLING, reaches=SAMPLING),
    Case("temperature 0 is an answer", model={"temperature": 0.7}, options={"temperature": 0.0},
         reaches={"temperature": 0.0}),
    Case("max_tokens", options={"max_tokens": 3}, reaches={"max_new_tokens": 3}, says=PLAIN[:3]),
    Case("max_new_tokens", options={"max_new_tokens": 2}, says=PLAIN[:2]),
    Case("max_tokens of the model", model={"max_tokens": 4}, says=PLAIN[:4]),
    Case("stop", options={"stop": ["wind"]}, reaches={"stop": ("wind",)}, says="A long and "),
    Case("stop of the model", model={"stop": ["long"]}, says="A "),
]  # fmt: skip

ROUTES: list[Ask] = [langchain, langchain_streamed, llama_index, llama_index_streamed]


@pytest.mark.parametrize("ask", ROUTES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_both_integrations_keep_the_contract(ask: Ask, case: Case) -> None:
    amulet = RecordingAmulet()
    text = ask(amulet, case.model, case.messages, case.options)
    (request,) = amulet.requests
    assert {name: getattr(request, name) for name in case.reaches} == case.reaches
    if case.reaches.get("temperature") in (None, 0.0):  # a sampled text is not the scripted one
        assert text == case.says


@pytest.mark.parametrize("ask", ROUTES)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokns": 5}, "max_tokns"),
        ({"strength": float("nan"), "preference": WISH}, "strength"),
        ({"floor": 2.0, "preference": WISH}, "floor"),
        ({"focus": -1.0, "preference": WISH}, "focus"),
        ({"loop_guard": 2.5, "preference": WISH}, "loop_guard"),
        ({"temperature": -1.0}, "temperature"),
        ({"max_tokens": 0}, "max_.*tokens"),
    ],
)
def test_both_refuse_what_is_wrong_by_name(ask: Ask, options: Any, message: str) -> None:
    amulet = RecordingAmulet()
    with pytest.raises(RequestError, match=message):
        ask(amulet, {}, [USER], options)
    assert amulet.requests == []


def test_every_level_takes_every_setting() -> None:
    from amulet.serve.schema import Settings
    from amulet_integrations._preference import Chosen, Push
    from amulet_integrations.langchain.middleware import StatedPreference
    from amulet_integrations.langchain.options import AmuletOptions
    from amulet_integrations.llama_index.settings import AmuletSettings

    settings = set(Steering.model_fields)
    assert set(Push.__annotations__) == settings
    assert set(StatedPreference.__annotations__) == settings | {"preference"}
    for model in (AmuletOptions, AmuletSettings, Chosen, Settings, Request):
        assert settings <= set(model.model_fields)
