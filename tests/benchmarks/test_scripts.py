"""Every benchmark script runs, on a tiny random model, and states its claims in its last line."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers.utils import logging

from amulet.backends.transformers.cpu import native
from benchmarks import all as all_scripts
from benchmarks import (
    authors,
    contenders,
    decode,
    first_token,
    gpu,
    gpu_check,
    lengths,
    llamacpp,
    measure,
    rag_quote,
    served,
    shared,
    startup,
    users,
)
from benchmarks.measure import Claim, Spread, Times
from benchmarks.passages import passages, rag_chat

CLAIMS: list[tuple[ModuleType, list[tuple[str, str]]]] = [
    (
        decode,
        [
            ("tiny, bfloat16, per token: steered / plain `generate`", "≤ 1.03"),
            ("tiny, bfloat16, per token: guidance / steered", "≥ 1.9"),
            ("tiny, bfloat16, per token: steered, not packed, two rows / guidance", "≤ 1.05"),
            ("tiny, bfloat16, per token: steered, int8 / plain", "shown"),
            ("tiny, bfloat16, per token: steered, int4 / plain", "shown"),
        ],
    ),
    (
        authors,
        [
            (
                "tiny, float32, 4 tokens after 96: the authors' code (from 4 positions) / steered",
                "≥ 25",
            )
        ],
    ),
    (
        rag_quote,
        [
            (f"tiny, bfloat16, whole answer, 160 tokens, {what}", bound)
            for what, bound in (
                ("that quotes: steered / plain `generate`", "≤ 0.6"),
                ("that quotes: without drafts / plain", "shown"),
                ("that quotes: steered / its lookup", "shown"),
                ("in own words: steered / plain", "shown"),
            )
        ],
    ),
    (
        first_token,
        [
            (f"tiny, bfloat16, first token{what}", bound)
            for what, bound in (
                (", 256 tokens: steered in the user's turn / plain", "≤ 1.08"),
                (", 256 tokens: the same / our own plain", "shown"),
                (", 256 tokens: steered in the system message / plain", "shown"),
                (" of a second turn (system), 192 tokens of history: kept / cold", "≤ 0.15"),
                (" of a second turn (user), 192 tokens of history: kept / cold", "≤ 0.15"),
            )
        ],
    ),
    (
        users,
        [
            (f"tiny, bfloat16, tokens per second: {what}", bound)
            for what, bound in (
                ("eight steered users together / eight plain in turn", "≥ 5"),
                ("the same, questions without passages", "shown"),
                ("ChatAmulet.batch, eight steered / ChatHuggingFace.batch, plain", "≥ 4"),
                ("AmuletLLM, one steered / HuggingFaceLLM, plain", "shown"),
            )
        ],
    ),
    (
        shared,
        [
            (f"tiny, bfloat16, {what}", bound)
            for what, bound in (
                ("200 shared tokens: KV cache, steered, two rows / plain", "≤ 1.1"),
                ("200 shared tokens: KV cache, steered, default / plain", "≤ 1.1"),
                ("400 tokens: attention, steered, two rows / plain", "≤ 1.1"),
                ("400 tokens: attention, steered, default / plain", "shown"),
                ("400 tokens: whole token, steered, two rows / plain", "shown"),
                ("400 tokens: whole token, steered, default / plain", "shown"),
                (
                    "eight users, 150 tokens each: tokens per second, steered, two rows / plain",
                    "≥ 0.85",
                ),
                (
                    "eight users, 150 tokens each: tokens per second, steered, default / plain",
                    "shown",
                ),
            )
        ],
    ),
    (
        lengths,
        [
            (f"{name}, bfloat16: {what}", "shown")
            for name in ("Llama", "Gemma 3")
            for what in ("1 row of 200 / 1 row of 100", "2 rows of 200 / 1 row of 200")
            if native.library() is not None
        ],
    ),
    (
        served,
        [
            (
                "smollm2, bfloat16, tokens per second of 16 steered users: amulet serve / batch",
                "≥ 0.9",
            )
        ],
    ),
    (
        gpu,
        [
            ("tiny, bfloat16, cpu, per token: amulet steered / own plain", "≤ 1.03"),
            ("tiny, bfloat16, cpu, per token: amulet steered / plain `generate`", "≤ 0.5"),
            ("tiny, bfloat16, cpu, per token: share of bandwidth, amulet steered", "≥ 0.6"),
            ("tiny, bfloat16, cpu, per token: plain `generate` / amulet steered", "shown"),
            ("tiny, bfloat16, cpu, per token: guidance / amulet steered", "shown"),
            ("tiny: first token: amulet steered / plain `generate`", "shown"),
            ("tiny: 4 steered users, prefill included", "shown"),
            ("tiny: the same, decoding alone", "shown"),
        ],
    ),
]


@pytest.fixture(autouse=True)
def _apart(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No GPU; and what the scripts silence is loud again for other tests."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    verbosity = logging.get_verbosity()
    yield
    logging.set_verbosity(verbosity)


# What the peers themselves warn of is not ours to fix.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("script", "claims"), [pytest.param(s, c, id=s.__name__.split(".")[1]) for s, c in CLAIMS]
)
@pytest.mark.allow_hosts(["127.0.0.1"])  # a server on a loopback port
def test_a_script_runs(
    script: Any, claims: list[tuple[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    result = script.main(["--quick"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    assert result["benchmark"] == script.__name__.split(".")[1]
    assert [(claim["claim"], claim["bound"]) for claim in result["claims"]] == claims
    assert result["machine"]["torch"] == torch.__version__


def test_the_authors_tokens_are_ours() -> None:
    result = authors.main(["--quick", "--full", "--tokens", "6"])
    assert result["float32"]["tokens_agreed"] == 6
    assert not result["extrapolated"]


def test_llama_cpp_runs_in_an_environment_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "llama_cpp.py").write_text(
        "import itertools\n"
        "__version__ = 'double'\n"
        "llama_print_system_info = lambda: b'no instructions'\n"
        "class Llama:\n"
        "    def __init__(self, path, **options): pass\n"
        "    def reset(self): pass\n"
        "    def generate(self, ids, temp): return itertools.count()\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    result = llamacpp.main(["--quick", "--python", sys.executable])
    assert result["llamacpp"]["version"] == "double"
    assert result["llamacpp"]["system"] == "no instructions"
    assert [claim["bound"] for claim in result["claims"]] == ["shown", "shown", "shown", "≤ 1.6"]


def test_start_up_is_measured_in_fresh_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert startup.fresh(startup.IMPORT)["torch"] is False

    def canned(script: str, *arguments: str) -> dict[str, Any]:
        if script is startup.MEMORY:
            assert arguments[:4] == ("tiny", "float32", "128", "4")
            kept = arguments[4] != "0"
            return {"taken_mib": 30.0 if kept else 21.0, "two_caches_mib": 20.0, "weights_mib": 1.0}
        return {"import_s": 0.1, "torch": False, "ready_s": 3.0, "answer_s": 3.5}

    monkeypatch.setattr(startup, "fresh", canned)
    monkeypatch.setattr(sys, "platform", "linux")
    claims = startup.main(["--quick"])["claims"]
    assert [(claim["bound"], claim["median"], claim["met"]) for claim in claims] == [
        ("≤ 0.2 s", 0.1, True),
        ("≤ 4 s", 3.0, True),
        ("shown", 3.5, None),
        ("≤ 1.1", 1.05, True),
        ("shown", 1.5, None),
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_memory_of_a_request_is_measured() -> None:
    found = startup.fresh(startup.MEMORY, "tiny", "float32", "128", "4", "0")
    tokens = len(
        contenders.tokenizer().apply_chat_template(  # type: ignore[arg-type]
            rag_chat(contenders.tokenizer(), 128, "Which is the oldest?"),
            add_generation_prompt=True,
        )["input_ids"]
    )
    row = 2 * 2 * 2 * 16 * 4 * (tokens + 4)  # layers, keys and values, heads, width, bytes
    assert found["two_caches_mib"] == 2 * row / 2**20
    assert found["weights_mib"] > 100


def test_all_gathers_the_claims_and_names_what_failed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    claim = {"claim": "a / b", "bound": "≤ 1", "unit": "", "met": False}
    result = {"claims": [{**claim, "median": 2.0, "least": 1.5, "most": 2.5}]}

    def run(arguments: list[str]) -> dict[str, Any] | None:
        assert arguments in (["decode", "--quick"], ["users", "--quick"])
        return result if arguments[0] == "decode" else None

    monkeypatch.setattr(all_scripts, "run", run)
    summary = all_scripts.main(["--quick", "--only", "decode", "--only", "users"])
    assert summary == {"results": {"decode": result}, "failed": ["users"]}
    assert "| a / b | ≤ 1 | 2 | 1.5 to 2.5 | no |" in capsys.readouterr().out.splitlines()


def test_without_a_gpu_the_gpu_script_says_so() -> None:
    with pytest.raises(SystemExit, match="There is no CUDA GPU; --quick runs a tiny shape"):
        gpu.main([])


def test_positions_between_timed_ones_lie_on_a_line() -> None:
    places = authors.spread_places(4, 10)
    assert places == [0, 3, 6, 9]
    assert authors.integrate(places, [1.0 + place for place in places]) == pytest.approx(55.0)
    assert authors.spread_places(12, 3) == [0, 1, 2]


def test_how_much_of_an_answer_is_quoted() -> None:
    prompt = list(range(20))
    assert rag_quote.quoted_share(prompt[3:13], prompt) == 1.0
    assert rag_quote.quoted_share([*prompt[3:11], 99], prompt) == 0.5
    assert rag_quote.quoted_share([1, 2], prompt) == 0.0


def test_a_claim_is_judged_by_its_median() -> None:
    spread = Spread.of([3.0, 1.0, 2.0])
    assert spread == Spread(2.0, 1.0, 3.0)
    assert Claim("", 2.0, spread).met is True
    assert Claim("", 2.1, spread, at_most=False).met is False
    assert Claim("", None, spread).met is None
    assert measure.at_least("", 2, [4.0, 9.0], [2.0, 3.0]).measured == Spread(2.5, 2.0, 3.0)
    assert Times([10.0], [2.0]).whole(4) == [16.0]


def test_contenders_take_turns_and_another_begins_each_round() -> None:
    order: list[tuple[str, int]] = []
    runs = {name: lambda turn, name=name: order.append((name, turn)) for name in "abc"}
    times = measure.in_turns(runs, 2)
    assert order == [("a", 0), ("b", 0), ("c", 0), ("b", 1), ("c", 1), ("a", 1)]
    assert {name: len(took) for name, took in times.items()} == {"a": 2, "b": 2, "c": 2}


def test_passages_have_the_length_that_is_wanted() -> None:
    tokenizer = contenders.tokenizer()
    text = passages(tokenizer, 500)
    assert 450 < len(tokenizer.encode(text)) <= 500
    assert text != passages(tokenizer, 500, seed=1)
    assert text.startswith("Passage 1. The ")


def test_sizes_are_those_of_the_shape() -> None:
    model = contenders.load("tiny", torch.float32)
    linear = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128) + 64 * 49152
    assert contenders.weight_bytes(model) == 4 * linear
    assert contenders.weight_bytes(model, 1) == linear
    assert contenders.cache_bytes(model.config, torch.bfloat16, 10) == 2 * 2 * 2 * 16 * 2 * 10


def test_a_check_that_fails_stops_no_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    claim = Claim("fast", 1.0, Spread.of([0.5]))
    result = {
        "claims": [
            {"claim": claim.text, "bound": claim.bound(), "unit": "", "met": True}
            | {"median": 0.5, "least": 0.5, "most": 0.5}
        ]
    }
    checks = [
        gpu_check.Check("slow", ["-c", "import time; print(7, flush=True); time.sleep(60)"], 5),
        gpu_check.Check("wrong", ["-c", "print('a | b'); raise SystemExit(3)"], 60),
        gpu_check.Check("right", ["-c", f"print('done'); print({json.dumps(result)!r})"], 60),
    ]
    monkeypatch.setattr(gpu_check, "QUICK", checks)
    summary = gpu_check.main(["--quick"])
    assert summary["failed"] == ["slow", "wrong"]
    outcomes = [found["outcome"] for found in summary["checks"]]
    assert outcomes == ["FAILED: not over after 5 s", "FAILED", "passed"]
    assert [found["said"] for found in summary["checks"]] == ["7", "a  b", "done"]
    assert "| fast | ≤ 1 | 0.5 | 0.5 to 0.5 | yes |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no CUDA GPU"):
        gpu_check.main([])
