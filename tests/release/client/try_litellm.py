"""litellm: completion, responses and embedding, by its provider `openai/`."""

import os
import sys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it downloads a price list

import litellm

url, embeds = sys.argv[1], sys.argv[2] == "embeddings"
here = {"model": "openai/m", "api_base": url, "api_key": "none"}
wish = {"extra_body": {"preference": "Answer in one short sentence."}}
messages = [{"role": "user", "content": "What is a black hole?"}]
parameters = {"type": "object", "properties": {"city": {"type": "string"}}}
tool = {"type": "function", "function": {"name": "weather", "parameters": parameters}}

assert litellm.completion(messages=messages, **here).choices[0].message.content == "Plain."
found = litellm.completion(messages=messages, **here, **wish)
assert found.choices[0].message.content == "Steered."
stream = litellm.completion(messages=messages, stream=True, **here, **wish)
assert "".join(piece.choices[0].delta.content or "" for piece in stream) == "Steered."
ask = [{"role": "user", "content": "Which weather has Rome?"}]
found = litellm.completion(messages=ask, tools=[tool], **here)
assert found.choices[0].message.tool_calls[0].function.arguments == '{"city": "Rome"}'
found = litellm.responses(input="What is a black hole?", **here, **wish)
assert found.output[0].content[0].text == "Steered."
said = ""
for event in litellm.responses(input="What is a black hole?", stream=True, **here, **wish):
    if event.type == "response.output_text.delta":
        said += event.delta
assert said == "Steered."
if embeds:
    here["model"] = "openai/all-MiniLM-L6-v2"
    found = litellm.embedding(input=["tea", "law"], **here)
    assert [len(entry["embedding"]) for entry in found.data] == [384, 384]
