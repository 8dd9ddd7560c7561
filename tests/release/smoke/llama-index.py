"""The extra `llama-index`: an index that answers by a preference."""

from __future__ import annotations

from llama_index.core import Document, SummaryIndex

from amulet import Amulet
from amulet_integrations.llama_index import AmuletLLM, preference

llm = AmuletLLM(amulet=Amulet.embedded(), max_tokens=24)
index = SummaryIndex.from_documents([Document(text="Bees live in hives and make honey.")])
engine = index.as_query_engine(llm=llm)
plain = str(engine.query("Where do bees live?"))
with preference("Talk like a pirate."):
    steered = str(engine.query("Where do bees live?"))
print(plain, steered, sep="\n")
assert "hives" in plain
assert plain != steered
