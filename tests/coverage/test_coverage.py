"""Some thirty of the families that people run are decoded exactly; `make coverage` runs all."""

from __future__ import annotations

import pytest

from tests.coverage.check import BASE, PREFERRED, Result, examine, generate, told
from tests.coverage.models import build, entries
from tests.coverage.scan import page

# Model types, and which way they are decoded.
FAMILIES = {
    "bloom": "row after row",
    "cohere2": "in rows",
    "deepseek_v3": "in rows",
    "deepseek_v32": "in rows",
    "falcon_h1": "in rows",
    "gemma2": "in rows",
    "gemma3": "in rows",
    "gemma4": "in rows",
    "glm4": "in rows",
    "gpt2": "in rows",
    "gpt_neo": "row after row",
    "gpt_oss": "in rows",
    "granitemoehybrid": "in rows",
    "jamba": "in rows",
    "lfm2": "in rows",
    "llama": "in rows",
    "llama4_text": "in rows",
    "mamba": "in rows",
    "mamba2": "in rows",
    "mistral": "in rows",
    "mistral_large4 (image-text)": "in rows",
    "mixtral": "in rows",
    "nemotron_h": "in rows",
    "olmo2": "in rows",
    "phi3": "in rows",
    "phi3:longrope": "in rows",
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
@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("diffusion_gemma", "no model that Transformers' generate decodes token by token"),
        ("blip", "blip reads an image with every text"),
        ("kosmos-2", "kosmos-2 reads an image with every text"),
    ],
)
def test_what_does_not_continue_a_text_is_refused(kind: str, why: str) -> None:
    label = f"{kind} (image-text)"
    result = examine(BY_LABEL[label])
    assert result.verdict == "refused"
    assert why in result.note
    assert f"| {label} | refused |" in page([result])


def test_a_guess_changes_no_answer() -> None:
    model, prompts = build(BY_LABEL["llama"]).double(), [PREFERRED, BASE]
    right = told(model, prompts, [])
    wrong = [*right[:5], (right[5] + 1) % 256, *right[6:]]
    assert right == told(model, prompts, right) == told(model, prompts, wrong)
    assert right == generate(model, prompts)


def test_the_page_says_what_was_not_compared_and_why() -> None:
    results = [
        Result("b", "exact", "in rows", "full attention"),
        Result("c", "no reference", note="OSError: no `/tmp/x/y` at 0x7f01"),
        Result("a", "exact", "row after row", "recurrent", "it has states"),
        Result("d", "exact", "row after row", "recurrent", "it has states"),
    ]
    written = page(results)
    assert written.index("| a | the same | row after row | recurrent |") < written.index("| b |")
    assert "\n## Why row after row\n\n- it has states: a, d\n\n## Not compared\n" in written
    assert written.endswith("- c: `OSError: no '…y' at …`\n")
    assert "| c |" not in written
    assert "The same tokens: 3 (1 in rows, 2 row after row)" in written
