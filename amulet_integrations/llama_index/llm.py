"""`AmuletLLM`: a local model for LlamaIndex that steers answers towards each user's preference."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Sequence
from typing import Any, TypeVar

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    ToolCallBlock,
)
from llama_index.core.instrumentation.events.llm import (
    LLMStructuredPredictEndEvent,
    LLMStructuredPredictInProgressEvent,
    LLMStructuredPredictStartEvent,
)
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.llm import ToolSelection
from llama_index.core.prompts import BasePromptTemplate, PromptTemplate
from llama_index.core.tools.types import BaseTool
from llama_index.core.types import PydanticProgramMode
from llama_index_instrumentation import get_dispatcher
from pydantic import BaseModel

from amulet.errors import AmuletError, DecodeError, RequestError
from amulet.grammar import closed
from amulet_integrations.llama_index import options, streams, structured
from amulet_integrations.llama_index.messages import to_chat_response, to_completion_response
from amulet_integrations.llama_index.settings import AmuletSettings
from amulet_integrations.llama_index.stage import reads_calls_alone

Model = TypeVar("Model", bound=BaseModel)

dispatcher = get_dispatcher(__name__)


class AmuletLLM(AmuletSettings):
    """A local model whose answers follow a preference; its internal calls stay plain.

    Every method takes, per call: `preference`, `strength`, `floor`, `placement`, `focus`,
    `loop_guard`; `max_tokens` (also `max_new_tokens`), `temperature`, `top_p`, `top_k`, `min_p`,
    `repetition_penalty`, `stop`, `seed`; `tools`, `tool_choice`, `parallel_tool_calls`,
    `tools_prompt`; `grammar`, `steer_grammar`, `trace`, `top_logprobs`, `logits_processor`,
    `template_options`, `enable_thinking`. Anything else is refused.

    Args:
        model: a hub id, a folder, or "embedded"; or
        amulet: a loaded `Amulet`. Two objects that name one model share its weights.
        dtype, device, device_map, model_kwargs: for loading; as for `Amulet.from_pretrained`.
        preference, strength, floor, placement, focus, loop_guard: settings for calls where neither
            the call nor the conversation nor the user sets them; see `amulet.Steering`. In raw
            text (a model without a chat template, `messages_to_prompt`) a preference precedes the
            prompt, whatever the placement.
        max_tokens, ..., seed: defaults for the calls; see `amulet.Request`.
        tools_prompt: "fallback" describes tools in the system message, if the chat template does
            not support tools or its call syntax can't be parsed; without it such a model is not a
            function calling model.
        system_prompt, messages_to_prompt, completion_to_prompt, callback_manager, ...: as for
            every LlamaIndex LLM. The model's own chat template is used unless you give
            `messages_to_prompt` or `completion_to_prompt`.

    Raises:
        RequestError: an option is unknown or out of range.
        ModelError: the model can't be loaded.

    >>> Settings.llm = AmuletLLM.embedded(preference="Answer in one short sentence.")
    """

    @classmethod
    def class_name(cls) -> str:
        """The name that LlamaIndex writes into a serialised component."""
        return "AmuletLLM"

    # --- chat and complete

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        plan = self._plan_chat(messages, kwargs)
        return to_chat_response(streams.read(self.amulet, plan), plan.raw)

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        plan = self._plan_chat(messages, kwargs)
        return streams.chat_responses(streams.start(self.amulet, plan), plan.raw)

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        plan = self._plan_chat(messages, kwargs)
        return to_chat_response(await streams.aread(self.amulet, plan), plan.raw)

    @llm_chat_callback()
    async def astream_chat(
        self, messages: Sequence[ChatMessage], **kwargs: Any
    ) -> ChatResponseAsyncGen:
        plan = self._plan_chat(messages, kwargs)
        return streams.achat_responses(streams.astart(self.amulet, plan), plan.raw)

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        plan = self._plan_complete(prompt, formatted, kwargs)
        return to_completion_response(streams.read(self.amulet, plan), plan.raw)

    @llm_completion_callback()
    def stream_complete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponseGen:
        plan = self._plan_complete(prompt, formatted, kwargs)
        return streams.completion_responses(streams.start(self.amulet, plan), plan.raw)

    @llm_completion_callback()
    async def acomplete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponse:
        plan = self._plan_complete(prompt, formatted, kwargs)
        return to_completion_response(await streams.aread(self.amulet, plan), plan.raw)

    @llm_completion_callback()
    async def astream_complete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponseAsyncGen:
        plan = self._plan_complete(prompt, formatted, kwargs)
        return streams.acompletion_responses(streams.astart(self.amulet, plan), plan.raw)

    # --- structured prediction

    def structured_predict(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Model:
        """Return an object of a pydantic class; the class's schema is the answer's grammar."""
        if self.pydantic_program_mode != PydanticProgramMode.DEFAULT:
            otherwise: Model = super().structured_predict(
                output_cls, prompt, llm_kwargs, **prompt_args
            )
            return otherwise
        dispatcher.event(_started(output_cls, prompt, prompt_args))
        messages, kwargs = self._structured(output_cls, prompt, llm_kwargs, prompt_args)
        result: Model = structured.parsed(output_cls, self.chat(messages, **kwargs))
        dispatcher.event(LLMStructuredPredictEndEvent(output=result))
        return result

    async def astructured_predict(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Model:
        """`structured_predict` for asyncio."""
        if self.pydantic_program_mode != PydanticProgramMode.DEFAULT:
            otherwise: Model = await super().astructured_predict(
                output_cls, prompt, llm_kwargs, **prompt_args
            )
            return otherwise
        dispatcher.event(_started(output_cls, prompt, prompt_args))
        messages, kwargs = self._structured(output_cls, prompt, llm_kwargs, prompt_args)
        result: Model = structured.parsed(output_cls, await self.achat(messages, **kwargs))
        dispatcher.event(LLMStructuredPredictEndEvent(output=result))
        return result

    def stream_structured_predict(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Generator[Any, None, None]:
        """`structured_predict`, giving the object as far as it is known each time it grows."""
        if self.pydantic_program_mode != PydanticProgramMode.DEFAULT:
            yield from super().stream_structured_predict(
                output_cls, prompt, llm_kwargs, **prompt_args
            )
            return
        dispatcher.event(_started(output_cls, prompt, prompt_args))
        messages, kwargs = self._structured(output_cls, prompt, llm_kwargs, prompt_args)
        known = None
        for known in structured.partial_objects(output_cls, self.stream_chat(messages, **kwargs)):
            dispatcher.event(LLMStructuredPredictInProgressEvent(output=known))
            yield known
        dispatcher.event(LLMStructuredPredictEndEvent(output=known))

    async def astream_structured_predict(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> AsyncGenerator[Any, None]:
        """`stream_structured_predict` for asyncio."""
        if self.pydantic_program_mode != PydanticProgramMode.DEFAULT:
            otherwise: AsyncGenerator[Any, None] = await super().astream_structured_predict(
                output_cls, prompt, llm_kwargs, **prompt_args
            )
            return otherwise

        async def objects() -> AsyncGenerator[Any, None]:
            dispatcher.event(_started(output_cls, prompt, prompt_args))
            messages, kwargs = self._structured(output_cls, prompt, llm_kwargs, prompt_args)
            responses = await self.astream_chat(messages, **kwargs)
            known = None
            async for known in structured.apartial_objects(output_cls, responses):
                dispatcher.event(LLMStructuredPredictInProgressEvent(output=known))
                yield known
            dispatcher.event(LLMStructuredPredictEndEvent(output=known))

        return objects()

    def _structured(
        self,
        output_cls: type[BaseModel],
        prompt: BasePromptTemplate,
        llm_kwargs: dict[str, Any] | None,
        prompt_args: dict[str, Any],
    ) -> tuple[list[ChatMessage], dict[str, Any]]:
        messages = prompt.format_messages(llm=self, **prompt_args)
        if self.output_parser is not None:
            messages = self.output_parser.format_messages(messages)
        kwargs = structured.call_options(output_cls, llm_kwargs)
        return structured.with_schema(messages, output_cls), kwargs

    # --- tools

    def _prepare_chat_with_tools(
        self,
        tools: Sequence[BaseTool],
        user_msg: str | ChatMessage | None = None,
        chat_history: list[ChatMessage] | None = None,
        verbose: bool = False,
        allow_parallel_tool_calls: bool = False,
        tool_required: bool = False,
        tool_choice: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        messages = list(chat_history or [])
        if user_msg is not None:
            if isinstance(user_msg, str):
                user_msg = ChatMessage(role="user", content=user_msg)
            messages.append(user_msg)
        if not tools:
            return {"messages": messages, **kwargs}
        # LlamaIndex's program for objects has no use for prose, and doesn't say so when streaming.
        required = tool_required or reads_calls_alone()
        return {
            "messages": messages,
            "tools": [
                closed(tool.metadata.to_openai_tool(skip_length_check=True)) for tool in tools
            ],
            "tool_choice": options.tool_choice(tool_choice, required),
            "parallel_tool_calls": allow_parallel_tool_calls,
            **kwargs,
        }

    def _validate_chat_with_tools_response(
        self,
        response: ChatResponse,
        tools: Sequence[BaseTool],
        allow_parallel_tool_calls: bool = False,
        **kwargs: Any,
    ) -> ChatResponse:
        calls = [block for block in response.message.blocks if isinstance(block, ToolCallBlock)]
        if not allow_parallel_tool_calls and len(calls) > 1:
            message = response.message
            message.blocks = [block for block in message.blocks if block not in calls[1:]]
            message.additional_kwargs["tool_calls"] = message.additional_kwargs["tool_calls"][:1]
        return response

    def get_tool_calls_from_response(
        self, response: ChatResponse, error_on_no_tool_call: bool = True, **kwargs: Any
    ) -> list[ToolSelection]:
        """Return the calls of a response.

        Raises:
            RequestError: there is none, and `error_on_no_tool_call`.
            DecodeError: there is none that can be read, and `error_on_no_tool_call`.
        """
        calls = [block for block in response.message.blocks if isinstance(block, ToolCallBlock)]
        if not calls and error_on_no_tool_call:
            raise _no_call(response)
        return [
            ToolSelection(
                tool_id=call.tool_call_id or "",
                tool_name=call.tool_name,
                tool_kwargs=call.tool_kwargs if isinstance(call.tool_kwargs, dict) else {},
            )
            for call in calls
        ]


def _no_call(response: ChatResponse) -> AmuletError:
    raw = response.raw if isinstance(response.raw, dict) else {}
    for call in raw.get("invalid_tool_calls", []):
        return DecodeError(
            f"The call of {call['name']} can't be read: {call['error']} (finish reason "
            f"{raw.get('finish_reason')!r}): {call['raw']!r}. If it was cut off, give a larger "
            "max_tokens, or bound the lengths in the tool's schema."
        )
    return RequestError(
        f"The model called no tool; it said {response.message.content!r}. "
        "Give tool_required=True to make it call one."
    )


def _started(
    output_cls: type[BaseModel], prompt: BasePromptTemplate, prompt_args: dict[str, Any]
) -> LLMStructuredPredictStartEvent:
    return LLMStructuredPredictStartEvent(
        output_cls=output_cls, template=prompt, template_args=prompt_args
    )
