"""Steps that are recorded and replayed decode what Transformers does.

Without a GPU the recording is one that runs the pass again; with one it is a CUDA graph.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable

import pytest
import torch

from amulet.cache import GPU_COLUMN_STEP
from amulet.engine import Engine
from amulet.graphs import Graph, StepGraphs
from tests.models import KINDS, Kind, random_model
from tests.oracles.reference import generate
from tests.oracles.test_decode import TOKENS, ids, plain, run, steered
from tests.oracles.test_faster_steps import _Foretold, needs_compiler

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class _Rerun:
    """Stands in for a CUDA graph: runs the pass over the same tensors again."""

    def __init__(self, forward: Callable[[], torch.Tensor]) -> None:
        self._forward, self.replays = forward, 0
        self.logits = forward()

    def replay(self) -> None:
        self.replays += 1
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

    monkeypatch.setattr(StepGraphs, "_recording", record)
    monkeypatch.setattr(StepGraphs, "__init__", init)


def _kept(engine: Engine) -> Engine:
    """Let an engine keep its cache, and with it the graphs, from one answer to the next."""
    engine._kept_bytes = 2**30
    return engine


def _eager(engine: Engine) -> list[int]:
    """Return a list that will hold the rows of every step that no graph served."""
    rows: list[int] = []
    forward = engine._forward

    def counted(new: list[list[int]], starts: list[int], first: int, keep: object) -> torch.Tensor:
        if len(new[0]) == 1:
            rows.append(len(new))
        return forward(new, starts, first, keep)  # type: ignore[arg-type]

    engine._forward = counted  # type: ignore[assignment, method-assign]
    return rows


@pytest.mark.parametrize("kind", KINDS)
def test_recorded_steps_decode_what_transformers_does(kind: Kind) -> None:
    """Rows in number and length as they come: level or not, with spare ones, joining, leaving."""
    model = random_model(kind, dtype=torch.float64).to(DEVICE)
    rng = random.Random(kind)
    engine = _kept(Engine(model))
    eager = _eager(engine)
    for lengths in ((40,), (20, 33, 64), (30, 9)):
        prompts = [ids(rng, length) for length in lengths]
        pair = [ids(rng, 50), ids(rng, 17)]
        generations = [plain(prompt) for prompt in prompts] + [steered(*pair, 2.0)]
        run(engine, generations)
        for prompt, generation in zip(prompts, generations, strict=False):
            assert generation.token_ids == generate(model, prompt, TOKENS)
        guided = generate(model, pair[0], TOKENS, base=pair[1], strength=2.0)
        assert generations[-1].token_ids == guided
    assert len(eager) <= len(engine._graphs._asked), "a step ran without its graph"


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_layers_are_compiled_once_for_all(kind: Kind) -> None:
    model = random_model(kind, dtype=torch.float64).to(DEVICE)
    rng = random.Random(kind)
    engine = Engine(model, compile=True)
    engine._compiled._by_layer = True
    for lengths in ((40,), (20, 33, 64)):
        prompts = [ids(rng, length) for length in lengths]
        generations = [plain(prompt) for prompt in prompts]
        run(engine, generations)
        for prompt, generation in zip(prompts, generations, strict=True):
            assert generation.token_ids == generate(model, prompt, TOKENS)
    assert not engine._compiled.broken
    assert all(shape[2] for shape in engine._graphs._graphs)
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_graphs_are_made_anew_when_the_cache_grows() -> None:
    model = random_model("llama", dtype=torch.float64).to(DEVICE)
    prompt = ids(random.Random(1), GPU_COLUMN_STEP - TOKENS - 10)
    engine = _kept(Engine(model))
    generation = plain(prompt)
    run(engine, [generation])
    (first,) = engine._graphs._graphs.values()
    had = engine._cache.capacity[1]
    longer = plain(prompt + generation.token_ids[:40])
    run(engine, [longer])
    (second,) = engine._graphs._graphs.values()
    assert longer.token_ids == generate(model, longer.prompts[0], TOKENS)
    assert second is not first
    assert engine._cache.capacity[1] > had


def test_a_changed_model_is_recorded_anew() -> None:
    model = random_model("llama", dtype=torch.float64).to(DEVICE)
    prompt = ids(random.Random(2), 30)
    engine = _kept(Engine(model))
    before, after = plain(prompt), plain(prompt)
    run(engine, [before])
    model.lm_head = torch.nn.Linear(64, 320, bias=False, dtype=torch.float64, device=DEVICE)
    torch.nn.init.normal_(model.lm_head.weight, generator=torch.Generator(DEVICE).manual_seed(0))
    run(engine, [after])
    assert before.token_ids != after.token_ids == generate(model, prompt, TOKENS)


def test_hooks_run_at_every_step(caplog: pytest.LogCaptureFixture) -> None:
    model = random_model("llama", dtype=torch.float64).to(DEVICE)
    prompt = ids(random.Random(3), 30)
    engine = _kept(Engine(model))
    first, second = plain(prompt), plain(prompt)
    run(engine, [first])
    calls: list[int] = []
    model.model.layers[1].register_forward_hook(lambda *_: calls.append(1))
    caplog.set_level(logging.INFO, "amulet")
    run(engine, [second])
    run(engine, [plain(prompt)])
    (line,) = [text for text in caplog.messages if "CUDA graphs" in text]
    assert "hooks" in line
    del calls[len(second.token_ids) :]
    assert second.token_ids == first.token_ids
    assert len(calls) == len(second.token_ids)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_checks_of_drafts_are_recorded(kind: Kind) -> None:
    model = random_model(kind, dtype=torch.float64).to(DEVICE)
    prompt, base = ids(random.Random(4), 40), ids(random.Random(5), 23)
    expected = generate(model, prompt, TOKENS, base=base, strength=2.0)
    engine = Engine(model, drafts=True)
    pair = steered(prompt, base, 2.0)
    pair.draft = _Foretold(expected, 0)
    run(engine, [pair])
    assert pair.token_ids == expected
    assert any(shape[1] > 1 for shape in engine._graphs._graphs)


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
    engine = Engine(model)
    for _ in range(2):
        generation = plain(prompt)
        run(engine, [generation])
        assert generation.token_ids == expected
    assert not engine._graphs.serves
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
    engine = Engine(model)
    run(engine, [generation])
    assert not engine._graphs._graphs
    assert generation.token_ids == generate(model, generation.prompts[0], TOKENS)
    assert sum("adapter" in text for text in caplog.messages) == 1
