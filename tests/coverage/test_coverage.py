"""Thirty of the families that people run are decoded exactly; `make coverage` runs all."""

from __future__ import annotations

import pytest

from tests.coverage.check import examine
from tests.coverage.models import entries
from tests.coverage.scan import page

# Model types, and which way they are decoded.
FAMILIES = {
    "bloom": "row after row",
    "cohere2": "in rows",
    "deepseek_v3": "in rows",
    "falcon_h1": "in rows",
    "gemma2": "in rows",
    "gemma3": "in rows",
    "gemma4": "in rows",
    "glm4": "in rows",
    "gpt2": "in rows",
    "gpt_neo": "row after row",
    "gpt_oss": "in rows",
    "granitemoehybrid": "in rows",
    "lfm2": "in rows",
    "llama": "in rows",
    "llama4_text": "in rows",
    "mamba": "row after row",
    "mamba2": "row after row",
    "mistral": "in rows",
    "mixtral": "in rows",
    "nemotron_h": "in rows",
    "olmo2": "in rows",
    "phi3": "in rows",
    "phi3:longrope": "row after row",
    "qwen2": "in rows",
    "qwen2_5_vl (image-text)": "in rows",
    "qwen3": "in rows",
    "qwen3_5": "in rows",
    "qwen3_moe": "in rows",
    "qwen3_next": "in rows",
    "recurrent_gemma": "row after row",
    "smollm3": "in rows",
}
BY_LABEL = {entry.label: entry for entry in entries()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("label", "way"), FAMILIES.items())
def test_a_family_is_decoded_exactly(label: str, way: str) -> None:
    result = examine(BY_LABEL[label])
    assert (result.verdict, result.way) == ("exact", way), result.note


@pytest.mark.filterwarnings("ignore")
def test_what_writes_by_diffusion_is_refused() -> None:
    result = examine(BY_LABEL["diffusion_gemma (image-text)"])
    assert result.verdict == "refused"
    assert "| diffusion_gemma (image-text) | refused |" in page([result])
