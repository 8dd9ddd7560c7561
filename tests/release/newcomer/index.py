"""What a newcomer writes after the README: their own LlamaIndex index, their own preference."""

from __future__ import annotations

from llama_index.core import Document, SummaryIndex

from amulet import Amulet
from amulet_integrations.llama_index import AmuletLLM, preference

documents = [
    Document(text="The repair café opens on the first Saturday of the month, from ten to four."),
    Document(text="Volunteers mend bicycles, lamps and clothes. Bring some patience."),
]
llm = AmuletLLM(amulet=Amulet.embedded(), max_tokens=48)
engine = SummaryIndex.from_documents(documents).as_query_engine(llm=llm)

plain = str(engine.query("When does the repair café open?"))
with preference("Talk like a pirate."):
    steered = str(engine.query("When does the repair café open?"))
print(f"plain: {plain}\n\nTalk like a pirate.: {steered}")
assert "Saturday" in plain
assert steered != plain
