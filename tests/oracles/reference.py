"""What Transformers itself gives: plain `generate`, and its classifier-free guidance."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel


def generate(
    model: PreTrainedModel,
    prompt: list[int],
    max_new_tokens: int,
    *,
    base: list[int] | None = None,
    strength: float | None = None,
    **options: object,
) -> list[int]:
    """Return the ids that `model.generate` decodes greedily after `prompt`.

    With `base` and `strength` it is guided: `guidance_scale = 1 + g`, the base prompt as the
    negative one.
    """
    guided: dict[str, object] = {}
    if base is not None and strength is not None:
        negative = torch.tensor([base], device=model.device)
        guided = {
            "guidance_scale": 1.0 + strength,
            "negative_prompt_ids": negative,
            "negative_prompt_attention_mask": torch.ones_like(negative),
        }
    ids = torch.tensor([prompt], device=model.device)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        **guided,
        **options,
    )
    return out[0, len(prompt) :].tolist()
