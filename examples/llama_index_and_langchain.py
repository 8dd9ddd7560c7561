"""LangChain and LlamaIndex in one process share a model, and one forward pass per step."""

from __future__ import annotations

import asyncio

from langchain_core.messages import HumanMessage
from llama_index.core.llms import ChatMessage

from amulet import Amulet
from amulet_integrations.langchain import ChatAmulet
from amulet_integrations.llama_index import AmuletLLM

QUESTION = "Why do cats purr?"


async def main() -> None:
    amulet = Amulet.embedded()
    chat = ChatAmulet(amulet=amulet, preference="Talk like a pirate.", max_tokens=40)
    llm = AmuletLLM(amulet=amulet, preference="Answer in one short sentence.", max_tokens=40)
    pirate, brief = await asyncio.gather(
        chat.ainvoke([HumanMessage(QUESTION)]),
        llm.achat([ChatMessage(QUESTION)]),
    )
    print(f"[LangChain, pirate]  {pirate.content}\n")
    print(f"[LlamaIndex, brief]  {brief.message.content}")


if __name__ == "__main__":
    asyncio.run(main())
