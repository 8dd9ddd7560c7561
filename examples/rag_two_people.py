"""One LangChain RAG chain for two people: plain, preference in the prompt only, and steered.

Everything is local: SmolLM2-135M-Instruct answers, MiniLM finds the passages. Run `make demo`; with
`make demo MODEL=gguf` llama.cpp runs SmolLM2; `MODEL=file.gguf`, a folder or a hub id uses another
model.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from langchain_core.documents import Document
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import Runnable, RunnablePassthrough
from langchain_core.vectorstores import InMemoryVectorStore, VectorStoreRetriever
from langchain_text_splitters import MarkdownHeaderTextSplitter
from minilm import MiniLM
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from amulet import Amulet
from amulet.evaluation.grounded import holds
from amulet.evaluation.rules import RULES
from amulet_integrations.langchain import ChatAmulet

DOCUMENTS = Path(__file__).parent / "documents"
# Chosen by the rule of benchmarks/demo_choice.py from 64 pairs of question and preference.
QUESTION, FACT = "What can I eat at the Saturday market?", "smoked trout"
PEOPLE = {"Ada": RULES["numbered"], "Ben": RULES["list"]}  # each with a program's check
PROMPT = ChatPromptTemplate.from_messages(
    [
        ("system", "You are a helpful guide to the town of Tarnholm."),
        ("user", "{passages}\n\n{question}"),
    ]
)


def load_passages() -> list[Document]:
    """Return the pages of `documents/`, split at their headings, one paragraph per line."""
    splitter = MarkdownHeaderTextSplitter([("#", "page"), ("##", "section")])
    passages = []
    for file in sorted(DOCUMENTS.glob("*.md")):
        for part in splitter.split_text(file.read_text(encoding="utf-8")):
            paragraphs = part.page_content.split("\n\n")
            text = "\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
            passages.append(Document(text, metadata=part.metadata))
    return passages


def title(passage: Document) -> str:
    """Return the passage's page and section."""
    return " / ".join(passage.metadata.values())


def join(passages: list[Document]) -> str:
    """Return the passages as the prompt shows them."""
    return "\n\n".join(passage.page_content for passage in passages)


def build_chain(retriever: VectorStoreRetriever, amulet: Amulet) -> Runnable[str, Any]:
    """Return the chain; only its last step uses preferences, which it reads from the config."""
    question = {"passages": retriever | join, "question": RunnablePassthrough()}
    return question | PROMPT | ChatAmulet(amulet=amulet, max_tokens=80)


def ways(preference: str) -> dict[str, dict[str, Any]]:
    """Return the settings of the three answers; strength and floor are the library's own."""
    return {
        "plain": {"preference": ""},
        "preference in the prompt only": {"preference": preference, "strength": 0.0},
        "steered": {"preference": preference},
    }


def answer_side_by_side(chain: Runnable[str, Any], console: Console, name: str) -> dict[str, str]:
    """Stream one person's three answers into a table, with the length and speed of each."""
    preference = PEOPLE[name].preference
    columns = {way: (Text("..."), Text("", style="dim")) for way in ways(preference)}
    table = Table(title=f"{name}: “{preference}”", expand=True, show_footer=True)
    for way, (_, figures) in columns.items():
        table.add_column(way, footer=figures, ratio=1)
    table.add_row(*(text for text, _ in columns.values()))
    with Live(table, console=console, refresh_per_second=8):
        for way, settings in ways(preference).items():
            text, figures = columns[way]
            text.plain, first, tokens = "", 0.0, 0
            for chunk in chain.stream(QUESTION, config={"configurable": settings}):
                first = first or time.perf_counter()
                text.append(chunk.text)
                tokens = (chunk.usage_metadata or {"output_tokens": 0})["output_tokens"]
            pace = 1000 * (time.perf_counter() - first) / max(tokens - 1, 1)
            figures.append(f"{len(text.plain.split())} words, {pace:.0f} ms per token")
    return {way: text.plain for way, (text, _) in columns.items()}


def summary(name: str, answers: dict[str, str]) -> str:
    """Return which of a person's answers keep the preference, and which state the fact."""
    kept = {way: PEOPLE[name].check(text) for way, text in answers.items()}
    held = {way: holds(text, [FACT]) for way, text in answers.items()}
    lines = (("keeps the preference", kept), (f"says “{FACT}”", held))
    return "\n".join(
        f"{what}: " + ", ".join(f"{way} {'yes' if yes else 'no'}" for way, yes in found.items())
        for what, found in lines
    )


def load(model: str | None) -> Amulet:
    """Return the embedded model, through Transformers (None) or llama.cpp ("gguf"), or another."""
    if model is None:
        return Amulet.embedded()
    if model == "gguf":
        return Amulet.embedded(backend="gguf")
    return Amulet.from_pretrained(model)


def main(model: str | None = None) -> dict[str, dict[str, str]]:
    """Load the two models, index the documents, ask; return each person's answers."""
    console = Console()
    with console.status("Loading MiniLM and indexing the documents ..."):
        store = InMemoryVectorStore.from_documents(load_passages(), MiniLM())
        retriever = store.as_retriever(search_kwargs={"k": 1})  # enough for so small a model
    with console.status(f"Loading {model or 'SmolLM2'} ..."):
        chain = build_chain(retriever, load(model))
    console.print(f"Question: {QUESTION}", style="bold", highlight=False)
    titles = "; ".join(title(passage) for passage in retriever.invoke(QUESTION))
    console.print(f"Passages: {titles}\n", highlight=False)
    answers = {}
    for name in PEOPLE:
        answers[name] = answer_side_by_side(chain, console, name)
        console.print("\n" + summary(name, answers[name]) + "\n", highlight=False)
    return answers


if __name__ == "__main__":
    main(*sys.argv[1:2])
