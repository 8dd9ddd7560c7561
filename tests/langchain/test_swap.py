"""Programs written for a peer's class run with only the model line changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import pytest
import torch
from langchain.agents import create_agent
from langchain.chat_models import init_chat_model
from langchain_core.messages import AnyMessage, HumanMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableParallel, RunnablePassthrough
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, StateGraph
from langgraph.graph.message import add_messages
from typing_extensions import TypedDict

from amulet_integrations.langchain import AmuletLLM, ChatAmulet
from tests.langchain.scripted import scripted_chat, tool_call_text


class State(TypedDict):
    messages: Annotated[list[AnyMessage], add_messages]


@tool
def stock(item: str) -> str:
    """How many of an item are in stock."""
    return f"7 {item}"


def rag_chain(model: Any) -> Any:
    """A retrieval chain, as it stands in tutorials."""
    prompt = ChatPromptTemplate.from_messages(
        [("system", "Answer from the context: {context}"), ("human", "{question}")]
    )
    retrieve = RunnableParallel(
        context=lambda _: "Emma was written by Jane Austen.", question=RunnablePassthrough()
    )
    return retrieve | prompt | model | StrOutputParser()


def agent(model: Any) -> Any:
    return create_agent(model, [stock], system_prompt="You help in a shop.")


def graph(model: Any) -> Any:
    def talk(state: State) -> dict[str, Any]:
        return {"messages": [model.invoke(state["messages"])]}

    builder = StateGraph(State)
    builder.add_node("talk", talk)
    builder.add_edge(START, "talk")
    return builder.compile(checkpointer=InMemorySaver())


ANSWERS = {
    "7 apples": "There are 7 apples.",
    "How many": tool_call_text("stock", item="apples"),
    "Emma": "Jane Austen wrote it.",
    "And Emma's author": "Still Austen.",
    "": "Hello!",
}


def for_ollama() -> ChatAmulet:
    # ChatOllama(model="qwen3", temperature=0, num_predict=200, seed=1, stop=["###"], top_k=40)
    return scripted_chat(ANSWERS, temperature=0, max_tokens=200, seed=1, stop=["###"], top_k=40)


def for_openai() -> ChatAmulet:
    # ChatOpenAI(model="gpt-...", temperature=0, max_tokens=200, seed=1, top_p=0.9, streaming=True)
    return scripted_chat(ANSWERS, temperature=0, max_tokens=200, seed=1, top_p=0.9, streaming=True)


def for_huggingface() -> ChatAmulet:
    # ChatHuggingFace(llm=HuggingFacePipeline.from_model_id(..., pipeline_kwargs={...}))
    return scripted_chat(ANSWERS, max_new_tokens=200, repetition_penalty=1.0)


MODELS = [for_ollama, for_openai, for_huggingface]


@pytest.mark.parametrize("model_line", MODELS)
async def test_a_chain(model_line: Callable[[], ChatAmulet]) -> None:
    chain = rag_chain(model_line())
    assert chain.invoke("Who?") == "Jane Austen wrote it."
    assert await chain.ainvoke("Who?") == "Jane Austen wrote it."
    assert "".join(chain.stream("Who?")) == "Jane Austen wrote it."
    assert chain.batch(["Who?", "Who?"]) == ["Jane Austen wrote it."] * 2


@pytest.mark.parametrize("model_line", MODELS)
async def test_an_agent(model_line: Callable[[], ChatAmulet]) -> None:
    made = agent(model_line())
    question: Any = {"messages": [HumanMessage("How many apples?")]}
    for result in (made.invoke(question), await made.ainvoke(question)):
        kinds = [message.type for message in result["messages"]]
        assert kinds == ["human", "ai", "tool", "ai"]
        assert result["messages"][2].content == "7 apples"
        assert result["messages"][3].content == "There are 7 apples."


@pytest.mark.parametrize("model_line", MODELS)
def test_a_graph_with_memory_streams_tokens(model_line: Callable[[], ChatAmulet]) -> None:
    made = graph(model_line())
    config: Any = {"configurable": {"thread_id": "1"}}
    pieces = [
        message.content
        for message, _ in made.stream(
            {"messages": [HumanMessage("Hi")]}, config, stream_mode="messages"
        )
    ]
    assert "".join(pieces) == "Hello!"
    assert len([piece for piece in pieces if piece]) == 6
    state = made.invoke({"messages": [HumanMessage("Who wrote Emma?")]}, config)
    assert [message.content for message in state["messages"]][1::2] == [
        "Hello!",
        "Jane Austen wrote it.",
    ]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_without_a_preference_the_answers_are_those_of_the_peer(smollm: Any) -> None:
    from langchain_huggingface import ChatHuggingFace, HuggingFacePipeline
    from transformers import pipeline

    model, tokenizer = smollm
    assert model.dtype == torch.float32
    pipe = pipeline(
        "text-generation",
        model=model,
        tokenizer=tokenizer,
        max_new_tokens=24,
        do_sample=False,
        return_full_text=False,
    )
    llm = HuggingFacePipeline(pipeline=pipe)
    peer = ChatHuggingFace(llm=llm)
    ours = ChatAmulet.from_pipeline(llm, max_new_tokens=24)
    assert rag_chain(ours).invoke("Who wrote Emma?") == rag_chain(peer).invoke("Who wrote Emma?")
    config: Any = {"configurable": {"thread_id": "1"}}
    question: Any = {"messages": [HumanMessage("Name a colour.")]}
    theirs = graph(peer).invoke(question, config)["messages"][-1].content
    assert graph(ours).invoke(question, config)["messages"][-1].content == theirs
    completion = AmuletLLM.from_pipeline(pipe, max_new_tokens=24)
    assert completion.invoke("The capital of France is") == llm.invoke("The capital of France is")


def test_langchain_has_no_names_for_other_packages_models() -> None:
    """If this fails, `init_chat_model("amulet:...")` may work, and docs/langchain.md is wrong."""
    with pytest.raises(ValueError, match="Supported providers"):
        init_chat_model("amulet:embedded")
    with pytest.raises(ValueError, match="Unsupported provider"):
        init_chat_model("embedded", model_provider="amulet_integrations.langchain")
