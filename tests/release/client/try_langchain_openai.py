"""langchain-openai: ChatOpenAI by chat completions and the Responses API, and OpenAIEmbeddings."""

import sys

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI, OpenAIEmbeddings

url, embeds = sys.argv[1], sys.argv[2] == "embeddings"
here = {"base_url": url, "api_key": "none"}


def weather(city: str) -> str:
    """Tells the weather."""
    return f"sun in {city}"


for responses in (False, True):
    options = {"model": "m", "use_responses_api": responses, **here}
    plain = ChatOpenAI(**options)
    steered = ChatOpenAI(extra_body={"preference": "Answer in one short sentence."}, **options)
    assert plain.invoke("What is a black hole?").text == "Plain."
    assert steered.invoke("What is a black hole?").text == "Steered."
    assert "".join(p.text for p in steered.stream("What is a black hole?")) == "Steered."
    bound = plain.bind_tools([weather])
    ask = HumanMessage("Which weather has Rome?")
    called = bound.invoke([ask])
    assert called.tool_calls[0]["args"] == {"city": "Rome"}
    result = ToolMessage("sun in Rome", tool_call_id=called.tool_calls[0]["id"])
    assert bound.invoke([ask, called, result]).text == "Sunny."
if embeds:
    # By default it sends the token ids of OpenAI's own tokenizer.
    embedder = OpenAIEmbeddings(model="all-MiniLM-L6-v2", check_embedding_ctx_length=False, **here)
    assert [len(vector) for vector in embedder.embed_documents(["tea", "law"])] == [384, 384]
