"""Who asks is told apart under subclasses and wrappers, in tasks, threads and streams."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from llama_index.core import DocumentSummaryIndex, PromptTemplate, TreeIndex
from llama_index.core.agent.workflow import AgentWorkflow, FunctionAgent, ReActAgent
from llama_index.core.chat_engine import (
    CondensePlusContextChatEngine,
    CondenseQuestionChatEngine,
    ContextChatEngine,
    SimpleChatEngine,
)
from llama_index.core.chat_engine.types import BaseChatEngine
from llama_index.core.evaluation import BaseEvaluator, CorrectnessEvaluator, FaithfulnessEvaluator
from llama_index.core.extractors import SummaryExtractor, TitleExtractor
from llama_index.core.indices.query.query_transform import HyDEQueryTransform
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.span_handlers import SimpleSpanHandler
from llama_index.core.llms import ChatMessage
from llama_index.core.memory import (
    ChatSummaryMemoryBuffer,
    FactExtractionMemoryBlock,
    Memory,
)
from llama_index.core.program import LLMTextCompletionProgram
from llama_index.core.query_engine import (
    CustomQueryEngine,
    RetryQueryEngine,
    RouterQueryEngine,
    SubQuestionQueryEngine,
    TransformQueryEngine,
)
from llama_index.core.question_gen.llm_generators import LLMQuestionGenerator
from llama_index.core.response_synthesizers import ResponseMode, get_response_synthesizer
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.core.selectors import LLMSingleSelector
from llama_index.core.tools import FunctionTool, QueryEngineTool, ToolMetadata
from pydantic import BaseModel

from amulet_integrations.llama_index import AmuletLLM, askers, preference
from tests.llama_index.doubles import (
    KINDS,
    PLAIN,
    STEERED,
    TEXTS,
    WISH,
    Logging,
    Tracer,
    WordEmbedding,
    calling,
    index,
    scripted,
)
from tests.llama_index.test_stage import DOCUMENTS, HISTORY, NODES, SELECT, SUB_QUESTIONS, tools

A, B = "Answer as Anna.", "Answer as Ben."
SAID = {A: "For Anna.", B: "For Ben.", WISH: STEERED, "": PLAIN}
CONDENSED = {"<Standalone question>": "Where does moss grow?", "Standalone question:": "Moss?"}


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    dispatcher = get_dispatcher()
    before = list(dispatcher.span_handlers)
    yield
    dispatcher.span_handlers = before


# ---- every component under every kind of LLM ----


async def test_chat_engines(kind: Any) -> None:
    llm = scripted(CONDENSED | SAID, kind=kind, preference=WISH)
    engines = [
        CondenseQuestionChatEngine.from_defaults(index().as_query_engine(llm=llm), llm=llm),
        CondensePlusContextChatEngine.from_defaults(index().as_retriever(), llm=llm),
    ]
    for engine in engines:
        assert str(engine.chat("And where?", list(HISTORY))) == STEERED
        assert str(await engine.achat("And where?", list(HISTORY))) == STEERED
    assert llm.amulet.steered == [False, True] * 4


async def test_query_engines(kind: Any) -> None:
    said = {
        "Some choices are given below": SELECT,
        "output a list of relevant sub-questions": SUB_QUESTIONS,
    }
    llm = scripted(said | SAID, kind=kind, preference=WISH)
    router = RouterQueryEngine(LLMSingleSelector.from_defaults(llm=llm), tools(llm), llm=llm)
    parts = SubQuestionQueryEngine.from_defaults(
        tools(llm),
        llm=llm,
        question_gen=LLMQuestionGenerator.from_defaults(llm=llm),
        verbose=False,
        response_synthesizer=get_response_synthesizer(llm=llm),
    )
    engine = index().as_query_engine(llm=llm)
    hyde = TransformQueryEngine(engine, HyDEQueryTransform(llm=llm))
    for asked, steered in (
        (router, [False, True]),
        (parts, [False, False, False, True]),
        (TransformQueryEngine(parts, HyDEQueryTransform(llm=llm)), [False] * 4 + [True]),
        (hyde, [False, True]),
    ):
        llm.amulet.requests.clear()
        assert str(asked.query("Where is moss?")) == STEERED
        assert llm.amulet.steered == steered
        assert str(await asked.aquery("Where is moss?")) == STEERED
        assert llm.amulet.steered == steered * 2


@pytest.mark.parametrize(
    ("mode", "steered"),
    [
        (ResponseMode.REFINE, [False, False, True]),
        (ResponseMode.COMPACT, [True]),
        (ResponseMode.TREE_SUMMARIZE, [True]),
        (ResponseMode.ACCUMULATE, [True, True, True]),
    ],
)
async def test_synthesizers(kind: Any, mode: ResponseMode, steered: list[bool]) -> None:
    llm = scripted(kind=kind, preference=WISH)
    synthesizer = get_response_synthesizer(llm=llm, response_mode=mode)
    synthesizer.synthesize("Where is moss?", NODES)
    await synthesizer.asynthesize("Where is moss?", NODES)
    assert llm.amulet.steered == steered * 2


@pytest.mark.parametrize("streaming", [False, True])
async def test_only_the_last_pass_over_chunks_that_were_cut(kind: Any, streaming: bool) -> None:
    llm = scripted(kind=kind, preference=WISH, window=1200, max_tokens=40)
    synthesizer = get_response_synthesizer(
        llm=llm, response_mode=ResponseMode.REFINE, streaming=streaming
    )
    llm.amulet.model.config.max_position_embeddings = 65536
    long = " ".join(f"Line {n} of the log." for n in range(300))
    nodes = [NodeWithScore(node=TextNode(text=text)) for text in (TEXTS[0], long, TEXTS[0], long)]
    response = synthesizer.synthesize("Where is moss?", nodes)
    assert str(response) == STEERED
    assert len(llm.amulet.requests) > 4
    assert llm.amulet.steered == [False] * (len(llm.amulet.requests) - 1) + [True]


async def test_only_the_last_pass_over_equal_chunks(kind: Any) -> None:
    llm = scripted(kind=kind, preference=WISH)
    for streaming in (False, True):
        synthesizer = get_response_synthesizer(
            llm=llm, response_mode=ResponseMode.REFINE, streaming=streaming
        )
        llm.amulet.requests.clear()
        assert str(synthesizer.synthesize("Where is moss?", NODES[:1] * 3)) == STEERED
        assert llm.amulet.steered == [False, False, True]


async def test_only_the_root_of_a_summary_tree(kind: Any) -> None:
    for use_async in (False, True):
        llm = scripted(kind=kind, preference=WISH, window=400, max_tokens=40)
        synthesizer = get_response_synthesizer(
            llm=llm, response_mode=ResponseMode.TREE_SUMMARIZE, use_async=use_async
        )
        llm.amulet.model.config.max_position_embeddings = 65536
        nodes = [NodeWithScore(node=TextNode(text=TEXTS[0] * 12))] * 3
        assert str(synthesizer.synthesize("Where is moss?", nodes)) == STEERED
        assert len(llm.amulet.requests) > 1
        assert llm.amulet.steered == [False] * (len(llm.amulet.requests) - 1) + [True]


async def test_evaluators(kind: Any) -> None:
    llm = scripted({"": "YES"}, kind=kind, preference=WISH)

    class Own(BaseEvaluator):
        def _get_prompts(self) -> Any:
            return {}

        def _update_prompts(self, prompts: Any) -> None: ...

        async def aevaluate(self, *args: Any, **kwargs: Any) -> Any:
            return await llm.apredict(PromptTemplate("Is it good? {it}"), it="It is.")

    judges = [
        CorrectnessEvaluator(llm=llm, parser_function=lambda text: (5.0, text)),
        FaithfulnessEvaluator(llm=llm),
        Own(),
    ]
    for judge in judges:
        before = len(llm.amulet.requests)
        judge.evaluate(query="q", response="r", contexts=[TEXTS[0]], reference="r")
        await judge.aevaluate(query="q", response="r", contexts=[TEXTS[0]], reference="r")
        assert llm.amulet.steered[before:] == [False, False]


def test_a_retry_engine_steers_its_answers_and_not_its_judge(kind: Any) -> None:
    llm = scripted(kind=kind, preference=WISH)
    judge = scripted({"": "YES"}, kind=kind, preference=WISH)
    engine = RetryQueryEngine(index().as_query_engine(llm=llm), FaithfulnessEvaluator(llm=judge))
    assert str(engine.query("moss?")) == STEERED
    assert (llm.amulet.steered, judge.amulet.steered) == ([True], [False])


async def test_memories(kind: Any) -> None:
    llm = scripted({"Transcript so far": "They spoke of moss."} | SAID, kind=kind, preference=WISH)
    memory = ChatSummaryMemoryBuffer.from_defaults(
        list(HISTORY) * 6, llm=llm, token_limit=20, tokenizer_fn=str.split
    )
    engine = SimpleChatEngine.from_defaults(llm=llm, memory=memory)
    assert str(engine.chat("And where?")) == STEERED
    assert llm.amulet.steered == [False, True]
    llm.amulet.requests.clear()
    facts = FactExtractionMemoryBlock(llm=llm, max_facts=1)
    await facts.aput(list(HISTORY), from_short_term_memory=True)
    memory = Memory.from_defaults(memory_blocks=[facts])
    assert str(await SimpleChatEngine.from_defaults(llm=llm, memory=memory).achat("Hi")) == STEERED
    assert llm.amulet.steered == [False, True]


async def test_index_construction_and_ingestion(kind: Any) -> None:
    llm = scripted(kind=kind, preference=WISH)
    for use_async in (False, True):
        TreeIndex.from_documents(DOCUMENTS, llm=llm, num_children=2, use_async=use_async)
    DocumentSummaryIndex.from_documents(DOCUMENTS, llm=llm, embed_model=WordEmbedding())
    pipeline = IngestionPipeline(
        transformations=[
            TitleExtractor(llm=llm, show_progress=False),
            SummaryExtractor(llm=llm, show_progress=False),
        ],
        disable_cache=True,
    )
    pipeline.run(nodes=[TextNode(text=text) for text in TEXTS])
    await pipeline.arun(nodes=[TextNode(text=text) for text in TEXTS])
    assert len(llm.amulet.requests) > 10
    assert not any(llm.amulet.steered)


class Person(BaseModel):
    name: str


def test_programs(kind: Any) -> None:
    llm = scripted({"": '{"name": "Anna"}'}, kind=kind, preference=WISH)
    program = LLMTextCompletionProgram.from_defaults(
        output_cls=Person, prompt=PromptTemplate("Who is {who}?"), llm=llm
    )
    assert program(who="she").name == "Anna"
    assert [person.name for person in program.stream_call(who="she")][-1] == "Anna"
    assert llm.amulet.steered == [False, False]


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call>'
FINAL = "Thought: I can answer.\nAnswer: Five it is."


@pytest.mark.parametrize("streaming", [True, False])
async def test_agents(kind: Any, streaming: bool) -> None:
    tool = FunctionTool.from_defaults(add)
    llm = calling({"<tool_response>\n5": PLAIN, "": CALL}, kind=kind, preference=WISH)
    agent = FunctionAgent(tools=[tool], llm=llm, streaming=streaming)
    assert str(await agent.run("2 + 3?")) == PLAIN
    assert llm.amulet.steered == [True, True]
    llm = scripted({WISH: " Five.", "": FINAL}, kind=kind, preference=WISH)
    agents: list[Any] = [
        ReActAgent(tools=[tool], llm=llm, streaming=streaming),
        AgentWorkflow(
            agents=[ReActAgent(name="adder", tools=[tool], llm=llm, streaming=streaming)],
            root_agent="adder",
        ),
    ]
    for agent in agents:
        llm.amulet.requests.clear()
        assert str(await agent.run("2 + 3?")) == "Five."
        assert llm.amulet.steered == [False, True]


@pytest.mark.parametrize(
    ("agent", "steered"), [(ReActAgent, [False, True]), (FunctionAgent, [True])]
)
async def test_an_agents_turn_is_told_by_its_spans_alone(
    agent: Any, steered: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(askers, "_running", lambda: iter(()))  # no stack frames
    llm = calling({WISH: PLAIN, "": FINAL}, preference=WISH)
    await agent(tools=[FunctionTool.from_defaults(add)], llm=llm).run("2 + 3?")
    assert llm.amulet.steered == steered


async def test_what_runs_inside_a_tool_is_plain(kind: Any) -> None:
    inner = scripted(kind=kind, preference=WISH)
    engine = index().as_query_engine(llm=inner, streaming=True)
    tool = QueryEngineTool(engine, ToolMetadata(name="notes", description="Notes."))
    assert str(tool.call("moss?")) == PLAIN
    call = '<tool_call>\n{"name": "notes", "arguments": {"input": "moss?"}}\n</tool_call>'
    llm = calling({"<tool_response>": STEERED, "": call}, kind=kind, preference=WISH)
    agent = FunctionAgent(
        tools=[QueryEngineTool(index().as_query_engine(llm=inner), tool.metadata)], llm=llm
    )
    result = await agent.run("Where is moss?")
    assert (str(result), result.tool_calls[0].tool_output.content) == (STEERED, PLAIN)


# ---- components that LlamaIndex's core does not know ----


async def test_a_query_engine_of_ones_own_is_steered(kind: Any) -> None:
    llm = scripted(kind=kind, preference=WISH)

    class Own(CustomQueryEngine):
        asked: Any = None

        def custom_query(self, query_str: str) -> str:
            return str(self.asked(query_str))

    Own.__module__ = "llama_index.query_engine.own"  # as installed packages are called
    for asked in (
        llm.complete,
        lambda text: llm.chat([ChatMessage(text)]).message.content,
        lambda text: llm.predict(PromptTemplate("{text}"), text=text),
    ):
        assert str(Own(asked=asked).query("moss?")) == STEERED


def test_a_chat_engine_of_ones_own_is_steered(kind: Any) -> None:
    llm = scripted(kind=kind, preference=WISH)

    class Own(SimpleChatEngine):
        pass

    class Bare(BaseChatEngine):
        def chat(self, message: str, chat_history: Any = None) -> Any:
            return llm.complete(message)

        stream_chat = chat  # type: ignore[assignment]
        achat = astream_chat = chat  # type: ignore[assignment]
        chat_history = ()  # type: ignore[assignment]

        def reset(self) -> None: ...

    assert str(Own.from_defaults(llm=llm).chat("Hi")) == STEERED
    assert str(Bare().chat("Hi")) == STEERED


def test_a_retriever_of_ones_own_is_plain(kind: Any) -> None:
    llm = scripted(kind=kind, preference=WISH)

    class Own(BaseRetriever):
        def _retrieve(self, query_bundle: Any) -> list[NodeWithScore]:
            llm.complete("Say it in other words: " + query_bundle.query_str)
            return NODES

    from llama_index.core.query_engine import RetrieverQueryEngine

    assert str(RetrieverQueryEngine.from_args(Own(), llm=llm).query("moss?")) == STEERED
    assert llm.amulet.steered == [False, True]


# ---- streams belong to the query that asked for them ----


def query_engine(llm: Any) -> Any:
    return index().as_query_engine(llm=llm, streaming=True)


async def test_a_streamed_answer_keeps_the_scope_of_its_query(kind: Any) -> None:
    llm = scripted(SAID, kind=kind)
    engine = query_engine(llm)
    with preference(A):
        sync, asynchronous = engine.query("moss?"), await engine.aquery("moss?")
        printed = engine.query("moss?")
    unscoped = engine.query("moss?")
    with preference(B):
        assert "".join(sync.response_gen) == "For Anna."
        assert "".join([piece async for piece in asynchronous.async_response_gen()]) == "For Anna."
        assert str(printed) == "For Anna."
        assert str(unscoped) == PLAIN
        assert llm.complete("Hi").text == "For Ben."
    assert llm.complete("Hi").text == PLAIN


def test_a_stream_may_be_read_in_any_thread_beside_another_one() -> None:
    llm = scripted(SAID)
    engine = query_engine(llm)
    with preference(A):
        anna = engine.query("moss?").response_gen
    with preference(B):
        ben = engine.query("moss?").response_gen
    said: dict[str, str] = {}
    threads = [
        threading.Thread(target=lambda: said.update(anna="".join(anna))),
        threading.Thread(target=lambda: said.update(ben="".join(ben))),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said == {"anna": "For Anna.", "ben": "For Ben."}


async def test_chat_engines_streams_keep_their_scope(kind: Any) -> None:
    llm = scripted(CONDENSED | SAID, kind=kind)
    retriever = index().as_retriever(similarity_top_k=1)
    engines = [
        lambda: SimpleChatEngine.from_defaults(llm=llm),
        lambda: ContextChatEngine.from_defaults(retriever, llm=llm),
        lambda: CondensePlusContextChatEngine.from_defaults(retriever, llm=llm),
        lambda: CondenseQuestionChatEngine.from_defaults(query_engine(llm), llm=llm),
    ]
    for make in engines:
        with preference(A):
            sync = make().stream_chat("And?", list(HISTORY))
            asynchronous = await make().astream_chat("And?", list(HISTORY))
        with preference(B):
            pieces = [piece async for piece in asynchronous.async_response_gen()]
            assert ("".join(sync.response_gen), "".join(pieces)) == ("For Anna.", "For Anna.")


async def test_an_agents_stream_keeps_its_scope() -> None:
    llm = calling(SAID)
    agent = FunctionAgent(tools=[FunctionTool.from_defaults(add)], llm=llm)
    with preference(A):
        running = agent.run("Hi")
    with preference(B):
        deltas = [getattr(event, "delta", "") async for event in running.stream_events()]
        assert "".join(deltas) == str(await running) == "For Anna."


def test_a_stream_of_an_inner_engine_is_plain_wherever_it_is_read() -> None:
    llm = scripted({"output a list of relevant sub-questions": SUB_QUESTIONS} | SAID)
    streaming = [
        QueryEngineTool(query_engine(llm), ToolMetadata(name=name, description=name))
        for name in ("moss", "tide")
    ]
    engine = SubQuestionQueryEngine.from_defaults(
        streaming,
        llm=llm,
        question_gen=LLMQuestionGenerator.from_defaults(llm=llm),
        verbose=False,
        use_async=False,
        response_synthesizer=get_response_synthesizer(llm=llm, streaming=True),
    )
    with preference(A):
        answer = engine.query("Where is moss and when is the tide?")
    assert str(answer) == "For Anna."
    assert llm.amulet.steered == [False, False, False, True]


async def test_a_stream_that_is_left_half_read_ends_its_decode() -> None:
    llm = scripted({"": "word " * 200}, max_tokens=400)
    engine = query_engine(llm)
    stream = engine.query("moss?").response_gen
    next(stream)
    stream.close()
    assert llm.complete("Hi", max_tokens=4).text == "word"
    assert llm.amulet.rows == 0
    stream = (await engine.aquery("moss?")).response_gen
    await anext(stream)
    await stream.aclose()
    del stream
    await asyncio.sleep(0.1)  # Python closes the generators inside of LlamaIndex's one
    assert llm.complete("Hi", max_tokens=4).text == "word"
    assert llm.amulet.rows == 0


# ---- the dispatcher ----


def test_the_dispatcher_has_one_handler_and_keeps_nothing() -> None:
    llm = scripted(SAID)
    for _ in range(3):
        index().as_query_engine(llm=AmuletLLM(amulet=llm.amulet)).query("moss?")
    handlers = [h for h in get_dispatcher().span_handlers if h is askers._HANDLER]
    assert len(handlers) == 1
    with pytest.raises(ValueError, match="no"):
        CustomFailing().query("moss?")
    handler = askers._HANDLER
    assert (handler.open_spans, handler.completed_spans, handler.dropped_spans) == ({}, [], [])


class CustomFailing(CustomQueryEngine):
    def custom_query(self, query_str: str) -> str:
        raise ValueError("no")


async def test_cancelled_queries_leave_nothing() -> None:
    llm = scripted({"": "word " * 400}, max_tokens=1000)
    task = asyncio.create_task(index().as_query_engine(llm=llm).aquery("moss?"))
    await asyncio.sleep(0.2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert askers._HANDLER.open_spans == {}
    assert llm.complete("Hi", max_tokens=4).text == "word"
    assert llm.amulet.rows == 0


@pytest.mark.parametrize("kind", [AmuletLLM, Logging, Tracer])
async def test_a_user_may_replace_the_dispatchers_handlers(kind: Any) -> None:
    llm = scripted(CONDENSED | SAID, kind=kind, preference=WISH)
    dispatcher = get_dispatcher()
    for handlers in ([], [SimpleSpanHandler()]):
        engine = CondenseQuestionChatEngine.from_defaults(query_engine(llm), llm=llm)
        judge = CorrectnessEvaluator(llm=llm, parser_function=lambda text: (5.0, text))
        refine = get_response_synthesizer(llm=llm, response_mode=ResponseMode.REFINE)
        llm.amulet.requests.clear()
        dispatcher.span_handlers = list(handlers)
        assert str(engine.chat("And where?", list(HISTORY))) == STEERED
        dispatcher.span_handlers = list(handlers)
        judge.evaluate(query="q", response="r", reference="r")
        dispatcher.span_handlers = list(handlers)
        assert str(refine.synthesize("moss?", NODES)) == STEERED
        assert llm.amulet.steered == [False, True, False, False, False, True]
        assert dispatcher.span_handlers[-1] is askers._HANDLER


def test_a_handler_of_the_users_own_sees_every_span_as_before() -> None:
    mine = SimpleSpanHandler()
    get_dispatcher().add_span_handler(mine)
    query_engine(scripted(SAID)).query("moss?")
    names = [span.id_.split("-")[0] for span in mine.completed_spans]
    assert names[-2:] == ["RetrieverQueryEngine._query", "RetrieverQueryEngine.query"]
