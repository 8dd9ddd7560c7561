"""What a newcomer writes after the README: their own LangChain chain, their own preference."""

from __future__ import annotations

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate

from amulet import Amulet
from amulet_integrations.langchain import ChatAmulet

prompt = ChatPromptTemplate.from_messages(
    [("system", "You help in a bicycle shop."), ("human", "My {part} is broken. What do I do?")]
)
model = ChatAmulet(amulet=Amulet.embedded(), max_tokens=48)
chain = prompt | model | StrOutputParser()

plain = chain.invoke({"part": "chain"})
wish = {"configurable": {"preference": "Use at most ten words."}}
short = chain.invoke({"part": "chain"}, config=wish)
print(f"plain: {plain}\n\nUse at most ten words.: {short}")
assert len(short.split()) < len(plain.split())
streamed = "".join(chain.stream({"part": "chain"}, config=wish))
assert streamed == short
