"""`AmuletLLM`: a LangChain completion model, prompt in and text out, with a preference."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any, cast

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import LangSmithParams
from langchain_core.language_models.llms import BaseLLM, get_prompts
from langchain_core.outputs import Generation, GenerationChunk, LLMResult
from langchain_core.prompt_values import PromptValue
from langchain_core.runnables import RunnableConfig
from pydantic import Field

from amulet.reply import Reply
from amulet.request import Request
from amulet_integrations._preference import Chosen
from amulet_integrations.langchain import replies
from amulet_integrations.langchain.calls import AmuletCalls, overflow_told
from amulet_integrations.langchain.options import LLM_OPTIONS, refuse_unknown

TRACING = ("tags", "metadata", "run_name", "run_id")


class AmuletLLM(AmuletCalls, BaseLLM):
    """Continues raw prompts, without a chat template; for instruct models prefer `ChatAmulet`.

    A preference comes from the nearest of: the call, `config["configurable"]`, the user, the
    constructor. It precedes the prompt, whatever the placement: raw text has no turns.

    >>> llm = AmuletLLM(model="Qwen/Qwen3-0.6B-Base", preference="Rhyme.", max_tokens=40)
    >>> llm.invoke("The sea is")
    """

    # Of the call that a copy of this object answers: LangChain's cache sees an LLM's own
    # parameters, but not the keywords of a call.
    call: dict[str, Any] = Field(default_factory=dict, repr=False)

    def generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        callbacks: Any = None,
        **kwargs: Any,
    ) -> LLMResult:
        """Continue many prompts in shared forward passes."""
        model, tracing = self._for_call(kwargs)
        return super(AmuletLLM, model).generate(prompts, stop, callbacks, **tracing)

    async def agenerate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        callbacks: Any = None,
        **kwargs: Any,
    ) -> LLMResult:
        """See `generate`."""
        model, tracing = self._for_call(kwargs)
        return await super(AmuletLLM, model).agenerate(prompts, stop, callbacks, **tracing)

    def _generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        requests, chosen, choices = self._requests(prompts, stop, kwargs)
        return self._result(self._replies(requests), chosen, choices)

    async def _agenerate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        requests, chosen, choices = self._requests(prompts, stop, kwargs)
        return self._result(await self._areplies(requests), chosen, choices)

    def _stream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[GenerationChunk]:
        (request,), chosen, _ = self._requests([prompt], stop, kwargs, streaming=True)
        begun = self._begun_earlier(request)
        with overflow_told(), begun or self.engine.start(request) as stream:
            for event in filter(replies.says_something, stream.events()):
                piece = replies.text_chunk(event)
                if run_manager is not None:
                    run_manager.on_llm_new_token(piece.text, chunk=piece)
                yield piece
            info = replies.llm_metadata(stream.reply, str(self.model), chosen)
            yield GenerationChunk(text="", generation_info=info)

    async def _astream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[GenerationChunk]:
        (request,), chosen, _ = self._requests([prompt], stop, kwargs, streaming=True)
        with overflow_told():
            async with self.engine.astart(request) as stream:
                async for event in stream.events():
                    if not replies.says_something(event):
                        continue
                    piece = replies.text_chunk(event)
                    if run_manager is not None:
                        await run_manager.on_llm_new_token(piece.text, chunk=piece)
                    yield piece
                info = replies.llm_metadata(stream.reply, str(self.model), chosen)
                yield GenerationChunk(text="", generation_info=info)

    def _requests(
        self,
        prompts: Sequence[str],
        stop: list[str] | None,
        kwargs: Mapping[str, Any],
        streaming: bool = False,
    ) -> tuple[list[Request], Chosen, int]:
        options = self.settled(None, {**self.call, **kwargs})
        refuse_unknown(options, LLM_OPTIONS, "The call")
        choices, chosen = self._choices(options, streaming), options["chosen"]
        fields = self._request_fields(options, stop, chosen)
        requests = [
            request
            for prompt in prompts
            for request in self._each_choice(Request(prompt=prompt, **fields), choices)
        ]
        return requests, chosen, choices

    def _asked(self, prompt: PromptValue, stop: Any, kwargs: dict[str, Any]) -> Sequence[Request]:
        model, _ = self._for_call(kwargs)
        params = {**model._identifying_params, "_type": model._llm_type, "stop": stop}
        cached, _, _, _ = get_prompts(params, [text := prompt.to_string()], self.cache)
        return [] if cached else model._requests([text], stop, {})[0]

    def _result(self, answers: Sequence[Any], chosen: Chosen, choices: int) -> LLMResult:
        model = str(self.model)
        generations = [replies.text_generation(reply, model, chosen) for reply in answers]
        return LLMResult(
            generations=[
                list[Generation](generations[start : start + choices])
                for start in range(0, len(generations), choices)
            ],
            llm_output={"model_name": model, "token_usage": _total(answers)},
        )

    def _for_call(self, kwargs: Mapping[str, Any]) -> tuple[AmuletLLM, dict[str, Any]]:
        call = dict(kwargs)
        tracing = {name: call.pop(name) for name in TRACING if name in call}
        config: RunnableConfig = {"configurable": call.pop("configurable", {})}
        settled = self.settled(config, call)
        refuse_unknown(settled, LLM_OPTIONS, "The call")
        return self.model_copy(update={"call": settled}), tracing

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=stop, **kwargs)
        traced = self._traced(stop, {**self.call, **kwargs})
        return cast("LangSmithParams", {**params, **traced})

    @property
    def _llm_type(self) -> str:
        return "amulet"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return {**super()._identifying_params, "call": self.call}


def _total(answers: Sequence[Reply]) -> dict[str, int]:
    return {
        "prompt_tokens": sum(reply.usage.prompt_tokens for reply in answers),
        "completion_tokens": sum(reply.usage.completion_tokens for reply in answers),
        "total_tokens": sum(reply.usage.total_tokens for reply in answers),
        "base_prompt_tokens": sum(reply.usage.base_prompt_tokens for reply in answers),
    }
