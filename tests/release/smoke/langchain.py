"""The extra `langchain`: a chain, structured output, and the agents' middleware."""

from __future__ import annotations

from langchain.agents import create_agent
from langchain_core.output_parsers import StrOutputParser
from pydantic import BaseModel

from amulet_integrations.langchain import AmuletLLM, ChatAmulet, PreferenceMiddleware

model = ChatAmulet.embedded(max_tokens=24)
chain = model | StrOutputParser()
plain = chain.invoke("What is tea?")
steered = chain.invoke("What is tea?", {"configurable": {"preference": "Talk like a pirate."}})
print(plain, steered, sep="\n")
assert plain != steered


class Age(BaseModel):
    years: int


print(model.with_structured_output(Age).invoke("Ann is 12 years old. How old is Ann?"))
agent = create_agent(model, tools=[], middleware=[PreferenceMiddleware()])
answer = agent.invoke({"messages": [("human", "What is tea?")]})
assert answer["messages"][-1].content == plain
assert AmuletLLM(amulet=model.engine, max_tokens=4).invoke("Tea is")
