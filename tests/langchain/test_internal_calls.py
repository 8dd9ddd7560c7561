"""The internal calls of a pipeline are not steered: the same condensed question either way."""

from __future__ import annotations

from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnableBranch

from amulet_integrations.langchain import ChatAmulet
from tests.langchain.scripted import scripted_chat

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

SAYS = {"PIRATE": "Arr!", "Condense": "condensed", "": "answer"}
HISTORY: list[Any] = [HumanMessage("Who wrote Emma?"), AIMessage("Jane Austen.")]


class Retriever(BaseRetriever):
    """Remembers the questions it was asked."""

    asked: list[str] = []  # noqa: RUF012 - a pydantic field

    def _get_relevant_documents(self, query: str, **_: Any) -> list[Document]:
        self.asked.append(query)
        return [Document("Austen was born in 1775.")]


def chat() -> ChatAmulet:
    return scripted_chat(SAYS)


def retrieval_chain(answering: Any, condensing: Any, retriever: Retriever) -> Any:
    from langchain_classic.chains import create_history_aware_retriever, create_retrieval_chain
    from langchain_classic.chains.combine_documents import create_stuff_documents_chain

    condense = ChatPromptTemplate.from_messages(
        [("system", "Condense."), MessagesPlaceholder("chat_history"), ("human", "{input}")]
    )
    answer = ChatPromptTemplate.from_messages([("system", "Use: {context}"), ("human", "{input}")])
    return create_retrieval_chain(
        create_history_aware_retriever(condensing, retriever, condense),
        create_stuff_documents_chain(answering, answer),
    )


@pytest.mark.parametrize("wish", [None, "PIRATE"])
def test_create_retrieval_chain_condenses_plainly(wish: str | None) -> None:
    model, retriever = chat(), Retriever(asked=[])
    chain = retrieval_chain(model, model.with_preference(""), retriever)
    config: Any = {"configurable": {"preference": wish}} if wish else {}
    result = chain.invoke({"input": "When was she born?", "chat_history": HISTORY}, config)
    assert retriever.asked == ["condensed"]
    assert result["answer"] == ("Arr!" if wish else "answer")


def test_without_the_plain_model_the_question_would_be_steered() -> None:
    model, retriever = chat(), Retriever(asked=[])
    config: Any = {"configurable": {"preference": "PIRATE"}}
    chain = retrieval_chain(model, model, retriever)
    chain.invoke({"input": "When was she born?", "chat_history": HISTORY}, config)
    assert retriever.asked == ["Arr!"]


@pytest.mark.parametrize("wish", [None, "PIRATE"])
def test_the_classic_conversational_chain_condenses_plainly(wish: str | None) -> None:
    from langchain_classic.chains import ConversationalRetrievalChain

    model, retriever = chat(), Retriever(asked=[])
    steered = model.with_preference(wish) if wish else model
    chain = ConversationalRetrievalChain.from_llm(
        steered,
        retriever,
        condense_question_llm=steered.with_preference(""),
        condense_question_prompt=ChatPromptTemplate.from_template(
            "Condense.\n{chat_history}\n{question}"
        ),
    )
    result = chain.invoke({"question": "When was she born?", "chat_history": HISTORY})
    assert retriever.asked == ["condensed"]
    assert result["answer"] == ("Arr!" if wish else "answer")


def test_a_router_and_a_summarising_memory_run_plainly() -> None:
    from langchain_classic.memory import ConversationSummaryMemory

    model = scripted_chat({"PIRATE": "Arr", "Route": "left", "Progressively": "summary", "": "ok"})
    steered = model.with_preference("PIRATE")
    plain = steered.with_preference("")
    router = ChatPromptTemplate.from_template("Route {q}") | plain
    branch: Any = RunnableBranch(
        (lambda q: router.invoke(q).content == "left", lambda _: steered.invoke("x")),
        lambda _: plain.invoke("x"),
    )
    assert branch.invoke({"q": "x"}).content == "Arr"
    memory = ConversationSummaryMemory(llm=plain)
    memory.save_context({"input": "hi"}, {"output": "ho"})
    assert memory.buffer == "summary"


@pytest.mark.parametrize("stated", ["message", "config"])
def test_sessions_of_a_message_history_keep_their_own_preference(stated: str) -> None:
    from langchain_core.chat_history import InMemoryChatMessageHistory
    from langchain_core.runnables.history import RunnableWithMessageHistory

    histories: dict[str, InMemoryChatMessageHistory] = {}

    def session(session_id: str) -> InMemoryChatMessageHistory:
        return histories.setdefault(session_id, InMemoryChatMessageHistory())

    model = scripted_chat({"PIRATE": "Arr!", "": "ok"})
    chain = RunnableWithMessageHistory(model, session)
    ann: Any = {"configurable": {"session_id": "ann"}}
    bob: Any = {"configurable": {"session_id": "bob"}}
    first = HumanMessage("Hi")
    if stated == "message":
        first = HumanMessage("Hi", additional_kwargs={"preference": "PIRATE"})
    else:
        ann["configurable"]["preference"] = "PIRATE"
    assert chain.invoke([first], ann).content == "Arr!"
    assert chain.invoke([HumanMessage("Hi")], bob).content == "ok"
    assert chain.invoke([HumanMessage("And now?")], ann).content == "Arr!"
    assert chain.invoke([HumanMessage("And now?")], bob).content == "ok"
    assert len(histories["ann"].messages) == 4
