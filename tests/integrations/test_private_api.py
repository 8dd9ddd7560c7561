"""Names of LangChain and LlamaIndex that are not public, and that the integrations rely on.

What a name does is tested where it is used; here a renamed or removed one is told by its name.
ARCHITECTURE.md lists them.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_core.language_models.llms import BaseLLM, get_prompts
from langchain_core.runnables.base import RunnableBindingBase
from langchain_core.runnables.config import var_child_runnable_config
from llama_index.core.llms import LLM
from llama_index.core.llms.function_calling import FunctionCallingLLM


@pytest.mark.parametrize(
    ("kind", "name", "arguments"),
    [
        (BaseChatModel, "_convert_input", ["self", "model_input"]),
        (BaseChatModel, "_get_llm_string", ["self", "stop", "kwargs"]),
        (BaseChatModel, "_get_ls_params", ["self", "stop", "kwargs"]),
        (BaseChatModel, "_resolve_model_profile", ["self"]),
        (BaseChatModel, "_should_stream", ["self", "async_api", "run_manager", "kwargs"]),
        (BaseChatModel, "_should_use_protocol_streaming", None),
        (BaseLLM, "_convert_input", ["self", "model_input"]),
        (LLM, "_extend_prompt", ["self", "formatted_prompt"]),
        (LLM, "_get_messages", ["self", "prompt", "prompt_args"]),
        (LLM, "_structured_stream_call", ["self", "output_cls", "prompt", "llm_kwargs"]),
        (LLM, "_structured_astream_call", ["self", "output_cls", "prompt", "llm_kwargs"]),
        (FunctionCallingLLM, "_prepare_chat_with_tools", ["self", "tools", "user_msg"]),
        (FunctionCallingLLM, "_validate_chat_with_tools_response", ["self", "response", "tools"]),
    ],
)
def test_the_method_is_there(kind: Any, name: str, arguments: list[str] | None) -> None:
    parameters = list(inspect.signature(getattr(kind, name)).parameters)
    if arguments is not None:
        assert parameters[: len(arguments)] == arguments


def test_langchain_keeps_the_run_in_this_variable() -> None:
    assert var_child_runnable_config.get() is None
    assert list(inspect.signature(get_prompts).parameters) == ["params", "prompts", "cache"]
    assert "config_factories" in RunnableBindingBase.model_fields


def test_llama_indexs_huggingface_llm_keeps_model_and_tokenizer_under_these_names() -> None:
    module = pytest.importorskip("llama_index.llms.huggingface")
    private = module.HuggingFaceLLM.__private_attributes__
    assert {"_model", "_tokenizer"} <= set(private)
