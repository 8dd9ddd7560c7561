"""An agent with tools, an SQLite store and a checkpointer, for two users with two preferences."""

from __future__ import annotations

import tempfile
from typing import Any, Literal

from langchain.agents import create_agent
from langchain.agents.middleware import wrap_model_call
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.store.sqlite import SqliteStore

from amulet_integrations import langchain as amulet


def opening_hours(place: Literal["library", "museum"]) -> str:
    """Look up when a place is open."""
    return f"The {place} is open from 9 to 17, on Mondays from 13 to 17."


@wrap_model_call
def choose_tool(request: Any, handler: Any) -> Any:
    """Choose the tool for this small model; larger models choose by themselves."""
    last = request.messages[-1]
    for words, choice in [("from now on", "remember_preference"), ("open?", "opening_hours")]:
        if last.type == "human" and words in last.text:
            return handler(request.override(tool_choice=choice))
    return handler(request.override(tools=[]))


def ask(folder: str, user: str, thread: str, text: str) -> None:
    """Answer one turn; store and threads are reopened each time, as after a restart."""
    with (
        SqliteStore.from_conn_string(f"{folder}/store.db") as store,
        SqliteSaver.from_conn_string(f"{folder}/threads.db") as threads,
    ):
        store.setup()
        amulet.PreferenceMemory(store).merge("Answer as a numbered list.", user_id="ben")
        agent = create_agent(
            amulet.ChatAmulet.embedded(tools_prompt="fallback", max_tokens=48),
            tools=[opening_hours, amulet.remember_preference()],
            middleware=[amulet.PreferenceMiddleware(), choose_tool],
            store=store,
            checkpointer=threads,
        )
        config = {"configurable": {"thread_id": f"{user} {thread}", "user_id": user}}
        result = agent.invoke({"messages": text}, config)
        calls = [call for m in result["messages"] if m.type == "ai" for call in m.tool_calls]
        called = [(call["name"], call["args"]) for call in calls]
        print(f"{user}: {text}\n  {called}\n  {result['messages'][-1].text}")


with tempfile.TemporaryDirectory() as temporary:
    plant = "How do I keep a houseplant alive?"
    ask(temporary, "anna", "first", "Keep it short, one sentence, from now on.")
    ask(temporary, "anna", "second", plant)
    ask(temporary, "ben", "first", plant)
    ask(temporary, "anna", "third", "When is the library open?")
