"""Where memory is short, at whatever tensor: the answers after it are right, nothing is held."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from amulet import Amulet
from amulet.backends.transformers import pages
from amulet.backends.transformers.backend import page_kind
from amulet.backends.transformers.cache import COLUMN_STEP, RowCache, RowsInPass
from amulet.backends.transformers.compiled import CompiledStep
from amulet.backends.transformers.cpu import native, rowwise
from amulet.backends.transformers.cpu.layers import are_native
from amulet.backends.transformers.cpu.packed_layers import Int8Linear, PackedLinear
from amulet.backends.transformers.cpu.packing import pack_linears
from amulet.backends.transformers.pages import PAGE, PageCache, PageKind
from amulet.decoding.engine import Engine
from amulet.decoding.generation import Generation
from amulet.errors import ModelError, OutOfMemoryError, RequestError, is_out_of_memory
from amulet.models.loading import load_pretrained
from amulet.serve.errors import from_amulet
from tests.engines import engine_over
from tests.faults import FAULTS, SHORTAGES, Allocations, admit, step
from tests.marks import needs_bfloat16_code, needs_code
from tests.models import ScriptedModel, random_model


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (FAULTS["gpu"](), True),
        (FAULTS["cpu"](), True),
        (torch.OutOfMemoryError("of whatever text"), True),
        (
            RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4 bytes."),
            True,
        ),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), True),
        (RuntimeError("std::bad_alloc"), True),
        (MemoryError(), True),
        (OSError(12, "Cannot allocate memory"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
        (OutOfMemoryError("Out of memory on cpu"), False),  # it is named already
        (RequestError("not enough memory"), False),
    ],
)
def test_which_errors_say_that_memory_is_short(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) == expected


def test_what_pytorch_raises_here_is_known() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**50)
    assert is_out_of_memory(raised.value)


# The cache


def two_layers(rows: int = 1, columns: int = 5) -> RowCache:
    """Return a cache whose rows hold 1, 2, ... in the first layer and negated in the second."""
    cache = RowCache()
    cache.reserve(rows, columns)
    cache.begin(0, [0] * rows, columns)
    numbers = torch.arange(1.0, rows * columns + 1).view(rows, 1, columns, 1)
    for layer, sign in enumerate((1, -1)):
        cache.update(
            sign * numbers.expand(-1, 2, -1, 4), sign * numbers.expand(-1, 2, -1, 8), layer
        )
        cache.update_indexer(sign * numbers[:, 0].expand(-1, -1, 6), layer)
    return cache


def allocations(run: Callable[[], object]) -> int:
    with Allocations() as counted:
        run()
    return counted.count


INTERRUPTED = {**FAULTS, "interrupt": lambda: KeyboardInterrupt("Ctrl-C")}


def raises(fault: str) -> Any:
    error = INTERRUPTED[fault]()
    return pytest.raises(type(error), match=re.escape(str(error)))


@pytest.mark.parametrize("fault", INTERRUPTED)
@pytest.mark.parametrize("room", [(1, 600), (3, 5), (3, 600)])
def test_reserve_is_all_or_nothing(room: tuple[int, int], fault: str) -> None:
    count = allocations(lambda: two_layers().reserve(*room)) - allocations(two_layers)
    assert count >= 6
    for place in range(1, count + 1):
        cache = two_layers()
        before, capacity = cache.row(0, 5), cache.capacity
        with raises(fault), Allocations(place, INTERRUPTED[fault]):
            cache.reserve(*room)
        assert cache.capacity == capacity == (1, COLUMN_STEP)
        keys, values = cache.buffers(0, 1)
        assert {tuple(buffer.shape) for buffer in (*keys, *values)} == {
            (1, 2, COLUMN_STEP, 4),
            (1, 2, COLUMN_STEP, 8),
        }
        assert all(map(torch.equal, cache.row(0, 5), before))
        cache.begin(0, [0, 0], 600)
        with pytest.raises(IndexError, match="no room for 2 rows of 600 tokens"):
            cache.update(torch.ones(2, 2, 600, 4), torch.ones(2, 2, 600, 8), 0)
        cache.reserve(*room)
        assert cache.capacity >= room
        assert all(map(torch.equal, cache.row(0, 5), before))
        assert not any(b[1:].any() or b[:, :, 5:].any() for b in cache._buffers)


@pytest.mark.parametrize("fault", INTERRUPTED)
def test_room_made_as_before_is_all_or_nothing(fault: str) -> None:
    for place in range(1, 7):
        cache = two_layers()
        cache.free()
        with raises(fault), Allocations(place, INTERRUPTED[fault]):
            cache.reserve(2, 300)
        assert (cache.capacity, cache.nbytes, len(cache)) == ((0, 0), 0, 0)
        cache.reserve(2, 300)
        keys, values = cache.buffers(0, 2)
        assert [tuple(made.shape) for made in keys] == 2 * [(2, 2, 2 * COLUMN_STEP, 4)]
        assert [tuple(made.shape) for made in values] == 2 * [(2, 2, 2 * COLUMN_STEP, 8)]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_row_that_could_not_be_written_is_written_later(fault: str) -> None:
    given = two_layers().row(0, 5)
    for place in range(1, 7):
        cache = RowCache()
        cache.reserve(1, 5)
        with raises(fault), Allocations(place, FAULTS[fault]):
            cache.write_row(0, given, 5)
        cache.write_row(0, given, 5)
        assert all(map(torch.equal, cache.row(0, 5), given))


def test_forgetting_needs_no_memory() -> None:
    def forget() -> None:
        cache.copy_row(0, 1, 3)
        cache.blank()
        cache.free()
        cache.clear()

    cache = two_layers(2)
    assert allocations(forget) == 0


def test_a_layer_with_other_heads_is_refused() -> None:
    cache = two_layers()
    with pytest.raises(IndexError, match=r"\(2, 16\) numbers in buffers of \[1, 2, 256, 4\]"):
        cache.buffers_of(0, (2, 16), (2, 16), torch.ones(1))


# An answer

TURN = "Tell me of the long road home.\n"


def conversation(tokenizer: PreTrainedTokenizerFast, *texts: str) -> list[int]:
    return tokenizer.encode(TURN + "".join(texts))


class Scene:
    """One answer is kept, one runs, and a third comes that begins as the first did.

    The third's prefill and all that follows is the part in which something may fail.
    """

    def __init__(self, engine: Engine, prompts: list[list[list[int]]], tokens: int) -> None:
        self.engine = engine
        kept, going, new = (
            Generation(prompts=rows, weights=[1.0] * (len(rows) - 1), max_new_tokens=tokens)
            for rows in prompts
        )
        self.kept, self.going, self.new = kept, going, new
        engine.admit(kept)
        while engine.running:
            engine.step()
        engine.admit(going)
        engine.step()

    def play(self) -> None:
        admit(self.engine, self.new)
        while self.engine.running:
            step(self.engine)


def check_every_allocation(scene: Callable[[], Scene], kinds: list[str], every: int = 1) -> None:
    """Let one allocation after the other fail; see that all goes on, and nothing is held."""
    model_answers = scene()
    with Allocations() as counted:
        model_answers.play()
    kept, going, new = model_answers.kept, model_answers.going, model_answers.new
    assert kept.done
    assert {kept.error, going.error, new.error} == {None}
    errors: list[BaseException] = []
    gc.collect()
    before = live_bytes()
    for place in range(1, counted.count + 1, every):
        for kind in kinds:
            now = scene()
            with Allocations(place, FAULTS[kind]):
                now.play()
            failed = [g for g in (now.going, now.new) if g.error is not None]
            if now.new in failed and not now.new.token_ids:
                assert now.going.error is None, "what joins in vain ends nobody else's answer"
            for found, expected in ((now.going, going), (now.new, new)):
                if found.error is None:
                    assert found.token_ids == expected.token_ids
                    assert found.finish_reason == expected.finish_reason
                else:
                    errors += [found.error] if kind in SHORTAGES else []
                    is_named = isinstance(found.error, OutOfMemoryError)
                    assert is_named == (kind in SHORTAGES), found.error
            assert now.engine.running == now.engine._owners == []
            assert now.engine.backend.nbytes == 0
            assert now.engine.prefixes.nbytes <= now.engine.prefixes.limit
            for found, expected in ((now.going, going), (now.new, new)):
                again = Generation(
                    prompts=found.prompts,
                    weights=found.weights,
                    max_new_tokens=found.max_new_tokens,
                )
                now.engine.admit(again)
                while now.engine.running:
                    now.engine.step()
                assert again.token_ids == expected.token_ids
            now.engine.prefixes.clear()  # the errors hold the engine
    assert errors
    del now, found, failed, again
    gc.collect()
    assert live_bytes() - before < 2**10 * len(errors), (
        "the errors hold what failed passes had computed"
    )


def live_bytes() -> int:
    """Return the bytes of all tensors that somebody holds."""
    tensors = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor)]
    storages = [t.untyped_storage() for t in tensors if t.layout == torch.strided]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def test_any_allocation_of_a_scripted_answer_may_fail(tokenizer: PreTrainedTokenizerFast) -> None:
    """The model reads its history off the cache: a row that is not right changes the answer."""
    answers = {"brief": "Be", "pirate": "Ar", "": "So"}
    model = ScriptedModel(tokenizer, answers)
    prompts = [
        [conversation(tokenizer)],
        [conversation(tokenizer, "Be brief.\n"), conversation(tokenizer, "So.\n")],
        [conversation(tokenizer, "As a pirate.\n"), conversation(tokenizer, "Now.\n")],
    ]

    def scene() -> Scene:
        return Scene(engine_over(model, prefix_bytes=2**20), prompts, 3)

    check_every_allocation(scene, list(FAULTS))


@needs_bfloat16_code
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_allocation_of_an_answer_of_layers_in_c_may_fail(dtype: torch.dtype) -> None:
    model = random_model("llama", dtype=dtype, head_dim=64)
    pack_linears(model)
    assert are_native(model)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 256, (3, 90), generator=generator).tolist()
    prompts = [[ids[0]], [ids[1], ids[1][40:]], [[*ids[0], 7, 8], ids[2]]]

    def scene() -> Scene:
        return Scene(engine_over(model, prefix_bytes=2**20, drafts=True), prompts, 4)

    check_every_allocation(scene, list(SHORTAGES), every=5)


@needs_code
def test_a_pass_that_fails_once_it_has_its_pages_harms_no_other_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By then its rows are cut back, and have dropped pages that they would not see again."""
    monkeypatch.setattr(pages, "BEHIND", 0)
    model = random_model("mistral", head_dim=64, layers=2)
    pack_linears(model)
    assert are_native(model)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 256, (3, 300), generator=generator).tolist()
    prompts = [[ids[0]], [ids[1], ids[1][20:]], [[*ids[0], 7, 8], ids[2]]]
    begin = RowsInPass.begin

    def play(fail_at: int) -> tuple[Scene, int]:
        passes = 0

        def begun(*given: Any) -> None:
            nonlocal passes
            passes += 1
            if passes == fail_at:
                raise FAULTS["cpu"]()
            begin(*given)

        scene = Scene(engine_over(model, prefix_bytes=2**24, drafts=True), prompts, 4)
        assert min(map(scene.engine.backend.least, range(2))) > 0, "no row has dropped a page"
        with monkeypatch.context() as patch:
            patch.setattr(RowsInPass, "begin", begun)
            scene.play()
        return scene, passes

    expected, count = play(0)
    assert count > 4
    ended = []
    for place in range(1, count + 1):
        now, _ = play(place)
        ended.append([now.going.error is not None, now.new.error is not None])
        for found, right in ((now.going, expected.going), (now.new, expected.new)):
            if found.error is None:
                assert found.token_ids == right.token_ids
            again = Generation(prompts=found.prompts, weights=found.weights, max_new_tokens=4)
            now.engine.admit(again)
            while now.engine.running:
                now.engine.step()
            assert again.token_ids == right.token_ids
    assert [False, True] in ended, "a prompt's pass ends no other answer"
    assert [True, True] in ended, "a step's ends all that take part"


@pytest.mark.parametrize("kind", SHORTAGES)
def test_running_answers_outlive_a_prompt_without_room(
    tokenizer: PreTrainedTokenizerFast, kind: str
) -> None:
    engine = engine_over(ScriptedModel(tokenizer, "one two three"))
    going = Generation(prompts=[conversation(tokenizer)], max_new_tokens=13)
    engine.admit(going)
    with Allocations(1, FAULTS[kind]), pytest.raises(OutOfMemoryError, match="3 rows of up to 900"):
        engine.admit(Generation(prompts=[[65] * 900, [66] * 900], weights=[1.0]))
    while engine.running:
        engine.step()
    assert tokenizer.decode(going.token_ids) == "one two three"


@pytest.mark.parametrize("kind", FAULTS)
def test_a_row_that_can_not_be_kept_ends_no_answer(
    tokenizer: PreTrainedTokenizerFast, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_over(ScriptedModel(tokenizer, "one two three"), prefix_bytes=2**20)
    short, long = (Generation(prompts=[conversation(tokenizer)], max_new_tokens=n) for n in (3, 13))
    engine.admit(short)
    engine.admit(long)

    def no_row(*_: object) -> tuple[torch.Tensor, ...]:
        raise FAULTS[kind]()

    monkeypatch.setattr(RowCache, "row", no_row)
    while engine.running:
        engine.step()
    assert [tokenizer.decode(g.token_ids) for g in (short, long)] == ["one", "one two three"]
    assert engine.prefixes.nbytes == 0


@pytest.mark.parametrize("kind", SHORTAGES)
def test_an_interrupt_or_a_shortage_at_the_first_token_leaves_no_row(
    tokenizer: PreTrainedTokenizerFast, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_over(ScriptedModel(tokenizer, "one two three"))

    for fault in (FAULTS[kind](), KeyboardInterrupt()):
        with monkeypatch.context() as patch:
            patch.setattr("amulet.decoding.engine.choose_tokens", Mock(side_effect=fault))
            with pytest.raises((OutOfMemoryError, KeyboardInterrupt)):
                engine.admit(Generation(prompts=[conversation(tokenizer)]))
        assert (engine.running, engine._owners, engine.backend.nbytes) == ([], [], 0)


@pytest.mark.parametrize("kind", SHORTAGES)
def test_callers_and_clients_learn_that_memory_is_short(
    tokenizer: PreTrainedTokenizerFast, kind: str
) -> None:
    """In a forward pass, and in a processor of the caller's own."""
    model = ScriptedModel(tokenizer, "abc")
    amulet = Amulet(model, tokenizer)

    def processor(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        raise FAULTS[kind]()

    model.fail_with = FAULTS[kind]()
    for options in ({}, {"logits_processor": [processor]}):
        with pytest.raises(OutOfMemoryError) as raised:
            amulet.chat([{"role": "user", "content": "Hello"}], **options)
        told = from_amulet(raised.value, ("messages",))
        assert (told.status, told.code, told.retry_after) == (503, "out_of_memory", 1)
    assert amulet.chat([{"role": "user", "content": "Hello"}]).text == "abc"


# C code, compiled code, packing and loading


@pytest.fixture
def native_engine() -> Engine:
    model = random_model("llama", dtype=torch.float32, head_dim=64)
    pack_linears(model)
    return engine_over(model)


@needs_code
def test_c_code_writes_and_reads_within_the_rows_pages_alone(native_engine: Engine) -> None:
    """Whatever a cache says of itself: the addresses of its pages count."""
    layer = native_engine.backend.model.model.layers[0].native
    hidden, turned = torch.zeros(2, 1, 64), torch.zeros(2, 1, 64)

    def whole(places: list[int], kind: PageKind, rows: int = 2) -> torch.Tensor:
        cache = PageCache(kind)
        cache.begin(0, [0] * rows, 2 * PAGE)
        cache.begin(0, [2 * PAGE - 1] * (rows - 1) + [PAGE - 1], 1)
        cache._positions = torch.tensor(places)[:, None]
        cache.by_window[0].in_c.places = cache._positions.data_ptr()
        return layer._whole(hidden, turned, turned, cache)

    kind = page_kind(native_engine.backend.model)
    assert whole([2 * PAGE - 1, PAGE - 1], kind).shape == hidden.shape
    for places, other in (
        ([2 * PAGE, 0], kind),
        ([0, PAGE], kind),
        ([-1, 0], kind),
        ([0, 0], kind._replace(layers=0)),
        ([0, 0], kind._replace(heads=1)),
        ([0, 0], kind._replace(dim=32)),
        ([0, 0], kind._replace(dtype=torch.bfloat16)),
        ([0], kind),
    ):
        with pytest.raises(IndexError, match=r"no room|outside"):
            whole(places, other, len(places))


@needs_code
def test_attention_in_c_refuses_shapes_that_do_not_fit() -> None:
    query, keys = torch.zeros(2, 4, 3, 64), torch.zeros(2, 2, 40, 64)
    attend = torch.ops.amulet.attend
    assert attend(query, keys, keys, None, 1.0).shape == (2, 3, 4, 64)
    for wrong in (
        (query, keys, keys[:, :, :20]),
        (query, keys[:1], keys[:1]),
        (query[:, :3], keys, keys),
        (query, keys[:, :, :2], keys[:, :, :2]),
        (query, keys.bfloat16(), keys.bfloat16()),
        (query[..., :40], keys[..., :40], keys[..., :40]),
        (query.double(), keys.double(), keys.double()),
    ):
        with pytest.raises(ValueError, match="do not fit together"):
            attend(*wrong, None, 1.0)


@needs_code
def test_operations_in_c_refuse_shapes_that_do_not_fit() -> None:
    one = torch.ones
    heads, angles = one(2, 3, 4, 64), one(1, 3, 64)
    for wrong in (
        lambda: rowwise.norm(one(3, 64), one(48), 1e-5),
        lambda: rowwise.norm(one(3, 40), one(40), 1e-5),
        lambda: rowwise.norm(one(3, 64), one(64, dtype=torch.bfloat16), 1e-5),
        lambda: rowwise.norm(one(64, 64).T, one(64), 1e-5),
        lambda: rowwise.norm(one(3, 64).double(), one(64).double(), 1e-5),
        lambda: rowwise.rotate_(heads, angles[:, :2], angles[:, :2]),
        lambda: rowwise.rotate_(heads, angles, one(1, 3, 32)),
        lambda: rowwise.rotate_(heads.transpose(1, 2), one(1, 4, 64), one(1, 4, 64)),
        lambda: rowwise.gate_(one(3, 64), one(2, 64)),
        lambda: rowwise.gate_(one(3, 8), one(3, 8)),
    ):
        with pytest.raises(ValueError, match="fit together"):
            wrong()
    query, keys = one(2, 4, 3, 64), one(2, 2, 40, 64)
    with pytest.raises(ValueError, match=r"mask of torch\.float32"):
        torch.ops.amulet.attend(query, keys, keys, one(2, 1, 3, 40), 1.0)
    packed = PackedLinear(torch.nn.Linear(64, 48).requires_grad_(False))
    packed.bias = one(32)
    with pytest.raises(ModelError, match=r"bias of torch\.float32, \[32\]: expected .* \[48\]"):
        packed(one(1, 64))


@needs_code
def test_no_memory_in_c_is_out_of_memory(
    native_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Short:
        def __getattr__(self, name: str) -> object:
            own = getattr(code, name)
            return own if name != "amulet_layer" else lambda *_: 1

    code = native.library()
    with monkeypatch.context() as patch:
        patch.setattr(native, "library", Short)
        with pytest.raises(OutOfMemoryError, match="1 rows of up to 20 tokens"):
            native_engine.admit(Generation(prompts=[list(range(20))]))
    assert native_engine.backend.nbytes == 0


@pytest.mark.parametrize("kind", SHORTAGES)
def test_a_compiled_step_without_memory_is_compiled_later(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    compiled = CompiledStep(random_model("llama"))

    def run(*_: object) -> torch.Tensor:
        raise FAULTS[kind]()

    monkeypatch.setattr(compiled, "_compiled", object())
    monkeypatch.setattr(compiled, "_run", run)
    with pytest.raises(type(FAULTS[kind]())):
        compiled(*[torch.zeros(1)] * 3, [], [], 1)
    assert not compiled.broken


@pytest.mark.parametrize("kind", SHORTAGES)
@pytest.mark.parametrize("pack", [True, "int8"])
def test_packing_without_memory_leaves_a_model_that_decodes(kind: str, pack: bool | str) -> None:
    dtype = torch.bfloat16
    model = random_model("llama", dtype=dtype)
    prompt = list(range(20))
    with torch.inference_mode():
        expected = model(torch.tensor([prompt])).logits
    count = allocations(lambda: pack_linears(random_model("llama", dtype=dtype), pack))
    count -= allocations(lambda: random_model("llama", dtype=dtype))
    with Allocations(count // 2, FAULTS[kind]), pytest.raises(OutOfMemoryError, match="pack=False"):
        pack_linears(model, pack)
    packed = [m for m in model.modules() if isinstance(m, PackedLinear | Int8Linear)]
    assert 0 < len(packed) < 29
    generation = Generation(prompts=[prompt], max_new_tokens=1)
    engine_over(model).admit(generation)
    if pack is True:
        assert generation.token_ids == [int(expected[0, -1].argmax())]


@pytest.mark.parametrize("error", [FAULTS["gpu"](), FAULTS["cpu"](), MemoryError()])
def test_a_model_that_does_not_fit_into_memory_says_so(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    error: Exception,
) -> None:
    from transformers import AutoModelForCausalLM

    random_model("llama").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(
        OutOfMemoryError, match="does not fit into memory: load it in a smaller dtype"
    ):
        load_pretrained(tmp_path, device="cpu")
