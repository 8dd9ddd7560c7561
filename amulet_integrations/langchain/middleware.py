"""`PreferenceMiddleware` and `remember_preference`: agents that answer each user their own way."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Annotated, Any, Literal

from langchain.agents.middleware import AgentMiddleware, AgentState, ModelRequest, ModelResponse
from langchain.tools import ToolRuntime
from langchain_core.messages import ToolMessage
from langchain_core.runnables import ensure_config
from langchain_core.tools import BaseTool, StructuredTool, ToolException
from langgraph.types import Command
from typing_extensions import NotRequired, TypedDict, Unpack

from amulet.errors import RequestError
from amulet.preference import Placement, PreferenceLike
from amulet_integrations._preference import SETTINGS, Push, Source, choose, warn_of_typos
from amulet_integrations.langchain.binding import unbound
from amulet_integrations.langchain.memory import (
    PreferenceMemory,
    Settings,
    as_json,
    merge_settings,
    warn_of_missing,
)
from amulet_integrations.langchain.messages import stated_settings
from amulet_integrations.langchain.options import AmuletOptions, checked

LONGEST = 500  # maximum characters of a remembered preference


def keep_stated(kept: Any, given: Any) -> Any:
    """The reducer of a state's `preference`: a new one replaces, `{"remember": ...}` adds.

    The stored value is plain JSON, so that every checkpointer can write it. Here `[]`, the field's
    initial value, means "not given" like None; "" is off.
    """
    if given is None or given == []:
        return []
    if isinstance(given, Mapping) and "remember" in given:
        kept_settings = {"preference": kept} if kept else {}
        return merge_settings(kept_settings, {"preference": as_json(given["remember"])})[
            "preference"
        ]
    return as_json(given)


class StatedPreference(TypedDict):
    """The state fields of a conversation's preference, for your own graph:

    >>> class State(MessagesState, StatedPreference): ...
    """

    preference: NotRequired[Annotated[list[Any], keep_stated]]
    strength: NotRequired[float | None]
    floor: NotRequired[float | None]
    placement: NotRequired[Placement | None]
    focus: NotRequired[float | None]
    loop_guard: NotRequired[int | None]


class PreferenceState(AgentState[Any], StatedPreference):
    """An agent's state with the conversation's preference in it."""


def state_settings(state: Mapping[str, Any]) -> Settings:
    """Return the preference settings of a graph's state, for a model call.

    Raises:
        RequestError: the state is not a dict.

    >>> def answer(state: State):
    ...     return {"messages": [model.invoke(state["messages"], **state_settings(state))]}
    """
    if not isinstance(state, Mapping):
        raise RequestError(
            f"state_settings: a state of type {type(state).__name__}: expected the dict that a "
            "node gets; for a pydantic model or a dataclass, give vars(state)."
        )
    settings = {name: state[name] for name in SETTINGS if state.get(name) is not None}
    if settings.get("preference") == []:  # the field's initial value: nothing was stated yet
        del settings["preference"]
    return settings


class PreferenceMiddleware(AgentMiddleware[PreferenceState, Any, Any]):
    """Gives each model call of an agent the preference in force; for `create_agent`.

    Each setting (preference, strength, floor, placement, focus, loop_guard) comes from the nearest
    level that has it:

    1. call: the run's `context` (a dict, dataclass or pydantic object with fields of these names);
    2. conversation: `config["configurable"]`; the state's fields of these names, which a
       checkpointer keeps with the thread; a message's `additional_kwargs`; the store's entry for
       the thread;
    3. user: the store's entry for `user_id`, which is read from the context, else from
       `config["configurable"]`;
    4. constructor: the arguments here, then those of the model.

    The store is the agent's own (`create_agent(store=...)`), read through `PreferenceMemory` at
    every model call, so what a tool has just remembered holds for the very next answer. Without a
    store, levels from it are empty.

    The agent's model must be a `ChatAmulet`. If another model replaces it, calls with a preference
    in force raise `RequestError`; others pass through.

    >>> agent = create_agent(
    ...     ChatAmulet.embedded(), tools=[remember_preference()], store=InMemoryStore(),
    ...     middleware=[PreferenceMiddleware()],
    ... )
    >>> agent.invoke({"messages": "Hi!"}, context={"user_id": "anna"})
    """

    state_schema = PreferenceState

    def __init__(
        self,
        preference: PreferenceLike = None,
        **push: Unpack[Push],
    ) -> None:
        super().__init__()
        self._constructor: Settings = checked("PreferenceMiddleware", **push)
        if preference is not None:
            self._constructor["preference"] = as_json(preference)

    def wrap_model_call(
        self,
        request: ModelRequest[Any],
        handler: Callable[[ModelRequest[Any]], ModelResponse[Any]],
    ) -> ModelResponse[Any]:
        """Call the model with the preference in force."""
        store = request.runtime.store
        kept = PreferenceMemory(store).recall(**_ids(request.runtime)) if store else {}
        return handler(self._decide(request, kept))

    async def awrap_model_call(
        self,
        request: ModelRequest[Any],
        handler: Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]],
    ) -> ModelResponse[Any]:
        """Call the model with the preference in force."""
        store = request.runtime.store
        kept = await PreferenceMemory(store).arecall(**_ids(request.runtime)) if store else {}
        return await handler(self._decide(request, kept))

    def _decide(
        self, request: ModelRequest[Any], kept: Mapping[Source, Settings]
    ) -> ModelRequest[Any]:
        """Return the request with the settings in force as its model settings."""
        model, config, bound = unbound(request.model)
        if isinstance(request.runtime.context, Mapping):
            warn_of_typos(request.runtime.context, "the run's context")
        context = {name: _field(request.runtime.context, name) for name in SETTINGS}
        pinned = model.pinned if isinstance(model, AmuletOptions) else {}
        call = _nearest(request.model_settings, context, bound, pinned)
        conversation = _nearest(
            config.get("configurable", {}),
            _configurable(),
            state_settings(request.state),
            stated_settings(request.messages),
            kept.get("conversation", {}),
        )
        chosen = choose(
            call=call,
            conversation=conversation,
            user=kept.get("user"),
            constructor=self._constructor,
        )
        settings = chosen.as_dict()
        if not settings:
            return request
        if not isinstance(model, AmuletOptions):
            raise RequestError(
                f"PreferenceMiddleware: the agent's model is a {type(model).__name__}, "
                f"which can't be steered, and {', '.join(settings)} is in force for this call. Use "
                "ChatAmulet, or leave the middleware out."
            )
        # The model looks up its own levels again, which must not override this decision.
        source = "call" if call or chosen.source in (None, "constructor") else chosen.source
        settings["preference_source"] = source
        return request.override(model_settings={**request.model_settings, **settings})


def remember_preference(scope: Literal["user", "thread"] = "user") -> BaseTool:
    """Return a tool with which an agent remembers how the user wants its answers.

    The agent needs `PreferenceMiddleware`; then the next answer, in the same run, follows it.

    Args:
        scope: "user" keeps it in the agent's store under `user_id`, for all conversations (and in
            this one's state, where a preference of its own would hide it); "thread" keeps it in
            this conversation's state.
    """
    if scope not in ("user", "thread"):
        raise RequestError(f'remember_preference: scope={scope!r}: expected "user" or "thread".')

    def remember(
        preference: str, runtime: ToolRuntime[Any, Any], replace: bool = False
    ) -> Command[Any]:
        wish = _wish(preference)
        if scope == "user":
            memory, user_id = _user_memory(runtime)
            keep = memory.set if replace or not wish else memory.merge
            keep(wish, user_id=user_id)
        return _remembered(scope, wish, replace, runtime)

    async def aremember(
        preference: str, runtime: ToolRuntime[Any, Any], replace: bool = False
    ) -> Command[Any]:
        wish = _wish(preference)
        if scope == "user":
            memory, user_id = _user_memory(runtime)
            keep = memory.aset if replace or not wish else memory.amerge
            await keep(wish, user_id=user_id)
        return _remembered(scope, wish, replace, runtime)

    return StructuredTool.from_function(
        remember,
        coroutine=aremember,
        name="remember_preference",
        handle_tool_error=True,
        description=(
            "Remember how the user wants answers to be, when they say so: for example 'Keep it "
            "short.' or 'Answer in French.' Put it as one instruction. Set replace to true if it "
            "takes the place of what they asked for earlier; an empty preference forgets that."
        ),
    )


def _wish(preference: str) -> str:
    wish = " ".join(preference.split())
    if len(wish) > LONGEST:  # the model's mistake, so the model gets the message
        raise ToolException(
            f"A preference of {len(wish)} characters is too long: put it as one instruction of at "
            f"most {LONGEST}."
        )
    # As a sentence, like the prompt around it, because small models follow that better.
    return wish[:1].upper() + wish[1:] + ("." if wish[-1:].isalnum() else "")


def _user_memory(runtime: ToolRuntime[Any, Any]) -> tuple[PreferenceMemory, str]:
    if runtime.store is None:
        raise RequestError(
            "remember_preference: the agent has no store: give create_agent(store="
            'InMemoryStore()) or another store, or use remember_preference(scope="thread").'
        )
    user_id = _user_id(runtime.context, runtime.config.get("configurable", {}))
    if user_id is None:
        raise RequestError(
            "remember_preference: no user_id: give invoke(..., context={'user_id': ...}) or "
            'config["configurable"]["user_id"], or use remember_preference(scope="thread").'
        )
    return PreferenceMemory(runtime.store), user_id


def _remembered(
    scope: str, wish: str, replace: bool, runtime: ToolRuntime[Any, Any]
) -> Command[Any]:
    answer = "Remembered." if wish else "Forgotten."
    update: dict[str, Any] = {
        "messages": [ToolMessage(answer, tool_call_id=runtime.tool_call_id)],
    }
    if scope == "thread" or state_settings(runtime.state).get("preference") is not None:
        update["preference"] = wish if replace or not wish else {"remember": wish}
    return Command(update=update)


def _ids(runtime: Any) -> dict[str, Any]:
    """Return the ids of a run's user and thread."""
    configurable = _configurable()
    ids = {
        "user_id": _user_id(runtime.context, configurable),
        "thread_id": configurable.get("thread_id"),
    }
    warn_of_missing(ids, configurable, 'config["configurable"]')
    if isinstance(runtime.context, Mapping):
        warn_of_missing(ids, runtime.context, "the run's context")
    return ids


def _user_id(context: Any, configurable: Mapping[str, Any]) -> Any:
    user_id = _field(context, "user_id")
    return configurable.get("user_id") if user_id is None else user_id


def _configurable() -> Settings:
    return dict(ensure_config().get("configurable", {}))


def _field(context: Any, name: str) -> Any:
    """Return a field of a run's context, which may be any kind of object."""
    return context.get(name) if isinstance(context, Mapping) else getattr(context, name, None)


def _nearest(*places: Mapping[str, Any]) -> Settings:
    """Return each setting from the first place that has it."""
    found: Settings = {}
    for place in places:
        for name in SETTINGS:
            if (value := place.get(name)) is not None:
                found.setdefault(name, value)
    return found
