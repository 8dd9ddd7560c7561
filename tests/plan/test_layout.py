"""Plans: how many GPUs, what the command prints, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from amulet import RequestError
from amulet.cli import app
from amulet.plan.costs import Work, step_bytes
from amulet.plan.gpus import GPUS, Gpu, find_gpu
from amulet.plan.layout import make_plan
from amulet.plan.shapes import find_shape

PAIR = Work(1800, 200, shared=1776)


def run(*arguments: str, code: int = 0) -> str:
    found = CliRunner().invoke(app, ["plan", *arguments], env={"COLUMNS": "100"})
    assert found.exit_code == code, found.output
    return " ".join(found.output.split()) if code else found.output


def test_one_gpu_then_several_then_nodes() -> None:
    shape, gpu = find_shape("llama-3.1-8b"), find_gpu("H100")
    few = make_plan(shape, gpu, 10, PAIR)
    assert (few.vllm.parts, few.vllm.copies, few.vllm.nodes, few.vllm.gpus) == (1, 1, 1, 1)
    assert (few.amulet.gpus, few.amulet.users) == (1, 10)
    many = make_plan(shape, gpu, 3 * few.vllm.fits, PAIR)
    assert (many.vllm.parts, many.vllm.copies, many.vllm.users) == (1, 3, few.vllm.fits)
    crowd = make_plan(shape, gpu, 40 * few.vllm.fits, PAIR)
    assert 8 < crowd.vllm.gpus <= 40
    assert crowd.vllm.nodes == -(-crowd.vllm.gpus // 8)
    assert crowd.vllm.users <= crowd.vllm.fits
    assert crowd.vllm.users * crowd.vllm.copies >= crowd.users
    assert crowd.vllm_plain.gpus < crowd.vllm.gpus


def test_a_model_too_large_for_one_gpu_is_split() -> None:
    shape, gpu = find_shape("llama-3.1-70b"), find_gpu("h100")
    plan = make_plan(shape, gpu, 20, PAIR)
    assert plan.vllm.parts == 2
    assert shape.weights("bfloat16") > gpu.memory * 0.9
    assert plan.amulet.fits == 0  # one process has one GPU
    assert plan.vllm.cache + shape.weights("bfloat16") / 2 <= gpu.memory * 0.9
    assert plan.vllm.step_seconds == pytest.approx(
        step_bytes(shape, "bfloat16", PAIR, plan.vllm.users, 2) / 3350e9
    )
    assert make_plan(shape, find_gpu("T4"), 1, PAIR).vllm.gpus == 0


def test_splitting_wins_where_whole_models_leave_no_room() -> None:
    shape = find_shape("llama-3.1-8b")
    tight = Gpu("", shape.weights("bfloat16") / 0.9 + 2**30)
    plan = make_plan(shape, tight, 64, PAIR)
    assert plan.vllm.parts > 1
    alone = make_plan(shape, tight, 1, PAIR)
    assert (alone.vllm.parts, alone.vllm.copies) == (1, 1)


def test_the_cost_is_the_law() -> None:
    shape = find_shape("llama-3.1-8b")
    plan = make_plan(shape, find_gpu("H100"), 10, Work(1800, 400, preference_tokens=0, alone=0))
    weights, rows = shape.read * 2, 10 * 2000 * shape.token("bfloat16")
    assert plan.steered_over_plain == pytest.approx((weights + 2 * rows) / (weights + rows))
    assert make_plan(shape, find_gpu("H100"), 10, PAIR.plain).steered_over_plain == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"users": 0}, "users=0: expected 1 or more"),
        ({"dtype": "int8"}, "dtype='int8': expected auto, float32"),
        ({"utilization": 1.5}, "utilization=1.5"),
        ({"work": Work(131072, 1)}, "131089 tokens and the model's context window 131072"),
    ],
)
def test_what_is_refused(options: dict[str, object], words: str) -> None:
    given: dict[str, object] = {"users": 1, "work": PAIR, **options}
    with pytest.raises(RequestError, match=words):
        make_plan(find_shape("llama-3.1-8b"), find_gpu("H100"), **given)  # type: ignore[arg-type]


def test_gpus_by_name() -> None:
    assert find_gpu("nvidia a100-40gb") == GPUS["A100 40GB"]
    assert find_gpu("rtx 4090").memory == 24 * 2**30
    with pytest.raises(RequestError, match=r"gpu='H900': expected one of T4.*give --memory GB"):
        find_gpu("H900")


def test_the_command_prints_a_table_and_what_to_start() -> None:
    shown = run("-m", "llama-3.1-8b", "--gpu", "H100", "--users", "20", "--shared", "1000")
    assert "8.03 B parameters, 15.0 GiB of weights, 128 KiB of cache per token and row" in (
        " ".join(shown.split())
    )
    assert "amulet serve --model MODEL --dtype bfloat16 --max-rows 60" in shown
    assert "ms per token, at best" in shown
    split = run("-m", "llama-3.1-70b", "--gpu", "H100", "--users", "2000")
    assert "--backend vllm --model MODEL --dtype bfloat16 --tensor-parallel-size" in split
    assert "nodes: see Amulet's documentation, Scaling." in split
    none = run("-m", "llama-3.1-70b", "--memory", "8", "--users", "1", "--preferences", "0")
    assert "Not even one user fits on 8 such GPUs" in none
    assert "ms per token" not in none


def test_the_command_gives_json(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "model_type": "llama",
                "hidden_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "vocab_size": 100,
                "intermediate_size": 128,
            }
        )
    )
    plan = json.loads(run("-m", str(tmp_path), "--memory", "1", "--users", "4", "--json"))
    assert plan["token"] == 2 * 2 * 2 * 16 * 2
    assert plan["gpu"]["memory"] == 2**30
    assert (plan["vllm"]["gpus"], plan["vllm"]["step_seconds"]) == (1, None)
    assert plan["work"]["preferences"] == 1


def test_errors_are_one_line_and_where_to_read_on() -> None:
    more = f"More: {RequestError.help_page}"
    both = run("-m", "llama-3.1-8b", "--users", "1", code=1)
    assert both == f"error: Give either --gpu NAME or --memory GB. {more}"
    named = run("-m", "llama", "--users", "1", "--gpu", "H100", code=1)
    assert named.startswith("error: model-config='llama': no such file or folder; known names")
    small = run("-m", "llama-3.1-8b", "--users", "1", "--memory", "0", code=1)
    assert small == f"error: memory=0: expected a finite number of GB, above 0. {more}"
    endless = run("-m", "llama-3.1-8b", "--users", "1", "--memory", "inf", code=1)
    assert endless == f"error: memory=inf: expected a finite number of GB, above 0. {more}"
