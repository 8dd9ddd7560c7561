"""Prints the tables of docs/scaling.md as Markdown: `python -m amulet.plan.tables`."""

from __future__ import annotations

from amulet.plan.costs import Work, amulet_bytes, law, vllm_block_bytes, vllm_blocks
from amulet.plan.shapes import BYTES, find_shape

MODELS = ("llama-3.2-1b", "llama-3.1-8b", "llama-3.1-70b")
USERS = (1, 8, 32, 128)
LENGTHS = (512, 2048, 8192)
DTYPE = "bfloat16"


def law_table() -> str:
    """Return the ratio of a steered step's time to a plain one's, by users and length."""
    head = [f"{tokens} tokens" for tokens in LENGTHS]
    lines = ["| model | users at once | " + " | ".join(head) + " |", "|---" * 5 + "|"]
    for name in MODELS:
        shape = find_shape(name)
        weights, token = shape.read * BYTES[DTYPE], shape.token(DTYPE)
        for users in USERS:
            cells = [f"{law(weights, token * tokens, users):.2f}" for tokens in LENGTHS]
            lines.append(f"| {name} | {users} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def shape_table() -> str:
    """Return the figures that the ratio depends on."""
    lines = ["| model | parameters | W, GiB | per token and row, KiB |", "|---|---|---|---|"]
    for name in MODELS:
        shape = find_shape(name)
        weights = shape.read * BYTES[DTYPE] / 2**30
        lines.append(
            f"| {name} | {shape.parameters / 1e9:.2f} B | {weights:.2f} "
            f"| {shape.token(DTYPE) / 2**10:g} |"
        )
    return "\n".join(lines)


def pair_table() -> str:
    """Return the size of a user's KV cache in MiB, plain and steered."""
    prompt, answer = 1800, 200
    works = (
        ("plain", Work(prompt, answer, 0)),
        ("steered, `system`: nothing shared", Work(prompt, answer)),
        ("steered, `user`: 1,780 tokens shared", Work(prompt, answer, shared=1780)),
        ("three preferences, `user`", Work(prompt, answer, 3, shared=1780)),
        ("one, `user`, without focus", Work(prompt, answer, shared=1780, alone=0)),
    )
    lines = [
        "| " + " | ".join(["", *(f"{name}, vLLM | {name}, Amulet" for name in MODELS[:2])]) + " |",
        "|---" * 5 + "|",
    ]
    for label, work in works:
        cells = []
        for name in MODELS[:2]:
            shape = find_shape(name)
            vllm = vllm_blocks(work) * vllm_block_bytes(shape, DTYPE) / 2**20
            cells += [f"{vllm:.0f}", f"{amulet_bytes(shape, DTYPE, work, 1) / 2**20:.0f}"]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


TABLES = {"shapes": shape_table, "law": law_table, "pair": pair_table}

if __name__ == "__main__":
    for make in TABLES.values():
        print(make(), end="\n\n")
