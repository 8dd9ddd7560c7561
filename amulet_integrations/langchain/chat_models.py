"""`ChatAmulet`: a LangChain chat model that answers each conversation in its own preferred way."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any, Literal, cast

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import LangSmithParams, LanguageModelInput, ModelProfile
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGenerationChunk, ChatResult, LLMResult
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.tools import BaseTool
from pydantic import Field

from amulet.errors import RequestError
from amulet.grammar import Grammar, closed
from amulet.request import Reply, Request
from amulet_integrations._preference import SETTINGS, Chosen
from amulet_integrations.langchain import replies
from amulet_integrations.langchain.binding import AmuletBinding
from amulet_integrations.langchain.messages import stated_settings, to_chat
from amulet_integrations.langchain.options import (
    CHAT,
    OUTPUT,
    PASSED_BY_LANGCHAIN,
    SAMPLING,
    AmuletOptions,
    given,
    refuse_unknown,
    together,
)
from amulet_integrations.langchain.structured import structured_output
from amulet_integrations.langchain.tools import normal_choice, response_schema, tool_schemas

CALL_OPTIONS = (
    *(*SETTINGS, "preference_source", "max_new_tokens"),
    *(*SAMPLING, *OUTPUT, *CHAT, *PASSED_BY_LANGCHAIN),
)


class ChatAmulet(AmuletOptions, BaseChatModel):
    """A chat model for chains, agents and graphs, steered to a preference while it decodes.

    A preference comes from the nearest of: the call (`invoke(..., preference=...)`, `bind`,
    `with_preference`), the conversation (`config["configurable"]["preference"]`, or a message of
    the history that states it), the user (`PreferenceMiddleware`), the constructor. None inherits,
    "" is off. Tool calls, JSON and thinking are never steered.

    Args:
        tools_prompt: "template" gives tools to the chat template and is an error where it knows
            none; "fallback" describes them in the system message for such a template.
        template_options: variables of the chat template, such as `enable_thinking`.
        streaming: let `invoke` too call back with every token.
            The others are those of `AmuletOptions`.

    >>> chat = ChatAmulet(model="Qwen/Qwen3-0.6B", preference="Answer in one short sentence.")
    >>> chat.invoke("What is a monad?").content
    """

    tools_prompt: Literal["template", "fallback"] = "template"
    template_options: dict[str, Any] = Field(default_factory=dict)
    streaming: bool = False

    # --- Runnable: the config's preference becomes part of the call

    def invoke(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AIMessage:
        return super().invoke(input, config, stop=stop, **self._folded(config, kwargs))

    async def ainvoke(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AIMessage:
        return await super().ainvoke(input, config, stop=stop, **self._folded(config, kwargs))

    def stream(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> Iterator[AIMessageChunk]:
        yield from super().stream(input, config, stop=stop, **self._folded(config, kwargs))

    async def astream(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[AIMessageChunk]:
        chunks = super().astream(input, config, stop=stop, **self._folded(config, kwargs))
        async for chunk in chunks:
            yield chunk

    def stream_events(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any
    ) -> Any:
        """Stream events; version "v3" does not pass through `stream`, so it is folded here."""
        if kwargs.get("version") == "v3":
            kwargs = self._folded(config, kwargs)
        return super().stream_events(input, config, **kwargs)

    def astream_events(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any
    ) -> Any:
        """See `stream_events`."""
        if kwargs.get("version") == "v3":
            kwargs = self._folded(config, kwargs)
        return super().astream_events(input, config, **kwargs)

    def batch(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[AIMessage]:
        """Answer many inputs in shared forward passes; each keeps its config, callbacks, cache."""
        configs = together(config, len(inputs))
        return super().batch(inputs, configs, return_exceptions=return_exceptions, **kwargs)

    def generate(
        self,
        messages: list[list[BaseMessage]],
        stop: list[str] | None = None,
        callbacks: Any = None,
        **kwargs: Any,
    ) -> LLMResult:
        """Answer many chats in shared forward passes."""
        kwargs = self._folded(None, kwargs)
        if len(messages) < 2:
            return super().generate(messages, stop, callbacks, **kwargs)
        run_id = kwargs.pop("run_id", None)
        generate = super().generate

        def one(position: int) -> LLMResult:
            own = {"run_id": run_id} if position == 0 else {}
            return generate([messages[position]], stop, callbacks, **own, **kwargs)

        with ThreadPoolExecutor(max_workers=len(messages)) as threads:
            tasks = [threads.submit(copy_context().run, one, i) for i in range(len(messages))]
            results = [task.result() for task in tasks]
        return LLMResult(
            generations=[result.generations[0] for result in results],
            llm_output=self._combine_llm_outputs([result.llm_output for result in results]),
            run=[info for result in results for info in result.run or []],
        )

    async def agenerate(
        self,
        messages: list[list[BaseMessage]],
        stop: list[str] | None = None,
        callbacks: Any = None,
        **kwargs: Any,
    ) -> LLMResult:
        """Answer many chats in shared forward passes."""
        return await super().agenerate(messages, stop, callbacks, **self._folded(None, kwargs))

    def bind(self, **kwargs: Any) -> AmuletBinding:
        """Bind options to every call; `bind_tools` and `with_structured_output` keep them."""
        return AmuletBinding(bound=self, kwargs=kwargs, config={})

    def bind_tools(
        self,
        tools: Sequence[Mapping[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: Any = None,
        **kwargs: Any,
    ) -> AmuletBinding:
        """Give the model tools.

        Args:
            tools: functions, Pydantic classes, `BaseTool`s or OpenAI's dicts.
            tool_choice: "auto", "any", "none", a tool's name, True for "any", or a dict that names
                a tool. A forced choice is enforced by a grammar.
            kwargs: further options of every call, such as `parallel_tool_calls` or `preference`.
        """
        schemas = tool_schemas(tools)
        kwargs["tools"] = schemas
        if (choice := normal_choice(tool_choice, schemas)) is not None:
            kwargs["tool_choice"] = choice
        refuse_unknown(kwargs, CALL_OPTIONS, "bind_tools")
        return self.bind(**kwargs)

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
        return self._result(self.engine.batch(requests), chosen)

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        requests, chosen = self._requests(messages, stop, kwargs)
        return self._result(await self.engine.abatch(requests), chosen)

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        requests, chosen = self._requests(messages, stop, kwargs, streaming=True)
        with self.engine.start(requests[0]) as stream:
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
        stream = self.engine.astart(requests[0])
        try:
            async for event in stream.events():
                if replies.says_something(event):
                    yield replies.chunk(event, self.output_version)
            yield replies.last_chunk(stream.reply, str(self.model), chosen)
        finally:
            await stream.aclose()

    def _requests(
        self,
        messages: Sequence[BaseMessage],
        stop: list[str] | None,
        kwargs: Mapping[str, Any],
        streaming: bool = False,
    ) -> tuple[list[Request], Chosen]:
        refuse_unknown(kwargs, CALL_OPTIONS, "The call")
        choices = self._choices(kwargs)
        if streaming and choices > 1:
            raise RequestError(f"n={choices}: a stream has one answer; use generate().")
        chosen = self.chosen(kwargs, stated_settings(messages))
        fields = self._request_fields(kwargs, stop, chosen)
        fields |= self._tool_fields(kwargs)
        if options := self._template_options(kwargs):
            fields["template_options"] = options
        fields["messages"] = to_chat(messages)
        seeds = self._seeds(fields, choices)
        return [Request(**{**fields, **seed}) for seed in seeds], chosen

    def _tool_fields(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        call = given(kwargs)
        # Without tools too: the history may hold calls and results that the template can't show.
        fields: dict[str, Any] = {"tools_prompt": self.tools_prompt}
        if tools := call.get("tools"):
            fields["tools"] = tool_schemas(tools)
            choice = normal_choice(call.get("tool_choice"), fields["tools"])
            if choice is not None:
                fields["tool_choice"] = choice
            if "parallel_tool_calls" in call:
                fields["parallel_tool_calls"] = call["parallel_tool_calls"]
        if "response_format" in call:
            schema = response_schema(call["response_format"])
            # Agents send both: a forced call leaves no text to give a form.
            if schema is not None and fields.get("tool_choice", "auto") in ("auto", "none"):
                grammar = Grammar.json_schema(closed(schema)) if schema else Grammar.json_object()
                fields["grammar"] = grammar
        if "steer_grammar" in call:
            fields["steer_grammar"] = call["steer_grammar"]
        return fields

    def _template_options(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        call = given(kwargs)
        options = {**self.template_options, **call.get("template_options", {})}
        if "enable_thinking" in call:
            options["enable_thinking"] = call["enable_thinking"]
        return options

    def _result(self, answers: Sequence[Any], chosen: Chosen) -> ChatResult:
        given_answers = cast("Sequence[Reply]", answers)
        model = str(self.model)
        return ChatResult(
            generations=[replies.generation(reply, model, chosen) for reply in given_answers]
        )

    # --- what LangChain asks about the model

    def _should_stream(self, **kwargs: Any) -> bool:
        several = self._choices(kwargs) > 1 and not kwargs.get("stream")  # stream() itself refuses
        return not several and super()._should_stream(**kwargs)

    def _should_use_protocol_streaming(self, **kwargs: Any) -> bool:
        return self._choices(kwargs) == 1 and super()._should_use_protocol_streaming(**kwargs)

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=stop, **kwargs)
        own = [self.stop] if isinstance(self.stop, str) else self.stop
        if stop is None and own:
            params["ls_stop"] = own
        return params

    @property
    def _llm_type(self) -> str:
        return "amulet-chat"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        chat = {"tools_prompt": self.tools_prompt, "template_options": self.template_options}
        return {**super()._identifying_params, **chat}

    def get_num_tokens_from_messages(
        self, messages: list[BaseMessage], tools: Sequence[Any] | None = None
    ) -> int:
        """Return how many tokens the chat has as the model's template writes it."""
        fields = self._tool_fields({"tools": tools})
        options = self._template_options({})
        return len(self.engine.encode_chat(to_chat(messages), template_options=options, **fields))

    def _resolve_model_profile(self) -> ModelProfile | None:
        template = str(getattr(self.engine.tokenizer, "chat_template", "") or "")
        profile: ModelProfile = {
            "text_inputs": True,
            "text_outputs": True,
            "image_inputs": False,
            "tool_calling": self.tools_prompt == "fallback" or "tools" in template,
            "structured_output": True,
            "reasoning_output": "<think>" in template,
        }
        if self.engine.window is not None:
            profile["max_input_tokens"] = self.engine.window
        return profile
