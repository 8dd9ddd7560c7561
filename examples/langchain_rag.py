"""A RAG chain with a preference per conversation; retrieval is never steered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableLambda, RunnablePassthrough
from langchain_core.vectorstores import InMemoryVectorStore
from langgraph.store.memory import InMemoryStore
from minilm import MiniLM

from amulet_integrations.langchain import ChatAmulet, PreferenceMemory, with_memory

model = ChatAmulet.embedded(max_tokens=48)
pages = Path(__file__).with_name("documents").glob("*.md")
sections = [part for page in sorted(pages) for part in page.read_text("utf-8").split("\n## ")]
passages = [section.split("\n", 1)[1].strip() for section in sections]  # without headings
retriever = InMemoryVectorStore.from_texts(passages, MiniLM()).as_retriever(search_kwargs={"k": 1})

rephrase = ChatPromptTemplate.from_messages([("human", "Say it in other words: {question}")])
answer = ChatPromptTemplate.from_messages(
    [
        ("system", "You are a helpful guide to the town of Tarnholm."),
        ("human", "{passage}\n\n{question}"),
    ]
)


def show(inputs: dict[str, Any]) -> dict[str, Any]:
    """Print the search query."""
    print(f"  searched: {inputs['search']}")
    return inputs


chain = (
    # `with_preference("")`: this internal call does not inherit the preference
    RunnablePassthrough.assign(search=rephrase | model.with_preference("") | StrOutputParser())
    | RunnableLambda(show)
    | RunnablePassthrough.assign(passage=lambda x: retriever.invoke(x["search"])[0].page_content)
    | answer
    | model
    | StrOutputParser()
)
memory = PreferenceMemory(InMemoryStore())  # or SqliteStore, PostgresStore, ...
memory.set("Answer as a bullet list.", thread_id="monday")  # tuesday has none
chat = with_memory(chain, memory)
for thread in ("monday", "tuesday"):
    print(thread)
    inputs = {"question": "What can I eat at the Saturday market?"}
    print(chat.invoke(inputs, {"configurable": {"thread_id": thread}}))
