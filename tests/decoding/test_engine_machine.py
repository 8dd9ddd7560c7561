"""Whatever comes, goes and fails in whatever order: each token is that of a full recomputation.

The model of the machine keeps nothing: it passes each row whole, in float64, for every token.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from transformers import PreTrainedModel

from amulet.backends.transformers import pages
from amulet.backends.transformers.backend import page_kind, windows
from amulet.backends.transformers.cache import RowCache
from amulet.backends.transformers.cpu.packing import pack_linears
from amulet.backends.transformers.pages import PageCache
from amulet.decoding.generation import Generation
from amulet.errors import OutOfMemoryError
from tests.engines import engine_over
from tests.faults import FAULTS, SHORTAGES, Allocations, admit, step
from tests.models import Kind, random_model

IDS = st.integers(0, 255)
ENDS = frozenset(range(40, 60))
BEGINNINGS = torch.randint(0, 40, (3, 70), generator=torch.Generator().manual_seed(0)).tolist()
# Of a difference of scores: what float32 can't tell apart. The scores lie between -100 and 0, and
# are sums over layers of some 100 products each.
NEAR = {torch.float64: 0.0, torch.float32: 1e-3}


@cache
def models(kind: Kind, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Return the model that the engine decodes with, and the reference in float64.

    In float32 it is packed: where there is C code, all its layers are.
    """
    model = random_model(kind, dtype=dtype, head_dim=64)
    reference = copy.deepcopy(model).double()
    if dtype == torch.float32:
        pack_linears(model)
    return model, reference


class Machine(RuleBasedStateMachine):
    """One engine, and all that has been asked of it.

    Attributes:
        kind: of the model.
        dtype: of the model.
        pages: whether the cache is in pages, though no layer is C code.
    """

    kind: Kind = "llama"
    dtype: torch.dtype
    pages = False

    def __init__(self) -> None:
        super().__init__()
        model, self.reference = models(self.kind, self.dtype)
        self.engine = engine_over(model, prefix_bytes=2**18, drafts=True)
        self.engine.backend.chunk = 24  # prompts give way to steps, and rows grow, ever so often
        if self.pages:
            self.engine.backend._cache = PageCache(page_kind(model), windows(model))
        elif not isinstance(self.engine.backend._cache, PageCache):
            self.engine.backend._cache = RowCache(column_step=16)
        self.allocations = Allocations()
        self.asked: list[Generation] = []
        self.checked: dict[Generation, int] = {}
        self.passes_left = 0
        self.fault = "other"
        self.hook = model.register_forward_pre_hook(self._before_pass)
        self.scores = cache(self._scores)

    def teardown(self) -> None:
        self.hook.remove()

    def _before_pass(self, *_: object) -> None:
        self.passes_left -= 1
        if self.passes_left == 0:
            raise FAULTS[self.fault]()

    def _scores(self, row: tuple[int, ...]) -> torch.Tensor:
        with torch.inference_mode():
            logits = self.reference(torch.tensor([row]), use_cache=False).logits[0, -1]
        return logits.log_softmax(-1)

    # What happens

    @initialize()
    def ask_first(self) -> None:
        self._ask([BEGINNINGS[0][:40]], tokens=3)

    def _ask(self, *asked: Sequence[list[int]], tokens: int) -> None:
        generations = [
            Generation(
                prompts=prompts,
                weights=[1.5, 0.5][: len(prompts) - 1],
                max_new_tokens=tokens,
                end_ids=ENDS,
            )
            for prompts in asked
        ]
        self.asked += generations
        with self.allocations:
            while generations:
                count = self.engine.together(generations)
                admit(self.engine, *generations[:count])
                generations = generations[count:]

    @rule(
        beginning=st.sampled_from(BEGINNINGS),
        shared=st.integers(0, 70),
        own=st.lists(st.lists(IDS, min_size=1, max_size=40), min_size=1, max_size=3),
        tokens=st.integers(1, 8),
    )
    def ask(self, beginning: list[int], shared: int, own: list[list[int]], tokens: int) -> None:
        self._ask([[*beginning[:shared], *ids] for ids in own], tokens=tokens)

    @rule(
        asked=st.lists(
            st.lists(st.lists(IDS, min_size=1, max_size=12), min_size=1, max_size=3),
            min_size=2,
            max_size=3,
        ),
        shared=st.integers(0, 12),
        tokens=st.integers(1, 4),
    )
    def ask_at_once(self, asked: list[list[list[int]]], shared: int, tokens: int) -> None:
        begun = BEGINNINGS[0][:shared]
        self._ask(*([[*begun, *ids] for ids in prompts] for prompts in asked), tokens=tokens)

    @rule(
        data=st.data(),
        own=st.lists(IDS, min_size=1, max_size=20),
        tokens=st.integers(1, 8),
    )
    def go_on(self, data: st.DataObject, own: list[int], tokens: int) -> None:
        """The next turn of a conversation, whose rows may have been kept or still run."""
        before = data.draw(st.sampled_from(self.asked))
        self._ask([[*p, *before.token_ids, *own][:200] for p in before.prompts], tokens=tokens)

    @rule(times=st.integers(1, 4))
    def decode(self, times: int) -> None:
        for _ in range(times):
            with self.allocations:
                step(self.engine)

    @precondition(lambda self: self.engine.running)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        with self.allocations:
            try:
                self.engine.retire(data.draw(st.sampled_from(self.engine.running)))
            except Exception as error:
                self.engine.fail_all(error)

    @rule(kind=st.sampled_from(list(FAULTS)), after=st.integers(1, 150))
    def let_an_allocation_fail(self, kind: str, after: int) -> None:
        self.allocations.fail_at = self.allocations.count + after
        self.allocations.fault = FAULTS[kind]

    @rule(kind=st.sampled_from(list(FAULTS)), after=st.integers(1, 6))
    def let_a_pass_fail(self, kind: str, after: int) -> None:
        self.fault, self.passes_left = kind, after

    # What always holds

    @invariant()
    def every_token_is_the_reference_s(self) -> None:
        for generation in self.asked:
            for place in range(self.checked.get(generation, 0), len(generation.token_ids)):
                answer = tuple(generation.token_ids[:place])
                *wanted, base = (self.scores((*p, *answer)) for p in generation.prompts)
                whole = base + sum(
                    weight * (row - base)
                    for weight, row in zip(generation.weights, wanted, strict=True)
                )
                token = generation.token_ids[place]
                assert whole.max() - whole[token] <= NEAR[self.dtype], (generation, place)
            self.checked[generation] = len(generation.token_ids)

    @invariant()
    def every_end_has_its_reason(self) -> None:
        for generation in self.asked:
            ids, error = generation.token_ids, generation.error
            if error is not None:
                assert isinstance(error, OutOfMemoryError | ValueError)
            elif generation.finish_reason == "length":
                assert len(ids) == generation.max_new_tokens
            elif generation.finish_reason == "stop":
                assert ids[-1] in ENDS
            else:
                running = generation in self.engine.running
                assert running == (generation.finish_reason is None)
                assert not ENDS & set(ids)

    @invariant()
    def rows_are_whose_they_are(self) -> None:
        owners = [(g, i) for g in self.engine.running for i in range(len(g.prompts))]
        assert sorted(map(hash, owners)) == sorted(map(hash, self.engine._owners))

    @invariant()
    def nothing_is_held_for_nobody(self) -> None:
        assert self.engine.prefixes.nbytes <= self.engine.prefixes.limit
        if not self.engine.running:
            assert self.engine.backend.nbytes == 0


class InFloat64(Machine):
    dtype = torch.float64


class OverPages(Machine):
    dtype = torch.float64
    pages = True


class OverWindows(OverPages):
    """Rows drop what two of the four layers can't see again: four columns at a time."""

    kind = "gemma3"

    def __init__(self) -> None:
        self.patch = pytest.MonkeyPatch()
        for name, value in {"PAGE": 4, "BLOCK": 1, "BEHIND": 4}.items():
            self.patch.setattr(pages, name, value)
        super().__init__()

    def teardown(self) -> None:
        super().teardown()
        self.patch.undo()


class Packed(Machine):
    dtype = torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("machine", [InFloat64, OverPages, OverWindows, Packed])
def test_any_order_of_requests_steps_cancels_and_failures(machine: type[Machine]) -> None:
    whole = settings(
        settings.default,
        max_examples=settings.default.max_examples // 4,
        stateful_step_count=25,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(machine, settings=whole)


@pytest.mark.parametrize("kind", [InFloat64, OverPages, OverWindows])
def test_the_machine_sees_a_cache_that_is_not_right(
    kind: type[Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A test that can't fail is none: columns of a row that are lost must be found."""
    own, begin, had = RowCache.copy_row, PageCache.begin, PageCache.row

    def copy_short(cache: RowCache, source: int, target: int, length: int) -> None:
        own(cache, source, target, max(length - 2, 0))

    def write_to_shared(cache: PageCache, first: int, starts: list[int], width: int) -> None:
        for page in (page for row in cache.by_window[0].rows for page in row):
            page.shared = False
        begin(cache, first, starts, width)

    def empty(cache: PageCache, row: int, length: int) -> tuple[pages.Page | None, ...]:
        found = had(cache, row, length)
        return tuple(page and pages.Page(torch.zeros_like(page.numbers)) for page in found)

    monkeypatch.setattr(RowCache, "copy_row", copy_short)
    if kind is OverWindows:  # its pages are too small for two columns to change a token
        monkeypatch.setattr(PageCache, "row", empty)
    else:
        monkeypatch.setattr(PageCache, "begin", write_to_shared)
    machine = kind()
    try:
        machine.ask_first()
        machine.ask(BEGINNINGS[0], 40, [[200, 201]], 6)
        machine.decode(2)
        with pytest.raises(AssertionError):
            machine.every_token_is_the_reference_s()
    finally:
        machine.teardown()


@pytest.mark.parametrize("kind", SHORTAGES)
def test_the_machine_lets_things_fail(kind: str) -> None:
    machine = InFloat64()
    try:
        machine.ask_first()
        machine.let_an_allocation_fail(kind, 5)
        machine.decode(1)
        assert isinstance(machine.asked[0].error, OutOfMemoryError)
        machine.let_a_pass_fail(kind, 1)
        machine.ask(BEGINNINGS[1], 30, [[1, 2]], 4)
        assert isinstance(machine.asked[1].error, OutOfMemoryError)
    finally:
        machine.teardown()
