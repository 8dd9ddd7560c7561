"""openai-agents: an agent by the Responses API, its default, and by chat completions."""

import asyncio
import sys

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI

set_tracing_disabled(True)  # it would send traces to OpenAI
client = AsyncOpenAI(base_url=sys.argv[1], api_key="none")
steered = ModelSettings(extra_body={"preference": "Answer in one short sentence."})


@function_tool
def weather(city: str) -> str:
    """Tells the weather."""
    return f"sun in {city}"


async def main() -> None:
    for kind in (OpenAIResponsesModel, OpenAIChatCompletionsModel):
        model = kind(model="m", openai_client=client)
        agent = Agent(name="a", instructions="Be kind.", model=model)
        assert (await Runner.run(agent, "What is a black hole?")).final_output == "Plain."
        agent = Agent(name="a", instructions="Be kind.", model=model, model_settings=steered)
        assert (await Runner.run(agent, "What is a black hole?")).final_output == "Steered."
        streamed = Runner.run_streamed(agent, "What is a black hole?")
        said = ""
        async for event in streamed.stream_events():
            if (
                event.type == "raw_response_event"
                and event.data.type == "response.output_text.delta"
            ):
                said += event.data.delta
        assert said == streamed.final_output == "Steered."
        agent = Agent(name="a", model=model, tools=[weather])
        assert (await Runner.run(agent, "Which weather has Rome?")).final_output == "Sunny."
        streamed = Runner.run_streamed(agent, "Which weather has Rome?")
        async for _ in streamed.stream_events():
            pass
        assert streamed.final_output == "Sunny."


asyncio.run(main())
