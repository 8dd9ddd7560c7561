"""autogen-agentchat: OpenAIChatCompletionClient, alone and in an agent with a tool."""

import asyncio
import sys

from autogen_agentchat.agents import AssistantAgent
from autogen_core.models import CreateResult, UserMessage
from autogen_ext.models.openai import OpenAIChatCompletionClient

INFO = {
    "vision": False,
    "function_calling": True,
    "json_output": True,
    "structured_output": True,
    "family": "unknown",
}
wish = {"extra_body": {"preference": "Answer in one short sentence."}}


async def weather(city: str) -> str:
    """Tells the weather."""
    return f"sun in {city}"


async def main() -> None:
    client = OpenAIChatCompletionClient(
        model="m", base_url=sys.argv[1], api_key="none", model_info=INFO
    )
    ask = [UserMessage(content="What is a black hole?", source="user")]
    assert (await client.create(ask)).content == "Plain."
    assert (await client.create(ask, extra_create_args=wish)).content == "Steered."
    pieces = [piece async for piece in client.create_stream(ask, extra_create_args=wish)]
    assert isinstance(pieces[-1], CreateResult)
    assert "".join(pieces[:-1]) == pieces[-1].content == "Steered."
    agent = AssistantAgent(
        "a", client, tools=[weather], system_message="Be kind.", reflect_on_tool_use=True
    )
    found = await agent.run(task="Which weather has Rome?")
    assert found.messages[-1].content == "Sunny."
    await client.close()


asyncio.run(main())
