"""A LangGraph agent with a tool and a memory; it remembers how each user wants to be answered.

`python main.py` plays a short conversation with two users.
"""

from typing import Literal

from langchain.agents import create_agent
from langgraph.checkpoint.memory import InMemorySaver  # or SqliteSaver, PostgresSaver
from langgraph.store.memory import InMemoryStore  # or SqliteStore, PostgresStore

from amulet_integrations.langchain import ChatAmulet, PreferenceMiddleware, remember_preference

# The fallback describes the tools in the system message if the chat template doesn't.
model = ChatAmulet.embedded(tools_prompt="fallback", max_tokens=64)


def opening_hours(place: Literal["library", "museum"]) -> str:
    """Look up when a place is open."""
    return f"The {place} is open from 9 to 17, on Mondays from 13 to 17."


middleware = [PreferenceMiddleware()]  # reads a user's preference before each call of the model

# ----------------------------------------------------------------------
# SmolLM2 is too small to decide when to call a tool, and what to say of a remembered preference,
# so this code does. A larger model decides by itself: delete everything between the two lines.
from langchain.agents.middleware import wrap_model_call
from langchain_core.messages import AIMessage


@wrap_model_call
def choose_tool(request, handler):
    """Force a tool, or offer none, by the words of the user's turn."""
    last = request.messages[-1]
    if last.type == "tool" and last.text == "Remembered.":
        return AIMessage("I will remember that.")
    for words, name in [("from now on", "remember_preference"), ("open?", "opening_hours")]:
        if last.type == "human" and words in last.text:
            return handler(request.override(tool_choice=name))
    return handler(request.override(tools=[]))


middleware.append(choose_tool)
# ----------------------------------------------------------------------

agent = create_agent(
    model,
    tools=[opening_hours, remember_preference()],
    middleware=middleware,
    store=InMemoryStore(),  # preferences, by user
    checkpointer=InMemorySaver(),  # conversations, by thread
)


def ask(user: str, thread: str, text: str) -> None:
    """Answer one turn of a user's conversation."""
    config = {"configurable": {"user_id": user, "thread_id": f"{user}/{thread}"}}
    result = agent.invoke({"messages": text}, config)
    print(f"{user}> {text}\n{result['messages'][-1].text}\n")


if __name__ == "__main__":
    ask("anna", "1", "Keep it short, one sentence, from now on.")
    ask("anna", "2", "How do I keep a houseplant alive?")
    ask("ben", "1", "How do I keep a houseplant alive?")
    ask("anna", "3", "When is the library open?")
