"""`ChatAmulet`: a LangChain chat model that steers each conversation towards its preference."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, cast

from langchain_core.caches import BaseCache
from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.globals import get_llm_cache
from langchain_core.language_models import LangSmithParams, LanguageModelInput, ModelProfile
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.load import dumps
from langchain_core.messages import BaseMessage
from langchain_core.outputs import ChatGenerationChunk, ChatResult, LLMResult
from langchain_core.prompt_values import ChatPromptValue, PromptValue
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.tools import BaseTool
from pydantic import Field

from amulet.grammar import Grammar
from amulet.request import Request
from amulet_integrations import _options
from amulet_integrations._preference import Chosen
from amulet_integrations.langchain import replies
from amulet_integrations.langchain.binding import ChatBinding
from amulet_integrations.langchain.calls import AmuletCalls, overflow_told
from amulet_integrations.langchain.messages import countable, to_chat
from amulet_integrations.langchain.options import CHAT_OPTIONS, given, refuse_unknown
from amulet_integrations.langchain.structured import structured_output
from amulet_integrations.langchain.tools import (
    bound_tools,
    normal_choice,
    response_schema,
    tool_schemas,
)


class ChatAmulet(AmuletCalls, BaseChatModel):
    """A chat model for chains, agents and graphs, steered to a preference while it decodes.

    A preference comes from the nearest of: the call (`invoke(..., preference=...)`, `bind`,
    `with_preference`), the conversation (`config["configurable"]["preference"]`, or a message of
    the history that states it), the user (`PreferenceMiddleware`), the constructor. None inherits,
    "" is off. Tool calls, JSON and thinking are never steered.

    Args:
        tools_prompt: "template" passes tools to the chat template, and is an error if it does not
            support tools; "fallback" then describes them in the system message.
        template_options: variables of the chat template, such as `enable_thinking`.
        streaming: True makes `invoke` call back with every token too; False makes `stream` return
            the answer in one piece.
            All other options are those of `AmuletOptions`.

    >>> chat = ChatAmulet(model="Qwen/Qwen3-0.6B", preference="Answer in one short sentence.")
    >>> chat.invoke("What is a monad?").content
    """

    tools_prompt: Literal["template", "fallback"] = "template"
    template_options: dict[str, Any] = Field(default_factory=dict)
    streaming: bool | None = None

    def generate(
        self,
        messages: list[list[BaseMessage]],
        stop: list[str] | None = None,
        callbacks: Any = None,
        **kwargs: Any,
    ) -> LLMResult:
        """Answer many chats in shared forward passes."""
        each, generate = self._each(messages, kwargs), super().generate

        def one(position: int) -> LLMResult:
            return generate([messages[position]], stop, callbacks, **each[position])

        def asked(position: int) -> Sequence[Request]:
            options = {k: value for k, value in each[position].items() if k in CHAT_OPTIONS}
            return self._asked(ChatPromptValue(messages=messages[position]), stop, options)

        count = len(messages)
        answered = sorted(self._together(count, count, one, asked), key=lambda pair: pair[0])
        return _joined([result for _, result in answered])

    async def agenerate(
        self,
        messages: list[list[BaseMessage]],
        stop: list[str] | None = None,
        callbacks: Any = None,
        **kwargs: Any,
    ) -> LLMResult:
        """Answer many chats in shared forward passes."""
        each, generate = self._each(messages, kwargs), super().agenerate
        pairs = zip(messages, each, strict=True)
        tasks = (generate([chat], stop, callbacks, **options) for chat, options in pairs)
        return _joined(await asyncio.gather(*tasks, return_exceptions=True))

    def _each(
        self, messages: list[list[BaseMessage]], kwargs: dict[str, Any]
    ) -> list[dict[str, Any]]:
        """Return the settled keywords of each chat; a binding's `configurable` comes along."""
        config: RunnableConfig = {"configurable": kwargs.pop("configurable", {})}
        run_ids = [kwargs.pop("run_id", None), *[None] * len(messages)]  # of the first chat
        pairs = zip(messages, run_ids, strict=False)
        return [{**self.settled(config, kwargs, chat), "run_id": id} for chat, id in pairs]

    def _composed(self, runnable: Any) -> ChatBinding:
        return ChatBinding(bound=runnable)

    def bind_tools(
        self,
        tools: Sequence[Mapping[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: Any = None,
        **kwargs: Any,
    ) -> ChatBinding:
        """Give the model tools.

        Args:
            tools: functions, Pydantic classes, `BaseTool`s or OpenAI's dicts.
            tool_choice: "auto", "any", "none", a tool's name, True for "any", or a dict that names
                a tool. A forced choice is enforced by a grammar.
            kwargs: further options of every call, such as `parallel_tool_calls` or `preference`.
        """
        options = bound_tools(tools, tool_choice=tool_choice, **kwargs)
        refuse_unknown(options, CHAT_OPTIONS, "bind_tools")
        return cast("ChatBinding", self.bind(**options))

    def with_structured_output(
        self, schema: dict[str, Any] | type | None = None, **kwargs: Any
    ) -> Runnable[LanguageModelInput, Any]:
        """Return a runnable whose answers have the schema; see `structured.structured_output`."""
        return structured_output(self, schema, **kwargs)

    # --- decoding

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        requests, chosen = self._requests(messages, stop, kwargs)
        return self._result(self._replies(requests), chosen)

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        requests, chosen = self._requests(messages, stop, kwargs)
        return self._result(await self._areplies(requests), chosen)

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        requests, chosen = self._requests(messages, stop, kwargs, streaming=True)
        begun = self._begun_earlier(requests[0])
        with overflow_told(), begun or self.engine.start(requests[0]) as stream:
            for event in stream.events():
                if replies.says_something(event):
                    yield replies.chunk(event, self.output_version)
            yield replies.last_chunk(stream.reply, str(self.model), chosen)

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        requests, chosen = self._requests(messages, stop, kwargs, streaming=True)
        with overflow_told():
            async with self.engine.astart(requests[0]) as stream:
                async for event in stream.events():
                    if replies.says_something(event):
                        yield replies.chunk(event, self.output_version)
                yield replies.last_chunk(stream.reply, str(self.model), chosen)

    def _requests(
        self,
        messages: Sequence[BaseMessage],
        stop: list[str] | None,
        kwargs: Mapping[str, Any],
        streaming: bool = False,
    ) -> tuple[list[Request], Chosen]:
        call = self.settled(None, kwargs, messages)
        refuse_unknown(call, CHAT_OPTIONS, "The call")
        choices, chosen = self._choices(call, streaming), call["chosen"]
        fields = self._request_fields(call, stop, chosen) | self._tool_fields(call)
        if options := self._template_options(call):
            fields["template_options"] = options
        fields["messages"] = to_chat(messages)
        return self._each_choice(Request(**fields), choices), chosen

    def _asked(self, prompt: PromptValue, stop: Any, kwargs: dict[str, Any]) -> Sequence[Request]:
        messages = prompt.to_messages()
        cache = self.cache if isinstance(self.cache, BaseCache) else get_llm_cache()
        if cache is not None and self.cache is not False:
            traced = ("ls_structured_output_format", "structured_output_format")
            seen = {name: kwargs[name] for name in kwargs if name not in traced}
            key = dumps([message.model_copy(update={"id": None}) for message in messages])
            if cache.lookup(key, self._get_llm_string(stop=stop, **seen)):
                return []
        return self._requests(messages, stop, kwargs)[0]

    def _tool_fields(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        call = given(kwargs)
        # Without tools too: the history may hold calls and results that the template can't show.
        fields: dict[str, Any] = {"tools_prompt": self.tools_prompt}
        tools = call.get("tools", ())
        choice = normal_choice(call.get("tool_choice"), tools)
        if choice is not None:
            fields["tool_choice"] = choice
        if tools:
            fields["tools"] = tools
            if "parallel_tool_calls" in call:
                fields["parallel_tool_calls"] = call["parallel_tool_calls"]
        if "response_format" in call:
            schema = response_schema(call["response_format"])
            # Agents send both: a forced call leaves no text to give a form.
            if schema is not None and fields.get("tool_choice", "auto") in ("auto", "none"):
                grammar = Grammar.json_like(schema) if schema else Grammar.json_object()
                fields["grammar"] = grammar
        if "steer_grammar" in call:
            fields["steer_grammar"] = call["steer_grammar"]
        return fields

    def _template_options(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        call = given(kwargs)
        own = _options.template_options(
            call.get("template_options", {}), call.get("enable_thinking")
        )
        return {**self.template_options, **own}

    def _result(self, answers: Sequence[Any], chosen: Chosen) -> ChatResult:
        model = str(self.model)
        return ChatResult(generations=[replies.generation(one, model, chosen) for one in answers])

    # --- what LangChain asks about the model

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=stop, **kwargs)
        return cast("LangSmithParams", {**params, **self._traced(stop, kwargs)})

    @property
    def _llm_type(self) -> str:
        return "amulet-chat"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        names = ("tools_prompt", "template_options", "output_version")
        return {**super()._identifying_params, **{name: getattr(self, name) for name in names}}

    def get_num_tokens_from_messages(
        self, messages: list[BaseMessage], tools: Sequence[Any] | None = None
    ) -> int:
        """Return how many tokens the chat has as the model's template writes it.

        Any part of a chat can be counted; videos and the like count for nothing.
        """
        fields = self._tool_fields({"tools": tool_schemas(tools or ())})
        options = self._template_options({})
        return self.engine.count_chat(countable(messages), template_options=options, **fields)

    def _resolve_model_profile(self) -> ModelProfile | None:
        template = str(getattr(self.engine.tokenizer, "chat_template", "") or "")
        profile: ModelProfile = {
            "text_inputs": True,
            "text_outputs": True,
            "image_inputs": self.engine.reads_images,
            "tool_calling": self.tools_prompt == "fallback" or "tools" in template,
            "structured_output": True,
            "reasoning_output": "<think>" in template,
        }
        if self.engine.window is not None:
            profile["max_input_tokens"] = self.engine.window
        return profile


def _joined(results: Sequence[Any]) -> LLMResult:
    """Return the results of several chats as one; the first error among them is raised."""
    for error in (result for result in results if isinstance(result, BaseException)):
        raise error
    return LLMResult(
        generations=[result.generations[0] for result in results],
        llm_output={},  # as LangChain's own for chat models
        run=[info for result in results for info in result.run or []],
    )
