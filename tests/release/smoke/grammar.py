"""The extra `grammar`: an answer that follows a JSON schema."""

from __future__ import annotations

import json

from amulet import Amulet, Grammar

schema = {
    "type": "object",
    "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["age"],
    "additionalProperties": False,
}
question = [{"role": "user", "content": "How old is a teenager? Answer in JSON."}]
reply = Amulet.embedded().chat(question, grammar=Grammar.json_schema(schema), max_new_tokens=30)
print(reply.text)
assert 0 <= json.loads(reply.text)["age"] <= 99
