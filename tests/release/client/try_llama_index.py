"""llama-index-llms-openai-like: OpenAILike, alone and in an agent with a tool."""

import asyncio
import sys

from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike

here = {"model": "m", "api_base": sys.argv[1], "api_key": "none", "is_chat_model": True}
wish = {"extra_body": {"preference": "Answer in one short sentence."}}
plain = OpenAILike(is_function_calling_model=True, **here)
steered = OpenAILike(additional_kwargs=wish, **here)
ask = [ChatMessage(role="user", content="What is a black hole?")]
assert plain.chat(ask).message.content == "Plain."
assert steered.chat(ask).message.content == "Steered."
assert "".join(piece.delta or "" for piece in steered.stream_chat(ask)) == "Steered."


def weather(city: str) -> str:
    """Tells the weather."""
    return f"sun in {city}"


async def main() -> None:
    agent = FunctionAgent(tools=[weather], llm=plain)
    assert str(await agent.run("Which weather has Rome?")) == "Sunny."


asyncio.run(main())
