"""Steps that are recorded and replayed decode what Transformers does.

Without a GPU the recording is one that runs the pass again; with one it is a CUDA graph.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable

import pytest
import torch
from torch._dynamo.utils import counters

from amulet.backends.transformers.cache import GPU_COLUMN_STEP, BufferKind, RowCache
from amulet.backends.transformers.cuda import graphs
from amulet.backends.transformers.cuda.graphs import Graph, StepGraphs, _can_record, _given
from amulet.decoding.engine import Engine
from amulet.errors import OutOfMemoryError
from tests.engines import engine_over
from tests.models import KINDS, Kind, random_model
from tests.oracles.reference import generate
from tests.oracles.test_decode import TOKENS, decodes_as_transformers, ids, plain, run, steered
from tests.oracles.test_faster_steps import _Foretold, _passes, needs_compiler

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class _Rerun:
    """Stands in for a CUDA graph: runs the pass over the same tensors again."""

    def __init__(self, forward: Callable[[], torch.Tensor]) -> None:
        self._forward = forward
        self.logits = forward()

    def replay(self) -> None:
        self.logits.copy_(self._forward())


@pytest.fixture(autouse=True)
def _recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let steps be recorded on a CPU."""
    if DEVICE == "cuda":
        return

    def record(
        self: StepGraphs, inputs: torch.Tensor, forward: Callable[[], torch.Tensor]
    ) -> Graph:
        recording = _Rerun(forward)
        return Graph(inputs, recording, recording.logits)  # type: ignore[arg-type]

    made = StepGraphs.__init__

    def init(self: StepGraphs, *given: object) -> None:
        made(self, *given)  # type: ignore[arg-type]
        self._possible = True

    monkeypatch.setattr(graphs, "try_triton", lambda _: None)
    monkeypatch.setattr(StepGraphs, "_recording", record)
    monkeypatch.setattr(StepGraphs, "__init__", init)


def _kept(engine: Engine) -> Engine:
    """Let an engine keep its cache, and with it the graphs, from one answer to the next."""
    engine.backend._kept_bytes = 2**30
    return engine


@pytest.mark.parametrize("kind", KINDS)
def test_recorded_steps_decode_what_transformers_does(kind: Kind) -> None:
    """Rows in number and length as they come: level or not, with spare ones, joining, leaving."""
    model = random_model(kind, dtype=torch.float64).to(DEVICE)
    rng = random.Random(kind)
    engine = _kept(engine_over(model))
    widths = _passes(engine)
    for lengths in ((40,), (20, 33, 64), (30, 9)):
        decodes_as_transformers(engine, model, rng, lengths)
    assert widths.count(1) <= len(engine.backend._graphs._asked), "a step ran without its graph"


@needs_compiler
@pytest.mark.slow
def test_layers_are_compiled_once_for_all(caplog: pytest.LogCaptureFixture) -> None:
    kind: Kind = "gemma3"  # with and without a window
    caplog.set_level(logging.INFO, "amulet")
    torch.compiler.reset()
    counters.clear()
    model = random_model(kind, dtype=torch.float64).to(DEVICE)
    rng = random.Random(kind)
    engine = _kept(engine_over(model, compile=True))
    engine.backend._compiled._by_layer = True
    for lengths in ((40,), (20, 33, 64)):
        prompts = [ids(rng, length) for length in lengths]
        generations = [plain(prompt) for prompt in prompts]
        run(engine, generations)
        for prompt, generation in zip(prompts, generations, strict=True):
            assert generation.token_ids == generate(model, prompt, TOKENS)
    assert not engine.backend._compiled.broken
    assert engine.backend._graphs._graphs
    assert all(shape[2] for shape in engine.backend._graphs._graphs)
    assert sum("Compiled the decode step" in text for text in caplog.messages) == 1
    assert counters["stats"]["unique_graphs"] == 2  # for one token and for several; none since
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_graphs_are_made_anew_when_the_cache_grows() -> None:
    model = random_model("llama", dtype=torch.float64).to(DEVICE)
    prompt = ids(random.Random(1), GPU_COLUMN_STEP - TOKENS - 10)
    engine = _kept(engine_over(model))
    generation = plain(prompt)
    run(engine, [generation])
    (first,) = engine.backend._graphs._graphs.values()
    had = engine.backend._cache.capacity[1]
    longer = plain(prompt + generation.token_ids[:40])
    run(engine, [longer])
    (second,) = engine.backend._graphs._graphs.values()
    assert longer.token_ids == generate(model, longer.prompts[0], TOKENS)
    assert second is not first
    assert engine.backend._cache.capacity[1] > had


def test_a_changed_model_is_recorded_anew() -> None:
    model = random_model("llama", dtype=torch.float64).to(DEVICE)
    prompt = ids(random.Random(2), 30)
    engine = _kept(engine_over(model))
    before, after = plain(prompt), plain(prompt)
    run(engine, [before])
    model.lm_head = torch.nn.Linear(64, 320, bias=False, dtype=torch.float64, device=DEVICE)
    torch.nn.init.normal_(model.lm_head.weight, generator=torch.Generator(DEVICE).manual_seed(0))
    run(engine, [after])
    assert before.token_ids != after.token_ids == generate(model, prompt, TOKENS)


def test_spare_rows_harm_no_prefill_that_is_under_way() -> None:
    """Three rows decode by a graph of four while a long prompt fills the fourth."""
    model = random_model("llama", dtype=torch.float64).to(DEVICE)
    rng = random.Random(7)
    engine = _kept(engine_over(model))
    engine.backend.chunk = 40  # a step of theirs after so many tokens
    prompts = [ids(rng, length) for length in (20, 31, 12, 390)]
    generations = [plain(prompt) for prompt in prompts]
    for generation in generations[:3]:
        engine.admit(generation)
    for _ in range(4):
        engine.step()
    decoded = len(generations[0].token_ids)
    engine.admit(generations[3])
    assert len(generations[0].token_ids) >= decoded + 8
    assert (4, 1, False) in engine.backend._graphs._graphs
    run(engine, [])
    for prompt, generation in zip(prompts, generations, strict=True):
        assert generation.token_ids == generate(model, prompt, TOKENS)


def test_padding_of_drafts_needs_no_positions_of_its_own() -> None:
    given = _given([[5, 6], [7, 8]], [10, 3], 4, 4, 99)
    assert given[0] == [[5, 6, 0, 0], [7, 8, 0, 0], [0] * 4, [0] * 4]
    assert given[1] == [[10, 11, 11, 11], [3, 4, 4, 4], [0] * 4, [0] * 4]
    assert given[2] == [[10, 11, 12, 13], [3, 4, 5, 6], [99] * 4, [99] * 4]


def test_models_whose_steps_differ_by_position_are_not_recorded() -> None:
    model = random_model("llama")
    assert _can_record(model)
    for name, value in (("num_local_experts", 8), ("attn_temperature_tuning", True)):
        setattr(model.config, name, value)
        assert not _can_record(model)
        setattr(model.config, name, None)
    model.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0}
    assert not _can_record(model)


def test_a_model_that_was_cast_decodes_on() -> None:
    model = random_model("llama").to(DEVICE)
    prompt = ids(random.Random(8), 30)
    engine = _kept(engine_over(model))
    run(engine, [plain(prompt)])
    model.to(torch.float64)
    generation = plain(prompt)
    run(engine, [generation])
    assert generation.token_ids == generate(model, prompt, TOKENS)


def test_a_long_answer_does_not_leave_long_rows_to_all() -> None:
    model = random_model("llama").to(DEVICE)
    engine = _kept(engine_over(model))
    engine.backend._cache = RowCache(column_step=16)
    run(engine, [plain(ids(random.Random(9), 400))])
    had = engine.backend._cache.capacity[1]
    short = plain(ids(random.Random(9), 20))
    run(engine, [short])
    assert engine.backend._cache.capacity[1] < had // 4


@pytest.mark.parametrize("running", [False, True])
def test_a_prompt_without_room_leaves_the_engine_as_it_was(
    monkeypatch: pytest.MonkeyPatch, running: bool
) -> None:
    model = random_model("llama", dtype=torch.float64).to(DEVICE)
    engine = _kept(engine_over(model))
    first = plain(ids(random.Random(10), 40))
    engine.admit(first)
    if not running:
        run(engine, [])
    zeros, made = BufferKind.zeros, [0]

    def makes_some(kind: BufferKind, rows: int, columns: int) -> torch.Tensor:
        made[0] += 1
        if made[0] == 4:
            raise torch.OutOfMemoryError("no room")
        return zeros(kind, rows, columns)

    monkeypatch.setattr(BufferKind, "zeros", makes_some)
    with pytest.raises(OutOfMemoryError):
        engine.admit(plain(ids(random.Random(11), 600)))
    second = plain(ids(random.Random(12), 300))
    run(engine, [second])
    for generation in (first, second):
        assert generation.token_ids == generate(model, generation.prompts[0], TOKENS)
    assert engine.backend._graphs.serves


def test_hooks_run_at_every_step(caplog: pytest.LogCaptureFixture) -> None:
    model = random_model("llama", dtype=torch.float64).to(DEVICE)
    prompt = ids(random.Random(3), 30)
    engine = _kept(engine_over(model))
    first, second = plain(prompt), plain(prompt)
    run(engine, [first])
    calls: list[int] = []
    model.model.layers[1].register_forward_hook(lambda *_: calls.append(1))
    caplog.set_level(logging.INFO, "amulet")
    run(engine, [second])
    assert second.token_ids == first.token_ids
    assert len(calls) == len(second.token_ids)
    run(engine, [plain(prompt)])
    (line,) = [text for text in caplog.messages if "CUDA graphs" in text]
    assert "hooks" in line


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_checks_of_drafts_are_recorded(kind: Kind) -> None:
    model = random_model(kind, dtype=torch.float64).to(DEVICE)
    prompt, base = ids(random.Random(4), 40), ids(random.Random(5), 23)
    expected = generate(model, prompt, TOKENS, base=base, strength=2.0)
    engine = engine_over(model, drafts=True)
    pair = steered(prompt, base, 2.0)
    pair.draft = _Foretold(expected, 0)
    run(engine, [pair])
    assert pair.token_ids == expected
    assert any(shape[1] > 1 for shape in engine.backend._graphs._graphs)


def test_what_can_not_be_recorded_runs_as_it_did(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(*_: object) -> Graph:
        raise RuntimeError("operation not permitted when stream is capturing")

    if DEVICE == "cpu":
        monkeypatch.setattr(StepGraphs, "_recording", refused)
    model = random_model("llama", dtype=torch.float64).to(DEVICE)
    prompt = ids(random.Random(5), 30)
    expected = generate(model, prompt, TOKENS)
    mlp = model.model.layers[1].mlp
    forward = mlp.forward
    mlp.forward = lambda hidden: forward(hidden) * (1.0 if hidden.sum().item() < 1e9 else 2.0)
    caplog.set_level(logging.INFO, "amulet")
    engine = engine_over(model)
    for _ in range(2):
        generation = plain(prompt)
        run(engine, [generation])
        assert generation.token_ids == expected
    assert not engine.backend._graphs.serves
    (line,) = [text for text in caplog.messages if "CUDA graphs" in text]
    assert line.startswith("Decode steps can't be CUDA graphs: ")


def test_an_adapter_is_run_at_every_step(caplog: pytest.LogCaptureFixture) -> None:
    model = random_model("llama", dtype=torch.float64).to(DEVICE)
    layer = model.model.layers[2].self_attn
    layer.q_proj = torch.nn.Module()  # as PEFT wraps a layer
    layer.q_proj.base_layer = torch.nn.Linear(64, 64, dtype=torch.float64, device=DEVICE)
    layer.q_proj.forward = layer.q_proj.base_layer.forward
    caplog.set_level(logging.INFO, "amulet")
    generation = plain(ids(random.Random(6), 30))
    engine = engine_over(model)
    run(engine, [generation])
    assert not engine.backend._graphs._graphs
    assert generation.token_ids == generate(model, generation.prompts[0], TOKENS)
    assert sum("adapter" in text for text in caplog.messages) == 1
