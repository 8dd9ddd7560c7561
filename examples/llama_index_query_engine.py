"""A query engine whose answers follow a preference: only two lines change."""

from __future__ import annotations

from pathlib import Path

from llama_index.core import PromptTemplate, Settings, SimpleDirectoryReader, VectorStoreIndex
from llama_index.core.node_parser import MarkdownNodeParser
from llama_index_minilm import MiniLM

from amulet_integrations.llama_index import AmuletLLM  # was: HuggingFaceLLM

DOCUMENTS = Path(__file__).parent / "documents"
QUESTION = "What can I eat at the Saturday market?"
PROMPT = PromptTemplate("{context_str}\n\n{query_str}")  # short, for a small model


def main() -> None:
    Settings.llm = AmuletLLM.embedded(  # was: HuggingFaceLLM(model_name=..., ...)
        preference="Answer in one short sentence.", max_tokens=80
    )
    Settings.embed_model = MiniLM()
    pages = SimpleDirectoryReader(DOCUMENTS).load_data()
    index = VectorStoreIndex(MarkdownNodeParser().get_nodes_from_documents(pages))
    options = {"similarity_top_k": 1, "text_qa_template": PROMPT}
    steered = index.as_query_engine(**options)
    plain = index.as_query_engine(llm=Settings.llm.with_preference(""), **options)
    for name, engine in (("plain", plain), ("one short sentence", steered)):
        answer = engine.query(QUESTION)
        sources = ", ".join(node.metadata["file_name"] for node in answer.source_nodes)
        print(f"[{name}; from {sources}]\n{answer}\n")


if __name__ == "__main__":
    main()
