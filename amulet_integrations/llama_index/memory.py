"""`PreferenceMemoryBlock`: a conversation's preference, stored with its messages."""

from __future__ import annotations

from typing import Any

from llama_index.core.async_utils import asyncio_run
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.bridge.pydantic import Field
from llama_index.core.memory import BaseMemoryBlock
from llama_index.core.storage.chat_store import SimpleChatStore
from llama_index.core.storage.chat_store.base import BaseChatStore
from llama_index.core.storage.chat_store.base_db import AsyncDBChatStore
from pydantic import ValidationError
from typing_extensions import Unpack

from amulet.aliases import refuse_unnamed
from amulet.errors import RequestError
from amulet.preference import PreferenceLike, describe
from amulet_integrations._preference import Push
from amulet_integrations.llama_index.messages import preference_message, stated_in
from amulet_integrations.llama_index.scope import Settings, stored

SUFFIX = "/preference"


class PreferenceMemoryBlock(BaseMemoryBlock[list[ChatMessage]]):
    """The preference of each conversation, for LlamaIndex's `Memory`.

    `AmuletLLM` reads it from the memory's messages and removes it from the prompt; another LLM
    reads it there as an instruction. It is kept in a chat store under "<session id>/preference",
    so it outlives the process if the store does, and a long conversation never drops it.

    Args:
        chat_store: any LlamaIndex chat store; by default one in memory.

    >>> store = SQLAlchemyChatStore("chats", async_database_uri="sqlite+aiosqlite:///chats.db")
    >>> block = PreferenceMemoryBlock(chat_store=store)
    >>> block.set("anna-monday", "Answer in one short sentence.")
    >>> memory = Memory.from_defaults(session_id="anna-monday", memory_blocks=[block])
    """

    name: str = "preference"
    description: str | None = "How this conversation wants its answers."
    chat_store: BaseChatStore | AsyncDBChatStore = Field(default_factory=SimpleChatStore)

    def __init__(self, *unnamed: Any, **options: Any) -> None:
        refuse_unnamed(unnamed, "PreferenceMemoryBlock", "chat_store=...")
        try:
            super().__init__(**options)
        except ValidationError as error:
            raise RequestError(f"PreferenceMemoryBlock: {describe(error)}") from None

    def set(
        self,
        session_id: str,
        preference: PreferenceLike = None,
        **push: Unpack[Push],
    ) -> None:
        """Replace a conversation's entry; "" stores "off", None inherits.

        Raises:
            RequestError: nothing is given, or it is not valid; nothing is written.
        """
        asyncio_run(self.aset(session_id, preference, **push))

    async def aset(
        self,
        session_id: str,
        preference: PreferenceLike = None,
        **push: Unpack[Push],
    ) -> None:
        """`set` for asyncio."""
        given = stored(preference, **push)
        await self._write(session_id, [preference_message(**given)])

    def get(self, session_id: str) -> Settings:
        """Return what is kept for a conversation; `{}` where nothing is."""
        kept: Settings = asyncio_run(self.aget_settings(session_id))
        return kept

    async def aget_settings(self, session_id: str) -> Settings:
        """`get` for asyncio."""
        key = _key(session_id)
        if isinstance(self.chat_store, BaseChatStore):
            return stated_in(await self.chat_store.aget_messages(key) or [])
        return stated_in(await self.chat_store.get_messages(key))

    def forget(self, session_id: str) -> None:
        """Delete what is kept; what lies further out counts again. Unknown ids are fine."""
        asyncio_run(self.aforget(session_id))

    async def aforget(self, session_id: str) -> None:
        """`forget` for asyncio."""
        await self._write(session_id, [])

    async def _write(self, session_id: str, messages: list[ChatMessage]) -> None:
        key = _key(session_id)
        if isinstance(self.chat_store, BaseChatStore):
            await self.chat_store.aset_messages(key, messages)
        else:
            await self.chat_store.set_messages(key, messages)

    async def _aget(
        self, messages: list[ChatMessage] | None = None, **block_kwargs: Any
    ) -> list[ChatMessage]:
        session_id = block_kwargs.get("session_id")
        kept = await self.aget_settings(session_id) if session_id else {}
        return [preference_message(**kept)] if kept else []

    async def _aput(self, messages: list[ChatMessage]) -> None:
        """Keep what messages say that leave the short-term memory."""
        for message in messages:
            session_id = message.additional_kwargs.get("session_id")
            if session_id and (stated := stated_in([message])):
                await self.aset(session_id, **stated)


def _key(session_id: object) -> str:
    if not isinstance(session_id, str) or not session_id.strip():
        raise RequestError(
            f"session_id={session_id!r}: expected non-empty text. Without it the preference would "
            "be shared by every conversation whose id is unknown."
        )
    return session_id + SUFFIX
