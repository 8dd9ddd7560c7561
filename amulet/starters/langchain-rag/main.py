"""A LangChain RAG chain over one set of documents that answers each user the way they prefer.

`python main.py` asks a sample question; `python main.py "..."` asks your own.
"""

import re
import sys
from pathlib import Path

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnablePassthrough
from langgraph.store.memory import InMemoryStore  # or SqliteStore, PostgresStore

from amulet_integrations.langchain import ChatAmulet, PreferenceMemory, with_memory

QUESTION = "What can I eat at the Saturday market?"
DOCUMENTS = Path(__file__).with_name("documents")

model = ChatAmulet.embedded(max_tokens=80)

# Each section of each page is a passage; its page's title helps to find it.
passages = {}
for file in sorted(DOCUMENTS.glob("*.md")):
    title, *sections = file.read_text("utf-8").split("\n## ")
    for section in sections:
        heading, _, text = section.partition("\n")
        passages[f"{title} {section}"] = " ".join(text.split())


def words(text: str) -> set[str]:
    """Return the words of a text, without the shortest."""
    return set(re.findall(r"\w{3,}", text.lower()))


def find(inputs: dict[str, str]) -> str:
    """Return the passage that shares the most words with the question. Put your retriever here."""
    asked = words(inputs["question"])
    return passages[max(passages, key=lambda text: len(asked & words(text)))]


prompt = ChatPromptTemplate.from_messages(
    [("system", "You are a helpful guide to the town."), ("human", "{passage}\n\n{question}")]
)
chain = RunnablePassthrough.assign(passage=find) | prompt | model | StrOutputParser()

memory = PreferenceMemory(InMemoryStore())
memory.set("Answer briefly.", user_id="ada")
memory.set("Answer as a numbered list.", user_id="ben")  # carl has no preference
chat = with_memory(chain, memory)

if __name__ == "__main__":
    question = " ".join(sys.argv[1:]) or QUESTION
    print(question)
    for user in ("ada", "ben", "carl"):
        print(f"\n{user}: ", end="")
        for piece in chat.stream({"question": question}, {"configurable": {"user_id": user}}):
            print(piece, end="", flush=True)
    print()
