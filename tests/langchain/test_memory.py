"""`PreferenceMemory`: entries per user and thread, over in-memory and SQLite stores."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from langchain_core.runnables import RunnableLambda
from langgraph.store.base import BaseStore
from langgraph.store.memory import InMemoryStore
from langgraph.store.sqlite import AsyncSqliteStore, SqliteStore

from amulet import Preference, RequestError
from amulet_integrations.langchain.memory import PreferenceMemory, with_memory


@pytest.fixture(params=["memory", "sqlite"])
def memory(request: pytest.FixtureRequest) -> Iterator[PreferenceMemory]:
    if request.param == "memory":
        yield PreferenceMemory(InMemoryStore())
        return
    with SqliteStore.from_conn_string(":memory:") as store:
        store.setup()
        yield PreferenceMemory(store)


def test_set_get_and_forget_touch_exactly_one_entry(memory: PreferenceMemory) -> None:
    memory.set("Be brief.", user_id="anna", strength=3.0)
    memory.set(["In French.", Preference("jokes", -0.5)], user_id="anna", thread_id="t1")
    memory.set("", thread_id="t1", placement="user")

    assert memory.get(user_id="anna") == {"preference": ["Be brief."], "strength": 3.0}
    french = ["In French.", {"text": "jokes", "weight": -0.5}]
    assert memory.get(user_id="anna", thread_id="t1") == {"preference": french}
    assert memory.get(thread_id="t1") == {"preference": "", "placement": "user"}

    memory.forget(user_id="anna")
    assert memory.get(user_id="anna") == {}
    assert memory.get(user_id="anna", thread_id="t1") == {"preference": french}
    memory.forget(user_id="anna")  # twice is fine
    memory.set("Now this.", user_id="anna", thread_id="t1")
    assert memory.get(user_id="anna", thread_id="t1") == {"preference": ["Now this."]}


# Each pair would meet in a store that joins labels by ".", or searches with LIKE or GLOB.
STRANGERS = [
    ("anna", "Anna"),
    ("anna", "anna "),
    ("a", "a.b"),
    ("a.b", "a=2Eb"),
    ("ann_", "anna"),
    ("ann%", "anna"),
    ("*", "anna"),
    ("a", "a\x00"),
    ("' OR 1=1 --", "anna"),
    ("ä", "a\u0308"),
    ("all threads", "thread all threads"),
    ("=", "=3D"),
]


@pytest.mark.parametrize(("one", "other"), STRANGERS)
def test_a_user_never_sees_anothers_entries(memory: PreferenceMemory, one: str, other: str) -> None:
    memory.set("hers", user_id=one)
    memory.set("hers here", user_id=one, thread_id="t")
    assert memory.get(user_id=other) == {}
    assert memory.get(user_id=other, thread_id="t") == {}
    assert memory.list(user_id=other) == {}
    assert memory.recall(user_id=other, thread_id="t") == {"conversation": {}, "user": {}}

    memory.set("his", user_id=other)
    memory.forget(user_id=other)
    assert memory.get(user_id=one) == {"preference": ["hers"]}
    assert memory.list(user_id=one) == {
        None: {"preference": ["hers"]},
        "t": {"preference": ["hers here"]},
    }


@pytest.mark.parametrize(("one", "other"), STRANGERS)
def test_a_thread_never_sees_anothers_entries(
    memory: PreferenceMemory, one: str, other: str
) -> None:
    memory.set("here", thread_id=one)
    assert memory.get(thread_id=other) == {}
    assert memory.list() == {one: {"preference": ["here"]}}


@pytest.mark.parametrize("ids", [{}, {"user_id": ""}, {"user_id": "  "}, {"user_id": 7}])
def test_an_entry_that_is_nobodys_is_refused(memory: PreferenceMemory, ids: Any) -> None:
    for call in (memory.get, memory.forget):
        with pytest.raises(RequestError, match=r"user_id"):
            call(**ids)
    for write in (memory.set, memory.merge):
        with pytest.raises(RequestError, match=r"user_id"):
            write("Be brief.", **ids)
    with pytest.raises(RequestError, match=r"thread_id=''"):
        memory.get(user_id="anna", thread_id="")


def test_what_is_not_valid_is_not_written(memory: PreferenceMemory) -> None:
    memory.set("Be brief.", user_id="anna")
    with pytest.raises(RequestError, match=r"floor=2\.0"):
        memory.set("Be long.", user_id="anna", floor=2.0)
    with pytest.raises(RequestError, match="loudness: unknown option"):
        memory.merge("Be long.", user_id="anna", loudness=3)  # type: ignore[call-arg]
    with pytest.raises(RequestError, match="a preference of type int"):
        memory.set(3, user_id="anna")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="There is nothing to store"):
        memory.set(user_id="anna")
    assert memory.get(user_id="anna") == {"preference": ["Be brief."]}


def test_an_entry_that_somebody_else_wrote_is_an_error(memory: PreferenceMemory) -> None:
    memory.store.put(("preferences", "anna"), "all threads", {"preference": [3]})
    with pytest.raises(RequestError, match=r"entry 'all threads' in .*anna.* not a preference"):
        memory.get(user_id="anna")


def test_merge_adds_replaces_the_same_text_and_drops_the_oldest(memory: PreferenceMemory) -> None:
    assert memory.merge("Be brief.", user_id="anna") == {"preference": ["Be brief."]}
    assert memory.merge("In French.", user_id="anna", strength=1.0) == {
        "preference": ["Be brief.", "In French."],
        "strength": 1.0,
    }
    stronger = Preference("be BRIEF.", 2.0)
    assert memory.merge(stronger, user_id="anna")["preference"] == [
        "In French.",
        {"text": "be BRIEF.", "weight": 2.0},
    ]
    assert memory.merge("", user_id="anna")["preference"] == ""
    for number in range(10):
        merged = memory.merge(f"Wish {number}.", user_id="anna")
    assert merged["preference"] == [f"Wish {number}." for number in range(2, 10)]
    assert memory.merge(strength=4.0, user_id="anna")["preference"] == merged["preference"]


def test_merges_at_the_same_time_lose_nothing(memory: PreferenceMemory) -> None:
    wishes = [f"Wish {number}." for number in range(8)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda wish: memory.merge(wish, user_id="anna"), wishes))
    assert sorted(memory.get(user_id="anna")["preference"]) == wishes


def test_list_reads_page_after_page(memory: PreferenceMemory) -> None:
    for number in range(205):
        memory.set(f"Wish {number}.", user_id="anna", thread_id=str(number))
    listed = memory.list(user_id="anna")
    assert len(listed) == 205
    assert listed["204"] == {"preference": ["Wish 204."]}


def test_recall_gives_the_levels(memory: PreferenceMemory) -> None:
    memory.set("the user", user_id="anna")
    memory.set("the thread", thread_id="t1")
    memory.set("her thread", user_id="anna", thread_id="t2")
    user = {"preference": ["the user"]}
    assert memory.recall() == {"conversation": {}, "user": {}}
    assert memory.recall(user_id="anna") == {"conversation": {}, "user": user}
    for ids, conversation in [
        ({"user_id": "anna", "thread_id": "t1"}, {"preference": ["the thread"]}),
        ({"user_id": "anna", "thread_id": "t2"}, {"preference": ["her thread"]}),
        ({"user_id": "anna", "thread_id": "t3"}, {}),
    ]:
        assert memory.recall(**ids) == {"conversation": conversation, "user": user}
    assert memory.recall(user_id="ben", thread_id="t2") == {"conversation": {}, "user": {}}


def test_entries_survive_a_restart(tmp_path: Path) -> None:
    database = str(tmp_path / "memory.db")
    with SqliteStore.from_conn_string(database) as store:
        store.setup()
        PreferenceMemory(store).set("Be brief.", user_id="anna@example.org", strength=3.0)
    with SqliteStore.from_conn_string(database) as store:
        store.setup()
        kept = PreferenceMemory(store).list(user_id="anna@example.org")
    assert kept == {None: {"preference": ["Be brief."], "strength": 3.0}}


@pytest.fixture(params=["memory", "sqlite"])
async def async_store(request: pytest.FixtureRequest) -> AsyncIterator[BaseStore]:
    if request.param == "memory":
        yield InMemoryStore()
        return
    async with AsyncSqliteStore.from_conn_string(":memory:") as store:
        await store.setup()
        yield store


async def test_the_async_twins(async_store: BaseStore) -> None:
    memory = PreferenceMemory(async_store)
    await memory.aset("the user", user_id="a.b")
    await memory.aset("her thread", user_id="a.b", thread_id="t")
    assert await memory.aget(user_id="a.b") == {"preference": ["the user"]}
    assert await memory.arecall(user_id="a.b", thread_id="t") == {
        "conversation": {"preference": ["her thread"]},
        "user": {"preference": ["the user"]},
    }
    assert await memory.alist(user_id="a.b") == {
        None: {"preference": ["the user"]},
        "t": {"preference": ["her thread"]},
    }
    await memory.aforget(user_id="a.b", thread_id="t")
    assert await memory.alist(user_id="a.b") == {None: {"preference": ["the user"]}}
    assert await memory.alist(user_id="a") == {}

    wishes = [f"Wish {number}." for number in range(7)]
    await asyncio.gather(*(memory.amerge(wish, user_id="a.b") for wish in wishes))
    assert sorted((await memory.aget(user_id="a.b"))["preference"]) == sorted(["the user", *wishes])


def test_only_a_store_will_do() -> None:
    with pytest.raises(RequestError, match="a store of type dict"):
        PreferenceMemory({})  # type: ignore[arg-type]


def test_with_memory_configures_the_chain(memory: PreferenceMemory) -> None:
    def settings(_: str, config: Any) -> dict[str, Any]:
        names = ("preference", "strength")
        return {name: config["configurable"].get(name) for name in names}

    memory.set("the user", user_id="anna", strength=1.0)
    memory.set("monday", thread_id="monday")
    chain = with_memory(RunnableLambda(settings), memory)

    def ask(**configurable: Any) -> dict[str, Any]:
        return chain.invoke("?", {"configurable": configurable})

    assert ask() == {"preference": None, "strength": None}
    assert ask(user_id="anna") == {"preference": ["the user"], "strength": 1.0}
    assert ask(user_id="anna", session_id="monday") == {"preference": ["monday"], "strength": 1.0}
    assert ask(thread_id="monday") == {"preference": ["monday"], "strength": None}
    assert ask(session_id="monday", preference="")["preference"] == ""


def test_with_memory_takes_a_memory() -> None:
    chain: Any = RunnableLambda(lambda text: text)
    for arguments in ((chain, InMemoryStore()), (PreferenceMemory(InMemoryStore()), chain)):
        with pytest.raises(RequestError, match=r"expected with_memory\(chain, PreferenceMemory\("):
            with_memory(*arguments)
