"""A conversation's preference is stored in its memory and survives a restart."""

from __future__ import annotations

import tempfile
from pathlib import Path

from llama_index.core.chat_engine import SimpleChatEngine
from llama_index.core.memory import Memory
from llama_index.core.storage.chat_store.sql import SQLAlchemyChatStore

from amulet_integrations.llama_index import AmuletLLM, PreferenceMemoryBlock

LLM = AmuletLLM.embedded(max_tokens=60)


def conversation(folder: Path) -> tuple[SimpleChatEngine, PreferenceMemoryBlock]:
    """Return what the program builds at start."""
    database = f"sqlite+aiosqlite:///{folder / 'chats.db'}"
    block = PreferenceMemoryBlock(
        chat_store=SQLAlchemyChatStore("preferences", async_database_uri=database)
    )
    memory = Memory.from_defaults(
        session_id="anna", memory_blocks=[block], async_database_uri=database
    )
    return SimpleChatEngine.from_defaults(llm=LLM, memory=memory), block


def main() -> None:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        engine, block = conversation(Path(folder))
        print(f"[plain] {engine.chat('Why is the sky blue?')}\n")
        block.set("anna", "Answer in one short sentence.", strength=1.0, placement="user")
        engine, block = conversation(Path(folder))  # as after a restart
        print(f"[after a restart: {block.get('anna')['preference'][0].text}]")
        print(engine.chat("And why are sunsets red?"))


if __name__ == "__main__":
    main()
