"""Rows that can't always go on: which passes are shared, and which compute a row anew."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from amulet.backends.base import Backend
from tests.backends.test_contract import longrope, mamba

IDS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]


@contextmanager
def passes(backend: Backend) -> Iterator[list[tuple[int, ...]]]:
    """Yield the rows and widths of the model's passes in the block."""
    seen: list[tuple[int, ...]] = []

    def note(_: Any, args: Any, options: dict[str, Any]) -> None:
        seen.append(tuple(options["input_ids"].shape))

    hook = backend.model.register_forward_pre_hook(note, with_kwargs=True)
    with torch.inference_mode():
        yield seen
    hook.remove()


def test_a_row_is_computed_anew_where_its_rotary_embedding_changes() -> None:
    backend = longrope(8).backend
    backend.reserve(3, 32)
    with passes(backend) as seen:
        backend.forward([IDS[:6], IDS[2:8]], [0, 0], 0, [5])
        backend.forward([IDS], [0], 2, [11])
        backend.step([[1], [2], [3]], [6, 6, 12])  # two short rows, one long
        backend.step([[1], [2], [3]], [7, 7, 13])
        backend.step([[1], [2], [3]], [8, 8, 14])  # all are long now
        backend.step([[1], [2], [3]], [9, 9, 15])
    assert seen == [(2, 6), (1, 12), *[(2, 1), (1, 1)] * 2, (1, 9), (1, 9), (1, 1), (3, 1)]


def test_a_prompt_of_mamba_is_one_pass_and_a_few_ids_behind_it_one_by_one() -> None:
    subject = mamba()
    backend, prompt = subject.backend, IDS * 3
    backend.reserve(2, 64)
    with passes(backend) as seen:
        backend.forward([prompt, prompt], [0, 0], 0, [35])
        found = backend.forward([IDS[:9], IDS[3:]], [36, 36], 0, [4, 8])
        again = backend.forward([IDS], [45], 0, [11])
    assert seen == [(2, 36), *[(2, 1)] * 9, (1, 57)]
    subject.close(found[:, 1], [*prompt, *IDS[:9]], [*prompt, *IDS[3:]])
    subject.close(found[:, 0], [*prompt, *IDS[:5]], [*prompt, *IDS[3:8]])
    subject.close(again[:, 0], [*prompt, *IDS[:9], *IDS])
