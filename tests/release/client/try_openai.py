"""openai: chat completions, responses and embeddings, plain and async."""

import asyncio
import sys

from openai import AsyncOpenAI, OpenAI

url, embeds = sys.argv[1], sys.argv[2] == "embeddings"
client = OpenAI(base_url=url, api_key="none")
wish = {"extra_body": {"preference": "Answer in one short sentence."}}
messages = [{"role": "user", "content": "What is a black hole?"}]
function = {
    "name": "weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}

found = client.chat.completions.create(model="m", messages=messages)
assert found.choices[0].message.content == "Plain."
found = client.chat.completions.create(model="m", messages=messages, **wish)
assert found.choices[0].message.content == "Steered."
stream = client.chat.completions.create(model="m", messages=messages, stream=True, **wish)
assert "".join(piece.choices[0].delta.content or "" for piece in stream) == "Steered."
ask = [{"role": "user", "content": "Which weather has Rome?"}]
tools = [{"type": "function", "function": function}]
found = client.chat.completions.create(model="m", messages=ask, tools=tools)
assert found.choices[0].message.tool_calls[0].function.arguments == '{"city": "Rome"}'

assert client.responses.create(model="m", input=messages, **wish).output_text == "Steered."
with client.responses.stream(
    model="m", input="Which weather has Rome?", tools=[{"type": "function", **function}]
) as events:
    found = events.get_final_response()
call = found.output[0]
assert (call.type, call.arguments) == ("function_call", '{"city": "Rome"}')
result = {"type": "function_call_output", "call_id": call.call_id, "output": "sun in Rome"}
assert client.responses.create(model="m", input=[*ask, call, result]).output_text == "Sunny."
if embeds:
    vectors = client.embeddings.create(model="all-MiniLM-L6-v2", input=["tea", "law"]).data
    assert [len(vector.embedding) for vector in vectors] == [384, 384]


async def later() -> None:
    async with AsyncOpenAI(base_url=url, api_key="none") as asking:
        assert (
            await asking.responses.create(model="m", input="hi", **wish)
        ).output_text == "Steered."


asyncio.run(later())
