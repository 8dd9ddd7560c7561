"""A LlamaIndex chat whose user can say at any time how to be answered; it survives a restart.

`python main.py` reads from the terminal.
"""

from pathlib import Path

from llama_index.core.chat_engine import SimpleChatEngine
from llama_index.core.memory import Memory
from llama_index.core.storage.chat_store.sql import SQLAlchemyChatStore

from amulet_integrations.llama_index import AmuletLLM, PreferenceMemoryBlock

USER = "anna"  # the signed-in user of your application
DATABASE = f"sqlite+aiosqlite:///{Path(__file__).with_name('chats.db')}"

llm = AmuletLLM.embedded(max_tokens=120)

preferences = PreferenceMemoryBlock(
    chat_store=SQLAlchemyChatStore("preferences", async_database_uri=DATABASE)
)
memory = Memory.from_defaults(
    session_id=USER, memory_blocks=[preferences], async_database_uri=DATABASE
)
engine = SimpleChatEngine.from_defaults(llm=llm, memory=memory)


def main() -> None:
    """Read lines until the end of the input."""
    print("/prefer TEXT says how to answer, /prefer alone forgets it, Ctrl-D leaves.")
    while True:
        try:
            line = input("you> ").strip()
        except EOFError:
            return
        if line.startswith("/prefer"):
            text = line.removeprefix("/prefer").strip()
            if text:
                preferences.set(USER, text)
            else:
                preferences.forget(USER)
        elif line:
            print(engine.chat(line))


if __name__ == "__main__":
    main()
