"""Which of LlamaIndex's calls are steered: every prompt type, every component, every stage."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from llama_index.core import (
    DocumentSummaryIndex,
    PromptTemplate,
    Settings,
    SummaryIndex,
    TreeIndex,
)
from llama_index.core.base.base_query_engine import BaseQueryEngine
from llama_index.core.chat_engine import (
    CondensePlusContextChatEngine,
    CondenseQuestionChatEngine,
    ContextChatEngine,
    SimpleChatEngine,
)
from llama_index.core.evaluation import (
    AnswerRelevancyEvaluator,
    BatchEvalRunner,
    CorrectnessEvaluator,
    FaithfulnessEvaluator,
    GuidelineEvaluator,
    PairwiseComparisonEvaluator,
    RelevancyEvaluator,
)
from llama_index.core.extractors import (
    DocumentContextExtractor,
    KeywordExtractor,
    QuestionsAnsweredExtractor,
    SummaryExtractor,
    TitleExtractor,
)
from llama_index.core.indices.query.query_transform import HyDEQueryTransform
from llama_index.core.llms import ChatMessage
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.output_parsers import PydanticOutputParser
from llama_index.core.postprocessor import LLMRerank
from llama_index.core.prompts import PromptType
from llama_index.core.query_engine import (
    CitationQueryEngine,
    MultiStepQueryEngine,
    RouterQueryEngine,
    SubQuestionQueryEngine,
    TransformQueryEngine,
)
from llama_index.core.query_engine.sql_join_query_engine import SQLAugmentQueryTransform
from llama_index.core.question_gen.llm_generators import LLMQuestionGenerator
from llama_index.core.response_synthesizers import ResponseMode, get_response_synthesizer
from llama_index.core.retrievers import QueryFusionRetriever
from llama_index.core.schema import Document, NodeWithScore, QueryBundle, TextNode
from llama_index.core.selectors import LLMMultiSelector, LLMSingleSelector
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.core.tools import QueryEngineTool, ToolMetadata
from pydantic import BaseModel

from amulet_integrations.llama_index import AmuletLLM, preference
from amulet_integrations.llama_index.stage import PROMPT_TYPES
from tests.llama_index.doubles import PLAIN, STEERED, TEXTS, WISH, WordEmbedding, index, scripted

NODES = [NodeWithScore(node=TextNode(text=text), score=1.0) for text in TEXTS]
DOCUMENTS = [Document(text=text, doc_id=f"d{i}") for i, text in enumerate(TEXTS)]


def wishing(**options: Any) -> AmuletLLM:
    return scripted(preference=WISH, **options)


# ---- prompt types ----


def test_every_prompt_type_has_its_row() -> None:
    assert set(PROMPT_TYPES) == set(PromptType)


def test_the_documentation_has_every_row() -> None:
    page = Path("docs/llama_index.md").read_text()
    words = {"answer": "steered", "synthesis": "by caller", "internal": "plain"}
    for prompt_type, use in PROMPT_TYPES.items():
        assert f"| `{prompt_type.name}` | {words[use]} |" in page


@pytest.mark.parametrize("prompt_type", list(PromptType))
def test_own_prompt_is_steered_by_its_type(prompt_type: PromptType) -> None:
    llm = wishing()
    said = llm.predict(PromptTemplate("Say {thing}.", prompt_type=prompt_type), thing="hello")
    assert said == (PLAIN if PROMPT_TYPES[prompt_type] == "internal" else STEERED)


@pytest.mark.parametrize(("steer", "said"), [(True, STEERED), (False, PLAIN)])
@pytest.mark.parametrize("prompt_type", [PromptType.QUESTION_ANSWER, PromptType.TEXT_TO_SQL])
async def test_a_prompt_can_say_which_it_is(
    prompt_type: PromptType, steer: bool, said: str
) -> None:
    llm = wishing()
    prompt = PromptTemplate("Say {x}.", prompt_type=prompt_type, metadata={"steer": steer})
    assert llm.predict(prompt, x="a") == said
    assert "".join(llm.stream(prompt, x="a")) == said
    assert await llm.apredict(prompt, x="a") == said
    assert "".join([piece async for piece in await llm.astream(prompt, x="a")]) == said


class Person(BaseModel):
    name: str


async def test_what_an_output_parser_reads_is_plain() -> None:
    said = {WISH: STEERED, "": '{"name": "Anna"}'}
    prompt = PromptTemplate("Who?", output_parser=PydanticOutputParser(Person))
    asked = scripted(said, preference=WISH)
    parsing = scripted(said, preference=WISH, output_parser=PydanticOutputParser(Person))
    for llm, who, read in (
        (asked, prompt, said[""]),
        (parsing, PromptTemplate("Who?"), "name='Anna'"),
    ):
        assert llm.predict(who) == read
        assert await llm.apredict(who) == read
        assert llm.amulet.steered == [False, False]
        assert llm.complete("Who?").text == STEERED  # nothing parses it
    assert str(index().as_query_engine(llm=parsing).query("moss?")) == "name='Anna'"
    prompt.metadata["steer"] = True
    assert asked.predict(prompt) == STEERED


def test_a_type_of_the_users_own_counts_as_custom() -> None:
    llm = wishing()
    assert llm.predict(PromptTemplate("Say it.", prompt_type="my own")) == STEERED


# ---- response synthesizers ----

ONE_EACH = {
    ResponseMode.REFINE: [False, False, True],
    ResponseMode.COMPACT: [True],
    ResponseMode.SIMPLE_SUMMARIZE: [True],
    ResponseMode.TREE_SUMMARIZE: [True],
    ResponseMode.GENERATION: [True],
    ResponseMode.NO_TEXT: [],
    ResponseMode.CONTEXT_ONLY: [],
    ResponseMode.ACCUMULATE: [True, True, True],
    ResponseMode.COMPACT_ACCUMULATE: [True],
}


def test_every_response_mode_is_tried() -> None:
    assert set(ONE_EACH) == set(ResponseMode)


@pytest.mark.parametrize("mode", list(ResponseMode))
async def test_synthesizers_steer_what_is_read(
    mode: ResponseMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = wishing()
    monkeypatch.setattr(Settings, "_llm", llm)  # the modes without an answer want one all the same
    synthesizer = get_response_synthesizer(llm=llm, response_mode=mode)
    synthesizer.synthesize("Where is moss?", NODES)
    assert llm.amulet.steered == ONE_EACH[mode]
    await synthesizer.asynthesize("Where is moss?", NODES)
    assert llm.amulet.steered == ONE_EACH[mode] * 2


STREAMING = [
    ResponseMode.REFINE,
    ResponseMode.COMPACT,
    ResponseMode.SIMPLE_SUMMARIZE,
    ResponseMode.TREE_SUMMARIZE,
    ResponseMode.GENERATION,
]


@pytest.mark.parametrize("mode", STREAMING)
async def test_streamed_synthesis_steers_what_is_read(mode: ResponseMode) -> None:
    llm = wishing()
    synthesizer = get_response_synthesizer(llm=llm, response_mode=mode, streaming=True)
    answer = synthesizer.synthesize("Where is moss?", NODES)
    assert "".join(answer.response_gen) == STEERED
    assert llm.amulet.steered == ONE_EACH[mode]
    llm = wishing()
    synthesizer = get_response_synthesizer(llm=llm, response_mode=mode, streaming=True)
    answer = await synthesizer.asynthesize("Where is moss?", NODES)
    assert "".join([piece async for piece in answer.async_response_gen()]) == STEERED
    assert llm.amulet.steered == ONE_EACH[mode]


@pytest.mark.parametrize("use_async", [False, True])
def test_only_the_root_of_a_summary_tree_is_steered(use_async: bool) -> None:
    llm = scripted(preference=WISH, window=400, max_tokens=40)
    texts = [text * 12 for text in TEXTS]
    synthesizer = get_response_synthesizer(
        llm=llm, response_mode=ResponseMode.TREE_SUMMARIZE, use_async=use_async
    )
    llm.amulet.model.config.max_position_embeddings = 65536  # the prompts may be as long as ever
    nodes = [NodeWithScore(node=TextNode(text=text)) for text in texts]
    assert str(synthesizer.synthesize("Where is moss?", nodes)) == STEERED
    assert len(llm.amulet.requests) > 1
    assert llm.amulet.steered == [False] * (len(llm.amulet.requests) - 1) + [True]


def test_a_users_own_template_is_steered_in_a_synthesizer() -> None:
    llm = wishing()
    own = PromptTemplate("Context: {context_str}\nQuestion: {query_str}\n")
    engine = index().as_query_engine(llm=llm, text_qa_template=own)
    assert str(engine.query("moss?")) == STEERED


def test_a_users_plain_template_stays_plain_in_a_synthesizer() -> None:
    llm = wishing()
    own = PromptTemplate("{context_str}\n{query_str}\n", metadata={"steer": False})
    assert str(index().as_query_engine(llm=llm, text_qa_template=own).query("moss?")) == PLAIN


# ---- query engines ----

SELECT = '[{"choice": 2, "reason": "tide"}]'
BOTH = '[{"choice": 1, "reason": "moss"}, {"choice": 2, "reason": "tide"}]'


def tools(llm: AmuletLLM) -> list[QueryEngineTool]:
    return [
        QueryEngineTool(
            index([text]).as_query_engine(llm=llm), ToolMetadata(name=name, description=name)
        )
        for name, text in zip(["moss", "tide"], TEXTS, strict=False)
    ]


@pytest.mark.parametrize("wish", [WISH, ""])
async def test_router_takes_the_same_route_with_and_without_preference(wish: str) -> None:
    said = {"Some choices are given below": SELECT, WISH: STEERED, "": PLAIN}
    llm = scripted(said, preference=wish)
    engine = RouterQueryEngine(LLMSingleSelector.from_defaults(llm=llm), tools(llm), llm=llm)
    answer = engine.query("When is the tide?")
    assert str(answer) == (STEERED if wish else PLAIN)
    assert answer.metadata["selector_result"].ind == 1
    assert llm.amulet.steered == [False, bool(wish)]
    assert str(await engine.aquery("When is the tide?")) == (STEERED if wish else PLAIN)


def test_multi_selector_is_plain() -> None:
    llm = scripted({"Some choices are given below": BOTH, WISH: STEERED, "": PLAIN})
    with preference(WISH):
        selected = LLMMultiSelector.from_defaults(llm=llm).select(
            [tool.metadata for tool in tools(llm)], QueryBundle("both?")
        )
    assert selected.inds == [0, 1]
    assert llm.amulet.steered == [False]


SUB_QUESTIONS = (
    '```json\n{"items": [{"sub_question": "Where is moss?", "tool_name": "moss"}, '
    '{"sub_question": "When is the tide?", "tool_name": "tide"}]}\n```'
)


@pytest.mark.parametrize("use_async", [False, True])
async def test_sub_questions_are_plain_and_their_synthesis_is_steered(use_async: bool) -> None:
    said = {"output a list of relevant sub-questions": SUB_QUESTIONS, WISH: STEERED, "": PLAIN}
    for run in ("query", "aquery"):
        llm = scripted(said, preference=WISH)
        engine = SubQuestionQueryEngine.from_defaults(
            tools(llm),
            llm=llm,
            question_gen=LLMQuestionGenerator.from_defaults(llm=llm),
            use_async=use_async,
            verbose=False,
            response_synthesizer=get_response_synthesizer(llm=llm),
        )
        asked = "Where is moss and when is the tide?"
        answer = engine.query(asked) if run == "query" else await engine.aquery(asked)
        assert str(answer) == STEERED
        assert llm.amulet.steered == [False, False, False, True]


def test_citations_stay_intact() -> None:
    llm = scripted({WISH: "North [1].", "": "The moss grows on the north wall [1]."})
    engine = CitationQueryEngine.from_args(index(), llm=llm, similarity_top_k=2)
    plain = engine.query("Where is moss?")
    with preference(WISH):
        steered = engine.query("Where is moss?")
    assert str(plain) == "The moss grows on the north wall [1]."
    assert str(steered) == "North [1]."
    assert [n.text for n in steered.source_nodes] == [n.text for n in plain.source_nodes]
    assert steered.source_nodes[0].text == f"Source 1:\n{TEXTS[0]}\n"


def test_steps_of_a_multi_step_query_are_plain() -> None:
    from llama_index.core.indices.query.query_transform.base import StepDecomposeQueryTransform

    llm = wishing()
    engine = MultiStepQueryEngine(
        index().as_query_engine(llm=llm),
        StepDecomposeQueryTransform(llm=llm),
        response_synthesizer=get_response_synthesizer(llm=llm),
        num_steps=1,
    )
    assert str(engine.query("Where is moss?")) == STEERED
    assert llm.amulet.steered == [False, False, True]


def test_the_question_after_a_table_is_plain() -> None:
    llm = wishing()
    transform = SQLAugmentQueryTransform(llm=llm)
    asked = transform.run("Where?", {"sql_query": "SELECT 1", "sql_query_response": "1"})
    assert asked.query_str == PLAIN
    assert llm.amulet.steered == [False]


def test_hypothetical_documents_are_plain() -> None:
    llm = wishing()
    engine: BaseQueryEngine = index().as_query_engine(llm=llm)
    hyde = TransformQueryEngine(engine, HyDEQueryTransform(llm=llm))
    assert str(hyde.query("Where is moss?")) == STEERED
    assert llm.amulet.steered == [False, True]


def test_query_generation_for_fusion_is_plain() -> None:
    llm = scripted({"generate": "tide\nlamp", WISH: STEERED, "": PLAIN}, preference=WISH)
    fusion = QueryFusionRetriever(
        [index().as_retriever(similarity_top_k=1)], llm=llm, num_queries=3, use_async=False
    )
    found = {node.text for node in fusion.retrieve("moss")}
    assert llm.amulet.steered == [False]
    assert TEXTS[0] in found


def test_choice_select_is_plain() -> None:
    llm = scripted({"A list of documents": "Doc: 2, Relevance: 9", "": PLAIN}, preference=WISH)
    ranked = LLMRerank(llm=llm, top_n=1).postprocess_nodes(NODES, query_str="tide?")
    assert [node.text for node in ranked] == [TEXTS[1]]
    assert llm.amulet.steered == [False]


def test_building_an_index_is_plain() -> None:
    llm = wishing()
    TreeIndex.from_documents(DOCUMENTS, llm=llm, num_children=2)
    DocumentSummaryIndex.from_documents(DOCUMENTS, llm=llm, embed_model=WordEmbedding())
    assert len(llm.amulet.requests) >= 5
    assert not any(llm.amulet.steered)


# ---- chat engines ----

HISTORY = [
    ChatMessage(role="user", content="What is on the mill?"),
    ChatMessage(role="assistant", content="Moss."),
]
CONDENSING = {"Standalone question:": "Where does moss grow?", WISH: STEERED, "": PLAIN}
CONDENSING_QUESTION = {"<Standalone question>": "Where does moss grow?", **CONDENSING}


def chat_engines(llm: AmuletLLM) -> dict[str, tuple[Any, list[bool]]]:
    retriever = index().as_retriever(similarity_top_k=1)
    return {
        "simple": (SimpleChatEngine.from_defaults(llm=llm), [True]),
        "context": (ContextChatEngine.from_defaults(retriever, llm=llm), [True]),
        "condense_plus_context": (
            CondensePlusContextChatEngine.from_defaults(retriever, llm=llm),
            [False, True],
        ),
        "condense_question": (
            CondenseQuestionChatEngine.from_defaults(index().as_query_engine(llm=llm), llm=llm),
            [False, True],
        ),
    }


CHAT_ENGINES = ["simple", "context", "condense_plus_context", "condense_question"]


@pytest.mark.parametrize("name", CHAT_ENGINES)
async def test_chat_engines_steer_the_answer_and_not_the_condensed_question(name: str) -> None:
    llm = scripted(CONDENSING_QUESTION, preference=WISH)
    engine, steered = chat_engines(llm)[name]
    assert str(engine.chat("And where?", chat_history=list(HISTORY))) == STEERED
    assert llm.amulet.steered == steered
    assert str(await engine.achat("And where?", chat_history=list(HISTORY))) == STEERED
    assert llm.amulet.steered == steered * 2


@pytest.mark.parametrize("name", ["simple", "context", "condense_plus_context"])
async def test_chat_engines_stream_under_a_scope(name: str) -> None:
    llm = scripted(CONDENSING)
    engine, steered = chat_engines(llm)[name]
    with preference(WISH):
        answer = engine.stream_chat("And where?", chat_history=list(HISTORY))
        assert "".join(answer.response_gen) == STEERED
        assert llm.amulet.steered == steered
        answer = await engine.astream_chat("And where?", chat_history=list(HISTORY))
        pieces = [piece async for piece in answer.async_response_gen()]
    assert "".join(pieces) == STEERED
    assert llm.amulet.steered == steered * 2
    assert str(engine.chat("And where?", chat_history=list(HISTORY))) == PLAIN


# ---- extractors and evaluators ----


def test_extractors_are_plain() -> None:
    llm = wishing()
    nodes = [TextNode(text=text) for text in TEXTS[:2]]
    for extractor in (
        TitleExtractor(llm=llm, show_progress=False),
        KeywordExtractor(llm=llm, show_progress=False),
        QuestionsAnsweredExtractor(llm=llm, show_progress=False),
        SummaryExtractor(llm=llm, show_progress=False),
    ):
        before = len(llm.amulet.requests)
        extractor.extract(nodes)
        assert len(llm.amulet.requests) > before
    assert not any(llm.amulet.steered)


async def test_the_context_of_a_chunk_is_plain() -> None:
    """It comes with the headers of another service."""
    llm = wishing()
    store = SimpleDocumentStore()
    store.add_documents(DOCUMENTS[:1])
    extractor = DocumentContextExtractor(
        docstore=store, llm=llm, max_context_length=1000, max_output_tokens=4
    )
    nodes = SentenceSplitter().get_nodes_from_documents(DOCUMENTS[:1])
    assert await extractor.aextract(nodes) == [{"context": PLAIN[:4]}]
    assert llm.amulet.steered == [False]


def test_evaluators_are_plain() -> None:
    llm = scripted({"": "YES\nscore 5.0\nwell said"}, preference=WISH)
    for evaluator in (
        FaithfulnessEvaluator(llm=llm),
        RelevancyEvaluator(llm=llm),
        CorrectnessEvaluator(llm=llm, parser_function=lambda text: (5.0, text)),
        AnswerRelevancyEvaluator(llm=llm),
        GuidelineEvaluator(llm=scripted({"": '{"passing": true, "feedback": "ok"}'})),
    ):
        before = len(llm.amulet.requests)
        evaluator.evaluate(query="q", response="r", contexts=[TEXTS[0]], reference="r")
        assert isinstance(evaluator, GuidelineEvaluator) or len(llm.amulet.requests) > before
    assert not any(llm.amulet.steered)
    llm = scripted({"": "[[A]]"}, preference=WISH)
    PairwiseComparisonEvaluator(llm=llm).evaluate(
        query="q", response="a", second_response="b", reference="r"
    )
    assert llm.amulet.steered == [False, False]


@pytest.mark.filterwarnings("ignore:asyncio_module:DeprecationWarning")  # LlamaIndex's own call
async def test_a_batch_of_evaluations_asks_for_the_answers_that_users_get() -> None:
    llm = wishing()
    judge = scripted({"": "YES"}, preference=WISH)
    runner = BatchEvalRunner({"relevant": RelevancyEvaluator(llm=judge)}, workers=2)
    results = await runner.aevaluate_queries(index().as_query_engine(llm=llm), ["moss?", "tide?"])
    assert [result.response for result in results["relevant"]] == [STEERED, STEERED]
    assert not any(judge.amulet.steered)


# ---- direct calls ----


async def test_direct_calls_are_steered_wherever_they_are_awaited() -> None:
    llm = wishing()
    said = [ChatMessage(role="user", content="Hi")]
    answers = await asyncio.gather(
        llm.achat(said), llm.achat(said), asyncio.to_thread(llm.chat, said)
    )
    assert [answer.message.content for answer in answers] == [STEERED] * 3
    assert llm.complete("Hi").text == STEERED
    assert (await llm.acomplete("Hi")).text == STEERED


def test_an_explicit_preference_of_the_call_always_counts() -> None:
    llm = scripted()
    summary = SummaryIndex(nodes=[TextNode(text=TEXTS[0])])
    assert str(summary.as_query_engine(llm=llm).query("moss?")) == PLAIN
    assert llm.complete("Hi", preference=WISH).text == STEERED
