"""smolagents: OpenAIModel, alone and in an agent that calls tools."""

import sys

from smolagents import ChatMessage, MessageRole, OpenAIModel, Tool, ToolCallingAgent


class Weather(Tool):
    name = "weather"
    description = "Tells the weather."
    inputs = {"city": {"type": "string", "description": "The city."}}  # noqa: RUF012
    output_type = "string"

    def forward(self, city: str) -> str:
        return f"sun in {city}"


def ask(text: str) -> list[ChatMessage]:
    return [ChatMessage(role=MessageRole.USER, content=[{"type": "text", "text": text}])]


here = {"model_id": "m", "api_base": sys.argv[1], "api_key": "none"}
plain = OpenAIModel(**here)
steered = OpenAIModel(**here, extra_body={"preference": "Answer in one short sentence."})
assert plain.generate(ask("What is a black hole?")).content == "Plain."
assert steered.generate(ask("What is a black hole?")).content == "Steered."
pieces = steered.generate_stream(ask("What is a black hole?"))
assert "".join(piece.content or "" for piece in pieces) == "Steered."
found = plain.generate(ask("Which weather has Rome?"), tools_to_call_from=[Weather()])
assert found.tool_calls[0].function.name == "weather"
agent = ToolCallingAgent(tools=[Weather()], model=plain, max_steps=3, verbosity_level=0)
assert agent.run("Which weather has Rome?") == "Sunny."
