"""The command `amulet plan`: prints the figures of `make_plan` as a table."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from amulet.console import readable_errors
from amulet.errors import RequestError

if TYPE_CHECKING:
    from amulet.plan.layout import Layout, Plan

Config = Annotated[
    str,
    typer.Option(
        "--model-config",
        "-m",
        metavar="PATH",
        help="config.json, model folder, hub id, or a known name, e.g. llama-3.1-8b.",
    ),
]
GpuName = Annotated[
    str | None, typer.Option(metavar="NAME", help="GPU, e.g. H100, L40S or RTX 4090.")
]
Memory = Annotated[
    float | None, typer.Option(metavar="GB", help="Memory of one GPU, instead of --gpu.")
]
Users = Annotated[int, typer.Option(help="Users whose answers are decoded at the same time.")]
Prompt = Annotated[
    int, typer.Option(metavar="TOKENS", help="Length of the prompt, without preferences.")
]
AnswerTokens = Annotated[
    int, typer.Option("--answer", metavar="TOKENS", help="Length of the answer.")
]
Preferences = Annotated[int, typer.Option(help="Preferences per user; 0 is plain decoding.")]
PreferenceTokens = Annotated[int, typer.Option(metavar="TOKENS", help="Length of a preference.")]
Shared = Annotated[
    int,
    typer.Option(
        metavar="TOKENS",
        help="Tokens of the prompt before the preference; with placement `user`, nearly all.",
    ),
]
Alone = Annotated[
    int,
    typer.Option(
        metavar="TOKENS",
        help="Length of the focus row, which reads only preferences; 0 turns focus off.",
    ),
]
DType = Annotated[str, typer.Option(help="auto (as saved), float32, bfloat16 or float16.")]
Utilization = Annotated[
    float, typer.Option(help="Share of the memory for weights and KV cache, 0 to 1.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")]


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command("plan")(plan_command)


def plan_command(
    model_config: Config,
    users: Users,
    gpu: GpuName = None,
    memory: Memory = None,
    prompt: Prompt = 1024,
    answer: AnswerTokens = 256,
    preferences: Preferences = 1,
    preference_tokens: PreferenceTokens = 16,
    shared: Shared = 0,
    alone: Alone = 48,
    dtype: DType = "auto",
    utilization: Utilization = 0.9,
    as_json: AsJson = False,
) -> None:
    """Estimate how many GPUs a number of steered users need, and what steering costs."""
    with readable_errors():
        from amulet.plan.costs import Work
        from amulet.plan.gpus import Gpu, find_gpu
        from amulet.plan.layout import make_plan
        from amulet.plan.shapes import find_shape

        if (gpu is None) == (memory is None):
            raise RequestError("Give either --gpu NAME or --memory GB.")
        if memory is not None and not 0 < memory < math.inf:
            raise RequestError(f"memory={memory:g}: expected a finite number of GB, above 0.")
        device = find_gpu(gpu) if gpu is not None else Gpu("", (memory or 0) * 2**30)
        work = Work(prompt, answer, preferences, preference_tokens, shared, alone)
        plan = make_plan(
            find_shape(model_config), device, users, work, dtype=dtype, utilization=utilization
        )
    if as_json:
        print(json.dumps(plan.as_dict()))
    else:
        show(plan, model_config, Console())


def show(plan: Plan, model: str, console: Console) -> None:
    """Print a plan as tables and advice."""
    shape, gpu, work = plan.shape, plan.gpu, plan.work
    console.print(
        f"[b]{shape.name}[/b] {plan.dtype}: {_count(shape.parameters)} parameters, "
        f"{_gib(plan.weights)} of weights, {plan.token / 2**10:g} KiB of cache per token and row"
    )
    console.print(
        f"[b]{plan.users} users[/b], each {work.prompt} + {work.answer} tokens, "
        f"{work.preferences} preference{'' if work.preferences == 1 else 's'} of "
        f"{work.preference_tokens} tokens, {work.shared} tokens shared; "
        f"{gpu.name or 'GPU'} of {_gib(gpu.memory)}, {plan.utilization:.0%} of it used\n"
    )
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("", "vLLM, plain", "vLLM, steered", "amulet serve, steered"):
        table.add_column(title, justify="left" if not title else "right")
    layouts = (plan.vllm_plain, plan.vllm, plan.amulet)
    blocks = (str(plan.plain_blocks), str(plan.blocks), "")
    table.add_row("blocks of cache per user", *blocks)
    table.add_row("users that one model holds", *(_cell(lay, str(lay.fits)) for lay in layouts))
    table.add_row("GPUs per model", *(_cell(lay, str(lay.parts)) for lay in layouts))
    table.add_row("models", *(_cell(lay, str(lay.copies)) for lay in layouts))
    table.add_row("[b]GPUs[/b]", *(_cell(lay, f"[b]{lay.gpus}[/b]") for lay in layouts))
    table.add_row("nodes of 8 GPUs", *(_cell(lay, str(lay.nodes)) for lay in layouts))
    table.add_row("users per model", *(_cell(lay, str(lay.users)) for lay in layouts))
    table.add_row("their cache, per GPU", *(_cell(lay, _gib(lay.cache)) for lay in layouts))
    if gpu.bandwidth is not None:
        table.add_row("ms per token, at best", *(_cell(lay, _ms(lay)) for lay in layouts))
    console.print(table)
    for line in advice(plan, model):
        console.print(line, style=None if line.startswith(" ") else "dim", soft_wrap=True)


def advice(plan: Plan, model: str) -> list[str]:
    """Return the commands to run, as lines."""
    from amulet.plan.shapes import KNOWN

    lines = [""]
    model = "MODEL" if model.lower() in KNOWN else model
    if plan.work.preferences:
        lines.append(
            f"A steered step reads {plan.steered_over_plain:.2f} times as many bytes as a plain "
            "step for as many users."
        )
    if not plan.vllm.fits:
        lines.append("Not even one user fits on 8 such GPUs: use larger GPUs or a smaller model.")
        return lines
    if plan.amulet.fits and plan.amulet.copies == 1:
        rows = plan.amulet.users * len(plan.work.rows)
        lines.append("One process with Amulet's own engine is enough:")
        lines.append(f"  amulet serve --model {model} --dtype {plan.dtype} --max-rows {rows}")
        return lines
    options = ""
    if plan.vllm.parts > 1:
        options += f" --tensor-parallel-size {plan.vllm.parts}"
    if plan.vllm.copies > 1:
        options += f" --data-parallel-size {plan.vllm.copies}"
    lines.append("With vLLM:")
    lines.append(f"  amulet serve --backend vllm --model {model} --dtype {plan.dtype}{options}")
    if plan.vllm.nodes > 1:
        lines.append(f"On {plan.vllm.nodes} nodes: see Amulet's documentation, Scaling.")
    return lines


def _cell(layout: Layout, text: str) -> str:
    return text if layout.fits else "–"


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.1f} MiB"


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.0f} M"


def _ms(layout: Layout) -> str:
    return f"{1e3 * (layout.step_seconds or 0):.2f}"
