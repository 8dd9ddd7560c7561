"""Preferences in graphs, sessions and retrieval chains: kept, and not in internal calls."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_classic.chains import (
    ConversationalRetrievalChain,
    create_history_aware_retriever,
    create_retrieval_chain,
)
from langchain_classic.chains.combine_documents import create_stuff_documents_chain
from langchain_classic.memory import ConversationSummaryMemory
from langchain_core.chat_history import BaseChatMessageHistory
from langchain_core.documents import Document
from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    HumanMessage,
    messages_from_dict,
    messages_to_dict,
)
from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder, PromptTemplate
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnableConfig, RunnableLambda, RunnableParallel
from langchain_core.runnables.history import RunnableWithMessageHistory
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.store.memory import InMemoryStore
from langgraph.store.sqlite import SqliteStore

from amulet_integrations.langchain.memory import PreferenceMemory, with_memory
from amulet_integrations.langchain.middleware import (
    PreferenceMiddleware,
    StatedPreference,
    state_settings,
)
from tests.langchain.scripted import preferring, scripted_chat


class State(MessagesState, StatedPreference):
    """A conversation and what its user asked of the answers."""


def hand_written(model: Any, **options: Any) -> Any:
    """A graph of one's own whose node passes on what its state says."""

    def answer(state: State) -> dict[str, Any]:
        return {"messages": [model.invoke(state["messages"], **state_settings(state))]}

    graph = StateGraph(State).add_node("answer", answer).add_edge(START, "answer")
    return graph.compile(**options)


def with_agent(model: Any, **options: Any) -> Any:
    return create_agent(model, middleware=[PreferenceMiddleware()], **options)


@pytest.mark.parametrize("build", [hand_written, with_agent])
def test_a_threads_preference_survives_a_restart(build: Any, tmp_path: Path) -> None:
    @contextmanager
    def opened() -> Iterator[Any]:
        """A new graph object over the same file, as after a restart."""
        with SqliteSaver.from_conn_string(str(tmp_path / "threads.db")) as saver:
            yield build(preferring("near"), checkpointer=saver)

    def ask(graph: Any, thread: str, **state: Any) -> str:
        config = {"configurable": {"thread_id": thread}}
        result = graph.invoke({"messages": [HumanMessage("Hi")], **state}, config)
        return result["messages"][-1].content

    with opened() as graph:
        assert ask(graph, "one", preference="near", strength=1.0) == "near!"
        assert ask(graph, "two") == "plain"
    with opened() as graph:
        assert ask(graph, "one") == "near!"
        assert ask(graph, "two") == "plain"
        kept = graph.get_state({"configurable": {"thread_id": "one"}}).values
        assert (kept["preference"], kept["strength"]) == (["near"], 1.0)
        assert ask(graph, "one", preference="") == "plain"
    with opened() as graph:
        assert ask(graph, "one") == "plain"


def test_a_users_preference_survives_a_restart(tmp_path: Path) -> None:
    database = str(tmp_path / "store.db")
    with SqliteStore.from_conn_string(database) as store:
        store.setup()
        PreferenceMemory(store).set("near", user_id="anna")
    with SqliteStore.from_conn_string(database) as store:
        store.setup()
        agent = with_agent(preferring("near"), store=store)
        for user, answer in [("anna", "near!"), ("ben", "plain")]:
            result = agent.invoke({"messages": "Hi"}, context={"user_id": user})
            assert result["messages"][-1].content == answer


class FileHistory(BaseChatMessageHistory):
    """A chat history in a JSON file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def messages(self) -> list[BaseMessage]:  # type: ignore[override]
        return messages_from_dict(json.loads(self.path.read_text())) if self.path.exists() else []

    def add_messages(self, messages: Any) -> None:
        self.path.write_text(json.dumps(messages_to_dict([*self.messages, *messages])))

    def clear(self) -> None:
        self.path.unlink(missing_ok=True)


def session_chat(model: Any, folder: Path) -> Any:
    prompt = ChatPromptTemplate.from_messages(
        [("placeholder", "{history}"), ("placeholder", "{input}")]
    )
    return RunnableWithMessageHistory(
        prompt | model,
        lambda session_id: FileHistory(folder / f"{session_id}.json"),
        input_messages_key="input",
        history_messages_key="history",
    )


@pytest.mark.filterwarnings("ignore:.*RunnableWithMessageHistory.*")
def test_a_sessions_preference_survives_a_restart(tmp_path: Path) -> None:
    database = str(tmp_path / "store.db")

    def ask(session: str, **configurable: Any) -> str:
        """Every call opens all files anew."""
        with SqliteStore.from_conn_string(database) as store:
            store.setup()
            chat = with_memory(session_chat(preferring("near"), tmp_path), PreferenceMemory(store))
            config = {"configurable": {"session_id": session, **configurable}}
            return chat.invoke({"input": [HumanMessage("Hi")]}, config).content

    with SqliteStore.from_conn_string(database) as store:
        store.setup()
        PreferenceMemory(store).set("near", thread_id="monday")
    assert [ask("monday"), ask("tuesday"), ask("monday")] == ["near!", "plain", "near!"]
    assert ask("monday", preference="") == "plain"
    history = FileHistory(tmp_path / "monday.json").messages
    assert [message.content for message in history] == ["Hi", "near!"] * 2 + ["Hi", "plain"]


@pytest.mark.filterwarnings("ignore:.*RunnableWithMessageHistory.*")
def test_a_message_may_carry_its_sessions_preference(tmp_path: Path) -> None:
    """Without a store: what a message of the history states stays with the history."""

    def ask(**stated: Any) -> str:
        chat = session_chat(preferring("near", "far"), tmp_path)
        prompt = HumanMessage("Hi", additional_kwargs=stated)
        config = {"configurable": {"session_id": "monday"}}
        return chat.invoke({"input": [prompt]}, config).content

    assert ask() == "plain"
    assert ask(preference="near") == "near!"
    assert ask() == "near!"
    assert ask(preference="far") == "far!"
    assert ask() == "far!"
    assert ask(preference="") == "plain"
    assert ask() == "plain"


async def test_with_memory_in_async_streams_and_batches() -> None:
    memory = PreferenceMemory(InMemoryStore())
    memory.set("near", user_id="anna")
    chat = with_memory(preferring("near"), memory)
    anna: RunnableConfig = {"configurable": {"user_id": "anna"}}
    ben: RunnableConfig = {"configurable": {"user_id": "ben"}}
    assert (await chat.ainvoke("Hi", anna)).content == "near!"
    assert [message.content for message in chat.batch(["Hi"] * 2, [anna, ben])] == [
        "near!",
        "plain",
    ]
    answers = await chat.abatch(["Hi"] * 2, [ben, anna])
    assert [message.content for message in answers] == ["plain", "near!"]
    pieces = [piece.content async for piece in chat.astream("Hi", anna)]
    assert "".join(pieces) == "near!"
    assert len(pieces) > 2
    assert [piece.content for piece in chat.stream("Hi", anna)] == pieces


def test_with_memory_reaches_every_model_of_a_parallel_chain_and_a_graph() -> None:
    memory = PreferenceMemory(InMemoryStore())
    memory.set("near", thread_id="t")
    model = preferring("near")
    answers = {"one": model, "other": RunnableLambda(lambda text: model.invoke(text))}
    config: RunnableConfig = {"configurable": {"thread_id": "t"}}
    result = with_memory(RunnableParallel(answers), memory).invoke("Hi", config)
    assert [result["one"].content, result["other"].content] == ["near!", "near!"]
    graph = with_memory(hand_written(model), memory)
    result = graph.invoke({"messages": [HumanMessage("Hi")]}, config)
    assert result["messages"][-1].content == "near!"


@pytest.mark.parametrize("build", [hand_written, with_agent])
def test_tokens_appear_in_the_graphs_stream(build: Any) -> None:
    stream = build(preferring("near")).stream(
        {"messages": [HumanMessage("Hi")], "preference": "near"}, stream_mode="messages"
    )
    pieces = [(piece.content, metadata["langgraph_node"]) for piece, metadata in stream]
    assert "".join(text for text, _ in pieces) == "near!"
    assert len(pieces) > 2
    assert {node for _, node in pieces} == {"answer" if build is hand_written else "model"}


def test_a_subgraph_has_its_own_state_and_inherits_the_config() -> None:
    model = preferring("near", "far")
    outer = StateGraph(State).add_node("inner", hand_written(model)).add_edge(START, "inner")
    graph = outer.compile()
    inputs = {"messages": [HumanMessage("Hi")]}
    far: RunnableConfig = {"configurable": {"preference": "far"}}
    assert graph.invoke({**inputs, "preference": "near"})["messages"][-1].content == "near!"
    assert graph.invoke(inputs, far)["messages"][-1].content == "far!"

    def private(state: State) -> dict[str, Any]:
        """A node that asks the inner graph about something else than the user sees."""
        answer = hand_written(model).invoke({"messages": [HumanMessage("Hi")], "preference": ""})
        return {"messages": answer["messages"][-1:]}

    graph = StateGraph(State).add_node("private", private).add_edge(START, "private").compile()
    assert graph.invoke(inputs, far)["messages"][-1].content == "plain"


# --- internal calls of a pipeline: the same with and without a preference

CONDENSE = "Rephrase the question so that it can be understood alone."
ANSWERS = {
    "near": "near!",
    "Rephrase": "What is the tallest tower in Paris?",
    "Progressively summarize": "They spoke of Paris.",
    "": "plain",
}
HISTORY = [HumanMessage("Is Paris large?"), AIMessage("Yes.")]


class Retriever:
    """Gives one document, and lists what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.runnable = RunnableLambda(self._retrieve)

    def _retrieve(self, question: str) -> list[Document]:
        self.asked.append(question)
        return [Document("The Eiffel Tower is 330 m high.")]


class AsRetriever(BaseRetriever):
    """The same for a chain that checks the type."""

    source: Any

    def _get_relevant_documents(self, query: str, *, run_manager: Any) -> list[Document]:
        return self.source.runnable.invoke(query)


def retrieval_chain(condenser: Any, model: Any, retriever: Retriever) -> Any:
    history = MessagesPlaceholder("chat_history")
    condense = ChatPromptTemplate.from_messages(
        [("system", CONDENSE), history, ("human", "{input}")]
    )
    answer = ChatPromptTemplate.from_messages(
        [("system", "{context}"), history, ("human", "{input}")]
    )
    return create_retrieval_chain(
        create_history_aware_retriever(condenser, retriever.runnable, condense),
        create_stuff_documents_chain(model, answer),
    )


@pytest.mark.parametrize("refused", [True, False])
@pytest.mark.parametrize("source", ["configurable", "constructor"])
def test_condensing_a_question_is_not_steered(refused: bool, source: str) -> None:
    """`with_preference("")` refuses what the chain inherits; without it the question is steered."""
    asked = {}
    for wish in ("near", ""):
        model = scripted_chat(ANSWERS, preference=wish if source == "constructor" else None)
        condenser = model.with_preference("") if refused else model
        retriever = Retriever()
        chain = retrieval_chain(condenser, model, retriever)
        config: Any = {"configurable": {"preference": wish}} if source == "configurable" else None
        result = chain.invoke({"input": "Its tallest tower?", "chat_history": HISTORY}, config)
        assert result["answer"] == ("near!" if wish else "plain")
        (asked[wish],) = retriever.asked
    assert asked[""] == ANSWERS["Rephrase"]
    assert asked["near"] == (ANSWERS["Rephrase"] if refused else "near!")


@pytest.mark.filterwarnings("ignore:.*was deprecated")
@pytest.mark.filterwarnings("ignore:.*is deprecated")
@pytest.mark.parametrize("wish", ["near", ""])
def test_the_classic_conversational_chain_condenses_the_same_question(wish: str) -> None:
    model = scripted_chat(ANSWERS)
    retriever = Retriever()
    chain = ConversationalRetrievalChain.from_llm(
        model.with_preference(wish),
        AsRetriever(source=retriever),
        condense_question_prompt=PromptTemplate.from_template(
            CONDENSE + "{chat_history}{question}"
        ),
        condense_question_llm=model.with_preference(""),
    )
    result = chain.invoke({"question": "Its tallest tower?", "chat_history": HISTORY})
    assert result["answer"] == ("near!" if wish else "plain")
    assert retriever.asked == [ANSWERS["Rephrase"]]


@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_with_memory_reaches_the_model_of_a_classic_chain() -> None:
    """By itself such a chain doesn't hand its config on to the model."""
    model = scripted_chat(ANSWERS)
    retriever = Retriever()
    chain = ConversationalRetrievalChain.from_llm(
        model,
        AsRetriever(source=retriever),
        condense_question_prompt=PromptTemplate.from_template(
            CONDENSE + "{chat_history}{question}"
        ),
        condense_question_llm=model.with_preference(""),
    )
    memory = PreferenceMemory(InMemoryStore())
    memory.set("near", thread_id="t")
    inputs = {"question": "Its tallest tower?", "chat_history": HISTORY}
    for thread, answer in [("t", "near!"), ("other", "plain")]:
        config: RunnableConfig = {"configurable": {"thread_id": thread}}
        assert with_memory(chain, memory).invoke(inputs, config)["answer"] == answer
    assert retriever.asked == [ANSWERS["Rephrase"]] * 2


@pytest.mark.filterwarnings("ignore:.*deprecated")
@pytest.mark.parametrize("wish", ["near", ""])
def test_a_summary_memory_is_not_steered(wish: str) -> None:
    model = scripted_chat(ANSWERS, preference=wish)
    memory = ConversationSummaryMemory(llm=model.with_preference(""))
    memory.save_context({"input": "Is Paris large?"}, {"output": "Yes."})
    assert memory.buffer == "They spoke of Paris."
