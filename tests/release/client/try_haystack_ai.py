"""haystack-ai: OpenAIChatGenerator, alone and in a pipeline, and OpenAITextEmbedder."""

import sys

from haystack import Pipeline
from haystack.components.embedders import OpenAITextEmbedder
from haystack.components.generators.chat import OpenAIChatGenerator
from haystack.dataclasses import ChatMessage
from haystack.tools import Tool
from haystack.utils import Secret

url, embeds = sys.argv[1], sys.argv[2] == "embeddings"
here = {"api_key": Secret.from_token("none"), "api_base_url": url}
wish = {"extra_body": {"preference": "Answer in one short sentence."}}
ask = [ChatMessage.from_user("What is a black hole?")]
chat = OpenAIChatGenerator(model="m", **here)
assert chat.run(ask)["replies"][0].text == "Plain."
assert chat.run(ask, generation_kwargs=wish)["replies"][0].text == "Steered."
said = []
found = chat.run(
    ask, generation_kwargs=wish, streaming_callback=lambda chunk: said.append(chunk.content)
)
assert "".join(said) == found["replies"][0].text == "Steered."
parameters = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
tool = Tool("weather", "Tells the weather.", parameters, lambda city: f"sun in {city}")
found = chat.run([ChatMessage.from_user("Which weather has Rome?")], tools=[tool])["replies"][0]
assert found.tool_calls[0].arguments == {"city": "Rome"}
pipeline = Pipeline()
pipeline.add_component("chat", OpenAIChatGenerator(model="m", generation_kwargs=wish, **here))
assert pipeline.run({"chat": {"messages": ask}})["chat"]["replies"][0].text == "Steered."
if embeds:
    embedder = OpenAITextEmbedder(model="all-MiniLM-L6-v2", **here)
    assert len(embedder.run("tea")["embedding"]) == 384
