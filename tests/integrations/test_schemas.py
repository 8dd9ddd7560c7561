"""LlamaIndex and the server take the unusual schemas that LangChain's tests list."""

from __future__ import annotations

from typing import Any

import pytest
from llama_index.core.prompts import PromptTemplate

from amulet import Amulet
from amulet.serve.schema import response_grammar
from amulet_integrations.llama_index import AmuletLLM
from tests.langchain.test_unusual_schemas import FIELDS, one
from tests.models import ScriptedModel
from tests.templates import family_tokenizer

TOKENIZER = family_tokenizer("qwen")


def amulet(answer: str) -> Amulet:
    model: Any = ScriptedModel(TOKENIZER, answer)
    return Amulet(model, TOKENIZER)


@pytest.mark.parametrize("name", FIELDS)
def test_llama_index_predicts_them(name: str) -> None:
    of, written, read = FIELDS[name]
    llm = AmuletLLM(amulet=amulet('{"field": ' + written + "}"))
    predicted: Any = llm.structured_predict(one(of), PromptTemplate("x"))
    assert predicted.field == read


@pytest.mark.parametrize("name", FIELDS)
def test_the_server_holds_answers_to_them(name: str) -> None:
    of, written, _ = FIELDS[name]
    schema = {"name": "One", "schema": one(of).model_json_schema()}
    grammar = response_grammar({"type": "json_schema", "json_schema": schema})
    answer = '{"field": ' + written + "}"
    question = [{"role": "user", "content": "x"}]
    assert amulet(answer).chat(question, grammar=grammar).text == answer
