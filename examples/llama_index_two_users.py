"""One index, one model, one engine: two users ask at once, and each gets their own style."""

from __future__ import annotations

import asyncio
from pathlib import Path

from llama_index.core import PromptTemplate, SimpleDirectoryReader, VectorStoreIndex
from llama_index.core.base.base_query_engine import BaseQueryEngine
from llama_index.core.node_parser import MarkdownNodeParser
from llama_index_minilm import MiniLM

from amulet_integrations.llama_index import AmuletLLM, preference

DOCUMENTS = Path(__file__).parent / "documents"
QUESTION = "What can I eat at the Saturday market?"
PROMPT = PromptTemplate("{context_str}\n\n{query_str}")
WISHES = {"Anna": "Answer in one short sentence.", "Ben": "Answer as a bullet list."}


async def ask(engine: BaseQueryEngine, name: str) -> None:
    with preference(WISHES[name], level="user"):
        print(f"[{name}] {await engine.aquery(QUESTION)}\n")


async def main() -> None:
    pages = SimpleDirectoryReader(DOCUMENTS).load_data()
    nodes = MarkdownNodeParser().get_nodes_from_documents(pages)
    engine = VectorStoreIndex(nodes, embed_model=MiniLM()).as_query_engine(
        AmuletLLM.embedded(max_tokens=60),
        similarity_top_k=1,
        text_qa_template=PROMPT,
    )
    await asyncio.gather(*(ask(engine, name) for name in WISHES))


if __name__ == "__main__":
    asyncio.run(main())
