"""dspy: an LM alone, in a signature, and in one that streams."""

import asyncio
import os
import sys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it downloads a price list

import dspy

here = {"api_base": sys.argv[1], "api_key": "none", "cache": False}
plain = dspy.LM("openai/m", **here)
steered = dspy.LM("openai/m", extra_body={"preference": "Answer in one short sentence."}, **here)
assert plain("What is a black hole?") == ["Plain."]
assert steered("What is a black hole?") == ["Steered."]
responses = dspy.LM("openai/m", model_type="responses", **here)
found = responses("What is a black hole?")
assert [one["text"] if isinstance(one, dict) else one for one in found] == ["Plain."]
dspy.configure(lm=plain)
assert dspy.Predict("question -> answer")(question="Which capital has Italy?").answer == "Rome"


async def main() -> None:
    listener = dspy.streaming.StreamListener(signature_field_name="answer")
    predict = dspy.streamify(dspy.Predict("question -> answer"), stream_listeners=[listener])
    pieces = [piece async for piece in predict(question="Which capital has Italy?")]
    said = "".join(p.chunk for p in pieces if isinstance(p, dspy.streaming.StreamResponse))
    # It looks for the end of a field in ten chunks, which are too few of one byte each.
    assert said.startswith("Rome")
    assert pieces[-1].answer == "Rome"


asyncio.run(main())
