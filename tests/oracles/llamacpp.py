"""What llama.cpp itself gives: a fresh context for every question, and its own greedy sampler."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from amulet.backends.llamacpp.model import KV_TYPES, GGUFModel


@contextmanager
def context(model: GGUFModel, tokens: int) -> Iterator[Any]:
    """Yield a new context with room for so many tokens of one sequence."""
    lib = model.lib
    parameters = lib.llama_context_default_params()
    parameters.n_ctx = parameters.n_batch = tokens
    parameters.n_threads = parameters.n_threads_batch = 1
    parameters.type_k = parameters.type_v = KV_TYPES[model.kv_type]
    if model.kv_type == "f32":
        parameters.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
    pointer = lib.llama_init_from_model(model.pointer, parameters)
    assert pointer
    try:
        yield pointer
    finally:
        lib.llama_free(pointer)


def decode(model: GGUFModel, pointer: Any, ids: Sequence[int]) -> torch.Tensor:
    """Append ids to a context; return the logits after the last one, `[vocab]`."""
    lib, count = model.lib, len(ids)
    array = (ctypes.c_int32 * count)(*ids)  # which the batch points into
    assert lib.llama_decode(pointer, lib.llama_batch_get_one(array, count)) == 0
    last = lib.llama_get_logits_ith(pointer, -1)
    return torch.from_numpy(np.ctypeslib.as_array(last, (model.vocab_size,)).copy())


def logits(model: GGUFModel, ids: Sequence[int]) -> torch.Tensor:
    """Return the logits `[vocab]` after some ids, which a fresh context computes in one pass."""
    with context(model, max(len(ids), 32)) as pointer:
        return decode(model, pointer, ids)


def greedy(model: GGUFModel, prompt: Sequence[int], tokens: int) -> list[int]:
    """Return what llama.cpp's own greedy sampler continues a prompt with, up to an ending id."""
    lib = model.lib
    found: list[int] = []
    sampler = lib.llama_sampler_init_greedy()
    with context(model, len(prompt) + tokens) as pointer:
        new = list(prompt)
        while len(found) < tokens:
            decode(model, pointer, new)
            new = [lib.llama_sampler_sample(sampler, pointer, -1)]
            found += new
            if lib.llama_vocab_is_eog(model.vocab, new[0]):
                break
    lib.llama_sampler_free(sampler)
    return found


def steered(
    model: GGUFModel, preferred: Sequence[int], base: Sequence[int], strength: float, tokens: int
) -> list[int]:
    """Return the likeliest tokens of `r + (1 + g)·(p − r)`, each row in a context of its own."""
    found: list[int] = []
    room = max(len(preferred), len(base)) + tokens
    with context(model, room) as one, context(model, room) as other:
        p, r = decode(model, one, preferred), decode(model, other, base)
        while True:
            p, r = p.double().log_softmax(-1), r.double().log_softmax(-1)
            found.append(int((r + (1 + strength) * (p - r)).argmax()))
            if len(found) == tokens or model.lib.llama_vocab_is_eog(model.vocab, found[-1]):
                return found
            p, r = decode(model, one, found[-1:]), decode(model, other, found[-1:])
