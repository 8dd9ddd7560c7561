"""Swap the model in two lines: the chain stays the same, and answers can follow a preference."""

from __future__ import annotations

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate

# Before:
#   from langchain_huggingface import ChatHuggingFace, HuggingFacePipeline
#   model = ChatHuggingFace(llm=HuggingFacePipeline.from_model_id(..., task="text-generation"))
# After; for your own model: ChatAmulet(model="Qwen/Qwen3-0.6B"), or from_pipeline(...).
from amulet_integrations.langchain import ChatAmulet

model = ChatAmulet.embedded(max_tokens=48)

prompt = ChatPromptTemplate.from_messages([("human", "How do I keep a {plant} alive?")])
chain = prompt | model | StrOutputParser()

print("as before:", chain.invoke({"plant": "houseplant"}))
for preference in ("Answer in one short sentence.", "Answer as a numbered list."):
    config = {"configurable": {"preference": preference}}
    print(f"{preference}", chain.invoke({"plant": "houseplant"}, config))
