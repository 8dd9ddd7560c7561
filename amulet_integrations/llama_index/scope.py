"""`with preference("..."):` and the workflow's `Context`: settings for all calls inside."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, TypeAlias, get_args
from weakref import ref

from llama_index.core.workflow import Context
from typing_extensions import Unpack

from amulet.errors import RequestError
from amulet.preference import PreferenceLike, Steering, normal_preferences
from amulet_integrations._options import refuse_unknown
from amulet_integrations._preference import SETTINGS, Push

Settings: TypeAlias = dict[str, Any]
"""Some of the preference and what `Steering` has; what is missing inherits."""

Level: TypeAlias = Literal["conversation", "user"]

STATE_KEY = "amulet_preference"

Scopes: TypeAlias = Mapping[str, Settings]


@dataclass(eq=False)
class _Block:
    """A `with` block. Tasks that were started inside keep its scopes after it has ended.

    Attributes:
        gives: the scopes inside.
        outer: the block around it, if any.
        began: the task, or outside of tasks the thread, that entered it.
        ended: whether it was left.
    """

    gives: Scopes
    outer: _Block | None
    began: ref[Any]
    ended: bool = False


_block: ContextVar[_Block | None] = ContextVar("amulet_block", default=None)


@contextmanager
def preference(
    preference: PreferenceLike = None,
    *,
    level: Level = "conversation",
    **push: Unpack[Push],
) -> Iterator[None]:
    """Apply settings to every call of any `AmuletLLM` inside this block.

    The scope crosses `await`, `asyncio.gather`, LlamaIndex's thread pools and workflows started
    inside it; other tasks never see it. Inner scopes win, separately for each setting. A streamed
    answer keeps the scope in which it was requested, wherever it is read.

    Args:
        preference: text, `Preference`, a list of them; "" is off, None inherits.
        level: "conversation", or "user" for a user's standing preference, over which a
            conversation's memory takes precedence.
        push: strength, floor, placement, focus, loop_guard; see `Steering`. None inherits.

    Raises:
        RequestError: a preference, a range or the level is not valid.

    >>> with preference("Answer in one short sentence."):
    ...     query_engine.query("What did the author do?")
    """
    given = checked(preference, **push)
    if level not in get_args(Level):
        raise RequestError(f'level={level!r}: expected "conversation" or "user".')
    from amulet_integrations.llama_index.askers import watch

    watch()  # from here on, so that streams are bound to their scope
    around = scopes()
    with entered({**around, level: {**around.get(level, {}), **given}}):
        yield


def scopes() -> Scopes:
    """Return what the scopes around the running code give, by level."""
    block = _innermost()
    return block.gives if block is not None else MappingProxyType({})


@contextmanager
def entered(given: Scopes) -> Iterator[None]:
    """Let these be the scopes around whatever runs inside."""
    block = _Block(given, _innermost(), ref(_here()))
    _block.set(block)
    try:
        yield
    finally:
        block.ended = True
        # A generator may be left in another context than it was entered in, and not in order.
        if _block.get() is block:
            _block.set(_innermost())


def _innermost() -> _Block | None:
    """Return the block in force. The task or thread that entered a block is in it until it ends."""
    block = _block.get()
    while block is not None and block.ended and block.began() is _here():
        block = block.outer
    return block


def _here() -> Any:
    try:
        return asyncio.current_task() or threading.current_thread()
    except RuntimeError:  # no loop is running
        return threading.current_thread()


async def set_preference(
    context: Context,
    preference: PreferenceLike = None,
    **push: Unpack[Push],
) -> None:
    """Keep a preference in a workflow's `Context`; it goes where the context goes (`to_dict`).

    Raises:
        RequestError: nothing is given, or it is not valid; nothing is written.
    """
    given = stored(preference, **push)
    await _store(context).set(STATE_KEY, as_json(given))


async def forget_preference(context: Context) -> None:
    """Forget what `set_preference` kept; what lies further out counts again."""
    await _store(context).set(STATE_KEY, {})


async def preference_of(context: Context) -> AbstractContextManager[None]:
    """Return the scope of what a workflow's `Context` keeps.

    >>> with await preference_of(context):
    ...     answer = await agent.run("Hello!", ctx=context)
    """
    kept = await _store(context).get(STATE_KEY, default={})
    return preference(**kept)


def _store(context: Context) -> Any:
    """Return a context's store.

    Raises:
        RequestError: it is not a `Context`, but for example the agent or the preference.
    """
    if not hasattr(context, "store"):
        raise RequestError(
            f"a context of type {type(context).__name__}: expected a workflow's Context, such as "
            "Context(agent)."
        )
    return context.store


def checked(preference: PreferenceLike = None, **push: Any) -> Settings:
    """Return the settings that were given, in normal form.

    Raises:
        RequestError: one of them is not valid.
    """
    refuse_unknown(push, SETTINGS, "The preference", {})
    given = {name: value for name, value in push.items() if value is not None}
    Steering(**given)  # checks the ranges
    if preference is None:
        return given
    return {"preference": list(normal_preferences(preference)) or "", **given}


def stored(preference: PreferenceLike = None, **push: Any) -> Settings:
    """Return `checked` settings that are to be stored.

    Raises:
        RequestError: none is given, or one of them is not valid.
    """
    if settings := checked(preference, **push):
        return settings
    raise RequestError(
        f'There is nothing to store: give a preference ("" is off), {", ".join(SETTINGS[1:])}.'
    )


def as_json(settings: Mapping[str, Any]) -> Settings:
    """Return settings as plain JSON: preferences as texts, or dicts where they have a weight."""
    plain = {name: settings[name] for name in SETTINGS if settings.get(name) is not None}
    if "preference" in plain:
        plain["preference"] = [
            wish.text if wish.weight == 1.0 else wish.model_dump()
            for wish in normal_preferences(plain["preference"])
        ] or ""
    return plain
