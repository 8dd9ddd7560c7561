"""Bindings of a model that keep its options, config and preference: `bind`, `with_config`, ...

LangChain's own bindings delegate `bind_tools`, `generate` and other methods to the bare model and
lose the bound keywords and config.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, cast

from langchain_core.language_models import BaseChatModel, BaseLanguageModel, LanguageModelInput
from langchain_core.runnables import Runnable, RunnableBinding, RunnableConfig
from langchain_core.runnables.base import RunnableBindingBase, RunnableSerializable
from langchain_core.runnables.config import ensure_config, merge_configs
from langchain_core.runnables.configurable import DynamicRunnable, RunnableConfigurableAlternatives
from langchain_core.runnables.fallbacks import RunnableWithFallbacks

from amulet.errors import RequestError
from amulet_integrations.langchain.options import AmuletOptions, checked, normal
from amulet_integrations.langchain.runs import in_its_run
from amulet_integrations.langchain.structured import structured_output
from amulet_integrations.langchain.tools import bound_tools


def check_config(name: str, config: object) -> None:
    """Raise `RequestError` if what stands in the place of a call's config is none."""
    several = isinstance(config, Sequence) and "batch" in name  # one for each input
    for one in cast("Sequence[object]", config) if several else [config]:
        if not isinstance(one, Mapping | None):
            raise RequestError(
                f"{name}: config is a {type(one).__name__}: expected a dict. A preference is "
                f"given by name: {name}(..., preference=...)."
            )


def _call(name: str) -> Any:
    """Return a method that calls a Runnable with the arguments of `_asked_as`."""

    @wraps(getattr(Runnable, name), updated=())  # without the mark of an abstract method
    def call(self: Composable, input: Any, config: Any = None, **kwargs: Any) -> Any:
        check_config(name, config)
        input, config, kwargs = self._asked_as(name, input, config, kwargs)
        return in_its_run(getattr(super(Composable, self), name)(input, config, **kwargs))

    return call


def _composing(name: str) -> Any:
    """Return a composing method whose result is a binding."""

    @wraps(getattr(Runnable, name, None) or getattr(RunnableSerializable, name), updated=())
    def compose(self: Composable, *args: Any, **options: Any) -> Any:
        return self._composed(getattr(super(Composable, self), name)(*args, **options))

    return compose


class Composable(RunnableSerializable[Any, Any]):
    """The methods by which models and their bindings are called and composed.

    The result of a composition is an `AmuletBinding`, so that the next one still knows the model. A
    stream belongs to the run that requests it.
    """

    def _composed(self, runnable: Any) -> Any:
        """Return a composition of this model as a binding."""
        raise NotImplementedError

    def _asked_as(
        self, name: str, input: Any, config: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, Any, dict[str, Any]]:
        """Return the arguments for LangChain's own method: input, config and keywords."""
        raise NotImplementedError

    invoke, ainvoke = _call("invoke"), _call("ainvoke")
    stream, astream = _call("stream"), _call("astream")
    transform, atransform = _call("transform"), _call("atransform")
    batch, abatch = _call("batch"), _call("abatch")
    batch_as_completed = _call("batch_as_completed")
    abatch_as_completed = _call("abatch_as_completed")
    stream_events, astream_events = _call("stream_events"), _call("astream_events")
    astream_log = _call("astream_log")

    with_retry, with_fallbacks = _composing("with_retry"), _composing("with_fallbacks")
    with_alisteners = _composing("with_alisteners")
    configurable_fields = _composing("configurable_fields")
    configurable_alternatives = _composing("configurable_alternatives")


def _generate(name: str) -> Any:
    """Return a method that LangChain's bindings lack, applied with the bound arguments."""

    @wraps(getattr(BaseLanguageModel, name, None) or getattr(BaseChatModel, name), updated=())
    def generate(
        self: AmuletBinding, prompts: Any, stop: Any = None, callbacks: Any = None, **kwargs: Any
    ) -> Any:
        model, options = self._for_generate(stop, callbacks, kwargs)
        return getattr(model, name)(prompts, **options)

    return generate


class AmuletBinding(Composable, RunnableBinding[Any, Any]):
    """A model, or a composition of one, with keywords and config for every call."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{**options, "kwargs": normal(options.get("kwargs") or {})})

    @classmethod
    def lc_id(cls) -> list[str]:
        """Return the id of LangChain's class, so that `dumpd` writes this one like it."""
        return [*cls.get_lc_namespace(), RunnableBinding.__name__]

    def bind(self, **kwargs: Any) -> Any:
        """Bind options to every call, overriding those bound before."""
        return super().bind(**normal(kwargs))

    def with_config(self, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """Bind config; the settings in `configurable` are added to those bound before."""
        given = {**(config or {}), **kwargs}
        if "configurable" in given:
            earlier = self.config.get("configurable", {})
            given["configurable"] = {**earlier, **(given["configurable"] or {})}
        return super().with_config(cast("RunnableConfig", given))

    def configurable_fields(self, **fields: Any) -> Any:
        """Make fields of the model configurable; see `Runnable.configurable_fields`."""
        return self._over(_inside(self.bound, lambda one: one.configurable_fields(**fields)))

    def with_preference(self, preference: Any = None, **settings: Any) -> Any:
        """See `ChatAmulet.with_preference`."""
        given = checked("with_preference", preference, **settings)
        several = _each(self.bound, lambda one: one.with_preference(preference, **settings))
        kept = {name: self.kwargs[name] for name in self.kwargs if name not in given}
        if "preference" in given:
            kept.pop("preference_source", None)
        if several is not None:
            return self._over(several, kept)
        return self._over(self.bound, {**kept, **given})

    generate, agenerate = _generate("generate"), _generate("agenerate")
    generate_prompt, agenerate_prompt = _generate("generate_prompt"), _generate("agenerate_prompt")

    def _for_generate(
        self, stop: list[str] | None, callbacks: Any, kwargs: Mapping[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        model, config, bound = unbound(self)
        if not isinstance(model, AmuletOptions):
            raise RequestError(f"generate: a {type(model).__name__} is bound; call invoke().")
        config = merge_configs(config, {"callbacks": callbacks} if callbacks else None)
        options = {**bound, **normal(kwargs)}
        if stop is not None:
            options["stop"] = stop
        for name in ("callbacks", "tags", "metadata", "run_name", "configurable"):
            if (value := config.get(name)) and name not in options:
                options[name] = value
        return model, options

    def _asked_as(
        self, name: str, input: Any, config: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, Any, dict[str, Any]]:
        # A call's keywords are merged with the bound ones by name, so both need the same spelling;
        # and a bound `configurable` would hide all of the run's.
        if isinstance(config, list | tuple):
            return input, [self._in_run(one) for one in config], normal(kwargs)
        return input, self._in_run(config), normal(kwargs)

    def _in_run(self, config: RunnableConfig | None) -> RunnableConfig | None:
        """Return a call's config, completed by that of the surrounding run."""
        bound = self.config.get("configurable") or {}
        own = (config or {}).get("configurable") or {}
        around = ensure_config().get("configurable") or {}
        if not (around and (bound or own)):
            return config
        return cast(
            "RunnableConfig", {**(config or {}), "configurable": {**around, **bound, **own}}
        )

    def _composed(self, runnable: Any) -> Any:
        return type(self)(bound=runnable)

    def _over(self, bound: Any, kwargs: Mapping[str, Any] | None = None) -> Any:
        kept: Any = {name: getattr(self, name) for name in RunnableBinding.model_fields}
        return type(self)(
            **{**kept, "bound": bound, "kwargs": self.kwargs if kwargs is None else kwargs}
        )


class ChatBinding(AmuletBinding):
    """A chat model, or a composition of one, with keywords and config for every call."""

    def bind_tools(self, tools: Any, **options: Any) -> ChatBinding:
        """See `ChatAmulet.bind_tools`."""
        several = _each(self.bound, lambda one: one.bind_tools(tools, **options))
        if several is not None:
            return cast("ChatBinding", self._over(several))
        return cast("ChatBinding", self.bind(**bound_tools(tools, **options)))

    def with_structured_output(
        self, schema: Any = None, **options: Any
    ) -> Runnable[LanguageModelInput, Any]:
        """See `ChatAmulet.with_structured_output`."""
        several = _each(self.bound, lambda one: one.with_structured_output(schema, **options))
        if several is not None:
            return cast("Runnable[LanguageModelInput, Any]", self._over(several))
        return structured_output(self, schema, **options)


def unbound(runnable: Any) -> tuple[Any, RunnableConfig, dict[str, Any]]:
    """Return the model inside a composition, with its bound config and keywords.

    If there are alternatives, it is the one that the config chooses, or the first.
    """
    config: RunnableConfig | None = None  # not {}, which to LangChain means the surrounding run's
    kwargs: dict[str, Any] = {}
    while True:
        if isinstance(runnable, RunnableBindingBase):
            made = [make(config or {}) for make in runnable.config_factories]
            config = merge_configs(runnable.config, *made, config)
            kwargs = {**runnable.kwargs, **kwargs}
            runnable = runnable.bound
        elif isinstance(runnable, DynamicRunnable):
            runnable, config = runnable.prepare(config)
        elif isinstance(runnable, RunnableWithFallbacks):
            runnable = runnable.runnable
        else:
            return runnable, config or {}, kwargs


def _each(runnable: Any, change: Callable[[Any], Any]) -> Any:
    """Return alternatives with each model changed, or None if there are no alternatives.

    Each model has its own form of tools and of structured output.
    """
    if isinstance(runnable, RunnableConfigurableAlternatives):
        others = {name: _later(other, change) for name, other in runnable.alternatives.items()}
        changed = {"default": change(runnable.default), "alternatives": others}
        return runnable.model_copy(update=changed)
    if isinstance(runnable, RunnableWithFallbacks):
        others = [change(other) for other in runnable.fallbacks]  # type: ignore[assignment]
        changed = {"runnable": change(runnable.runnable), "fallbacks": others}
        return runnable.model_copy(update=changed)
    if isinstance(runnable, RunnableBindingBase):
        inner = _each(runnable.bound, change)
        return None if inner is None else runnable.model_copy(update={"bound": inner})
    return None


def _later(runnable: Any, change: Callable[[Any], Any]) -> Any:
    """Change an alternative, which may be a function that creates it."""
    return change(runnable) if isinstance(runnable, Runnable) else lambda: change(runnable())


def _inside(runnable: Any, change: Callable[[Any], Any]) -> Any:
    """Change the model inside a wrapper with fields of its own, such as a retry."""
    if isinstance(runnable, RunnableBindingBase) and not isinstance(runnable, AmuletBinding):
        return runnable.model_copy(update={"bound": _inside(runnable.bound, change)})
    if isinstance(runnable, RunnableWithFallbacks):
        return runnable.model_copy(update={"runnable": _inside(runnable.runnable, change)})
    return change(runnable)
