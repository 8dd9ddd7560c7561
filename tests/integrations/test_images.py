"""Images through LangChain and LlamaIndex: the core's answer, whatever form they are given in."""

from __future__ import annotations

import base64
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import HumanMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_tests.integration_tests import ChatModelIntegrationTests
from llama_index.core.base.llms.types import ChatMessage, ImageBlock, TextBlock
from llama_index.core.chat_engine import SimpleChatEngine
from llama_index.core.memory import ChatMemoryBuffer

from amulet import Amulet, RequestError
from amulet_integrations.langchain import ChatAmulet
from amulet_integrations.llama_index import AmuletLLM
from tests.models.images import asks, data_url, image_model, picture, png, processor

WISH = "Be brief."
SAID = "Which tea?"
BASE64 = base64.b64encode(png()).decode()


@pytest.fixture(scope="module")
def amulet() -> Amulet:
    return Amulet(image_model("llava", torch.float32), processor("llava"))


@pytest.fixture(scope="module")
def expected(amulet: Amulet) -> str:
    answer = amulet.chat(asks(SAID, picture()), preference=WISH, max_new_tokens=8).text
    assert answer != amulet.chat(asks(SAID), preference=WISH, max_new_tokens=8).text
    return answer


# ---- LangChain


@pytest.fixture(scope="module")
def chat(amulet: Amulet) -> ChatAmulet:
    return ChatAmulet(amulet=amulet, preference=WISH, max_tokens=8)


BLOCKS: dict[str, Any] = {
    "image_url": {"type": "image_url", "image_url": {"url": data_url()}},
    "base64": {"type": "image", "base64": BASE64, "mime_type": "image/png"},
    "url": {"type": "image", "url": data_url()},
}


def human(block: Any) -> HumanMessage:
    return HumanMessage([{"type": "text", "text": SAID}, block])


@pytest.mark.parametrize("form", BLOCKS)
async def test_langchain(chat: ChatAmulet, expected: str, form: str) -> None:
    message = human(BLOCKS[form])
    assert chat.invoke([message]).content == expected
    assert "".join(str(chunk.content) for chunk in chat.stream([message])) == expected
    assert [one.content for one in chat.batch([[message], [message]])] == [expected] * 2
    assert (await chat.ainvoke([message])).content == expected
    assert chat.get_num_tokens_from_messages([message]) > 4


def test_langchains_prompt_templates(chat: ChatAmulet, expected: str) -> None:
    block = {"type": "image_url", "image_url": {"url": "data:image/png;base64,{image}"}}
    prompt = ChatPromptTemplate.from_messages([("human", ["{question}", block])])
    assert (prompt | chat).invoke({"question": SAID, "image": BASE64}).content == expected


def test_langchains_profile(chat: ChatAmulet) -> None:
    assert chat.profile is not None
    assert chat.profile["image_inputs"]


class Claims(ChatModelIntegrationTests):
    """What is claimed of a model that reads images; the rest is claimed of SmolLM2."""

    __test__ = False

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatAmulet

    @property
    def supports_image_inputs(self) -> bool:
        return True


def test_langchains_standard_test(chat: ChatAmulet, monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite's image is on the net; all that is needed of it is that it is one."""
    monkeypatch.setattr(httpx, "get", lambda *_, **__: SimpleNamespace(content=png(3, 200, 100)))
    Claims().test_image_inputs(chat)


# ---- LlamaIndex


@pytest.fixture(scope="module")
def llm(amulet: Amulet) -> AmuletLLM:
    return AmuletLLM(amulet=amulet, preference=WISH, max_tokens=8)


def of_user(block: ImageBlock) -> ChatMessage:
    return ChatMessage(role="user", blocks=[TextBlock(text=SAID), block])


async def test_llama_index(llm: AmuletLLM, expected: str, tmp_path: Path) -> None:
    (tmp_path / "tea.png").write_bytes(png())
    for block in (
        ImageBlock(image=png()),
        ImageBlock(image=BytesIO(png())),
        ImageBlock(path=tmp_path / "tea.png"),
        ImageBlock(url=data_url()),
    ):
        message = of_user(block)
        assert llm.chat([message]).message.content == expected
        *_, last = llm.stream_chat([message])
        assert last.message.content == expected
        assert (await llm.achat([message])).message.content == expected


def test_a_chat_engine_of_llama_index(llm: AmuletLLM, amulet: Amulet) -> None:
    """The second turn has the first one's image in its history."""
    engine = SimpleChatEngine.from_defaults(llm=llm, memory=ChatMemoryBuffer.from_defaults())
    history = [of_user(ImageBlock(image=png()))]
    answer = engine.chat("And this?", chat_history=history)
    asked = [*asks(SAID, picture()), {"role": "user", "content": "And this?"}]
    assert str(answer) == amulet.chat(asked, preference=WISH, max_new_tokens=8).text


# ---- both


def test_no_address_is_fetched(chat: ChatAmulet, llm: AmuletLLM) -> None:
    url = "http://127.0.0.1/tea.png"
    with pytest.raises(RequestError, match="doesn't fetch"):
        chat.invoke([human({"type": "image", "url": url})])
    with pytest.raises(RequestError, match="doesn't fetch"):
        llm.chat([of_user(ImageBlock(url=url))])
