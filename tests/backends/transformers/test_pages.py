"""The KV cache in pages: rows that begin alike share them, and none sees what another writes."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from amulet.backends.transformers import pages
from amulet.backends.transformers.backend import TransformersBackend, page_kind, windows
from amulet.backends.transformers.cache import RowCache
from amulet.backends.transformers.cpu import native
from amulet.backends.transformers.cpu.layers import are_native
from amulet.backends.transformers.cpu.packing import pack_linears
from amulet.backends.transformers.pages import BLOCK, PAGE, PageCache, PageKind
from amulet.decoding.engine import Engine
from amulet.decoding.generation import Generation
from tests import bounds
from tests.engines import engine_over
from tests.faults import FAULTS, Allocations
from tests.marks import needs_code
from tests.models import Kind, random_model
from tests.search import examples

KIND = PageKind(layers=2, heads=3, dim=32, dtype=torch.float64)


def write(cache: PageCache, first: int, starts: list[int], width: int) -> torch.Tensor:
    """Write random keys to layer 1; return all columns of the rows, keys and values."""
    cache.begin(first, starts, width)
    kind = cache.kind
    new = torch.randn(len(starts), kind.heads, width, kind.dim).to(kind.dtype)
    keys, values = cache.update(new, -new, 1)
    assert torch.equal(keys, -values)
    for row, start in enumerate(starts):
        assert torch.equal(keys[row, :, start : start + width], new[row])
    return keys


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_a_row_wrote_is_what_it_reads(dtype: torch.dtype) -> None:
    cache = PageCache(KIND._replace(dtype=dtype))
    first = write(cache, 0, [0, 0], 150)
    uneven = write(cache, 0, [70, 150], 3)
    assert torch.equal(uneven[0, :, :70], first[0, :, :70])
    assert torch.equal(uneven[1, :, :150], first[1])


@examples(60)
@given(
    length=st.integers(1, 3 * PAGE),
    writes=st.lists(st.tuples(st.integers(0, 1), st.integers(1, 2 * PAGE)), max_size=4),
)
def test_rows_that_share_a_beginning_write_on_alone(
    length: int, writes: list[tuple[int, int]]
) -> None:
    cache = PageCache(KIND)
    expected = write(cache, 0, [0], 3 * PAGE)[0, :, :length]
    cache.copy_row(0, 1, length)
    kept = cache.row(0, length)
    texts = [expected, expected]
    for row, width in writes:
        start = texts[row].shape[1]
        texts[row] = write(cache, row, [start], width)[0]
        for other in (0, 1):
            assert torch.equal(texts[other][:, :length], expected)
    cache.write_row(2, kept, length)
    assert torch.equal(write(cache, 2, [length], 1)[0, :, :length], expected)


def test_a_shared_page_is_held_once_and_dropped_with_its_last_row() -> None:
    cache = PageCache(KIND)
    write(cache, 0, [0], 3 * PAGE + 1)
    assert cache.nbytes == 4 * KIND.nbytes == 4 * 2 * 2 * 3 * PAGE * 32 * 8
    for row in (1, 2):
        cache.copy_row(0, row, 3 * PAGE + 1)
    assert cache.nbytes == 4 * KIND.nbytes
    write(cache, 1, [3 * PAGE + 1, 3 * PAGE + 1], 1)
    assert cache.nbytes == 6 * KIND.nbytes  # the third page is partly filled, and two write to it
    cache.drop(1)
    assert cache.nbytes == 4 * KIND.nbytes
    assert cache.row_bytes(PAGE) == KIND.nbytes
    assert cache.row_bytes(PAGE + 1) == 2 * KIND.nbytes
    cache.drop(0)
    assert cache.nbytes == 0


def test_a_row_cut_short_lets_go_of_its_pages() -> None:
    cache = PageCache(KIND)
    before = write(cache, 0, [0], 3 * PAGE)
    after = write(cache, 0, [PAGE - 1], 1)
    assert cache.nbytes == KIND.nbytes
    assert torch.equal(after[0, :, : PAGE - 1], before[0, :, : PAGE - 1])


def allocations_of(
    pass_of: Callable[[PageCache], None], made: Callable[[], PageCache]
) -> Sequence[int]:
    """Return the numbers of a pass's allocations, from 1 on, over a cache that was made before."""
    with Allocations() as counted:
        pass_of(made())
    with Allocations() as before:
        made()
    return range(1, counted.count - before.count + 1)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_pass_without_memory_changes_no_row(fault: str) -> None:
    def pass_of(cache: PageCache) -> None:
        cache.begin(0, [PAGE + 1, 2 * PAGE], 2 * PAGE)

    def filled() -> PageCache:
        cache = PageCache(KIND)
        write(cache, 0, [0, 0], 2 * PAGE)
        cache.copy_row(1, 2, PAGE)
        return cache

    for place in allocations_of(pass_of, filled):
        cache = filled()
        rows = [list(row) for row in cache.by_window[0].rows]
        with pytest.raises(type(FAULTS[fault]())), Allocations(place, FAULTS[fault]):
            pass_of(cache)
        assert [
            list(row)[: len(had)] for row, had in zip(cache.by_window[0].rows, rows, strict=True)
        ] == rows
        pass_of(cache)
        assert cache.by_window[0].in_c.most == 4


def test_a_pass_after_one_without_memory_knows_the_present_pages() -> None:
    def pass_of(cache: PageCache) -> None:
        cache.begin(0, [PAGE + 1], 1)

    def shared() -> PageCache:
        cache = PageCache(KIND)
        write(cache, 0, [0], PAGE + 1)
        cache.begin(0, [PAGE + 1], 1)
        cache.row(0, PAGE + 1)
        return cache

    for place in allocations_of(pass_of, shared):
        cache = shared()
        with pytest.raises(RuntimeError), Allocations(place):
            pass_of(cache)
        pass_of(cache)
        assert cache.by_window[0]._held[0].tolist() == [
            [page.address for page in cache.by_window[0].rows[0]]
        ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [PAGE + 1, PAGE + 8, 2 * PAGE - 1, 2 * PAGE])
def test_a_row_does_not_take_over_what_is_behind_its_beginning(
    dtype: torch.dtype, length: int
) -> None:
    """A masked column is still multiplied by 0, and 0 times another user's infinity is NaN."""
    cache = PageCache(KIND._replace(dtype=dtype))
    kind = cache.kind
    before = write(cache, 0, [0], length)
    cache.begin(0, [length], 9)
    bad = torch.full((1, kind.heads, 9, kind.dim), torch.inf).to(dtype)
    cache.update(bad, bad, 1)
    cache.write_row(1, cache.row(0, length + 9), length)
    after = write(cache, 1, [length], 1)
    assert torch.equal(after[0, :, :length], before[0])
    for page in cache.by_window[0].rows[1]:
        assert page.numbers.isfinite().all()


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"),
    reason="needs the GNU C library",
)
def test_the_system_gets_back_the_memory_of_many_pages() -> None:
    def resident() -> int:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    before, others = resident(), []
    cache = PageCache(PageKind(layers=30, heads=3, dim=64, dtype=torch.bfloat16))
    for _ in range(3):  # the C library changes its way when first freeing blocks of this size
        cache.begin(0, [0] * 10, 20 * PAGE)
        held = cache.nbytes
        kept = cache.row(0, 20 * PAGE)
        for step in range(PAGE + 1):
            cache.begin(0, [20 * PAGE + step] * 10, 1)
            others.append(torch.empty(1000))
        cache.free()
    assert resident() - before < held / 2
    assert len(kept) == 20


def test_rows_with_the_same_pages_are_one_task() -> None:
    cache = PageCache(KIND)
    write(cache, 0, [0], BLOCK * PAGE + 1)
    for row in (1, 2):
        cache.copy_row(0, row, BLOCK * PAGE + 1)
    write(cache, 3, [0], PAGE)
    cache.begin(0, [BLOCK * PAGE + 1] * 3 + [PAGE], 1)
    _, tasks, following = cache.by_window[0]._held
    assert tasks.tolist() == [[0, 0], [0, 3], [1, 0], [1, 1], [1, 2]]
    assert following.tolist() == [[1, 2, -1, -1], [-1] * 4]


WINDOW = 100
DROPPED = BLOCK * PAGE  # columns that are dropped together


def behind_windows() -> PageCache:
    """Return the cache of two layers, of which the second has a window."""
    return PageCache(KIND, [0, WINDOW])


def test_a_row_drops_what_its_windows_do_not_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "BEHIND", 50)
    cache, whole = behind_windows(), PageCache(KIND)
    one = KIND._replace(layers=1).nbytes
    assert cache.row_bytes(DROPPED) == 4 * KIND.nbytes
    length = DROPPED + WINDOW + 50  # of which the last sees as little as the first that drops
    torch.manual_seed(0)
    write(cache, 0, [0], length)
    torch.manual_seed(0)
    write(whole, 0, [0], length)
    count = -(-length // PAGE)
    assert cache.nbytes == 2 * count * one
    assert cache.least(0) == 0
    cache.begin(0, [length - 1], 1)
    assert cache.nbytes == (2 * count - BLOCK) * one == cache.row_bytes(length)
    least = DROPPED + WINDOW - 1
    assert cache.least(0) == least
    for start in (length, least):
        torch.manual_seed(1)
        found = write(cache, 0, [start], 9)
        torch.manual_seed(1)
        expected = write(whole, 0, [start], 9)
        assert torch.equal(found[:, :, DROPPED:], expected[:, :, DROPPED:])
        assert not found[:, :, :DROPPED].any()
    with pytest.raises(AssertionError, match="dropped what"):
        cache.begin(0, [DROPPED - 1], 1)
    cache.begin(0, [0], 9)  # from its beginning on it is another row
    assert cache.least(0) == 0


def test_a_row_that_has_dropped_pages_is_copied_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "BEHIND", 0)
    cache = behind_windows()
    length = 2 * DROPPED + WINDOW
    write(cache, 0, [0], length)
    whole = cache.row(0, length)  # before it drops any
    expected = write(cache, 0, [length], 1)[0]
    kept = cache.row(0, length + 1)
    assert sum(page is None for page in kept) == 2 * BLOCK
    cache.copy_row(0, 1, length + 1)
    cache.write_row(2, kept, length + 1)
    cache.write_row(3, whole, length)
    assert [cache.least(row) for row in range(4)] == [2 * DROPPED + WINDOW - 1] * 3 + [0]
    after = write(cache, 0, [length + 1] * 3, 1)
    for row in range(3):
        assert torch.equal(after[row, :, :-1], expected)
    begun = write(cache, 3, [DROPPED + WINDOW], 1)[0]
    assert not begun[:, :DROPPED].any()
    assert torch.equal(begun[:, 2 * DROPPED : -1], expected[:, 2 * DROPPED : begun.shape[1] - 1])


# The C code


def attend(
    cache: PageCache, query: torch.Tensor, layer: int, window: int, few: bool
) -> torch.Tensor:
    """Attend by `native/pages.c`, or by `native/prefill.c`; `[rows, width, heads, dim]`."""
    rows, width, heads, dim = query.shape
    kind = cache.kind
    sizes = rows, kind.heads, heads // kind.heads, width, 0, dim
    strides = width * heads * dim, dim, heads * dim
    numbers = (*sizes, *strides, *[0] * 8)
    out = torch.empty_like(query)
    library = native.library()
    call = library.amulet_attend_pages if few else library.amulet_prefill_pages
    call.argtypes = [
        *(ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p),
        *(ctypes.c_long, ctypes.c_long, ctypes.c_float, ctypes.c_void_p),
    ]
    failed = call(
        (ctypes.c_long * len(numbers))(*numbers),
        kind.dtype == torch.bfloat16,
        query.data_ptr(),
        ctypes.addressof(cache.of_layer(1)[0].in_c),
        layer,
        window,
        dim**-0.5,
        out.data_ptr(),
    )
    assert not failed
    return out


@needs_code
@examples(80)
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    dim=st.sampled_from([32, 64, 96, 128, 256]),
    groups=st.sampled_from([1, 3, 4]),
    shared=st.integers(0, 600),
    own=st.lists(st.integers(0, 300), min_size=1, max_size=4),
    width=st.sampled_from([1, 3, 17]),
    window=st.sampled_from([0, 5, 64, 300]),
    drops=st.booleans(),
    few=st.booleans(),
    seed=st.integers(0, 99),
)
def test_attention_over_pages_is_exact(
    dtype: torch.dtype,
    dim: int,
    groups: int,
    shared: int,
    own: list[int],
    width: int,
    window: int,
    drops: bool,
    few: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    cache = PageCache(PageKind(2, 2, dim, dtype), [0, window] if drops else [])
    layer = 0 if drops and window else 1  # among the pages of the layer that is attended to
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pages, "BEHIND", 0)
        _check_attention(cache, dim, groups, shared, own, width, window, layer, few)


def _check_attention(
    cache: PageCache,
    dim: int,
    groups: int,
    shared: int,
    own: list[int],
    width: int,
    window: int,
    layer: int,
    few: bool,
) -> None:
    dtype = cache.kind.dtype
    if shared:
        write(cache, 0, [0], shared)
    for row in range(len(own) - 1, -1, -1):
        if shared:
            cache.copy_row(0, row, shared)
        if own[row]:
            write(cache, row, [shared], own[row])
    starts = [shared + length for length in own]
    keys = write(cache, 0, starts, width)
    query = torch.randn(len(own), width, 2 * groups, dim).to(dtype)
    places, column = cache.positions[:, None, :, None], torch.arange(keys.shape[2])
    seen = column <= places
    if window:
        seen &= column > places - window
    exact = bounds.attention(query.transpose(1, 2), keys, -keys, seen, dim**-0.5)
    together = attend(cache, query, layer, window, few)
    bounds.check(together, exact)
    for row, start in enumerate(starts):  # alone, to the last bit
        cache.begin(row, [start], width)
        alone = attend(cache, query[row : row + 1].contiguous(), layer, window, few)
        assert torch.equal(alone[0], together[row])


# In the engine


def over_pages(kind: Kind, dtype: torch.dtype) -> Engine:
    """Return an engine over pages whatever the model's layers are."""
    model = random_model(kind, dtype=dtype, head_dim=32)
    engine = engine_over(model, prefix_bytes=2**24)
    engine.backend._cache = PageCache(page_kind(model), windows(model))
    return engine


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral", "gemma3"])
def test_answers_over_pages_are_those_over_buffers_in_float64(kind: Kind) -> None:
    pages = over_pages(kind, torch.float64)
    rows = engine_over(random_model(kind, dtype=torch.float64, head_dim=32), prefix_bytes=2**24)
    assert isinstance(rows.backend, TransformersBackend)
    assert isinstance(rows.backend._cache, RowCache)
    generator = torch.Generator().manual_seed(0)
    common = torch.randint(0, 256, (150,), generator=generator).tolist()
    answers = []
    for engine in (pages, rows):
        made = [
            Generation(
                prompts=[[*common[:n], *[n] * 9], [*common[:n], 7], [5, n]],
                weights=[1.5, -0.5],
                max_new_tokens=12,
            )
            for n in (30, 150, 120)
        ]
        for generation in made:
            engine.admit(generation)
            engine.step()
        while engine.running:
            engine.step()
        again = Generation(prompts=[[*common, 7, *made[1].token_ids, 3]], max_new_tokens=5)
        engine.admit(again)
        while engine.running:
            engine.step()
        assert again.cached_tokens >= 150
        answers.append([generation.token_ids for generation in (*made, again)])
        assert engine.backend.nbytes == 0
    assert answers[0] == answers[1]


@needs_code
def test_a_steered_request_holds_its_shared_prompt_once() -> None:
    model = random_model("llama", dtype=torch.float32, head_dim=64)
    pack_linears(model)
    assert are_native(model)
    engine = engine_over(model)
    kind = page_kind(model)
    prompt = torch.randint(0, 256, (1000,), generator=torch.Generator().manual_seed(0)).tolist()
    for prompts in ([prompt], [[*prompt, *[5] * 20], [5] * 20, [*prompt, 7]]):
        weights = [1.0, 0.5][: len(prompts) - 1]
        generation = Generation(prompts=prompts, weights=weights, max_new_tokens=9)
        engine.admit(generation)
        engine.step()
        whole = -(-1000 // PAGE)  # the plain request's pages, the last of which is partly filled
        shared = 1000 // PAGE
        pages = whole if len(prompts) == 1 else shared + 2 + 1
        assert engine.backend.nbytes == pages * kind.nbytes
        engine.retire(generation)
        assert engine.backend.nbytes == 0


@needs_code
def test_kept_rows_of_a_request_count_what_they_share_once() -> None:
    model = random_model("llama", dtype=torch.float32, head_dim=64)
    pack_linears(model)
    engine = engine_over(model, prefix_bytes=2**24)
    prompt = torch.randint(0, 256, (1000,), generator=torch.Generator().manual_seed(0)).tolist()
    engine.admit(Generation(prompts=[[*prompt, 5], [*prompt, 7]], weights=[1.0], max_new_tokens=1))
    assert engine.running == []
    assert engine.prefixes.nbytes == (1000 // PAGE + 2) * page_kind(model).nbytes


@needs_code
@pytest.mark.parametrize("kind", ["mistral", "gemma3"])
def test_a_long_answer_holds_its_windows_only(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tokens are as with all columns. The third prompt can begin where the first two part."""
    monkeypatch.setattr(pages, "BEHIND", 0)
    prompt = torch.randint(0, 256, (1200,), generator=torch.Generator().manual_seed(0)).tolist()
    answers, held, cached = [], [], []
    for drops in (True, False):
        model = random_model(kind, dtype=torch.float32, head_dim=64)
        model.config.max_position_embeddings = 4096
        pack_linears(model)
        engine = engine_over(model, prefix_bytes=2**26)
        if not drops:
            engine.backend._cache = PageCache(page_kind(model))
        for ending in (5, 6, 7):
            asked = Generation(prompts=[[*prompt, *[ending] * 300]], max_new_tokens=30)
            engine.admit(asked)
            engine.step()
            held.append(engine.backend.nbytes)
            while engine.running:
                engine.step()
            answers.append(asked.token_ids)
            cached.append(asked.cached_tokens)
    assert answers[:3] == answers[3:]
    assert cached == [0, 0, 1200, 0, 1200, 1200]
    share = {"mistral": 4 / 24, "gemma3": (4 / 24 + 1) / 2}[kind]
    assert held[0] == held[2] == share * held[3]
