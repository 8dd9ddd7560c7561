"""Fixtures that every test can take: the byte tokenizer, and SmolLM2 loaded once."""

from __future__ import annotations

import gc
import os
import signal
from contextlib import suppress
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from amulet import Amulet, Request
from amulet.prepare import Preparer
from tests.models import byte_tokenizer

with suppress(ImportError):  # the environment of vLLM's tests goes without Hypothesis
    from hypothesis import settings

    # A busy machine is slow, and nothing here measures time. The draws are the same at every run:
    # what somebody's change breaks fails at once, and nothing else. `make test-random` searches on.
    settings.register_profile("fixed", deadline=None, derandomize=True)
    settings.register_profile("random", deadline=None, max_examples=2000)
    settings.load_profile("fixed")


def pytest_configure() -> None:
    """Hear Ctrl-C, which a shell has ignored in what it starts in the background."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Let the garbage collector pass over what was imported, or each collection takes .3 s."""
    gc.collect()
    gc.freeze()


def pytest_report_header() -> list[str]:
    """Say whether the C code is tested here: many tests are left out where it can't be."""
    from amulet.backends.transformers.cpu import native

    found = native.reason()
    return [f"C code: {'not tested here, ' + found if found else 'compiled, and tested'}"]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens, ChatML as template; see `tests.models`."""
    return byte_tokenizer()


@pytest.fixture(scope="session")
def smollm() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct in float32 on the CPU as Transformers has it, and its tokenizer."""
    from amulet.models.embedded import load_embedded

    model, tokenizer = load_embedded(dtype=torch.float32, pack=False)
    return model, tokenizer


@pytest.fixture(scope="session")
def packed_smollm() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The same as `Amulet.embedded()` loads it: its weights are packed, which is twice as fast."""
    from amulet.models.embedded import load_embedded

    model, tokenizer = load_embedded(dtype=torch.float32)
    return model, tokenizer


@pytest.fixture
def embedded(
    packed_smollm: tuple[PreTrainedModel, PreTrainedTokenizerBase], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Let `Amulet.embedded()` find the model loaded, once for all tests."""

    def load(cls: type[Amulet], dtype: str = "", **options: Any) -> Amulet:
        return cls(*packed_smollm, **options)

    monkeypatch.setattr(Amulet, "embedded", classmethod(load))


@pytest.fixture
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut answers to eight tokens, but for those whose form is given: they would be broken."""
    limit = Preparer._limit

    def short(self: Preparer, request: Request, prompt_tokens: int) -> int:
        is_whole = request.grammar is not None or request.tool_choice not in ("auto", "none")
        tokens: int = limit(self, request, prompt_tokens)
        return tokens if is_whole else min(tokens, 8)

    monkeypatch.setattr(Preparer, "_limit", short)
