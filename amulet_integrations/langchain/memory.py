"""`PreferenceMemory`: preferences of users and conversations, stored in a LangGraph store."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Iterable
from itertools import count
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

from langchain_core.runnables import Runnable, RunnableConfig, RunnableLambda
from langgraph.store.base import BaseStore, Item
from typing_extensions import Unpack

from amulet.errors import RequestError
from amulet.preference import PreferenceLike, Steering, normal_preferences
from amulet_integrations._preference import (
    SETTINGS,
    Push,
    Source,
    choose,
    plain,
    warn_of_typos,
)

ROOT = "preferences"
KEPT = 8  # preferences per entry: each costs a row of every later answer, so old ones make room
PAGE = 100  # items per read while listing

Settings: TypeAlias = dict[str, Any]
"""Some of the preference and what `Steering` has, as JSON; what is missing inherits."""


# Merging reads and then writes. These keep the parallel tool calls of one process from losing
# each other's wish; between processes the last write wins, for stores have no compare-and-set.
_merging = threading.Lock()
_amerging: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = WeakKeyDictionary()


class PreferenceMemory:
    """Preferences per user, per conversation, or per user's conversation, in any `BaseStore`.

    `set`, `merge`, `get` and `forget` take `user_id`, `thread_id` or both, and affect exactly that
    entry: one user's preferences are never found under another's id. Ids are any non-empty text.
    Each method has an async version: `aset`, `amerge`, `aget`, `aforget`, `alist`, `arecall`.

    Args:
        store: the graph's store: in-memory, SQLite, Postgres, ... The sync methods need a sync
            store and the async methods an async store; `InMemoryStore` is both.

    >>> memory = PreferenceMemory(InMemoryStore())
    >>> memory.set("Be brief.", user_id="anna", strength=3.0)
    >>> memory.get(user_id="anna")
    {'preference': ['Be brief.'], 'strength': 3.0}
    """

    def __init__(self, store: BaseStore) -> None:
        if not isinstance(store, BaseStore):
            raise RequestError(
                f"PreferenceMemory: a store of type {type(store).__name__}: expected a LangGraph "
                "BaseStore, such as InMemoryStore(), SqliteStore or PostgresStore."
            )
        self.store = store

    def set(
        self,
        preference: PreferenceLike = None,
        *,
        user_id: str | None = None,
        thread_id: str | None = None,
        **push: Unpack[Push],
    ) -> None:
        """Replace the entry; a preference of "" stores "off", None inherits.

        Raises:
            RequestError: an id, a preference or a range is not valid; nothing is written.
        """
        place = _place(user_id, thread_id)
        self.store.put(*place, _settings(preference, push), index=False)

    async def aset(
        self,
        preference: PreferenceLike = None,
        *,
        user_id: str | None = None,
        thread_id: str | None = None,
        **push: Unpack[Push],
    ) -> None:
        """`set` for an async store."""
        place = _place(user_id, thread_id)
        await self.store.aput(*place, _settings(preference, push), index=False)

    def merge(
        self,
        preference: PreferenceLike = None,
        *,
        user_id: str | None = None,
        thread_id: str | None = None,
        **push: Unpack[Push],
    ) -> Settings:
        """Add to the entry, and return the result.

        A repeated text replaces the earlier one; beyond 8 preferences the oldest are dropped.
        A preference of "" switches off. Settings of `Steering` replace the stored ones.

        Raises:
            RequestError: an id, a preference or a range is not valid; nothing is written.
        """
        place = _place(user_id, thread_id)
        given = _settings(preference, push)
        with _merging:
            merged = merge_settings(_read(self.store.get(*place)), given)
            self.store.put(*place, merged, index=False)
        return merged

    async def amerge(
        self,
        preference: PreferenceLike = None,
        *,
        user_id: str | None = None,
        thread_id: str | None = None,
        **push: Unpack[Push],
    ) -> Settings:
        """`merge` for an async store."""
        place = _place(user_id, thread_id)
        given = _settings(preference, push)
        async with _amerging.setdefault(asyncio.get_running_loop(), asyncio.Lock()):
            merged = merge_settings(_read(await self.store.aget(*place)), given)
            await self.store.aput(*place, merged, index=False)
        return merged

    def get(self, *, user_id: str | None = None, thread_id: str | None = None) -> Settings:
        """Return exactly this entry; `{}` if there is none."""
        return _read(self.store.get(*_place(user_id, thread_id)))

    async def aget(self, *, user_id: str | None = None, thread_id: str | None = None) -> Settings:
        """`get` for an async store."""
        return _read(await self.store.aget(*_place(user_id, thread_id)))

    def forget(self, *, user_id: str | None = None, thread_id: str | None = None) -> None:
        """Delete exactly this entry; the next level applies again. Unknown ids are no error."""
        self.store.delete(*_place(user_id, thread_id))

    async def aforget(self, *, user_id: str | None = None, thread_id: str | None = None) -> None:
        """`forget` for an async store."""
        await self.store.adelete(*_place(user_id, thread_id))

    def list(self, *, user_id: str | None = None) -> dict[str | None, Settings]:
        """Return a user's entries by thread id; None is the entry for all of the user's threads.

        Without `user_id`: the entries of threads that were kept without a user.
        """
        namespace = _namespace(user_id)
        found: dict[str | None, Settings] = {}
        for offset in count(0, PAGE):
            page = self.store.search(namespace, limit=PAGE, offset=offset)
            found.update(_entries(page, namespace))
            if len(page) < PAGE:
                break
        return found

    async def alist(self, *, user_id: str | None = None) -> dict[str | None, Settings]:
        """`list` for an async store."""
        namespace = _namespace(user_id)
        found: dict[str | None, Settings] = {}
        for offset in count(0, PAGE):
            page = await self.store.asearch(namespace, limit=PAGE, offset=offset)
            found.update(_entries(page, namespace))
            if len(page) < PAGE:
                break
        return found

    def recall(
        self, *, user_id: str | None = None, thread_id: str | None = None
    ) -> dict[Source, Settings]:
        """Return the settings of the levels "conversation" and "user", as `choose` takes them.

        A conversation's settings are those stored for the user's thread or, if there are none,
        those stored for the thread regardless of the user.
        """
        kept = [self.get(**ids) if ids else {} for ids in _lookups(user_id, thread_id)]
        return {"conversation": kept[0] or kept[1], "user": kept[2]}

    async def arecall(
        self, *, user_id: str | None = None, thread_id: str | None = None
    ) -> dict[Source, Settings]:
        """`recall` for an async store."""
        kept = [await self.aget(**ids) if ids else {} for ids in _lookups(user_id, thread_id)]
        return {"conversation": kept[0] or kept[1], "user": kept[2]}


def with_memory(chain: Runnable[Any, Any], memory: PreferenceMemory) -> Runnable[Any, Any]:
    """Return the chain with the stored preferences of each session, thread or user.

    For chains without agent middleware, above all `RunnableWithMessageHistory`: the ids are
    `user_id` and `session_id` (or `thread_id`) of `config["configurable"]`, and the settings stored
    for them reach every model in the chain by the same route. Settings of the call take precedence.

    Raises:
        RequestError: `memory` is no `PreferenceMemory`.

    >>> memory.set("Be brief.", thread_id="monday")
    >>> chat = with_memory(RunnableWithMessageHistory(chain, get_session_history, ...), memory)
    >>> chat.invoke({"question": "Hi!"}, {"configurable": {"session_id": "monday"}})
    """

    if not isinstance(memory, PreferenceMemory):
        raise RequestError(
            f"with_memory: a memory of type {type(memory).__name__}: expected "
            "with_memory(chain, PreferenceMemory(store))."
        )

    def remembering(_: Any, config: RunnableConfig) -> Runnable[Any, Any]:
        call = config.get("configurable", {})
        return _configured(chain, call, memory.recall(**_ids(call)))

    async def aremembering(_: Any, config: RunnableConfig) -> Runnable[Any, Any]:
        call = config.get("configurable", {})
        return _configured(chain, call, await memory.arecall(**_ids(call)))

    return RunnableLambda(remembering, aremembering, name="with_memory")


def _configured(
    chain: Runnable[Any, Any], call: Settings, kept: dict[Source, Settings]
) -> Runnable[Any, Any]:
    settings = choose(call=call, **kept).as_dict()
    # The lambda makes the config ambient, because classic chains don't pass theirs to the model.
    return RunnableLambda(lambda _: chain).with_config(configurable={**call, **settings})


def _ids(configurable: Settings) -> dict[str, Any]:
    thread_id = configurable.get("session_id", configurable.get("thread_id"))
    ids = {"user_id": configurable.get("user_id"), "thread_id": thread_id}
    warn_of_missing(ids, configurable, 'config["configurable"]')
    return ids


def warn_of_missing(ids: Settings, keys: Iterable[object], where: str) -> None:
    """Warn about keys that probably mean an id that is missing: nothing stored would be found."""
    others = {"user_id": ("user_id",), "thread_id": ("thread_id", "session_id")}
    missing = [name for known, names in others.items() if ids[known] is None for name in names]
    warn_of_typos(keys, where, missing)


def merge_settings(kept: Settings, given: Settings) -> Settings:
    """Return `kept` with `given` added; see `PreferenceMemory.merge`."""
    merged = {**kept, **given}
    if given.get("preference") and kept.get("preference"):
        added = normal_preferences(given["preference"])
        said_again = {preference.text.casefold() for preference in added}
        earlier = normal_preferences(kept["preference"])
        remaining = [wish for wish in earlier if wish.text.casefold() not in said_again]
        merged["preference"] = as_json([*remaining, *added][-KEPT:])
    return merged


def as_json(preference: PreferenceLike) -> list[str | dict[str, Any]] | str:
    """Return preferences as a list of texts and dicts; "" if they are off.

    Raises:
        RequestError: not text, a `Preference`, its dict, or a list of them.
    """
    return plain(normal_preferences(preference)) or ""


def _settings(preference: PreferenceLike, push: Push) -> Settings:
    settings: Settings = {name: value for name, value in push.items() if value is not None}
    Steering(**settings)  # checks names and ranges
    if preference is not None:
        settings = {"preference": as_json(preference), **settings}
    if not settings:
        raise RequestError(
            'There is nothing to store: give a preference ("" is off), '
            f"{', '.join(Steering.model_fields)}; to delete an entry use forget()."
        )
    return settings


def _read(item: Item | None) -> Settings:
    if item is None:
        return {}
    settings = {name: item.value[name] for name in SETTINGS if name in item.value}
    preference = settings.pop("preference", None)
    try:
        return _settings(preference, Push(**settings))  # type: ignore[typeddict-item]
    except RequestError as error:
        raise RequestError(
            f"The store's entry {item.key!r} in {item.namespace} is not a preference: {error}"
        ) from error


def _lookups(user_id: str | None, thread_id: str | None) -> list[dict[str, str]]:
    """Return the ids of the user's thread, the thread and the user; `{}` for unknown ones."""
    user = {} if user_id is None else {"user_id": user_id}
    thread = {} if thread_id is None else {"thread_id": thread_id}
    return [{**user, **thread} if user and thread else {}, thread, user]


def _place(user_id: str | None, thread_id: str | None) -> tuple[tuple[str, str], str]:
    """Return the namespace and key of an entry."""
    if user_id is None and thread_id is None:
        raise RequestError("No id: give user_id, thread_id, or both.")
    key = "all threads" if thread_id is None else f"thread {_label('thread_id', thread_id)}"
    return _namespace(user_id), key


def _namespace(user_id: str | None) -> tuple[str, str]:
    # "=" alone can't be a label: `_label` writes a "=" as "=3D".
    return ROOT, "=" if user_id is None else _label("user_id", user_id)


def _label(name: str, identity: object) -> str:
    """Encode an id so that no store takes it for a path, a wildcard or a control code.

    Stores join labels by ".", and search them with LIKE or GLOB. Different ids stay different.
    """
    if not isinstance(identity, str) or not identity.strip():
        raise RequestError(
            f"{name}={identity!r}: expected non-empty text. Without it the preference would be "
            "shared by everyone whose id is unknown."
        )
    raw = identity.encode("utf-8", "surrogatepass")
    return re.sub(rb"[^A-Za-z0-9-]", lambda byte: b"=%02X" % byte[0][0], raw).decode()


def _identity(label: str) -> str:
    raw = re.sub(rb"=(..)", lambda code: bytes([int(code[1], 16)]), label.encode())
    return raw.decode("utf-8", "surrogatepass")


def _entries(page: list[Any], namespace: tuple[str, str]) -> dict[str | None, Settings]:
    """Return one page's entries by thread id; a store that searches by prefix may add others'."""
    return {
        _identity(item.key.removeprefix("thread ")) if item.key != "all threads" else None: _read(
            item
        )
        for item in page
        if item.namespace == namespace
    }
