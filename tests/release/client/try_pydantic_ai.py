"""pydantic-ai: an agent by chat completions and by the Responses API."""

import asyncio
import sys
from typing import Literal

from pydantic import BaseModel
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider


class Mood(BaseModel):
    """How somebody feels."""

    mood: Literal["good", "bad"]


def weather(city: str) -> str:
    """Tells the weather."""
    return f"sun in {city}"


async def main() -> None:
    provider = OpenAIProvider(base_url=sys.argv[1], api_key="none")
    steered = {"extra_body": {"preference": "Answer in one short sentence."}}
    for kind in (OpenAIChatModel, OpenAIResponsesModel):
        model = kind("m", provider=provider)
        agent = Agent(model, instructions="Be kind.")
        assert (await agent.run("What is a black hole?")).output == "Plain."
        found = await agent.run("What is a black hole?", model_settings=steered)
        assert found.output == "Steered."
        async with agent.run_stream("What is a black hole?", model_settings=steered) as stream:
            assert await stream.get_output() == "Steered."
        agent = Agent(model, tools=[weather])
        assert (await agent.run("Which weather has Rome?")).output == "Sunny."
        agent = Agent(model, output_type=Mood)
        assert (await agent.run("Which mood?")).output == Mood(mood="good")


asyncio.run(main())
